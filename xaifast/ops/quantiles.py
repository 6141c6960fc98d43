"""Masks that keep the top share of an attribution: hard and nested, or soft and differentiable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xaifast.ops._registry import tracing
from xaifast.ops.ranking import rank_features

BAND = 10.0  # soft masks are within BAND_ERROR of 0 or 1 at BAND temperatures from the threshold and farther
BAND_ERROR = 4.6e-5  # 1 / (1 + e^10)


def quantile_masks(
    attributions: Tensor,  # [B, H, W], [B, 1, H, W] or [B, C, H, W]
    quantiles: Sequence[float] | Tensor,  # Q shares in [0, 1]
    *,
    temperature: float | None = None,
) -> Tensor:
    """Masks that keep the top share q of the pixels, for every q: [B, Q, H, W], of the attributions' dtype.

    With P = H W pixels and k = floor(q P + 1/2):

    - hard (``temperature=None``): 1 for the first k pixels of the order of `rank_features` (descending value, ties by
      ascending flat index), else 0. Exactly k pixels, so masks are nested, whatever the ties.
    - soft: sigmoid((a - t) / temperature) with the threshold t midway between the k-th and the (k+1)-th value, zeros
      for k = 0 and ones for k = P. Differentiable with respect to the attributions, through the threshold as well, so
      that adding a constant changes nothing; at a tie, as a sort is. As the temperature falls, the hard mask is
      approached: a pixel with |a - t| >= 10 temperature differs from it by less than 4.6e-5. Only where the k-th and
      the (k+1)-th value tie is there no limit: all pixels of that value, hence all of a constant map, stay at 0.5.

    Args:
        attributions: floating; channels are summed, in float32 at least.
        quantiles: shares of pixels to keep.
        temperature: positive, in the units of the attributions (a multiple of their standard deviation, say).

    Raises:
        TypeError: attributions that are not floating.
        ValueError: other shapes, NaN (for soft masks also infinities), quantiles outside [0, 1], a temperature that is
            not positive. Compiled code does not look at values.

    Cost: a sort of each input and one write of the result.
    Source: areas of FEI's and RISE's insertion and deletion curves (Petsiuk, Das, Saenko, BMVC 2018), made soft.

    A training loss, the insertion area of a model under soft masks; with 1 - masks, that of deletion:

        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, baseline = torch.randn(2, 1, 4, 4), 0.0
        >>> attributions = torch.randn(2, 4, 4, requires_grad=True)
        >>> shares = torch.linspace(0, 1, 9)
        >>> masks = quantile_masks(attributions, shares, temperature=0.1)  # [2, 9, 4, 4]
        >>> rows = baseline + masks[:, :, None] * (x[:, None] - baseline)  # [2, 9, 1, 4, 4]
        >>> probabilities = model(rows.flatten(0, 1)).softmax(-1)[:, 0].view(2, 9)
        >>> area = torch.trapezoid(probabilities, shares)  # [2]
        >>> (-area.mean()).backward()
        >>> attributions.grad.shape
        torch.Size([2, 4, 4])
    """
    maps = _maps(attributions)  # [B, P]
    counts = _counts(quantiles, maps)  # [Q]
    if temperature is None:
        if not tracing() and maps.isnan().any():
            raise ValueError("xaifast.quantile_masks: attributions must not be NaN; repair them, e.g. by nan_to_num()")
        ranks = rank_features(maps, nan="last")
        masks = ranks[:, None] < counts[:, None]
    else:
        masks = _soft(maps, counts, temperature)
    return masks.to(attributions.dtype).view(maps.shape[0], counts.shape[0], *attributions.shape[-2:])


def _soft(maps: Tensor, counts: Tensor, temperature: float) -> Tensor:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"xaifast.quantile_masks: temperature must be a positive number or None, got {temperature!r}")
    if not tracing() and not maps.isfinite().all():
        raise ValueError(
            "xaifast.quantile_masks: attributions must be finite where masks are soft; repair them, e.g. by "
            "nan_to_num(), or use hard masks"
        )
    ordered = maps.sort(dim=1, descending=True, stable=True).values
    above = torch.nn.functional.pad(ordered, (1, 0), value=math.inf)  # k = 0: no pixel reaches an infinite threshold
    below = torch.nn.functional.pad(ordered, (0, 1), value=-math.inf)
    thresholds = above[:, counts] / 2 + below[:, counts] / 2  # [B, Q]
    return torch.sigmoid((maps[:, None] - thresholds[:, :, None]) / temperature)


def _maps(attributions: Tensor) -> Tensor:
    """Attributions of pixels [B, P], in float32 at least."""
    if not isinstance(attributions, Tensor) or not attributions.is_floating_point():
        given = attributions.dtype if isinstance(attributions, Tensor) else type(attributions).__name__
        raise TypeError(f"xaifast.quantile_masks: attributions must be a floating tensor, got {given}; convert them")
    if attributions.dim() not in (3, 4) or 0 in attributions.shape[1:]:
        raise ValueError(
            "xaifast.quantile_masks: attributions must be [B, H, W] or [B, C, H, W] with at least one pixel, got "
            f"{list(attributions.shape)}; expand players to pixels first"
        )
    maps = attributions.to(torch.promote_types(attributions.dtype, torch.float32))
    return (maps.sum(1) if maps.dim() == 4 else maps).flatten(1)


def _counts(quantiles: Sequence[float] | Tensor, maps: Tensor) -> Tensor:
    """Pixels kept for every share, q P with halves rounded up: int64 [Q]."""
    given = quantiles if isinstance(quantiles, Tensor) else torch.tensor(quantiles, dtype=torch.float64, device="cpu")
    shares = given.detach().double()
    fit = shares.dim() == 1 and shares.numel() > 0
    if not fit or not (tracing() or bool(((shares >= 0) & (shares <= 1)).all())):
        raise ValueError(
            f"xaifast.quantile_masks: quantiles must be one or more shares [Q] between 0 and 1, got {quantiles}"
        )
    return (shares * maps.shape[1] + 0.5).floor().long().to(maps.device)
