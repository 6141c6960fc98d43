"""Runs every kernel once on small inputs and compares with the reference: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python tools/sanitizer_cases.py [--device cuda]

On the CPU it runs the CPU kernels. Prints a line a case; exits with 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import xaifast.ops  # noqa: F401  registers the operators
from xaifast.attribution.occlude.certified import Certifier
from xaifast.ops import rank_features
from xaifast.ops.occlude import group_elements
from xaifast.ops.perturb_rows import perturb_rows, perturb_rows_out
from xaifast.ops.select import select_rows, select_rows_out
from xaifast.ops.tokens import compact_rows, compact_rows_out
from xaifast.reference import masking as reference
from xaifast.reference import occlude as reference_occlude
from xaifast.reference import perturb as reference_perturb
from xaifast.reference import ranking as reference_ranking
from xaifast.reference import tokens as reference_tokens

occlude_linear = torch.ops.xaifast.occlude_linear.default
Case = tuple[str, list[Tensor], list[Tensor]]  # name, results, what they must be
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def select_cases(device: str) -> Iterator[Case]:
    """Every item size with one and two words, shared and per input, one and three background rows, odd ends."""
    for dtype, n_players, per_input, n_background in itertools.product(DTYPES, (5, 70), (False, True), (1, 3)):
        lead, n_inputs, n_coalitions, rep, unit = ((2,) if per_input else ()), 2, 17, 3, 5
        bits = torch.randint(-(2**62), 2**62, (*lead, n_coalitions, -(-n_players // 64)), device=device)
        index = torch.randint(-1, n_players, (*lead, n_players), dtype=torch.int32, device=device)
        n_elements = rep * n_players * unit
        x = (torch.rand(n_inputs, n_elements, device=device) * 200).to(dtype)
        baseline = (torch.rand(*lead, n_background, n_elements, device=device) * 200).to(dtype)
        arguments = (x, bits, index, baseline, rep, unit, 1, n_inputs * n_coalitions - 1)
        out = torch.zeros(n_inputs * n_coalitions - 2, n_background, n_elements, dtype=dtype, device=device)
        select_rows_out(*arguments, out)
        name = f"select_rows {dtype} {n_players} players, per input {per_input}, background {n_background}"
        yield name, [out, select_rows(*arguments)], [reference.select_rows(*arguments)] * 2


def compact_cases(device: str) -> Iterator[Case]:
    """Rows of 1 to 1536 bytes, full and padded; on a GPU also a unit that does not fit, which must become NaN."""
    for dtype, width, per_input in itertools.product(DTYPES, (1, 24, 192), (False, True)):
        lead, n_inputs, n_tokens, n_players = ((2,) if per_input else ()), 2, 75, 70
        bits = torch.randint(-(2**62), 2**62, (*lead, 9, 2), device=device)
        index = torch.randint(-1, n_players, (*lead, n_tokens), dtype=torch.int32, device=device)
        x = (torch.rand(n_inputs, n_tokens, width, device=device) * 200).to(dtype)
        for length in (n_tokens, n_tokens + 3, *((20,) if device != "cpu" else ())):
            arguments = (x, bits, index, length, 1, 2 * 9 - 1)
            expected = reference_tokens.compact_rows(*arguments)
            out = torch.zeros_like(expected)
            compact_rows_out(*arguments, out)
            name = f"compact_rows {dtype} width {width}, per input {per_input}, length {length}"
            yield name, [out, compact_rows(*arguments)], [expected] * 2


def perturb_cases(device: str) -> Iterator[Case]:
    """Every item size, entries of one item and of several, shared and per input, odd ends."""
    for dtype, per_input, (rep, period, unit) in itertools.product(
        DTYPES, (False, True), ((3, 35, 1), (2, 9, 5), (1, 700, 2))
    ):
        n_inputs, n_points, n_elements = 3, 17, rep * period * unit
        rows = n_inputs if per_input else 1
        rank = (torch.rand(rows, period, device=device).argsort(1) - 1).int()
        points = torch.stack([torch.randint(0, n, (n_points,), device=device) for n in (period + 1, 2)], 1)
        x, insertion, deletion = (
            (torch.rand(n, n_elements, device=device) * 200).to(dtype) for n in (n_inputs, rows, rows)
        )
        arguments = (x, insertion, deletion, rank, rep, unit, points, 1, n_inputs * n_points - 1)
        out = torch.zeros(n_inputs * n_points - 2, n_elements, dtype=dtype, device=device)
        perturb_rows_out(*arguments, out)
        expected = reference_perturb.perturb_rows(*arguments)
        name = f"perturb_rows {dtype} {rep} x {period} x {unit}, per input {per_input}"
        yield name, [out, perturb_rows(*arguments)], [expected] * 2


def rank_cases(device: str) -> Iterator[Case]:
    """Widths about where the kernel's way of sorting changes."""
    for dtype, width in itertools.product((torch.bfloat16, torch.float32, torch.float64, torch.int64), (3, 100, 1000)):
        values = (torch.randn(5, width, device=device) * 50).to(dtype)
        expected = reference_ranking.rank_features(values, "most", None)
        yield f"rank_features {dtype} {width}", [rank_features(values)], [expected]


def occlude_cases(device: str) -> Iterator[Case]:
    """Every step, elements and groups, shared and per input, widths about a block of units; and certificates."""
    for dtype, width, groups in itertools.product((torch.float32, torch.float64), (1, 63, 130), (None, 1, 3)):
        n_players, order, offsets = 9, None, None
        x, columns, z = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((3, 9), (9, width), (3, width)))
        if groups is not None:
            ids = torch.randint(0, 4, (groups, 9), device=device)
            ids[:, :4] = torch.arange(4, device=device)
            n_players, order, offsets = group_elements(ids, x)
        rows = torch.randperm(3 * n_players, device=device)[1:]
        tolerance = 1e-4 if dtype == torch.float32 else 1e-12
        for step in ("identity", "relu", "leaky_relu:0.1", "sigmoid", "tanh", "silu"):
            arguments = (x, columns, rows, n_players, [z], [], [step], order, offsets, None, "full")
            near = (occlude_linear(*arguments) - reference_occlude.occlude_linear(*arguments)).abs() < tolerance
            yield f"occlude_linear {dtype} {step} width {width}, groups {groups}", [near], [torch.ones_like(near)]
        if device == "cpu":
            certifier = Certifier([z.double(), z.double()], [torch.eye(width).double()], ["relu", "relu"], dtype)
            changes = reference_occlude.player_changes(x, columns * 1e-3, rows, n_players, order, offsets)
            flags = certifier(x, columns * 1e-3, rows, n_players, order, offsets, 0)
            kept = ((z[rows // n_players] > 0) == (z[rows // n_players] > changes)).all(1)
            yield f"occlude_certify {dtype} width {width}, groups {groups}", [flags & ~kept], [torch.zeros_like(kept)]


def equal(a: Tensor, b: Tensor) -> bool:
    """Equality that takes NaN for equal to NaN."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, nan=-7.0), torch.nan_to_num(b, nan=-7.0))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    right = []
    families = (select_cases, compact_cases, perturb_cases, rank_cases, occlude_cases)
    for name, results, expected in itertools.chain.from_iterable(family(device) for family in families):
        right.append(all(equal(a, b) for a, b in zip(results, expected, strict=True)))
        print(f"{'ok   ' if right[-1] else 'WRONG'} {name}")
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{len(right)} cases on {device}, {right.count(False)} wrong")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
