"""Maps of pixels as maps of patches, the resolution at which models that choose patches are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_finite, check_maps, result_dtype

_CALLER = "xaifast.metrics.to_patches"


def to_patches(
    map: Tensor,
    patch: int | tuple[int, int],
    sign: Literal["clamp", "abs"] = "clamp",
    ignore: float | None = None,
    *,
    normalise: bool = True,
) -> Tensor:
    """Pixel maps averaged over the patches of `xaifast.grid_mask`: `[B, M]`, row-major.

    In this order: the sign rule, the mean over each patch, division by the largest patch of the map. A map of zeros
    stays zero. Patches at the right and bottom border are averaged over the pixels they have.

    For a segmentation pass the mask with `normalise=False`, which gives the share of each patch that is object;
    division would call an object smaller than a patch a full one.

    Args:
        map: `[B, H, W]` or `[B, 1, H, W]`, any real dtype, finite where not ignored.
        patch: side in pixels, or (height, width).
        sign: `"clamp"`: negative values count as 0; `"abs"`: as their size.
        ignore: a value, NaN included, of pixels that do not count, such as the border in a segmentation. A patch of
            nothing else is NaN, which the metrics over segmentations ignore.
        normalise: divide by the map's largest patch.

    Returns:
        `[B, M]` with M = ceil(H / patch) ceil(W / patch), in the map's floating dtype, at least float32; summed in
        float64. In 0..1 where normalised, or where the map is.

    Raises:
        TypeError: no dense real tensor.
        ValueError: a wrong shape, several channels, a patch below 1, an unknown sign rule, values that are not finite.

    Cost: two passes in float64. Source: OpenReview qr8leFAPrd; the paper gives no rule for signs.

    Example:
        >>> to_patches(torch.tensor([[[2.0, 4.0, 1.0], [0.0, -9.0, 0.5]]]), 2)
        tensor([[1.0000, 0.5000]])
        >>> trimap = torch.tensor([[[1.0, 1.0, 0.0], [0.0, torch.nan, torch.nan]]])  # object, background, border
        >>> to_patches(trimap, (2, 2), ignore=torch.nan, normalise=False)
        tensor([[0.6667, 0.0000]])
    """
    _check_map(map)
    size = tuple(patch) if isinstance(patch, Iterable) else (patch, patch)
    if len(size) != 2 or not all(type(side) is int and side >= 1 for side in size):
        raise ValueError(f"{_CALLER}: patch must be a positive int or two of them (height, width), got {patch!r}")
    if sign not in ("clamp", "abs"):
        raise ValueError(f'{_CALLER}: sign must be "clamp" or "abs", got {sign!r}')
    kept = _kept(map, ignore)
    check_finite(_CALLER, "map", map, kept, "name pixels that should not count in ignore (NaN works)")

    values = torch.where(kept, map, 0).double()
    values = values.abs() if sign == "abs" else values.clamp(min=0)
    total, n_kept = (
        F.avg_pool2d(x, size, ceil_mode=True, divisor_override=1).flatten(1) for x in (values, kept.double())
    )
    means = total / n_kept.clamp(min=1)
    if normalise:
        largest = means.amax(1, keepdim=True)
        means = means / torch.where(largest > 0, largest, 1)
    return torch.where(n_kept > 0, means, torch.nan).to(result_dtype(map))


def _check_map(map: Tensor) -> None:
    has_channel = isinstance(map, Tensor) and map.dim() == 4
    check_maps(_CALLER, "B, 1, H, W" if has_channel else "B, H, W", map=map)
    if has_channel and map.shape[1] != 1:
        raise ValueError(
            f"{_CALLER}: map must be [B, H, W] or [B, 1, H, W], got {list(map.shape)}; sum over channels first"
        )


def _kept(map: Tensor, ignore: float | None) -> Tensor:
    """Which pixels count, broadcastable to the map."""
    if ignore is None:
        return torch.ones_like(map[:1], dtype=torch.bool)
    # Not in the map's own dtype: -1 is 255 in uint8.
    return ~map.isnan() if ignore != ignore else map.double() != ignore
