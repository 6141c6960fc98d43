"""GPU operators by CUDA events with a cold L2 cache, and what launching one costs the host.

Providers and the ceiling are timed in turn; before every timed call a buffer several times the largest L2 cache is
overwritten, which also keeps the GPU busy while Python gets to the launch. Shares are taken within a round. Nothing is
timed whose result differs from the reference's.

    python bench/bench_operators_cuda.py [--rounds 50] [--only NAME] [--csv FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from curve_operators import CURVE_CASES
from environment import describe
from operators import CASES, PROVIDERS, Call, Case, check
from results import Row, show, write

from xaifast.ops import plan_selection
from xaifast.ops.select import select_rows_out
from xaifast.ops.tokens import compact_rows

FLUSH_BYTES = 512 * 2**20
BURST = 200


def cold_times(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds on the GPU of each call, the calls in turn, L2 overwritten before every one."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in calls.values():
        for _ in range(3):
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def kernel_rows(case: Case, rounds: int) -> list[Row]:
    """A row a provider of one case."""
    calls = {name: case.providers[name] for name in PROVIDERS if name in case.providers}
    times = cold_times({**calls, "ceiling": case.ceiling}, rounds)
    rows = []
    for name in calls:
        seconds = statistics.median(times[name])
        shares = [case.scale * c / t for c, t in zip(times["ceiling"], times[name], strict=True)]
        rows.append({
            "kind": "kernel", "operator": case.operator, "case": case.name, "provider": name,
            "microseconds": round(seconds * 1e6, 3), "gb_per_s": round(case.n_bytes / seconds / 1e9, 1),
            "gflop_per_s": "", "ceiling": case.ceiling_name, "share": round(statistics.median(shares), 3),
            "rounds": rounds,
        })  # fmt: skip
    return rows


def launch_rows(rounds: int) -> list[Row]:
    """What a call on tiny tensors costs the host: bursts without synchronisation, the smallest."""
    plan = plan_selection(torch.randn(1, 16, device="cuda"))
    bits = torch.tensor([[3]], device="cuda")
    arguments = (plan.x, bits, plan.index, plan.baseline, plan.rep, plan.unit, 0, 1)
    flat, tokens = torch.empty(1, 1, 16, device="cuda"), torch.randn(1, 4, 4, device="cuda")
    index = torch.arange(4, dtype=torch.int32, device="cuda")
    calls = {
        "torch.add": lambda: torch.add(plan.x, plan.x),
        "select_rows_out": lambda: select_rows_out(*arguments, flat),
        "compact_rows": lambda: compact_rows(tokens, bits, index, 4, 0, 1),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(BURST):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / BURST)
    blank = {"gb_per_s": "", "gflop_per_s": "", "ceiling": "", "share": "", "rounds": rounds}
    return [
        {"kind": "call", "operator": name, "case": "tiny tensors", "provider": "xaifast"}
        | {"microseconds": round(seconds * 1e6, 3)} | blank
        for name, seconds in best.items()
    ]  # fmt: skip


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a CUDA device is needed; bench_operators.py measures on the CPU", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    conditions, rows = describe(), []
    with torch.no_grad():
        cases = CASES | CURVE_CASES
        for name in (name for name in cases if arguments.only in name):
            case = cases[name]("cuda")
            check(case)
            rows += kernel_rows(case, arguments.rounds)
            del case
            torch.cuda.empty_cache()
        rows += launch_rows(arguments.rounds)
    rows = [{**row, **conditions} for row in rows]
    show(rows, ("operator", "case", "provider", "microseconds", "gb_per_s", "ceiling", "share"))
    if arguments.csv:
        write(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
