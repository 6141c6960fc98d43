"""`XtrainResult.plot`: which inputs, which checkpoints, and whether they are pictures, lines or bars."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import figures, training_figures
from ._plot import _are_images, _of_rows, _over_pixels, _player_names

if TYPE_CHECKING:
    from .xtrain_result import XtrainResult

_CALLER = "xaifast.XtrainResult.plot"
_LABELS = {"xtrain": "XtrAIn", "xstep": "Xstep", "xtrain+": "XtrAIn+"}


def plot_result(
    result: XtrainResult,
    index: int | Sequence[int] | None,
    names: Sequence[str] | None,
    max_items: int,
    max_checkpoints: int,
) -> object:
    """See `XtrainResult.plot`."""
    n_players = result._players.n_players
    if names is not None and len(names) != n_players:
        raise ValueError(f"{_CALLER}: names must hold one name a player ({n_players}), got {len(names)}")
    if max_checkpoints < 1:
        raise ValueError(f"{_CALLER}: max_checkpoints must be at least 1, got {max_checkpoints}")
    rows = _rows(index, len(result.values), max_items)
    inputs, players = (result._inputs[rows].cpu(),), _of_rows(result._players, rows)
    ends = torch.tensor([end for _, end in result.steps])
    formed = result.values[None] if result.per_step is None else result.formed()
    formed = formed[:, rows, :n_players].detach().cpu()  # [S | 1, n, M]
    label = _LABELS[result.variant]
    titles = [f"input {i}, output {int(result.target[i])}" for i in rows]
    if _are_images(inputs, players):
        kept = _spread(len(formed), max_checkpoints)
        maps = torch.stack([_over_pixels(players.expand(formed[s], inputs)[0]) for s in kept], 1)  # [n, kept, H, W]
        columns = [f"checkpoint {int(ends[len(ends) - len(formed) + s])}" for s in kept]
        return training_figures.forming_figure(maps, columns=columns, titles=titles, label=label)
    labels = _player_names(names, inputs, players)
    if result.per_step is None:
        return figures.bar_figure(formed[0], names=labels, titles=titles, label=label)
    start = torch.zeros(1, *formed.shape[1:], dtype=formed.dtype)
    paths, moments = torch.cat((start, formed)).transpose(0, 1), torch.cat((torch.tensor([result.steps[0][0]]), ends))
    return training_figures.path_figure(paths, moments, names=labels, titles=titles, label=label)


def _rows(index: int | Sequence[int] | None, batch: int, max_items: int) -> list[int]:
    if index is None:
        return list(range(min(batch, max_items)))
    try:
        rows = [operator.index(index)]
    except TypeError:
        rows = [operator.index(i) for i in index]
    if not rows or not all(-batch <= i < batch for i in rows):
        raise IndexError(f"{_CALLER}: index must name inputs 0..{batch - 1}, got {index!r}")
    return [i % batch for i in rows]


def _spread(length: int, most: int) -> list[int]:
    """At most so many of 0..length-1, evenly, the last among them."""
    places: Tensor = torch.linspace(length - 1, 0, most).round().long()
    return sorted({0} if length == 1 else set(places.tolist()))
