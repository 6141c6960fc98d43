"""Max-sensitivity: against Captum for the same perturbations, against a loop for its own."""

from __future__ import annotations

import math

import pytest
import torch
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from xaifast import noise
from xaifast.metrics import max_sensitivity


def wave(rows: Tensor) -> Tensor:
    """A perturbation that depends on the input alone."""
    return rows + 0.02 * torch.sin(50 * rows)


def saliency(rows: Tensor, target: Tensor | None = None) -> Tensor:
    """Gradients of a small network."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows[0].numel(), 4, generator=generator, dtype=torch.float64).to(rows.dtype)
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        outputs = torch.tanh(rows.flatten(1) @ weight)
        score = outputs.sum(1) if target is None else outputs.gather(1, target[:, None])[:, 0]
        return torch.autograd.grad(score.sum(), rows)[0]


def in_captums_way(explain):
    """Captum hands the clean input over as a tuple, and wants a tuple back."""
    return lambda rows: (explain(*rows),) if isinstance(rows, tuple) else explain(rows)


@pytest.mark.parametrize("norm", ["fro", 1, 3.0, math.inf])
def test_equals_captum_for_the_same_perturbations(norm):
    x = torch.rand(4, 2, 5, 3, dtype=torch.float64)
    table = x.repeat_interleave(6, 0) + 0.02 * torch.randn(24, 2, 5, 3, dtype=torch.float64)
    for perturb in (wave, lambda rows: table):
        expected = sensitivity_max(in_captums_way(saliency), x, perturb, n_perturb_samples=6, norm_ord=norm)
        got = max_sensitivity(saliency, x, perturb=perturb, n_samples=6, norm=norm, batch_size=24)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_zeros_are_measured_absolutely_as_in_captum():
    x = torch.stack((torch.zeros(5), torch.ones(5))).double()

    def explain(rows: Tensor) -> Tensor:
        return rows.relu()

    def perturb(rows: Tensor) -> Tensor:
        return rows + 0.25

    got = max_sensitivity(explain, x, perturb=perturb)
    torch.testing.assert_close(got, torch.tensor([0.25 * 5**0.5, 0.25], dtype=torch.float64))
    captums = sensitivity_max(in_captums_way(explain), x, perturb)
    torch.testing.assert_close(got, captums)


def test_own_perturbations_equal_a_loop():
    x = torch.rand(3, 2, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1])
    got = max_sensitivity(
        saliency, x, radius=0.1, n_samples=8, seed=5, first_index=9, additional_args=target, batch_size=5
    )
    for b in range(3):
        clean, worst = saliency(x[b : b + 1], target[b : b + 1]), 0.0
        for n in range(8):
            unit = (9 + b) * 8 + n
            drawn = noise.uniform_units(unit, unit + 1, 8, 8, domain=noise.SENSITIVITY, seed=5, first_index=0)
            moved = x[b : b + 1] + 0.1 * (2 * drawn.view(1, 2, 4) - 1)
            change = saliency(moved, target[b : b + 1]) - clean
            worst = max(worst, float(change.norm() / clean.norm()))
        assert float(got[b]) == pytest.approx(worst, rel=1e-9)


def test_perturbations_fill_the_box():
    seen = []
    x = torch.rand(2, 3, 10)
    max_sensitivity(lambda rows: seen.append(rows.clone()) or rows, x, radius=0.5, n_samples=100, batch_size=30)
    moves = (torch.cat(seen)[2:].view(2, 100, 30) - x.flatten(1)[:, None]).double()
    assert float(moves.abs().max()) <= 0.5 + 1e-6 and float(moves.abs().max()) > 0.49
    assert moves.mean().abs() < 0.02 and abs(float(moves.var()) - 1 / 12) < 0.005
    assert moves.flatten(0, 1).unique(dim=0).shape[0] == 200


def test_several_inputs_and_explanations():
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 2, 2, dtype=torch.float64)

    def explain(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.exp(), b.flatten(1).sum(1)[:, None, None] * b

    def perturb(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rows[0] + 0.01, rows[1] * 1.02

    got = max_sensitivity(explain, (x, y), perturb=perturb, n_samples=2)
    clean, moved = explain(x, y), explain(x + 0.01, y * 1.02)
    joined = [torch.cat([part.flatten(1) for part in parts], 1) for parts in (clean, moved)]
    torch.testing.assert_close(got, (joined[1] - joined[0]).norm(dim=1) / joined[0].norm(dim=1))
    expected = sensitivity_max(lambda rows: explain(*rows), (x, y), perturb, n_perturb_samples=2)
    torch.testing.assert_close(got, expected)


def test_results_do_not_depend_on_chunks_or_neighbours():
    x = torch.rand(5, 3, 8, 8)
    settings = dict(n_samples=4, seed=2)
    threads = torch.get_num_threads()

    def explain(rows: Tensor) -> Tensor:
        return (rows * 64).repeat(1, 1, 20, 10)  # 38400 elements, which two threads would share

    try:
        torch.set_num_threads(2)
        whole = max_sensitivity(explain, x, first_index=10, **settings)
        assert torch.equal(max_sensitivity(explain, x[3:4], first_index=13, batch_size=1, **settings), whole[3:4])
    finally:
        torch.set_num_threads(threads)
    for batch_size in (1, 3, 1000):
        assert torch.equal(max_sensitivity(explain, x, first_index=10, batch_size=batch_size, **settings), whole)
    assert not torch.equal(max_sensitivity(explain, x, first_index=11, **settings), whole)


def test_explain_may_write_to_its_rows():
    def explain(rows: Tensor) -> Tensor:
        return rows.mul_(2).requires_grad_().detach().exp()

    x = torch.rand(3, 4)
    before = x.clone()
    expected = max_sensitivity(lambda rows: (2 * rows).exp(), x)
    assert torch.equal(max_sensitivity(explain, x), expected) and torch.equal(x, before)
    with torch.inference_mode():
        x = before.clone()
    assert torch.equal(max_sensitivity(explain, x), expected)


def test_dtypes():
    x = torch.rand(2, 6)
    assert max_sensitivity(saliency, x).dtype == torch.float32
    assert max_sensitivity(saliency, x.double()).dtype == torch.float64
    assert max_sensitivity(lambda rows: rows, x.half()).dtype == torch.float32


def test_out_of_memory_makes_chunks_smaller():
    x, sizes = torch.rand(4, 3), []

    def explain(rows: Tensor) -> Tensor:
        if len(rows) > 3:
            raise MemoryError
        sizes.append(len(rows))
        return rows

    got = max_sensitivity(explain, x, n_samples=5, batch_size=16)
    assert torch.equal(got, max_sensitivity(lambda rows: rows, x, n_samples=5)) and max(sizes) <= 3


def never(rows: Tensor) -> Tensor:
    raise AssertionError("the explanation ran")


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (dict(explain=3), TypeError, "explain must be callable"),
        (dict(perturb=3), TypeError, "perturb must be callable"),
        (dict(inputs=torch.ones(2, 3, dtype=torch.int64)), TypeError, "inputs must be floating"),
        (dict(inputs=torch.ones(3)), ValueError, "inputs must have shape"),
        (dict(radius=0), ValueError, "radius must be"),
        (dict(n_samples=0), ValueError, "n_samples must be"),
        (dict(norm="nuc"), ValueError, "norm must be"),
        (dict(norm=0.5), ValueError, "norm must be"),
        (dict(batch_size=0), ValueError, "batch_size must be"),
        (dict(seed=-3), ValueError, "seed must be"),
    ],
)
def test_bad_input_is_said_before_anything_runs(changed, kind, message):
    with pytest.raises(kind, match=message):
        max_sensitivity(**{**dict(explain=never, inputs=torch.rand(2, 3)), **changed})


def test_bad_explanations():
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match="explain must return floating tensors"):
        max_sensitivity(lambda rows: rows[:1], x)
    with pytest.raises(ValueError, match="explain must return floating tensors"):
        max_sensitivity(lambda rows: rows.long(), x)
    with pytest.raises(ValueError, match="NaN or infinity for input 1"):
        max_sensitivity(lambda rows: torch.where(rows == x[1, 0], torch.nan, rows), x)
    with pytest.raises(ValueError, match="same shapes for perturbed inputs"):
        max_sensitivity(lambda rows: rows if len(rows) == 3 else rows[:, :2], x, n_samples=4)
    with pytest.raises(ValueError, match="perturb must return tensors"):
        max_sensitivity(lambda rows: rows, x, perturb=lambda rows: rows[:2])
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="must not be random"):
        max_sensitivity(lambda rows: model(rows), x)
    assert max_sensitivity(lambda rows: model(rows).detach(), x, allow_training_mode=True).shape == (3,)
