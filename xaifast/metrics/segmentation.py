"""How well importance agrees with a segmentation of the object.

Source: the IA/EA/PA architectures (OpenReview qr8leFAPrd). `xaifast.metrics.to_patches` makes `[B, M]` of maps and
masks. The functions named `*_rows` and `*_counts` give float64 numbers an input, which the classes sum.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ._checks import check_finite, check_maps, result_dtype


def difference_rows(importance: Tensor, seg: Tensor, ignore_value: float | None = None) -> Tensor:
    """Mean absolute difference of each input over the patches kept, float64 [B]."""
    kept = _kept("segmentation_difference", importance, seg, ignore_value)
    total = torch.where(kept, importance.double() - seg.double(), 0).abs().sum(1)
    n_kept = kept.sum(1)
    return torch.where(n_kept > 0, total / n_kept.clamp(min=1), torch.nan)


def overlap_counts(
    importance: Tensor, seg: Tensor, threshold: float = 0.5, ignore_value: float | None = None
) -> Tensor:
    """Patches of each input in foreground and background, float64 [B, 2, 2]: (intersection, union), (fore, back)."""
    check_threshold(threshold)
    kept = _kept("macro_iou", importance, seg, ignore_value)
    a, m = importance >= threshold, seg >= threshold
    sets = torch.stack([a & m, ~(a | m), a | m, ~(a & m)])  # [4, B, M]
    return (sets & kept).sum(2).double().T.unflatten(1, (2, 2))


def mean_overlap(counts: Tensor) -> Tensor:
    """Mean of foreground and background IoU of counts [..., 2, 2]: an empty union counts as 1, two of them as NaN."""
    intersection, union = counts.unbind(-2)
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1).mean(-1)
    return torch.where(union.sum(-1) > 0, iou, torch.nan)


def segmentation_difference(importance: Tensor, seg: Tensor, ignore_value: float | None = None) -> Tensor:
    """Mean absolute difference from a segmentation: d[b] = mean_m |seg[b, m] - importance[b, m]|.

    Args:
        importance: `[B, M]`, meant to be in 0..1, any real dtype, finite where the segmentation is not ignored.
        seg: `[B, M]` in 0..1, the share of each patch that is object; any real dtype. NaN: ignored.
        ignore_value: a value of `seg` that is ignored too, such as 255.

    Returns:
        `[B]`, in 0..1 for importance in 0..1, 0 is best; NaN where all patches of an input are ignored. In the inputs'
        floating dtype, at least float32; summed in float64. The mean over the inputs is the paper's d; inputs with
        ignored patches then count as much as others.

    Raises:
        TypeError: no dense real tensors.
        ValueError: shapes or devices differ, nothing in the batch, `seg` outside of 0..1, `importance` not finite.

    Cost: one pass. Source: segmentation difference of OpenReview qr8leFAPrd.

    Example:
        >>> seg = torch.tensor([[1.0, 0.0, torch.nan, 0.5]])
        >>> segmentation_difference(torch.tensor([[0.7, 0.3, 0.9, 0.5]]), seg)
        tensor([0.2000])
    """
    return difference_rows(importance, seg, ignore_value).to(result_dtype(importance, seg))


def macro_iou(
    importance: Tensor,
    seg: Tensor,
    threshold: float = 0.5,
    ignore_value: float | None = None,
    *,
    pooled: bool = False,
) -> Tensor:
    """Macro-averaged intersection over union: the mean of foreground IoU and background IoU.

    Foreground is importance >= threshold and seg >= threshold, background the rest. An empty union counts as 1: an
    object that neither map has is agreed upon.

    Args:
        importance: `[B, M]`, any real dtype, finite where the segmentation is not ignored.
        seg: `[B, M]` in 0..1, the share of each patch that is object; any real dtype. NaN: ignored.
        threshold: 0 to 1, for both maps, compared in their own dtypes.
        ignore_value: a value of `seg` that is ignored too, such as 255.
        pooled: count patches over the whole batch and give one number, rather than one an input.

    Returns:
        `[B]`, or a scalar where pooled, in 0..1, 1 is best; NaN where all patches are ignored. In the inputs' floating
        dtype, at least float32.

    Raises:
        TypeError: no dense real tensors.
        ValueError: shapes or devices differ, nothing in the batch, `seg` or `threshold` outside of 0..1, `importance`
            not finite.

    Cost: one pass. Source: macro-averaged IoU of OpenReview qr8leFAPrd. The paper does not say how: the threshold of
    the segmentation, the mean over images and the empty union are choices of this package.

    Example:
        >>> macro_iou(torch.tensor([[0.9, 0.6, 0.2, 0.1]]), torch.tensor([[1, 0, 0, 0]]))
        tensor([0.5833])
    """
    counts = overlap_counts(importance, seg, threshold, ignore_value)
    return mean_overlap(counts.sum(0) if pooled else counts).to(result_dtype(importance, seg))


def check_threshold(threshold: float) -> None:
    """The threshold is a number in 0..1, where segmentations are."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"xaifast.metrics.macro_iou: threshold must be a number in 0..1, got {threshold!r}")


def _kept(name: str, importance: Tensor, seg: Tensor, ignore_value: float | None) -> Tensor:
    """Check both maps; which patches count: bool [B, M]."""
    caller = f"xaifast.metrics.{name}"
    check_maps(caller, "B, M", importance=importance, seg=seg)
    kept = ~seg.isnan()
    if ignore_value is not None:
        kept &= seg.double() != ignore_value  # not in its own dtype: -1 is 255 in uint8
    outside = kept & ~((seg >= 0) & (seg <= 1))
    if bool(outside.any()):
        index = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{caller}: seg must be in 0..1, got {seg[tuple(index)].item()} at {index}; "
            "compare labels with the object's, and name others in ignore_value"
        )
    check_finite(caller, "importance", importance, kept)
    return kept
