"""Masking in plain torch: the executable specification of `xaifast.ops.masking` and its `select_rows` operator.

Every function here is made of differentiable torch operations only, so it is also what the operators decompose into
under `torch.func` transforms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def present_entries(bits: Tensor, index: Tensor, start: int, stop: int) -> Tensor:
    """Presence of every entry of a player map in the units start..stop: bool [stop - start, P].

    bits is int64 [N, W] or [B, N, W]; index holds player ids, int [P] or [B, P], where -1 means always present and an
    id beyond the words absent. Unit u is coalition u % N of input u // N.
    """
    n_coalitions = bits.shape[-2]
    units = torch.arange(start, stop, device=bits.device)
    inputs, coalitions = units // n_coalitions, units % n_coalitions
    words = bits[coalitions] if bits.dim() == 2 else bits[inputs, coalitions]  # [U, W]
    players = (index[None] if index.dim() == 1 else index[inputs]).long()  # [1, P] or [U, P]
    words = torch.nn.functional.pad(words, (0, 1))  # an empty word, for ids beyond the others
    word = words.gather(1, (players >> 6).clamp(0, words.shape[1] - 1).expand(stop - start, -1))  # [U, P]
    return ((word >> (players & 63)) & 1).bool() | (players < 0)


def select_rows(
    x: Tensor, bits: Tensor, index: Tensor, baseline: Tensor, rep: int, unit: int, start: int, stop: int
) -> Tensor:
    """Rows of the units start..stop: x where present, else the baseline: [stop - start, R, F].

    x is [B, F], baseline [R, F] or [B, R, F], index [P] or [B, P] with F = rep * P * unit: element e belongs to index
    entry (e // unit) % P.
    """
    n_units, period, n_background = stop - start, index.shape[-1], baseline.shape[-2]
    inputs = torch.arange(start, stop, device=x.device) // bits.shape[-2]
    present = present_entries(bits, index, start, stop).reshape(n_units, 1, 1, period, 1)
    rows = x[inputs].reshape(n_units, 1, rep, period, unit)
    if baseline.dim() == 2:
        base = baseline.reshape(1, n_background, rep, period, unit)
    else:
        base = baseline[inputs].reshape(n_units, n_background, rep, period, unit)
    return torch.where(present, rows, base).reshape(n_units, n_background, x.shape[1])


def mask_inputs(
    inputs: Tensor,
    present: Tensor,
    feature_mask: Tensor | None = None,
    baselines: float | Tensor = 0.0,
    *,
    background: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Masked copies of inputs [B, *feat]: select, then normalise, then cast: [B, N, *feat] or, with a background, [B,
    N, R, *feat].

    present is bool [N, M] or [B, N, M]; mean and std are [C] for dimension 1 of the inputs.
    """
    feat = inputs.shape[1:]
    if feature_mask is None:
        feature_mask = torch.arange(feat.numel(), device=inputs.device).reshape(feat)
    players = feature_mask.expand(inputs.shape).long()
    present = present.expand(inputs.shape[0], *present.shape[-2:])
    if background is None:
        background = torch.as_tensor(baselines, device=inputs.device, dtype=inputs.dtype).expand(inputs.shape)[:, None]
        squeeze = True
    else:
        background, squeeze = background.to(inputs.dtype).expand(inputs.shape[0], *background.shape), False
    out = []
    for b in range(inputs.shape[0]):
        seen = present[b][:, players[b].clamp(min=0)] | (players[b] < 0)  # [N, *feat]
        out.append(torch.where(seen[:, None], inputs[b], background[b]))  # [N, R, *feat]
    rows = torch.stack(out)
    channel = (-1,) + (1,) * (len(feat) - 1)
    if mean is not None:
        rows = rows - mean.reshape(channel)
    if std is not None:
        rows = rows / std.reshape(channel)
    rows = rows.to(rows.dtype if dtype is None else dtype)
    return rows[:, :, 0] if squeeze else rows


def blend_inputs(
    inputs: Tensor, masks: Tensor, feature_mask: Tensor | None = None, baselines: float | Tensor = 0.0
) -> Tensor:
    """baseline + m * (x - baseline) for soft masks [N, M] or [B, N, M] over players: [B, N, *feat]."""
    feat = inputs.shape[1:]
    if feature_mask is None:
        feature_mask = torch.arange(feat.numel(), device=inputs.device).reshape(feat)
    players = feature_mask.expand(inputs.shape).long()
    masks = masks.expand(inputs.shape[0], *masks.shape[-2:])
    base = torch.as_tensor(baselines, device=inputs.device, dtype=inputs.dtype).expand(inputs.shape)
    weight = torch.stack(
        [torch.where(p < 0, 1, m[:, p.clamp(min=0)]) for p, m in zip(players, masks, strict=True)]
    )  # [B, N, *feat]
    return base[:, None] + weight * (inputs - base)[:, None]
