"""The Triton kernel of select_rows, run by Triton's interpreter on the CPU: TRITON_INTERPRET=1 pytest tests/kernels."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 and run tests/kernels in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from xaifast.kernels import select

from xaifast.reference import masking as reference

SENTINEL = 77
VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def case(n_inputs, n_coalitions, words, period, rep=1, unit=1, n_background=1, per_input="", dtype=torch.float32):
    """Random arguments of select_rows; `per_input` names those of "bits index baseline" that have a leading B."""
    generator = torch.Generator().manual_seed(0)

    def lead(name):
        return (n_inputs,) if name in per_input.split() else ()

    n_elements = rep * period * unit
    bits = torch.randint(-(2**63), 2**63 - 1, (*lead("bits"), n_coalitions, words), generator=generator)
    index = torch.randint(-1, min(64 * words, 70), (*lead("index"), period), generator=generator, dtype=torch.int32)
    x, baseline = (
        (torch.rand(shape, generator=generator) * 200 - (0 if dtype == torch.uint8 else 100)).to(dtype)
        for shape in ((n_inputs, n_elements), (*lead("baseline"), n_background, n_elements))
    )
    return x, bits, index, baseline, rep, unit


def check(arguments, start, stop):
    """Every element, and the elements around the output, which must stay untouched."""
    x, _, _, baseline, *_ = arguments
    rows, width = (stop - start) * baseline.shape[-2], x.shape[1]
    memory = torch.full(((rows + 2) * width,), SENTINEL, dtype=torch.float32).to(x.dtype)
    out = memory[width:-width].view(stop - start, baseline.shape[-2], width)
    select.select_rows(*arguments, start, stop, out)
    expected = reference.select_rows(*arguments, start, stop)
    view = VIEWS[x.element_size()]
    assert torch.equal(out.view(view), expected.view(view))
    guard = torch.full((width,), SENTINEL, dtype=torch.float32).to(x.dtype)
    assert torch.equal(memory[:width], guard)
    assert torch.equal(memory[-width:], guard)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype):
    check(case(2, 3, 1, 11, rep=2, unit=2, n_background=2, dtype=dtype), 0, 6)


@pytest.mark.parametrize(
    "shape",
    [
        {"period": 1},
        {"period": 63, "rep": 3},
        {"period": 65, "words": 2},
        {"period": 13, "unit": 7, "words": 2},
        {"period": 5, "rep": 2, "unit": 3},
        {"period": 30, "n_background": 5},
        {"period": 30, "n_background": 3, "words": 2, "unit": 2},
        {"period": 300, "unit": 4, "rep": 2},
        {"period": 700, "n_background": 3},
    ],
    ids=str,
)
def test_shapes(shape):
    check(case(2, 2, **{"words": 1, **shape}), 0, 4)


@pytest.mark.parametrize("per_input", ["bits", "index", "baseline", "bits index", "bits index baseline"])
@pytest.mark.parametrize("n_background", [1, 3])
@pytest.mark.parametrize("words", [1, 2])
def test_arguments_of_each_input(per_input, n_background, words):
    check(case(3, 3, words, 9, rep=2, n_background=n_background, per_input=per_input), 0, 9)


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (0, 1), (14, 15), (2, 4), (3, 12), (5, 10), (7, 13), (6, 6)])
@pytest.mark.parametrize("per_input", ["", "bits index baseline"])
def test_ranges(start, stop, per_input):
    check(case(3, 5, 2, 17, per_input=per_input), start, stop)


@pytest.mark.parametrize("units", [1, 4, 16])
@pytest.mark.parametrize(("start", "stop"), [(0, 21), (4, 18)])
def test_coalitions_per_program(units, start, stop, monkeypatch):
    monkeypatch.setattr(select, "_UNITS", (units,))
    check(case(3, 7, 1, 19), start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "groups"),  # 7 groups of 16 coalitions in each input of 100
    [(0, 300, 21), (4, 5, 1), (90, 96, 1), (93, 98, 2), (96, 100, 1), (98, 102, 2), (250, 300, 4), (99, 201, 9)],
)
def test_programs_are_spent_on_the_range_alone(start, stop, groups, monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **constexprs: None

    monkeypatch.setattr(select, "_UNITS", (16,))
    monkeypatch.setattr(select, "select_rows_kernel", Kernel())
    x, bits, index, baseline, rep, unit = case(3, 100, 1, 3000)
    select.select_rows(x, bits, index, baseline, rep, unit, start, stop, torch.empty(stop - start, 1, 3000))
    assert launched == [(groups * 3,)]


def test_present_and_absent_everywhere():
    x, bits, index, baseline, rep, unit = case(2, 2, 1, 9)
    index = torch.arange(9, dtype=torch.int32)
    bits[0], bits[1] = -1, 0
    out = torch.empty(4, 1, 9)
    select.select_rows(x, bits, index, baseline, rep, unit, 0, 4, out)
    assert torch.equal(out[0::2, 0], x)
    assert torch.equal(out[1::2, 0], baseline.expand(2, -1))
    select.select_rows(x, bits, torch.full_like(index, -1), baseline, rep, unit, 0, 4, out)
    assert torch.equal(out[:, 0], x.repeat_interleave(2, 0))


def test_every_bit_position():
    bits = torch.tensor([[1 << p if p < 63 else -(2**63), 0] for p in range(64)] + [[0, 1], [0, -(2**63)]])
    x, baseline = torch.ones(1, 128), torch.zeros(1, 128)
    out = torch.empty(66, 1, 128)
    select.select_rows(x, bits, torch.arange(128, dtype=torch.int32), baseline, 1, 1, 0, 66, out)
    expected = torch.zeros(66, 128)
    expected[torch.arange(66), torch.tensor([*range(64), 64, 127])] = 1
    assert torch.equal(out[:, 0], expected)


def test_players_beyond_the_words_are_absent():
    x, baseline = torch.ones(1, 4), torch.zeros(1, 4)
    for words, players in ((1, [0, 63, 64, 2**31 - 1]), (2, [0, 127, 128, 2**31 - 1])):
        out = torch.empty(1, 1, 4)
        index = torch.tensor(players, dtype=torch.int32)
        select.select_rows(x, torch.full((1, words), -1), index, baseline, 1, 1, 0, 1, out)
        assert out.flatten().tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_leaks(value, dtype):
    x, bits, index, baseline, rep, unit = case(2, 3, 1, 9, dtype=dtype)
    check((torch.full_like(x, value), bits, index, baseline, rep, unit), 0, 6)
    check((x, bits, index, torch.full_like(baseline, value), rep, unit), 0, 6)
    bits[:] = 0
    out = torch.empty(6, 1, 9, dtype=dtype)
    select.select_rows(torch.full_like(x, float("nan")), bits, index.clamp(min=0), baseline, rep, unit, 0, 6, out)
    assert torch.equal(out, baseline.expand(6, 1, 9))


def test_empty():
    x, bits, index, baseline, rep, unit = case(2, 3, 1, 9)
    select.select_rows(x, bits, index, baseline, rep, unit, 2, 2, torch.empty(0, 1, 9))
    select.select_rows(x[:, :0], bits, index[:0], baseline[:, :0], rep, unit, 0, 6, torch.empty(6, 1, 0))
