"""Attribution shift against a loop over inputs and features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xaifast.metrics import attribution_shift


def by_hand(explain, x, occluded, baseline, channels_together=False):
    """One input [*feat], one set of its shape, a baseline of its shape."""
    moved = torch.where(occluded, baseline, x)
    before, after = explain(x[None])[0].double(), explain(moved[None])[0].double()
    if channels_together:
        occluded = occluded.any(0).expand(before.shape)
    shift = [
        abs(float(p - q))
        for p, q, s in zip(before.flatten(), after.flatten(), occluded.flatten(), strict=True)
        if not s
    ]
    size = [abs(float(p)) for p, s in zip(before.flatten(), occluded.flatten(), strict=True) if not s]
    if not size or sum(size) == 0:
        return math.inf if size and sum(shift) else math.nan
    return sum(shift) / sum(size)


def product(x):
    """Gradient times input of a small network that mixes all features, in float64."""
    g = torch.Generator().manual_seed(0)
    n = x[0].numel()
    w, v = torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)
    with torch.enable_grad():
        rows = x.detach().double().flatten(1).requires_grad_()
        (grad,) = torch.autograd.grad(((rows @ w).tanh() @ v).sum(), rows)
    return (grad * rows).detach().view(x.shape)


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 3)])
@pytest.mark.parametrize("batch_size", ["auto", 1, 2])
def test_formula(shape, batch_size):
    x = torch.randn(shape)
    shared, own = torch.rand(shape[1:]) < 0.3, torch.rand(shape) < 0.3
    own[0] = True  # nothing outside
    own[1] = False  # nothing changes
    baseline = torch.randn(shape)
    for given, rows in ((0.5, torch.full(shape, 0.5)), (baseline[0], baseline[:1].expand(shape)), (baseline, baseline)):
        got = attribution_shift(product, x, [shared, own], baselines=given, batch_size=batch_size)
        wanted = [
            [by_hand(product, x[b], shared, rows[b]), by_hand(product, x[b], own[b], rows[b])] for b in range(len(x))
        ]
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), equal_nan=True)
        assert got[1, 1] == 0 and got[0, 1].isnan()
        one = attribution_shift(product, x, own, baselines=given, batch_size=batch_size)
        assert torch.equal(one.nan_to_num(-1), got[:, 1].nan_to_num(-1))


@pytest.mark.parametrize("keepdim", [True, False])
def test_maps_without_channels(keepdim):
    x = torch.randn(3, 2, 4, 3)
    occluded = torch.zeros(3, 2, 4, 3, dtype=torch.bool)
    occluded[:, 0, 1, 1] = occluded[:, 1, 2, 0] = True  # one channel of a pixel is enough

    def explain(rows):
        return product(rows).sum(1, keepdim=keepdim)

    got = attribution_shift(explain, x, occluded)
    zeros = torch.zeros(2, 4, 3)
    wanted = [by_hand(explain, x[b], occluded[b], zeros, channels_together=True) for b in range(3)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    pixels = torch.zeros(1, 4, 3, dtype=torch.bool)
    pixels[0, 1, 1] = True
    spread = pixels.expand(3, 2, 4, 3)
    assert torch.equal(attribution_shift(explain, x, pixels), attribution_shift(explain, x, spread))


def test_nothing_behind_an_occluded_feature_leaks():
    x = torch.tensor([[1.0, torch.nan, 3.0]])
    calls = []

    def explain(rows):
        calls.append(rows.clone())
        return rows.nan_to_num(5.0)

    got = attribution_shift(explain, x, torch.tensor([False, True, False]), baselines=-1.0)
    assert calls[1].tolist() == [[1.0, -1.0, 3.0]] and got.tolist() == [0.0]


def test_the_clean_attribution_is_computed_once_and_arguments_follow_their_rows():
    x, targets = torch.randn(5, 3), torch.arange(5)
    seen = []

    def explain(rows, target, factor):
        seen.append(target.tolist())
        return factor * rows * target[:, None]

    sets = [torch.tensor([True, False, False])] * 3
    attribution_shift(explain, x, sets, additional_args=(targets, 2.0), batch_size=2)
    assert seen == [[0, 1]] * 4 + [[2, 3]] * 4 + [[4]] * 4


def test_zero_attributions():
    x = torch.ones(1, 3)
    sets = [torch.tensor([True, False, False])]
    assert attribution_shift(lambda rows: rows * 0, x, sets).isnan().all()
    assert attribution_shift(lambda rows: 1 - rows.amin(1, keepdim=True).expand_as(rows), x, sets).item() == math.inf


X, S = torch.ones(2, 3), torch.tensor([True, False, False])
ACTIVE = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()


@pytest.mark.parametrize("call, kind, said", [
    (lambda: attribution_shift(3, X, S), TypeError, "explain must be callable, got int"),
    (lambda: attribution_shift(product, X[0], S), ValueError, r"inputs must have shape \[B, ...\]"),
    (lambda: attribution_shift(product, X, S.int()), TypeError, "occluded must be a bool tensor"),
    (lambda: attribution_shift(product, X, [S, 1]), TypeError, "occluded must be a bool tensor .* got int"),
    (lambda: attribution_shift(product, X, []), ValueError, "at least one set"),
    (lambda: attribution_shift(product, X, S[:2]), ValueError, r"shape of an input \[3\] or of the inputs \[2, 3\]"),
    (lambda: attribution_shift(product, X, S, baselines=torch.ones(4)), ValueError, "baselines must be"),
    (lambda: attribution_shift(product, X, S, batch_size=0), ValueError, "batch_size must be"),
    (lambda: attribution_shift(lambda rows: rows[:1], X, S), ValueError, r"explain must return a floating tensor \[2"),
    (lambda: attribution_shift(lambda rows: rows[:, :2], X, S), ValueError, "spread those of players"),
    (lambda: attribution_shift(lambda rows: rows / rows, X, S), ValueError, "finite, got NaN or infinity for input 0"),
    (lambda: attribution_shift(lambda rows: ACTIVE(rows), X, S), ValueError, "[Dd]ropout"),
])  # fmt: skip
def test_bad_input(call, kind, said):
    with pytest.raises(kind, match="xaifast.metrics.attribution_shift.*" + said):
        call()
