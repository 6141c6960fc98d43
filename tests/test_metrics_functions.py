"""Metrics against loops over the formulas, scipy and scikit-learn, row by row."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from xaifast import metrics

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same(got, wanted):
    assert got.dtype == torch.float32 or got.dtype == torch.float64
    torch.testing.assert_close(
        got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7, equal_nan=True
    )


def tied(b, m, dtype=torch.float32):
    """Maps with many ties, both signs and both zeros."""
    values = torch.randint(-2, 3, (b, m)).to(dtype)
    return torch.where(torch.rand(b, m) < 0.5, values, -values) if values.is_floating_point() else values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 49)])
def test_e_rmse(shape, dtype):
    pred, ref = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    squares = [
        [(p - r) ** 2 for p, r in zip(*rows, strict=True)] for rows in zip(pred.tolist(), ref.tolist(), strict=True)
    ]
    same(metrics.e_rmse(pred, ref), [math.sqrt(sum(row) / len(row)) for row in squares])
    same(metrics.e_rmse(pred, ref, pooled=True), math.sqrt(sum(map(sum, squares)) / pred.numel()))
    assert metrics.e_rmse(pred, ref).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_e_rmse_accumulates_in_float64():
    pred = torch.full((1, 1_000_000), 1e-4)
    pred[0, 0] = 1e3  # its square swallows all others in float32 sums
    wanted = (pred.double().square().mean(1)).sqrt()
    torch.testing.assert_close(metrics.e_rmse(pred, torch.zeros_like(pred)).double(), wanted, rtol=1e-7, atol=0)
    assert float(metrics.e_rmse(torch.full((1, 3), 1e30), torch.zeros(1, 3))) == pytest.approx(1e30)  # 1e60 on the way


@pytest.mark.parametrize("pooled", [False, True])
def test_e_rmse_has_a_gradient_where_maps_are_equal(pooled):
    ref = torch.rand(3, 4, dtype=torch.float64)
    pred = ref.clone()
    pred[0] += 2.0
    pred.requires_grad_()
    metrics.e_rmse(pred, ref, pooled=pooled).sum().backward()
    one = 1 / math.sqrt(4 * 12) if pooled else 1 / 4  # d sqrt(mean e^2) / d e_i = e_i / (n rmse)
    wanted = torch.tensor([[one] * 4, [0.0] * 4, [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(pred.grad, wanted)
    pred = ref.clone().requires_grad_()
    metrics.e_rmse(pred, ref, pooled=True).backward()
    assert pred.grad.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("k", [1, 2, 10, 11])
def test_iou_at_k(k, dtype):
    pred, ref = tied(6, 11, torch.float32).to(dtype), tied(6, 11, torch.float32).to(dtype)
    wanted = []
    for rows in zip(pred.tolist(), ref.tolist(), strict=True):
        a, b = (set(sorted(range(11), key=lambda i, row=row: (-row[i], i))[:k]) for row in rows)
        wanted.append(len(a & b) / len(a | b))
    same(metrics.iou_at_k(pred, ref, k), wanted)


def test_iou_at_k_of_equal_values_goes_by_index():
    assert metrics.iou_at_k(torch.zeros(1, 40), torch.arange(40.0, 0, -1)[None], 5).tolist() == [1.0]
    signed = torch.tensor([[-0.0, 0.0, 0.0, -1.0]])
    assert metrics.iou_at_k(signed, torch.tensor([[1, 0, 0, 0]]), 1).tolist() == [1.0]
    large = torch.tensor([[2**53, 2**53 + 1]])  # equal once cast to float64
    assert metrics.iou_at_k(large, torch.tensor([[0, 1]]), 1).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("m", [1, 2, 3, 49, 130])
def test_rank_correlation_is_scipys(m, dtype):
    stats = pytest.importorskip("scipy.stats")
    pred, ref = tied(8, m).to(dtype), torch.randn(8, m)
    ref[1] = ref[1, 0]
    pred[2] = pred[2, 0]
    ref[3] = pred[3].float()
    wanted = []
    for rows in zip(pred.double(), ref.double(), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant rows
            wanted.append(float(stats.spearmanr(*rows).statistic) if m > 1 else math.nan)
    same(metrics.rank_correlation(pred, ref), wanted)
    assert m == 1 or (metrics.rank_correlation(pred, ref).isnan()[1:3]).all()


def test_rank_correlation_is_exact_where_orders_agree():
    values = torch.randn(4, 33, dtype=torch.float64)
    assert metrics.rank_correlation(values, values.exp()).tolist() == [1.0] * 4
    assert metrics.rank_correlation(values, -values).tolist() == [-1.0] * 4
    large = torch.tensor([[2**53, 2**53 + 1, 2**53 + 2]])  # two of them equal once cast to float64
    assert metrics.rank_correlation(large, torch.tensor([[1, 2, 3]])).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8])
def test_segmentation_difference(dtype):
    importance, seg = torch.rand(5, 13), torch.rand(5, 13).to(dtype)
    rows = zip(importance.tolist(), seg.tolist(), strict=True)
    wanted = [sum(abs(m - a) for a, m in zip(*row, strict=True)) / 13 for row in rows]
    same(metrics.segmentation_difference(importance, seg), wanted)


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.7])
def test_macro_iou_is_scikit_learns(threshold):
    jaccard_score = pytest.importorskip("sklearn.metrics").jaccard_score
    importance = torch.randint(0, 11, (12, 9)).float() / 10  # the threshold itself, in float32, among the values
    seg = torch.randint(0, 11, (12, 9)).double() / 10
    seg[0], importance[1], seg[2], importance[2] = 0, 1, 1, 1  # no object; all object; an empty background union
    seg[3], importance[3] = 0, 0

    def score(a, m):
        sides = jaccard_score(m, a, labels=[0, 1], average=None, zero_division=1)
        return sides.mean()

    a, m = importance >= torch.tensor(threshold), seg >= threshold
    same(metrics.macro_iou(importance, seg, threshold), [score(*row) for row in zip(a, m, strict=True)])
    same(metrics.macro_iou(importance, seg, threshold, pooled=True), score(a.flatten(), m.flatten()))
    assert metrics.macro_iou(importance, seg, threshold)[2:4].tolist() == [1.0, 1.0]


def test_macro_iou_counts_the_threshold_as_foreground():
    half = torch.tensor([[0.5, 0.0]])
    assert metrics.macro_iou(half, torch.tensor([[True, False]])).tolist() == [1.0]
    assert metrics.macro_iou(torch.tensor([[1.0, 0.0]]), half).tolist() == [1.0]


@pytest.mark.parametrize(
    ("seg", "ignore_value"),
    [
        (torch.tensor([[1.0, torch.nan, 0.0, torch.nan], [torch.nan] * 4]), None),
        (torch.tensor([[1, 255, 0, 255], [255] * 4], dtype=torch.uint8), 255),
        (torch.tensor([[1.0, -1.0, 0.0, torch.nan], [-1.0, torch.nan, -1.0, torch.nan]]), -1),
    ],
)
def test_ignored_patches_do_not_leak(seg, ignore_value):
    importance = torch.tensor([[0.75, torch.nan, 0.625, torch.inf], [torch.nan, 1.0, 0.0, 2.0]])
    same(metrics.segmentation_difference(importance, seg, ignore_value), [(0.25 + 0.625) / 2, math.nan])
    same(metrics.macro_iou(importance, seg, ignore_value=ignore_value), [(1 / 2 + 0) / 2, math.nan])
    same(metrics.macro_iou(importance, seg, ignore_value=ignore_value, pooled=True), 0.25)
    same(metrics.macro_iou(importance[1:], seg[1:], ignore_value=ignore_value, pooled=True), math.nan)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_sparsity(dtype):
    importance = torch.rand(4, 7).to(dtype)
    same(metrics.sparsity(importance), [sum(row) / 7 for row in importance.tolist()])


@pytest.mark.parametrize("n_runs", [2, 5])
def test_reproducibility(n_runs):
    runs = torch.rand(n_runs, 3, 7)
    wanted = []
    for b in range(3):
        deviations = []
        for m in range(7):
            values = runs[:, b, m].tolist()
            mean = sum(values) / n_runs
            deviations.append(math.sqrt(sum((v - mean) ** 2 for v in values) / n_runs))
        wanted.append(sum(deviations) / 7)
    same(metrics.reproducibility(runs), wanted)
    same(metrics.reproducibility(runs.double() + 1e8), wanted)
    assert metrics.reproducibility(runs[:1].expand(n_runs, -1, -1)).tolist() == [0.0] * 3


PAIRS = {
    "e_rmse": metrics.e_rmse,
    "iou_at_k": lambda a, b: metrics.iou_at_k(a, b, 3),
    "rank_correlation": metrics.rank_correlation,
    "segmentation_difference": metrics.segmentation_difference,
    "macro_iou": metrics.macro_iou,
}


@pytest.mark.parametrize("name", PAIRS)
def test_rows_depend_on_themselves_only(name):
    metric = PAIRS[name]
    a, b = torch.rand(9, 16, dtype=torch.float64), torch.rand(9, 16, dtype=torch.float64)
    together = metric(a, b)
    assert torch.equal(together, torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(9)]))
    apart = [torch.stack([x, torch.full_like(x, torch.nan)], 2)[..., 0] for x in (a, b)]
    assert not apart[0].is_contiguous() and torch.equal(metric(*apart), together)
    assert torch.equal(metric(a.T.contiguous().T, b), together)
    a.requires_grad_()
    assert torch.equal(metric(a, b).detach(), together)


FINE = torch.rand(2, 4)
BAD_PAIRS = {
    "no tensor": (([[1.0]], FINE), TypeError, "must be a tensor"),
    "second no tensor": ((FINE, 1.0), TypeError, "must be a tensor"),
    "complex": ((FINE, FINE.to(torch.complex64)), TypeError, "real"),
    "sparse": ((FINE.to_sparse(), FINE), TypeError, "dense"),
    "no batch": ((FINE[0], FINE[0]), ValueError, r"unsqueeze\(0\)"),
    "pixels": ((FINE[None], FINE[None]), ValueError, "to_patches"),
    "shapes differ": ((FINE, FINE[:1]), ValueError, r"\[2, 4\] and \[1, 4\]"),
    "devices differ": ((FINE, FINE.to("meta")), ValueError, "cpu and meta"),
    "empty batch": ((FINE[:0], FINE[:0]), ValueError, "must not be empty"),
    "no patches": ((FINE[:, :0], FINE[:, :0]), ValueError, "must not be empty"),
    "nan": (
        (torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]), torch.ones(2, 2)),
        ValueError,
        r"finite, got nan at \[1, 0\]",
    ),
    "infinite": ((torch.tensor([[0.0, -torch.inf]]), torch.ones(1, 2)), ValueError, r"finite, got -inf at \[0, 1\]"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
@pytest.mark.parametrize("name", PAIRS)
def test_bad_pairs(name, case):
    arguments, error, says = BAD_PAIRS[case]
    with pytest.raises(error, match=rf"xaifast\.metrics\.{name}: .*{says}"):
        PAIRS[name](*arguments)


@pytest.mark.parametrize("name", ["e_rmse", "iou_at_k", "rank_correlation"])
def test_a_reference_that_is_not_finite(name):
    with pytest.raises(ValueError, match=r"ref must be finite, got nan at \[1, 3\]"):
        PAIRS[name](FINE, torch.where(torch.arange(8).view(2, 4) == 7, torch.nan, FINE))


@pytest.mark.parametrize("name", ["segmentation_difference", "macro_iou"])
@pytest.mark.parametrize("value", [2, -1, 255, torch.inf])
def test_a_segmentation_outside_of_zero_to_one(name, value):
    seg = torch.zeros(2, 4)
    seg[1, 2] = value
    with pytest.raises(
        ValueError, match=rf"xaifast\.metrics\.{name}: seg must be in 0\.\.1, got {float(value)} at \[1, 2\]"
    ):
        PAIRS[name](FINE, seg)


BAD = {
    "k zero": (lambda: metrics.iou_at_k(FINE, FINE, 0), ValueError, "k must be at least 1, got 0"),
    "k beyond": (lambda: metrics.iou_at_k(FINE, FINE, 5), ValueError, "k must be at most M = 4, got 5"),
    "k float": (lambda: metrics.iou_at_k(FINE, FINE, 2.0), TypeError, "k must be an int, got float"),
    "threshold nan": (
        lambda: metrics.macro_iou(FINE, FINE, math.nan),
        ValueError,
        r"threshold must be .* 0\.\.1, got nan",
    ),
    "threshold 256": (
        lambda: metrics.macro_iou(FINE, FINE > 0, 256),
        ValueError,
        r"threshold must be .* 0\.\.1, got 256",
    ),
    "ignored in uint8": (
        lambda: metrics.macro_iou(FINE, torch.full((2, 4), 255, dtype=torch.uint8), ignore_value=-1),
        ValueError,
        r"seg must be in 0\.\.1, got 255 at \[0, 0\]",
    ),
    "uint16": (lambda: metrics.rank_correlation(FINE, FINE.to(torch.uint16)), TypeError, "ref must be a dense real"),
    "k bool": (lambda: metrics.iou_at_k(FINE, FINE, True), TypeError, "k must be an int, got bool"),
    "sparsity nan": (lambda: metrics.sparsity(torch.tensor([[torch.nan]])), ValueError, r"finite, got nan at \[0, 0\]"),
    "sparsity shape": (lambda: metrics.sparsity(FINE[0]), ValueError, r"\[B, M\], got \[4\]"),
    "one run": (lambda: metrics.reproducibility(FINE[None]), ValueError, r"at least 2 runs, got \[1, 2, 4\]"),
    "no run axis": (lambda: metrics.reproducibility(FINE), ValueError, r"\[R, B, M\], got \[2, 4\]"),
    "runs nan": (
        lambda: metrics.reproducibility(FINE.expand(2, 2, 4) / 0),
        ValueError,
        r"finite, got inf at \[0, 0, 0\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, says = BAD[case]
    with pytest.raises(error, match=r"xaifast\.metrics\.\w+: .*" + says):
        call()
