"""The Triton kernel of perturb_rows, interpreted on the CPU: TRITON_INTERPRET=1 pytest tests/kernels."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 and run tests/kernels in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from xaifast.kernels import perturb

from xaifast.reference import perturb as reference

SENTINEL = 77
VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ALL = "insertion deletion rank"


def case(n_inputs, n_points, period, rep=1, unit=1, per_input="rank", dtype=torch.float32):
    """Random arguments of perturb_rows; `per_input` names those of "insertion deletion rank" that have B rows."""
    generator = torch.Generator().manual_seed(0)
    n_elements = rep * period * unit
    rows = {name: n_inputs if name in per_input.split() else 1 for name in ALL.split()}
    rank = torch.rand(rows["rank"], period, generator=generator).argsort(1).int()
    rank[:, period // 2] = -1
    points = torch.randint(0, period + 1, (n_points, 2), generator=generator)
    points[:, 1] = torch.arange(n_points) % 2
    x, insertion, deletion = (
        (torch.rand(n, n_elements, generator=generator) * 200 - (0 if dtype == torch.uint8 else 100)).to(dtype)
        for n in (n_inputs, rows["insertion"], rows["deletion"])
    )
    return x, insertion, deletion, rank, rep, unit, points


def check(arguments, start, stop):
    """Every element, and the elements around the output, which must stay untouched."""
    x = arguments[0]
    rows, width = stop - start, x.shape[1]
    memory = torch.full(((rows + 2) * width,), SENTINEL, dtype=torch.float32).to(x.dtype)
    out = memory[width:-width].view(rows, width)
    perturb.perturb_rows(*arguments, start, stop, out)
    expected = reference.perturb_rows(*arguments, start, stop)
    view = VIEWS[x.element_size()]
    assert torch.equal(out.view(view), expected.view(view))
    guard = torch.full((width,), SENTINEL, dtype=torch.float32).to(x.dtype)
    assert torch.equal(memory[:width], guard)
    assert torch.equal(memory[-width:], guard)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype):
    check(case(2, 4, 11, rep=2, unit=2, dtype=dtype), 0, 8)


@pytest.mark.parametrize(
    "shape",
    [
        {"period": 1},
        {"period": 63, "rep": 3},
        {"period": 13, "unit": 7},
        {"period": 5, "rep": 2, "unit": 3},
        {"period": 300, "unit": 4, "rep": 2},
        {"period": 1100, "rep": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("per_input", ["", "rank", "insertion", "deletion", ALL])
def test_shapes(shape, per_input):
    check(case(3, 2, **shape, per_input=per_input), 0, 6)


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (0, 1), (14, 15), (2, 4), (3, 12), (5, 10), (7, 13), (6, 6)])
@pytest.mark.parametrize("per_input", ["", ALL])
def test_ranges(start, stop, per_input):
    check(case(3, 5, 17, per_input=per_input), start, stop)


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize(("start", "stop"), [(0, 21), (4, 18)])
def test_points_per_program(group, start, stop, monkeypatch):
    monkeypatch.setattr(perturb, "_POINTS", (group,))
    check(case(3, 7, 19, per_input=ALL), start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "groups"),  # 7 groups of 16 points in each input of 100
    [(0, 300, 21), (4, 5, 1), (90, 96, 1), (93, 98, 2), (96, 100, 1), (98, 102, 2), (250, 300, 4), (99, 201, 9)],
)
def test_programs_are_spent_on_the_range_alone(start, stop, groups, monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **constexprs: None

    monkeypatch.setattr(perturb, "_POINTS", (16,))
    monkeypatch.setattr(perturb, "perturb_rows_kernel", Kernel())
    perturb.perturb_rows(*case(3, 100, 3000), start, stop, torch.empty(stop - start, 3000))
    assert launched == [(groups * 3,)]


def test_counts_at_both_ends_and_beyond():
    x, insertion, deletion, rank, rep, unit, _ = case(2, 1, 9, per_input=ALL)
    rank[:, 4] = 8
    points = torch.tensor([[0, 0], [9, 0], [0, 1], [9, 1], [-5, 0], [-5, 1], [2**40, 0], [2**40, 1]])
    out = torch.empty(16, 9)
    perturb.perturb_rows(x, insertion, deletion, rank.argsort(1).int(), rep, unit, points, 0, 16, out)
    expected = torch.stack((insertion, x, x, deletion, insertion, x, x, deletion), 1).flatten(0, 1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_leaks(value, dtype):
    x, insertion, deletion, *rest = case(2, 3, 9, dtype=dtype)
    check((torch.full_like(x, value), insertion, deletion, *rest), 0, 6)
    check((x, torch.full_like(insertion, value), deletion, *rest), 0, 6)
    check((x, insertion, torch.full_like(deletion, value), *rest), 0, 6)


def test_empty():
    x, insertion, deletion, rank, rep, unit, points = case(2, 3, 9)
    perturb.perturb_rows(x, insertion, deletion, rank, rep, unit, points, 2, 2, torch.empty(0, 9))
    none = (x[:, :0], insertion[:, :0], deletion[:, :0], rank[:, :0])
    perturb.perturb_rows(*none, rep, unit, points, 0, 6, torch.empty(6, 0))
