"""`ShapleyResult.plot`: which inputs and outputs, and whether they are pictures or bars."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import figures
from ..players import Players

if TYPE_CHECKING:
    from .kernel_shap import ShapleyResult

_CALLER = "xaifast.ShapleyResult.plot"


def plot_result(
    result: ShapleyResult,
    index: int | Sequence[int] | None,
    output: int | None,
    names: Sequence[str] | None,
    max_items: int,
) -> object:
    """See `ShapleyResult.plot`."""
    rows = _rows(index, result.values.shape[0], max_items)
    values, errors, base, full, outputs = _one_output(result, rows, output)
    label, titles = _texts(rows, outputs)
    caption = f"{result.n_evaluations:,} evaluations an input, estimator {result.estimator}"
    if result.estimator == "exact" or not bool(torch.isfinite(errors).any()):
        errors, caption = None, caption + ("" if result.estimator == "exact" else ", too few for standard errors")

    inputs, players = tuple(x[rows].cpu() for x in result._inputs), _of_rows(result._players, rows)
    if _are_images(inputs, players):
        maps = _over_pixels(players.expand(values, inputs)[0])
        if errors is not None:
            errors = _over_pixels(players.expand(errors.square(), inputs)[0]).sqrt()
        ends = zip(titles, base.tolist(), full.tolist(), strict=True)
        titles = [f"{title}\n{low:.3g} → {high:.3g}".replace("-", "\N{MINUS SIGN}") for title, low, high in ends]
        return figures.map_figure(maps, images=inputs[0], errors=errors, titles=titles, label=label, caption=caption)
    if errors is not None:
        caption += ", whiskers ± one standard error"
    return figures.bar_figure(
        values, names=_player_names(names, inputs, players), errors=errors, base=base, titles=titles, label=label,
        caption=caption,
    )  # fmt: skip


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


def _one_output(result: ShapleyResult, rows: list[int], output: int | None) -> tuple:
    """Values and standard errors ``[n, M]``, base and full values ``[n]``, and which output it is of each, if known."""
    parts = [x[rows].detach().cpu() for x in (result.values, result.std_errors, result.base_values, result.full_values)]
    if result.values.dim() == 2:
        if output is not None:
            raise ValueError(
                f"{_CALLER}: output chooses among the outputs of values [B, M, K], but these are [B, M], of one output "
                "only; leave it out, or call kernel_shap with target=None"
            )
        return (*parts, None if result.targets is None else result.targets[rows].tolist())
    n_outputs = result.values.shape[2]
    if output is not None and not (isinstance(output, Integral) and 0 <= output < n_outputs):
        raise ValueError(f"{_CALLER}: output must be an int in 0..{n_outputs - 1}, got {output!r}")
    chosen = parts[3].argmax(1) if output is None else torch.full((len(rows),), int(output))
    at = torch.arange(len(rows))
    values, errors, base, full = parts
    return values[at, :, chosen], errors[at, :, chosen], base[at, chosen], full[at, chosen], chosen.tolist()


def _texts(rows: list[int], outputs: list[int] | None) -> tuple[str, list[str]]:
    """What the values are, and a title for each input; the output is said once where all share it."""
    if outputs is None:
        return "Shapley value", [f"input {i}" for i in rows]
    if len(set(outputs)) == 1:
        return f"Shapley value of output {outputs[0]}", [f"input {i}" for i in rows]
    return "Shapley value", [f"input {i}, output {k}" for i, k in zip(rows, outputs, strict=True)]


def _of_rows(players: Players, rows: list[int]) -> Players:
    """The players of some inputs, on the CPU."""
    masks = tuple(mask[rows] if own else mask for mask, own in zip(players.masks, players.per_input, strict=True))
    return replace(players, masks=tuple(mask.cpu() for mask in masks), absent=None)


def _are_images(inputs: tuple[Tensor, ...], players: Players) -> bool:
    """One input ``[n, C, H, W]``, or ``[n, H, W]`` in which players differ along both axes (else it is a sequence)."""
    if len(inputs) != 1 or inputs[0].dim() not in (3, 4) or min(inputs[0].shape[-2:]) < 2:
        return False
    mask = players.masks[0].expand(inputs[0].shape if players.per_input[0] else inputs[0].shape[1:])
    sequence = bool((mask == mask[..., :1]).all()) or bool((mask == mask[..., :1, :]).all())
    return inputs[0].dim() == 4 or not sequence


def _over_pixels(maps: Tensor) -> Tensor:
    """``[n, H, W]`` of ``[n, (C,) H, W]``: the channels' common value, or their sum where players differ by channel."""
    if maps.dim() == 3:
        return maps
    same = bool(((maps == maps[:, :1]) | maps.isnan()).all())
    return maps[:, 0] if same else maps.sum(1)


def _player_names(
    names: Sequence[str] | None, inputs: tuple[Tensor, ...], players: Players
) -> list[str] | list[list[str]]:
    """Names of the players; in tables with one player a column, each with the input's value of it."""
    if names is not None and len(names) != players.n_players:
        raise ValueError(f"{_CALLER}: names must hold one name a player ({players.n_players}), got {len(names)}")
    columns = torch.arange(players.n_players)
    table = len(inputs) == 1 and inputs[0].dim() == 2 and torch.equal(players.masks[0], columns)
    given = [str(name) for name in names] if names is not None else None
    if not table:
        return given or [f"player {i}" for i in columns.tolist()]
    given = given or [f"column {i}" for i in columns.tolist()]
    return [[f"{name} = {x:.4g}" for name, x in zip(given, row, strict=True)] for row in inputs[0].tolist()]
