"""Perturbation by rank in plain torch: the executable specification of `xaifast.ops.perturb`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shown_entries(rank: Tensor, points: Tensor, start: int, stop: int) -> Tensor:
    """Whether x is seen, for every entry of a rank map in the units start..stop: bool [stop - start, P].

    rank is int32 [1, P] or [B, P], -1 for entries that are never perturbed; points int64 [N, 2] of (count, 0 insertion
    | 1 deletion). Unit u is point u % N of input u // N.
    """
    units = torch.arange(start, stop, device=points.device)
    count, deletes = points[units % max(points.shape[0], 1)].unbind(1)  # [U]
    ranks = rank if rank.shape[0] == 1 else rank[units // max(points.shape[0], 1)]  # [1, P] or [U, P]
    return (ranks < 0) | ((ranks < count[:, None]) != (deletes[:, None] != 0))


def perturb_rows(
    x: Tensor, insertion: Tensor, deletion: Tensor, rank: Tensor, rep: int, unit: int, points: Tensor, start: int,
    stop: int,
) -> Tensor:  # fmt: skip
    """Rows of the units start..stop: x where shown, else the baseline of the point's kind: [stop - start, F].

    x is [B, F], insertion and deletion [1, F] or [B, F], rank [1, P] or [B, P] with F = rep * P * unit: element e
    belongs to entry (e // unit) % P.
    """
    units = torch.arange(start, stop, device=x.device)
    inputs, deletes = units // max(points.shape[0], 1), points[units % max(points.shape[0], 1), 1] != 0
    shown = shown_entries(rank, points, start, stop)[:, None, :, None]

    def rows(t: Tensor) -> Tensor:
        t = t if t.shape[0] == 1 else t[inputs]
        return t.reshape(t.shape[0], rep, rank.shape[1], unit)

    base = torch.where(deletes[:, None, None, None], rows(deletion), rows(insertion))
    return torch.where(shown, rows(x), base).reshape(stop - start, x.shape[1])


def perturb_by_rank(
    inputs: Tensor,
    ranks: Tensor,
    insertion_counts: Sequence[int] = (),
    deletion_counts: Sequence[int] = (),
    insertion_baseline: float | Tensor = 0.0,
    deletion_baseline: float | Tensor = 0.0,
    feature_mask: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Perturbed copies of inputs [B, *feat]: select, then normalise, then cast: [B, N_ins + N_del, *feat].

    ranks is [B, *feat'] with feat' broadcastable to feat, or [B, M] where a feature mask is given; mean and std are [C]
    for dimension 1 of the inputs.
    """
    feat = inputs.shape[1:]
    if feature_mask is None:
        ranks = ranks.reshape(len(ranks), *(1,) * (inputs.dim() - ranks.dim()), *ranks.shape[1:]).expand(inputs.shape)
    else:
        players = feature_mask.expand(inputs.shape).flatten(1).long()
        ranks = torch.where(players < 0, -1, ranks.gather(1, players.clamp(min=0))).reshape(inputs.shape)
    insertion, deletion = (
        torch.as_tensor(b, device=inputs.device).to(inputs.dtype).expand(inputs.shape)
        for b in (insertion_baseline, deletion_baseline)
    )
    rows = [torch.where(ranks < k, inputs, insertion) for k in insertion_counts]
    rows += [torch.where((ranks >= 0) & (ranks < k), deletion, inputs) for k in deletion_counts]
    out = torch.stack(rows, 1)
    channel = (-1,) + (1,) * (len(feat) - 1)
    if mean is not None:
        out = out - mean.reshape(channel)
    if std is not None:
        out = out / std.reshape(channel)
    return out if dtype is None else out.to(dtype)
