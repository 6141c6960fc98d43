"""CleanScore: how much of an attribution lies on a known signal, and how silent it leaves the background."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_finite, result_dtype

_CALLER = "xaifast.metrics.clean_score"
KINDS = ("energy", "contrast")


def clean_score_rows(attributions: Tensor, signal_mask: Tensor, kind: str) -> Tensor:
    """The score of each input, float64 [B]."""
    check_kind(kind)
    signal = _check(attributions, signal_mask)
    size = attributions.double().abs()
    on = torch.where(signal, size, 0).flatten(1).sum(1)
    off = torch.where(signal, 0, size).flatten(1).sum(1)
    if kind == "contrast":
        n_signal = signal.flatten(1).sum(1)
        on, off = on / n_signal, off / (signal[0].numel() - n_signal)
    return on / (on + off)


def clean_score(attributions: Tensor, signal_mask: Tensor, kind: str = "energy") -> Tensor:
    """Share of an attribution on the features that are known to carry the signal.

    With S the signal and N the background of an input, and a its attribution::

        energy   = sum_S |a| / (sum_S |a| + sum_N |a|)
        contrast = mean_S |a| / (mean_S |a| + mean_N |a|)

    A uniform map scores |S| / (|S| + |N|) in energy and 1/2 in contrast. Both reward silence in the background, so a
    method that multiplies by an input whose background is 0 scores 1 whatever it found: state the preprocessing with
    every score, and give that of |x| itself beside.

    Args:
        attributions: `[B, ...]`, any real dtype, finite; signs do not count.
        signal_mask: bool, or 0 and 1: of the attributions' shape, of one input's, `[...]`, or with an axis of 1 where
            it is shared (channels).
        kind: "energy" or "contrast".

    Returns:
        `[B]` in 0..1, 1 is best; in the attributions' floating dtype, at least float32; summed in float64. NaN where
        there is nothing to compare: a map of zeros (never 1), and for "contrast" an input without signal or without
        background. `clean_score(...).isnan().sum()` counts them, as does `CleanScore.undefined`.

    Raises:
        TypeError: no dense real tensors.
        ValueError: shapes or devices that do not fit, a mask of other values, an empty batch, values that are not
            finite.

    Cost: one pass. Source: CleanScore of XtrAIn (arXiv 2606.10877), of which only the idea is known; both formulas are
    this package's reading.

    Example:
        >>> maps = torch.tensor([[3.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> clean_score(maps, torch.tensor([True, False, False, False]))
        tensor([0.7500,    nan])
        >>> clean_score(maps, torch.tensor([True, False, False, False]), kind="contrast")
        tensor([0.9000,    nan])
    """
    return clean_score_rows(attributions, signal_mask, kind).to(result_dtype(attributions))


def check_kind(kind: str) -> None:
    """Kind is known."""
    if kind not in KINDS:
        raise ValueError(f'{_CALLER}: kind must be "energy" or "contrast", got {kind!r}')


def _check(attributions: object, signal_mask: object) -> Tensor:
    """The mask as bool of the attributions' shape."""
    for name, values in (("attributions", attributions), ("signal_mask", signal_mask)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{_CALLER}: {name} must be a tensor, got {type(values).__name__}")
        if values.layout != torch.strided or values.is_complex():
            raise TypeError(f"{_CALLER}: {name} must be a dense real tensor, got {values.layout} of {values.dtype}")
    shape = attributions.shape
    if attributions.dim() < 2 or attributions.numel() == 0:
        raise ValueError(f"{_CALLER}: attributions must be [B, ...] and not empty, got {list(shape)}")
    mask = signal_mask[None] if signal_mask.dim() == attributions.dim() - 1 else signal_mask
    if mask.dim() != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"{_CALLER}: signal_mask must have the attributions' shape {list(shape)}, or {list(shape[1:])} for all "
            f"inputs, with 1 for axes it is shared along, got {list(signal_mask.shape)}; flatten both, or "
            "unsqueeze(1) a mask without channels"
        )
    if mask.device != attributions.device:
        raise ValueError(
            f"{_CALLER}: attributions and signal_mask must be on one device, got {attributions.device} and "
            f"{mask.device}; move one with .to()"
        )
    check_finite(_CALLER, "attributions", attributions)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{_CALLER}: signal_mask must be bool, or 0 and 1, got other values; compare it, mask > 0.5")
    return mask.bool().expand(shape)
