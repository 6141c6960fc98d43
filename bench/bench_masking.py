"""Masking operators against their reference, torch.compile of it, and a memcpy of the output.

    python bench/bench_masking.py [--threads 1] [--rounds 25] [--csv FILE]

Providers are timed in turn, one call each per round; medians are printed. "memcpy" copies as many bytes as the operator
writes (so it also reads them all, which selection need not). Operators write into a given buffer where they can.
"""

import argparse
import csv
import platform
import statistics
import sys
import time

import torch

from xaifast.ops.coalitions import sample_coalitions
from xaifast.ops.masking import blend_inputs, plan_selection
from xaifast.ops.tokens import compact_rows
from xaifast.reference import masking as reference
from xaifast.reference import tokens as reference_tokens


def patches(height, width, patch):
    rows, columns = torch.arange(height) // patch, torch.arange(width) // patch
    return rows[:, None] * -(-width // patch) + columns


def select_case(plan, bits):
    """Providers of one selection of all units."""
    units = plan.n_inputs * bits.shape[-2]
    arguments = (plan.x, bits, plan.index, plan.baseline, plan.rep, plan.unit, 0, units)
    out = plan.rows(bits)
    flat, source = out.view(units, plan.n_background, -1), torch.empty_like(out)

    def fill(out, *arguments):
        out.copy_(reference.select_rows(*arguments))

    compiled = torch.compile(fill, fullgraph=True)
    providers = {
        "xaifast": lambda: plan.rows(bits, 0, units, out=out),
        "xaifast, allocating": lambda: plan.rows(bits, 0, units),
        "reference": lambda: fill(flat, *arguments),
        "torch.compile": lambda: compiled(flat, *arguments),
        "memcpy": lambda: out.copy_(source),
    }
    return providers, out.numel() * out.element_size()


def image(dtype, per_pixel=False):
    players = torch.arange(224 * 224).reshape(224, 224) if per_pixel else patches(224, 224, 32)
    bits = sample_coalitions(49, 64)[0]
    if per_pixel:
        bits = torch.randint(-(2**63), 2**63 - 1, (64, 784))
    return select_case(plan_selection(torch.randn(1, 3, 224, 224), players, dtype=dtype), bits)


def tokens():
    players = torch.arange(197)[:, None] - 1
    plan = plan_selection(torch.randn(8, 197, 768, dtype=torch.bfloat16), players, torch.zeros(197, 768))
    return select_case(plan, sample_coalitions(196, 16)[0])


def table():
    plan = plan_selection(torch.randn(1, 30), background=torch.randn(100, 30))
    return select_case(plan, sample_coalitions(30, 128)[0])


def compact():
    """Half of 196 patches and the class token kept: 64 coalitions of one image."""
    x, index = torch.randn(1, 197, 768, dtype=torch.bfloat16), torch.arange(-1, 196, dtype=torch.int32)
    present = torch.rand(64, 196).argsort(1) < 98
    bits = torch.stack(
        [(present[:, w : w + 64].long() << torch.arange(min(64, 196 - w))).sum(1) for w in (0, 64, 128, 192)], 1
    )
    length = 99
    out = compact_rows(x, bits, index, length, 0, 64)
    source = torch.empty_like(out)
    gather = torch.cat((torch.zeros(64, 1, dtype=torch.long), 1 + present.nonzero()[:, 1].reshape(64, 98)), 1)
    compiled = torch.compile(reference_tokens.compact_rows, fullgraph=True)
    providers = {
        "xaifast": lambda: compact_rows(x, bits, index, length, 0, 64),
        "reference": lambda: reference_tokens.compact_rows(x, bits, index, length, 0, 64),
        "torch.compile": lambda: compiled(x, bits, index, length, 0, 64),
        "index gather, indices given": lambda: x[0][gather],
        "memcpy": lambda: out.copy_(source),
    }
    return providers, out.numel() * out.element_size()


def blend():
    x, masks, players = torch.randn(1, 3, 224, 224), torch.rand(32, 49), patches(224, 224, 32)
    compiled = torch.compile(blend_inputs, fullgraph=True)
    out = blend_inputs(x, masks, players)
    source = torch.empty_like(out)
    providers = {
        "xaifast": lambda: blend_inputs(x, masks, players),
        "reference": lambda: reference.blend_inputs(x, masks, players),
        "torch.compile": lambda: compiled(x, masks, players),
        "memcpy": lambda: out.copy_(source),
    }
    return providers, out.numel() * out.element_size()


CASES = {
    "select image 3x224x224 f32, 49 patches, 64 coalitions": lambda: image(torch.float32),
    "select image 3x224x224 bf16, 49 patches, 64 coalitions": lambda: image(torch.bfloat16),
    "select image 3x224x224 f32, a player per pixel, 64 coalitions": lambda: image(torch.float32, per_pixel=True),
    "select tokens 8x197x768 bf16, 16 coalitions": tokens,
    "select table 30 f32, 100 background rows, 128 coalitions": table,
    "compact tokens 197x768 bf16, 99 kept, 64 coalitions": compact,
    "blend image 3x224x224 f32, 49 patches, 32 masks": blend,
}


def median_times(providers, rounds):
    """Median seconds of one call of every provider, timed in turn."""
    times = {name: [] for name in providers}
    for _ in range(2):
        for call in providers.values():
            call()
    for _ in range(rounds):
        for name, call in providers.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--csv", help="append the rows to this file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for case, make in CASES.items():
            if options.only not in case:
                continue
            providers, size = make()
            times = median_times(providers, options.rounds)
            print(f"{case}: {size / 1e6:.1f} MB written")
            for name, seconds in times.items():
                share = times["memcpy"] / seconds
                print(f"  {name:28} {seconds * 1e3:9.3f} ms {size / seconds / 1e9:7.2f} GB/s  {share:5.2f} of memcpy")
                rows.append([case, name, options.threads, size, seconds, torch.__version__, platform.processor()])
    if options.csv:
        with open(options.csv, "a", newline="") as file:
            csv.writer(file).writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
