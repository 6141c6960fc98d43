"""CleanScore against its formula in plain Python, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from xaifast.metrics import clean_score


def by_hand(a, signal, kind):
    """One input, flat lists."""
    on = [abs(v) for v, s in zip(a, signal, strict=True) if s]
    off = [abs(v) for v, s in zip(a, signal, strict=True) if not s]
    if sum(on) + sum(off) == 0 or (kind == "contrast" and not (on and off)):
        return math.nan
    if kind == "energy":
        return sum(on) / (sum(on) + sum(off))
    on, off = sum(on) / len(on), sum(off) / len(off)
    return on / (on + off)


def check(attributions, mask, kind, spread):
    """Scores of a mask given in some form, against those of the same mask spread over all elements."""
    got = clean_score(attributions, mask, kind)
    rows = zip(attributions.double().flatten(1).tolist(), spread.flatten(1).tolist(), strict=True)
    wanted = torch.tensor([by_hand(a, s, kind) for a, s in rows], dtype=got.dtype)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("kind", ["energy", "contrast"])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (3, 2, 4, 5), (1, 1)])
def test_formula(kind, shape):
    a = torch.randn(shape)
    a[0] = 0
    own = torch.rand(shape) < 0.4
    if shape[0] > 2:
        own[1], own[2] = True, False
    check(a, own, kind, own)
    check(a, own.int(), kind, own)
    check(a, own.double(), kind, own)
    check(a, own[-1], kind, own[-1:].expand(shape))
    check(a.transpose(1, -1), own.transpose(1, -1), kind, own.transpose(1, -1))
    if len(shape) == 4:
        check(a, own[:, :1], kind, own[:, :1].expand(shape))
        check(a, own[1, :1], kind, own[1:2, :1].expand(shape))


def test_a_map_of_zeros_is_nan_and_never_one():
    zeros, mask = torch.zeros(3, 4), torch.ones(4, dtype=torch.bool)
    assert clean_score(zeros, mask).isnan().all() and clean_score(-zeros, mask, "contrast").isnan().all()
    one = zeros.clone()
    one[1, 2] = -1e-30
    assert clean_score(one, mask).isnan().tolist() == [True, False, True]
    assert float(clean_score(one, mask)[1]) == 1


def test_uniform_maps():
    mask = torch.tensor([True, False, False, False, False])
    assert clean_score(torch.full((1, 5), -3.0), mask).tolist() == pytest.approx([0.2])
    assert clean_score(torch.full((1, 5), -3.0), mask, "contrast").tolist() == [0.5]


def test_scale_sign_and_neighbours_do_not_matter():
    a, mask = torch.randn(6, 9), torch.rand(6, 9) < 0.5
    score = clean_score(a, mask)
    assert torch.equal(clean_score(-1024 * a, mask), score)
    assert torch.equal(clean_score(a[2:3], mask[2:3]), score[2:3])


def test_sums_are_float64():
    a = torch.full((1, 2**20 + 1), 1.0, dtype=torch.float16)
    a[0, 0] = 2048
    mask = torch.zeros(2**20 + 1, dtype=torch.bool)
    mask[0] = True
    score = clean_score(a, mask)
    assert score.dtype == torch.float32 and float(score) == pytest.approx(2048 / (2048 + 2**20), rel=1e-6)
    assert clean_score(a.double(), mask).dtype == torch.float64


def test_integer_maps():
    assert clean_score(torch.tensor([[-3, 1]]), torch.tensor([1, 0])).tolist() == [0.75]


A, M = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("call, kind, said", [
    (lambda: clean_score([1.0], M), TypeError, "attributions must be a tensor, got list"),
    (lambda: clean_score(A, [1]), TypeError, "signal_mask must be a tensor, got list"),
    (lambda: clean_score(A.to_sparse(), M), TypeError, "dense"),
    (lambda: clean_score(A[0], M[0]), ValueError, r"must be \[B, ...\]"),
    (lambda: clean_score(A[:0], M[:0]), ValueError, "not empty"),
    (lambda: clean_score(A, M[:, :2]), ValueError, r"attributions' shape \[2, 3\], or \[3\] for all inputs"),
    (lambda: clean_score(A, M.T), ValueError, "signal_mask must have"),
    (lambda: clean_score(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4)), ValueError, "unsqueeze"),
    (lambda: clean_score(A, M * 2), ValueError, "bool, or 0 and 1"),
    (lambda: clean_score(A, A * torch.nan), ValueError, "bool, or 0 and 1"),
    (lambda: clean_score(A * torch.nan, M), ValueError, r"attributions must be finite, got nan at \[0, 0\]"),
    (lambda: clean_score(A, M, "ratio"), ValueError, 'kind must be "energy" or "contrast", got .ratio'),
    (lambda: clean_score(A, M.to("meta")), ValueError, "on one device"),
])  # fmt: skip
def test_bad_input(call, kind, said):
    with pytest.raises(kind, match="xaifast.metrics.clean_score: .*" + said):
        call()


def maps(n):
    torch.manual_seed(n)
    a = torch.randn(n, 12)
    a[1] = 0
    return a, torch.rand(n, 12) < 0.4


@pytest.mark.parametrize("kind", ["energy", "contrast"])
def test_class_adds_batches_up(kind):
    metrics = pytest.importorskip("xaifast.metrics._classes", reason="needs torchmetrics")
    metric = metrics.CleanScore(kind)
    a, mask = maps(10)
    for part, its_mask in zip(a.split((3, 1, 6)), mask.split((3, 1, 6)), strict=True):
        metric.update(part, its_mask)
    wanted = clean_score(a.double(), mask, kind)
    assert metric.undefined == 1 == int(wanted.isnan().sum())
    assert float(metric.compute()) == pytest.approx(float(wanted.nanmean()), rel=1e-12)
    with pytest.raises(ValueError, match="kind must be"):
        metrics.CleanScore("ratio")


def test_class_is_differentiable_and_kept_apart_by_kind():
    torchmetrics = pytest.importorskip("torchmetrics")
    from xaifast.metrics import CleanScore

    a, mask = maps(4)
    a = a[[0, 2, 3]].double().requires_grad_()
    mask = mask[[0, 2, 3]]
    assert CleanScore.is_differentiable and torch.autograd.gradcheck(lambda x: CleanScore("contrast")(x, mask), a)
    half = torch.tensor([True, False])
    both = torchmetrics.MetricCollection({"e": CleanScore(), "c": CleanScore("contrast")})
    both.update(attributions=torch.ones(1, 2), signal_mask=half)  # both 1/2
    both.update(attributions=torch.ones(1, 3), signal_mask=torch.tensor([True, False, False]))
    assert {name: float(v) for name, v in both.compute().items()} == {"e": pytest.approx((1 / 2 + 1 / 3) / 2), "c": 0.5}
