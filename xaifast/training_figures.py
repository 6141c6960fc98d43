"""Drawing what forms over training: maps as small multiples, players as lines; in the style of `xaifast.figures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figures import (
    _FAINT,
    _INK,
    NEGATIVE,
    POSITIVE,
    _clean,
    _colormap,
    _new_figure,
    _scale,
    as_array,
    signed_limit,
    signed_rgba,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forming_figure(
    values: object,
    *,
    columns: Sequence[str],
    titles: Sequence[str] | None = None,
    label: str = "attribution",
    caption: str = "",
) -> Figure:
    """Signed maps as they form: a row of maps an input, a column a moment, one symmetric scale for all.

    Args:
        values: ``[n, S, H, W]``.
        columns: S names.
        titles: n names.
        label: What the values are.
        caption: Above the figure.
    """
    values = as_array(values)
    n, n_moments, height, width = values.shape
    limit = signed_limit(values)
    tall = 1.25 * min(max(height / width, 0.4), 2.5)
    figure = _new_figure(max(4.2, 1.3 * n_moments + 0.4), n * tall + 1.15)
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(n, n_moments, squeeze=False)
    for (i, s), axis in np.ndenumerate(axes):
        axis.imshow(signed_rgba(values[i, s], limit))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#dddddd")
        if i == 0:
            axis.set_title(columns[s], fontsize=8, color=_INK)
        if s == 0 and titles is not None:
            axis.set_ylabel(titles[i], fontsize=8, color=_INK)
    scale = _scale(_colormap(NEGATIVE, (255, 255, 255), POSITIVE), -limit, limit)
    beyond = bool(np.nanmax(np.abs(values), initial=0) > limit)
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", shrink=0.5, aspect=40, extend="both" if beyond else "neither"
    )
    bar.set_label(label + ("; full colour: the 99.5 % quantile" if beyond else ""), fontsize=8, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, color=_FAINT, labelcolor=_INK)
    if caption:
        figure.suptitle(caption, fontsize=9, color=_INK)
    return figure


def path_figure(
    values: object,
    moments: object,
    *,
    names: Sequence[str] | Sequence[Sequence[str]],
    titles: Sequence[str] | None = None,
    label: str = "attribution",
    along: str = "checkpoint",
    caption: str = "",
    max_lines: int = 6,
) -> Figure:
    """Lines of players over moments, a panel an input: those that end or have been largest in colour, others grey.

    Args:
        values: ``[n, S, M]``.
        moments: ``[S]``, ascending.
        names: M names, or M for each input.
        titles: n names.
        label: What the values are.
        along: What the moments are.
        caption: Above the figure.
        max_lines: Named lines a panel at most; each is named at its end.
    """
    values, moments = as_array(values), as_array(moments)
    n = len(values)
    names = [list(names)] * n if isinstance(names[0], str) else names
    across = min(n, 2)
    figure = _new_figure(4.8 * across, 2.9 * -(-n // across) + (0.3 if caption else 0))
    axes = figure.subplots(-(-n // across), across, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    for i, axis in enumerate(axes[:n]):
        order = np.argsort(-np.abs(values[i]).max(0), kind="stable")
        if len(order) > max_lines:
            axis.plot(moments, values[i][:, order[max_lines:]], color="#cccccc", linewidth=0.6)
        ends = values[i][-1, order[:max_lines]]
        low, high = np.nanmin(values[i]), np.nanmax(values[i])
        places = _apart(ends, 0.075 * ((high - low) or 1.0))
        for j, end, place in zip(order[:max_lines], ends, places, strict=True):
            colour = np.array(NEGATIVE if end < 0 else POSITIVE) / 255
            axis.plot(moments, values[i][:, j], color=colour, linewidth=1.4)
            axis.annotate(
                names[i][j], (moments[-1], place), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7.5, color=_INK, annotation_clip=False,
            )  # fmt: skip
        axis.axhline(0, color=_FAINT, linewidth=0.8, zorder=0)
        axis.set_xlabel(along, fontsize=8, color=_INK)
        axis.set_ylabel(label, fontsize=8, color=_INK)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _clean(axis)
        if titles is not None:
            axis.set_title(titles[i], fontsize=9, color=_INK, loc="left")
    if caption:
        figure.suptitle(caption, fontsize=9, color=_INK)
    return figure


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Places of labels at least ``gap`` apart, pushed upwards from below, in the order of the places."""
    order = np.argsort(places, kind="stable")
    apart = places[order]
    for k in range(1, len(apart)):
        apart[k] = max(apart[k], apart[k - 1] + gap)
    apart -= (apart - places[order]).mean() if len(apart) else 0
    result = np.empty_like(apart)
    result[order] = apart
    return result
