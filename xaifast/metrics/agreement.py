"""How well attributions agree with reference attributions: root-mean-square error, top-k overlap, rank correlation.

Source: "Transferring visual explainability" (arXiv 2507.04380), which compares predicted attributions with Shapley
values. The functions named `*_rows` give float64 numbers an input, which the classes sum.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ..ops import rank_features
from ._checks import check_finite, check_maps, result_dtype


def error_rows(pred: Tensor, ref: Tensor) -> Tensor:
    """Root-mean-square error of each input, float64 [B]; its gradient is 0 where pred = ref."""
    _check("e_rmse", pred, ref)
    difference = (pred.double() - ref.double()).contiguous()  # one order of summation
    return torch.linalg.vector_norm(difference, dim=1) / pred.shape[1] ** 0.5


def iou_rows(pred: Tensor, ref: Tensor, k: int) -> Tensor:
    """Overlap of the top k of each input, float64 [B]."""
    _check("iou_at_k", pred, ref)
    check_k(k)
    if k > pred.shape[1]:
        raise ValueError(f"xaifast.metrics.iou_at_k: k must be at most M = {pred.shape[1]}, got {k}")
    shared = ((rank_features(pred) < k) & (rank_features(ref) < k)).sum(1).double()
    return shared / (2 * k - shared)


def rank_correlation_rows(pred: Tensor, ref: Tensor) -> Tensor:
    """Spearman's correlation of each input, float64 [B]."""
    _check("rank_correlation", pred, ref)
    x, y = _centred_ranks(pred), _centred_ranks(ref)
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def e_rmse(pred: Tensor, ref: Tensor, *, pooled: bool = False) -> Tensor:
    """Root-mean-square error of attributions: e[b] = sqrt(mean_m (pred[b, m] - ref[b, m])^2).

    Args:
        pred, ref: `[B, M]`, any real dtype, finite.
        pooled: give one number, sqrt(mean_bm (pred - ref)^2), rather than one an input.

    Returns:
        `[B]`, or a scalar where pooled; 0 is best. In the inputs' floating dtype, at least float32; summed in float64.

    Raises:
        TypeError: no dense real tensors.
        ValueError: shapes or devices differ, nothing in the batch, values that are not finite.

    Differentiable. Cost: one pass. Source: E-RMSE of "Transferring visual explainability" (arXiv 2507.04380); the
    paper's mean over images is `e_rmse(pred, ref).mean()`.

    Example:
        >>> e_rmse(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([3.5355, 0.0000])
    """
    errors = error_rows(pred, ref)
    if pooled:
        errors = torch.linalg.vector_norm(errors) / len(errors) ** 0.5
    return errors.to(result_dtype(pred, ref))


def iou_at_k(pred: Tensor, ref: Tensor, k: int) -> Tensor:
    """Overlap of the k largest attributions: |top_k(pred) & top_k(ref)| / |top_k(pred) | top_k(ref)|.

    The top k are the first in the order of `xaifast.ops.rank_features`: descending value, ties by index. So equal
    values, zeros for example, overlap by position.

    Args:
        pred, ref: `[B, M]`, any real dtype, finite.
        k: 1 to M.

    Returns:
        `[B]` in 0..1, 1 is best; in the inputs' floating dtype, at least float32.

    Raises:
        TypeError: no dense real tensors, k no int.
        ValueError: k out of range, shapes or devices differ, nothing in the batch, values that are not finite.

    Cost: a sort of each row. Source: IoU@K of "Transferring visual explainability" (arXiv 2507.04380).

    Example:
        >>> iou_at_k(torch.tensor([[5.0, 4.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, 2.0, 1.0]]), 2)
        tensor([0.3333])
    """
    return iou_rows(pred, ref, k).to(result_dtype(pred, ref))


def rank_correlation(pred: Tensor, ref: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the ranks over m, equal values sharing their mean rank.

    Args:
        pred, ref: `[B, M]`, any real dtype, finite.

    Returns:
        `[B]` in -1..1, 1 is best; in the inputs' floating dtype, at least float32. NaN where either map is constant
        (M = 1 included), which has no ranks to compare; `scipy.stats.spearmanr` does the same.

    Raises:
        TypeError: no dense real tensors.
        ValueError: shapes or devices differ, nothing in the batch, values that are not finite.

    Cost: a sort of each row. Ranks are whole numbers, so that sums are exact up to M = 200000. Source: Spearman, "The
    proof and measurement of association between two things", 1904; used by arXiv 2507.04380.

    Example:
        >>> rank_correlation(torch.tensor([[0.1, 0.2, 0.9], [1.0, 1.0, 1.0]]), torch.tensor([[3, 5, 4], [1, 2, 3]]))
        tensor([0.5000,    nan])
    """
    return rank_correlation_rows(pred, ref).to(result_dtype(pred, ref))


def check_k(k: int) -> None:
    """k is an int of at least 1."""
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise TypeError(f"xaifast.metrics.iou_at_k: k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"xaifast.metrics.iou_at_k: k must be at least 1, got {k}")


def _check(name: str, pred: Tensor, ref: Tensor) -> None:
    caller = f"xaifast.metrics.{name}"
    check_maps(caller, "B, M", pred=pred, ref=ref)
    check_finite(caller, "pred", pred)
    check_finite(caller, "ref", ref)


def _centred_ranks(values: Tensor) -> Tensor:
    """Twice the mean rank less twice its average, float64 [B, M].

    Ranks begin at 1. The mean rank of a value is (#smaller + #smaller or equal + 1) / 2, its average (M + 1) / 2.
    """
    values = values.detach().contiguous()
    ordered, index = (values.to(torch.uint8) if values.dtype == torch.bool else values).sort(dim=1)
    smaller = torch.searchsorted(ordered, ordered)
    ranks = smaller + torch.searchsorted(ordered, ordered, right=True) - values.shape[1]
    return torch.empty_like(ranks).scatter_(1, index, ranks).double()
