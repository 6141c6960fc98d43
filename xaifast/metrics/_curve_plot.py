"""`Curves.plot`: one input's curves, or the data set's with bands, areas in the legend."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from .. import figures

if TYPE_CHECKING:
    from .curve_result import Curves


def plot_curves(curves: Curves, index: int | None, label: str) -> object:
    """See `Curves.plot`."""
    batch = curves.deletion.shape[0]
    if index is not None:
        if not -batch <= operator.index(index) < batch:
            raise IndexError(f"xaifast.Curves.plot: index must lie in 0..{batch - 1}, got {index}")
        index = operator.index(index) % batch
    shown, mean = {}, curves.mean()
    for name in ("insertion", "deletion"):
        if getattr(curves, name) is None:
            continue
        if index is None:
            area, band = float(getattr(mean, f"{name}_auc")), float(getattr(mean, f"{name}_auc_band"))
            text = f"{name}, area {area:.3g}" + (f" \N{PLUS-MINUS SIGN} {band:.2g}" if batch > 1 else "")
            shown[text] = getattr(mean, name), getattr(mean, f"{name}_band")
        else:
            shown[f"{name}, area {float(getattr(curves, f'{name}_auc')[index]):.3g}"] = (
                getattr(curves, name)[index],
                None,
            )
    fractions = curves.fractions[index] if index is not None and curves.fractions.dim() == 2 else mean.fractions
    which = f"mean of {batch} inputs, 95 % bands" if index is None and batch > 1 else f"input {index or 0}"
    tool = "" if curves.compat is None else f", points and areas of {curves.compat}"
    return figures.curve_figure(fractions, shown, label=label, caption=f"{which}, {curves.order} first{tool}")
