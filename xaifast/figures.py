"""Drawing attributions: signed maps over pictures, bars from base to full value, curves over shares of features.

Everything takes tensors or arrays and returns a ``matplotlib.figure.Figure`` that belongs to nobody: no pyplot, no
global state, no change of backend. One colour scale serves all: orange speaks for the output, purple against it, and
the strength of the colour is the size of the value.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE = (230, 97, 1), (94, 60, 153)  # ends of ColorBrewer's PuOr, safe for colour-blind readers
QUANTILE = 0.995
_INK, _FAINT = "#333333", "#999999"
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}


def as_array(x: object) -> np.ndarray:
    """A tensor on any device, or anything array-like, as float64."""
    return x.detach().to("cpu", torch.float64).numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=np.float64)


def signed_limit(values: object) -> float:
    """Where a symmetric colour scale ends: the 99.5 % quantile of the finite ``|values|``, any shape.

    A quantile, so that one outlier does not bleach all the others; the largest value where the quantile is zero, and 1
    where all values are zero.

    Example:
        >>> signed_limit(torch.tensor([-2.0, 0.0, 2.0, torch.nan]))
        2.0
    """
    sizes = np.abs(as_array(values))
    sizes = sizes[np.isfinite(sizes)]
    if sizes.size == 0 or sizes.max() == 0:
        return 1.0
    return float(np.quantile(sizes, QUANTILE)) or float(sizes.max())


def signed_rgba(values: object, limit: float) -> np.ndarray:
    """Colours of values: orange above zero, purple below, opacity ``|value| / limit``; NaN is transparent.

    Args:
        values: ``[...]``.
        limit: The value of full colour, positive.

    Returns:
        uint8 ``[..., 4]``. Laid over a grey picture it is an overlay, over white a map.

    Example:
        >>> signed_rgba([0.0, -5.0], limit=5.0).tolist()
        [[230, 97, 1, 0], [94, 60, 153, 255]]
    """
    values = np.nan_to_num(as_array(values))
    colours = np.empty((*values.shape, 4), dtype=np.uint8)
    colours[..., :3] = np.where((values < 0)[..., None], NEGATIVE, POSITIVE)
    colours[..., 3] = np.rint(255 * np.clip(np.abs(values) / limit, 0, 1))
    return colours


def display_image(x: object) -> np.ndarray:
    """A model input as a picture: ``[H, W]`` or ``[H, W, 3]`` floats in 0..1.

    Values within 0..1 stay; others (normalised inputs, 0..255) are stretched from their 0.5 % to their 99.5 % quantile,
    all channels together, so that hues keep their order. Channels other than one or three are averaged.

    Args:
        x: ``[H, W]``, ``[C, H, W]`` or ``[H, W, 3]``.

    Example:
        >>> display_image(torch.tensor([[[-3.0, 3.0]]])).round(2).tolist()
        [[0.0, 1.0]]
    """
    x = np.nan_to_num(as_array(x))
    if x.ndim not in (2, 3):
        raise ValueError(
            f"xaifast.figures.display_image: a picture must be [H, W], [C, H, W] or [H, W, 3], got shape {x.shape}; "
            "pass one input without its batch axis"
        )
    if x.ndim == 3 and x.shape[0] == 3:
        x = np.moveaxis(x, 0, -1)
    elif x.ndim == 3 and x.shape[-1] != 3:
        x = x.mean(0)
    if x.min() < 0 or x.max() > 1:
        low, high = np.quantile(x, (1 - QUANTILE, QUANTILE))
        x = (x - low) / (high - low) if high > low else np.full_like(x, 0.5)
    return np.clip(x, 0, 1)


def map_figure(
    values: object,
    *,
    images: object = None,
    errors: object = None,
    titles: Sequence[str] | None = None,
    label: str = "Shapley value",
    caption: str = "",
) -> Figure:
    """Signed maps as small multiples: each input as picture | map over the faded picture | standard error.

    All maps share one symmetric scale (`signed_limit`), all standard errors another.

    Args:
        values: ``[n, H, W]``.
        images: n pictures as `display_image` takes them, or None for maps alone.
        errors: ``[n, H, W]``, or None to leave them out; NaN where there are none.
        titles: n names.
        label: What the values are.
        caption: Above the figure.
    """
    from matplotlib.ticker import MaxNLocator

    values, n = as_array(values), len(values)
    limit = signed_limit(values)
    parts = (("input", images), ("attribution", values), ("standard error", errors))
    columns = [name for name, part in parts if part is not None]
    across = 1 if n <= 3 else 2 if len(columns) > 1 else 4
    n_rows, tall = -(-n // across), 1.6 * min(max(values.shape[1] / values.shape[2], 0.4), 2.5)
    height = n_rows * (tall + 0.06) + 0.3
    figure = _new_figure(max(4.2, across * (0.45 + 1.65 * len(columns))), height + 1.05)
    grid, legend = figure.subfigures(2, 1, height_ratios=(height, 0.7))
    blocks = grid.add_gridspec(1, across, wspace=0.04)
    axes = np.empty((n_rows * across, len(columns)), dtype=object)
    for b in range(across):
        axes[b::across] = blocks[b].subgridspec(n_rows, len(columns)).subplots(squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#dddddd")
    for axis in axes[n:].flat:
        axis.set_axis_off()
    for row in axes[: min(across, n)]:
        for axis, name in zip(row, columns, strict=True):
            axis.set_title(name, fontsize=9, color=_INK)

    bars = [(_scale(_colormap(NEGATIVE, (255, 255, 255), POSITIVE), -limit, limit), label)]
    if errors is not None:
        errors = as_array(errors)
        bars.append(
            (_scale(_colormap((255, 255, 255), (50, 50, 50)), 0, np.nan_to_num(errors).max() or 1), "standard error")
        )
    for i in range(n):
        panels = iter(axes[i])
        if images is not None:
            picture = display_image(images[i])
            next(panels).imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis = next(panels)
        if images is not None:
            axis.imshow(_faded(picture), cmap="gray", vmin=0, vmax=1)
        axis.imshow(signed_rgba(values[i], limit))
        if errors is not None:
            next(panels).imshow(errors[i], cmap=bars[1][0].cmap, norm=bars[1][0].norm)
        if titles is not None:
            axes[i, 0].set_ylabel(titles[i], fontsize=8, color=_INK)

    beyond = bool(np.nanmax(np.abs(values), initial=0) > limit)
    for k, (axis, (scale, text)) in enumerate(zip(legend.subplots(1, len(bars), squeeze=False)[0], bars, strict=True)):
        bar = figure.colorbar(
            scale, cax=axis, orientation="horizontal", extend="both" if beyond and k == 0 else "neither"
        )
        bar.set_label(
            text + ("\nfull colour: the 99.5 % quantile" if beyond and k == 0 else ""), fontsize=8, color=_INK
        )
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(5)
        axis.tick_params(labelsize=7, color=_FAINT, labelcolor=_INK)
        axis.xaxis.get_offset_text().set_fontsize(7)
    if caption:
        figure.suptitle(caption, fontsize=9, color=_INK)
    return figure


def bar_figure(
    values: object,
    *,
    names: Sequence[str] | Sequence[Sequence[str]],
    errors: object = None,
    base: object = None,
    titles: Sequence[str] | None = None,
    label: str = "Shapley value",
    caption: str = "",
    max_bars: int = 12,
) -> Figure:
    """Bars of players, the largest ``|value|`` first, a panel an input; the rest is summed in one bar.

    With ``base`` the bars are steps of a path from the base value to the full one; without, all start at zero. Whiskers
    are ± one standard error.

    Args:
        values: ``[n, M]``.
        names: M names, or M for each input.
        errors: ``[n, M]`` or None; NaN draws none.
        base: ``[n]`` or None.
        titles: n names.
        label: What the values are.
        caption: Above the figure.
        max_bars: Players a panel at most.
    """
    values = as_array(values)
    n, n_players = values.shape
    errors = np.full_like(values, np.nan) if errors is None else as_array(errors)
    names = [list(names)] * n if isinstance(names[0], str) else names
    across = min(n, 2)
    n_bars = min(n_players, max_bars + 1)
    figure = _new_figure(5.6 * across, -(-n // across) * (0.27 * n_bars + 0.95) + (0.3 if caption else 0))
    axes = figure.subplots(-(-n // across), across, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    for i, axis in enumerate(axes[:n]):
        order = np.argsort(-np.abs(values[i]), kind="stable")
        shown = order if n_players <= max_bars + 1 else order[:max_bars]
        sizes, whiskers = values[i, shown], errors[i, shown]
        labels = [names[i][j] for j in shown]
        if len(shown) < n_players:
            sizes = np.append(sizes, values[i, order[max_bars:]].sum())
            whiskers = np.append(whiskers, np.nan)
            labels.append(f"{n_players - max_bars} others")
        start = np.zeros(len(sizes))
        if base is not None:
            start = float(as_array(base)[i]) + np.concatenate(([0.0], np.cumsum(sizes)[:-1]))
        _draw_bars(axis, start, sizes, whiskers, labels, path=base is not None)
        axis.set_xlabel(label if base is None else f"base value, step by step plus {label}", fontsize=8, color=_INK)
        if titles is not None:
            axis.set_title(titles[i], fontsize=9, color=_INK, loc="left", pad=14 if base is not None else 6)
    if caption:
        figure.suptitle(caption, fontsize=9, color=_INK)
    return figure


def curve_figure(
    fractions: object,
    curves: dict[str, tuple[object, object]],
    *,
    label: str = "score",
    caption: str = "",
) -> Figure:
    """Curves over the share of features, the first orange, the second purple, with bands where there are some.

    Args:
        fractions: ``[N]`` in 0..1.
        curves: Text of the legend to (``[N]``, half width of a band ``[N]`` or None; NaN draws none).
        label: What the curves are.
        caption: Above the figure.
    """
    fractions = as_array(fractions)
    figure = _new_figure(4.8, 3.4)
    axis = figure.subplots()
    for (text, (values, band)), colour in zip(curves.items(), (POSITIVE, NEGATIVE), strict=False):
        values, colour = as_array(values), tuple(c / 255 for c in colour)
        if band is not None:
            band = as_array(band)
            axis.fill_between(fractions, values - band, values + band, color=colour, alpha=0.18, linewidth=0)
        axis.plot(fractions, values, color=colour, linewidth=1.6, label=text)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of features inserted or deleted", fontsize=8, color=_INK)
    axis.set_ylabel(label, fontsize=8, color=_INK)
    axis.legend(fontsize=8, labelcolor=_INK, frameon=False)
    _clean(axis)
    if caption:
        figure.suptitle(caption, fontsize=9, color=_INK)
    return figure


def _draw_bars(
    axis: object, start: np.ndarray, sizes: np.ndarray, whiskers: np.ndarray, labels: list[str], path: bool
) -> None:
    """One panel: bars from ``start`` with their values written beside them."""
    at = np.arange(len(sizes))
    end = start + sizes
    colours = [np.array(NEGATIVE if size < 0 else POSITIVE) / 255 for size in sizes]
    axis.barh(at, sizes, left=start, color=colours, height=0.68)
    has = np.isfinite(whiskers) & (whiskers > 0)
    axis.errorbar(end[has], at[has], xerr=whiskers[has], fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    low, high = min(start.min(), end.min()), max(start.max(), end.max())
    room = (high - low) or 1.0
    right = np.maximum(start, end + np.where(has, whiskers, 0)) + 0.015 * room
    for y, value in enumerate(sizes):
        axis.text(right[y], y, _signed(value), va="center", fontsize=7.5, color=_INK, bbox=_PAPER)
    axis.set_yticks(at, labels, fontsize=8, color=_INK)
    axis.set(ylim=(len(sizes) - 0.4, -0.6), xlim=(low - 0.06 * room, high + 0.17 * room))
    _clean(axis)
    if not path:
        axis.axvline(0, color=_FAINT, linewidth=0.8, zorder=0)
        return
    axis.vlines(end[:-1], at[:-1], at[1:], color=_FAINT, linewidth=0.7, zorder=0)
    for x, name, left in ((start[0], "base", start[0] <= end[-1]), (end[-1], "full", start[0] > end[-1])):
        axis.axvline(x, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(
            f"{name} {x:.3g}".replace("-", "\N{MINUS SIGN}"), (x, 1), xycoords=("data", "axes fraction"),
            xytext=(3 if left else -3, 2), textcoords="offset points", ha="right" if left else "left", fontsize=7,
            color="#666666",
        )  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _faded(picture: np.ndarray) -> np.ndarray:
    """Grey and light ``[H, W]``, so that colours laid over it can be told apart."""
    grey = picture @ (0.299, 0.587, 0.114) if picture.ndim == 3 else picture
    return 0.66 + 0.34 * grey


def _clean(axis: object) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#cccccc")
    axis.tick_params(labelsize=7.5, color="#cccccc", labelcolor=_INK)


def _colormap(*colours: tuple[int, int, int]) -> object:
    """Straight from colour to colour: over white, `signed_rgba` is one."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("xaifast", [tuple(c / 255 for c in colour) for colour in colours])


def _scale(colours: object, low: float, high: float) -> object:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), colours)


def _new_figure(width: float, height: float) -> Figure:
    return _figure_class()(figsize=(width, height), layout="constrained", dpi=120)


@functools.cache
def _figure_class() -> type:
    """`Figure` that notebooks show without pyplot having been imported."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("xaifast.figures needs matplotlib; pip install 'xaifast[report]'") from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure
