"""The part of a report that judges attributions: curves, rankings, and the images where they do best and worst."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..evaluation.bootstrap import Ranking, rank_methods
from ..evaluation.scores import Scores, read_curves, read_scores
from ..metrics import MeanCurves
from ..run import Run
from .formats import count, fixed, flatten

N_IMAGES = 4  # of the best and of the worst
N_COLOURS = 6
_WIDTH, _HEIGHT = 460, 300  # of a plot, in its own units
_RIGHT, _TOP, _BOTTOM = 20, 10, 38
_SMALL = 40  # height of an input's plot, a hundred wide
_HIDDEN = ("methods", "scores", "runs", "preprocessing", "target", "features", "curve_evaluations")


@dataclass(frozen=True)
class _Axis:
    """A linear axis with round ticks that covers some values."""

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def over(cls, values: np.ndarray) -> _Axis:
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= next(k for k in (1, 2, 2.5, 5, 10) if (high - low) / (k * step) <= 5)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, [round(k * step, 12) for k in range(first, last + 1)])


class EvaluationPart:
    """A stored evaluation, turned into plain values for the template.

    Args:
        run: The evaluation, with at least one finished chunk.
        tile: ``tile(index)`` is what a report shows of an input of the first run, None where it shows none.
    """

    def __init__(self, run: Run, tile: Callable[[int], dict | None]) -> None:
        self.run, self._tile = run, tile
        self.settings = run.manifest["settings"]
        self.scores: Scores = read_scores(run)
        self.methods = self.scores.methods

    def content(self) -> dict:
        """All the template needs."""
        return {
            "n": len(self.scores.index),
            "n_items": len(self.run),
            "complete": self.run.complete,
            "methods": [self._method(m) for m in range(len(self.methods))],
            "plots": [self.plot(kind) for kind in ("insertion", "deletion")],
            "size": (_WIDTH, _HEIGHT),
            "frame": (self._left, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
            "rankings": self.rankings,
            "others": self.others(),
            "images": self.images(),
            "conventions": self.conventions(),
            "details": self.details(),
            "command": self.run.manifest.get("command"),
        }

    @property
    def _ranked(self) -> list[str]:
        return [name for name in self.scores.values if self.scores.larger_is_better(name) is not None]

    def _method(self, m: int) -> dict:
        """Name and style: grey for chance, a colour and a dash for each of the others, the first one strong."""
        name = self.methods[m]
        others = [other for other in self.methods if other != "random"]
        style = "chance" if name == "random" else f"m{others.index(name) % N_COLOURS}"
        return {"name": name, "style": style, "first": m == 0}

    @cached_property
    def _curves(self) -> list[MeanCurves]:
        return [curves.mean() for curves in read_curves(self.run).values()]

    @cached_property
    def _axis(self) -> _Axis:
        """One axis for both plots, so that they can be compared."""
        drawn = [*self._means("insertion"), *self._means("deletion")]
        ends = np.concatenate([mean + sign * np.nan_to_num(band) for mean, band in drawn for sign in (-1, 1)])
        return _Axis.over(ends if self.settings["score"] == "logit" else ends.clip(0, 1))

    @cached_property
    def _left(self) -> int:
        """Room for the texts at the axis."""
        return max(40, 12 + 7 * max(len(_tick(tick)) for tick in self._axis.ticks))

    def _means(self, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Mean curve and half of its band of each method, ``[S + 1]``."""
        names = (kind, f"{kind}_band")
        return [tuple(getattr(curves, name).double().numpy() for name in names) for curves in self._curves]

    def plot(self, kind: str) -> dict:
        """Mean curves of one kind with their bands, in the units of the drawing."""
        x = self._x(self._curves[0].fractions.double().numpy())
        lines = []
        for m, (mean, band) in reversed(list(enumerate(self._means(kind)))):  # the first on top
            line = {**self._method(m), "path": _path(x, self._y(mean)), "band": None}
            if np.isfinite(band).all():
                above, below = (self._y(np.clip(mean + b, self._axis.low, self._axis.high)) for b in (band, -band))
                line["band"] = _path(np.concatenate([x, x[::-1]]), np.concatenate([above, below[::-1]])) + "Z"
            lines.append(line)
        shares = np.linspace(0, 1, 6)
        return {
            "title": kind.capitalize(),
            "about": f"share of {self._features} {'shown' if kind == 'insertion' else 'taken away'}",
            "score": self._score,
            "lines": lines,
            "x": [(float(at), f"{100 * share:.0f} %") for at, share in zip(self._x(shares), shares, strict=True)],
            "y": [(float(self._y(np.array(tick))), _tick(tick)) for tick in self._axis.ticks],
        }

    @cached_property
    def rankings(self) -> list[dict]:
        """Of each score that has a better end."""
        return [self._ranking(name) for name in self._ranked if len(self.methods) > 1]

    def _ranking(self, name: str) -> dict:
        """Methods by one score, the best first, with intervals of their differences to it."""
        better = bool(self.scores.larger_is_better(name))
        ranking: Ranking = rank_methods(
            self.scores.values[name], larger_is_better=better, seed=self.run.manifest["seed"]
        )
        gaps = np.stack([ranking.low, ranking.difference, ranking.high])
        low, high = min(np.nanmin(gaps, initial=0.0), 0.0), max(np.nanmax(gaps, initial=0.0), 0.0)
        room = (high - low) or 1.0
        decimals = min(6, max(3, 2 - math.floor(math.log10(room))))  # three digits of what methods differ by

        def at(value: float) -> float | None:
            return 2 + 96 * (float(value) - low) / room if np.isfinite(value) else None

        rows = []
        order = np.argsort(np.nan_to_num(-ranking.mean if better else ranking.mean), kind="stable")
        for m in order.tolist():
            below, gap, above = (fixed(x, decimals, signed=True) for x in gaps[:, m])
            rows.append(
                {
                    **self._method(m),
                    "mean": fixed(ranking.mean[m], decimals),
                    "difference": f"{gap} [{below}, {above}]" if np.isfinite(ranking.low[m]) else gap,
                    "first_share": float(ranking.first[m]),
                    "best": m == ranking.best,
                    "at": tuple(map(at, gaps[:, m])),
                }
            )
        return {
            "title": _capital(self.scores.title(name)),
            "better": "larger" if better else "smaller",
            "n": ranking.n,
            "zero": at(0.0),
            "rows": rows,
        }

    def others(self) -> dict:
        """Means of the scores of which neither end is better, with half of their intervals."""
        names = [name for name in self.scores.values if name not in self._ranked or len(self.methods) == 1]
        columns = [self.scores.means(name) for name in names]
        rows = [
            {**self._method(m), "cells": [(float(mean[m]), float(band[m])) for mean, band in columns]}
            for m in range(len(self.methods))
        ]
        return {"titles": [self.scores.title(name) for name in names], "rows": rows}

    def images(self) -> list[dict]:
        """Where the first method does best and worst, with its curves."""
        name = "deletion_auc" if self.scores.order == "least" else "insertion_auc"  # larger is better of both
        score = self.scores.values[name][:, 0].astype(np.float64)
        known = np.flatnonzero(np.isfinite(score))
        order = known[np.lexsort((self.scores.index[known], -score[known]))]
        worst = order[::-1][: min(N_IMAGES, len(order) // 2)]
        groups = [("Best", order[: min(N_IMAGES, -(-len(order) // 2))]), ("Worst", worst)]
        stored = {i: self.run[int(self.scores.index[i])] for _, rows in groups for i in rows.tolist()}
        drawn = [row[kind][0].double().numpy() for row in stored.values() for kind in ("insertion", "deletion")]
        axis = _Axis.over(np.concatenate(drawn)) if drawn else self._axis
        ends = f"from {_tick(axis.low)} to {_tick(axis.high)}"
        return [
            {
                "title": f"{title} inputs of {self.methods[0]}",
                "note": f"by the {self.scores.title(name)}; curves: insertion solid, deletion dashed, {ends}",
                "tiles": [self._image(i, stored[i], axis) for i in rows.tolist()],
            }
            for title, rows in groups
            if len(rows)
        ]

    def _image(self, i: int, stored: dict, axis: _Axis) -> dict:
        index, x = int(self.scores.index[i]), 100 * stored["fractions"].numpy()
        curves = {}
        for kind in ("insertion", "deletion"):
            height = (stored[kind][0].double().numpy() - axis.low) / (axis.high - axis.low)
            curves[kind] = _path(x, _SMALL * (1 - height))
        found = [(self.scores.title(name), float(self.scores.values[name][i, 0])) for name in self._ranked]
        return {"name": self.run.name(index), "tile": self._tile(index), "curves": curves, "scores": found}

    def conventions(self) -> str:
        """How the curves were taken, in a sentence."""
        s = self.settings
        replaced = {
            "token-drop": "tokens of absent patches dropped",
            "token-select": f"tokens of absent patches selected from {s['insertion_baseline']} (insertion) and "
            f"{s['deletion_baseline']} (deletion)",
        }.get(s["removal"], f"insertion into {s['insertion_baseline']}, deletion to {s['deletion_baseline']}")
        first = "highest attribution first" if s["order"] == "most" else "lowest attribution first"
        return (
            f"{count(s['steps'], 'step')} over {s['features']}, {first}, ties by index; {replaced}; {self._score}; "
            "areas by trapezoids over the true shares; bands ± 1.96 standard errors; rankings by 2,000 paired "
            "resamples of the inputs, 95 % intervals."
        )

    @property
    def _score(self) -> str:
        if (self.scores.target < 0).all():
            return "output of the model"
        target = {"label": "labelled class", "predicted": "predicted class", "all": "predicted class"}.get(
            str(self.settings["target"]), "explained class"
        )
        names = {"softmax": "probability of the", "logit": "output of the", "accuracy": "share predicted as the"}
        return f"{names[self.settings['score']]} {target}"

    @property
    def _features(self) -> str:
        return "pixels" if self.settings["level"] == "pixels" else "features"

    def details(self) -> list[tuple[str, str]]:
        """Settings and versions."""
        manifest = self.run.manifest
        shown = {name: value for name, value in self.settings.items() if name not in _HIDDEN}
        shown |= {"seed": manifest["seed"], "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())}
        return flatten(shown)

    def _x(self, share: np.ndarray) -> np.ndarray:
        return self._left + share * (_WIDTH - self._left - _RIGHT)

    def _y(self, value: np.ndarray) -> np.ndarray:
        return (
            _HEIGHT
            - _BOTTOM
            - (value - self._axis.low) / (self._axis.high - self._axis.low) * (_HEIGHT - _TOP - _BOTTOM)
        )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def evaluation_part(run: Run | None, tile: Callable[[int], dict | None]) -> EvaluationPart | None:
    """The part of a report, None where nothing has been evaluated yet."""
    if run is None or not run.finished:
        return None
    part = EvaluationPart(run, tile)
    return part if len(part.scores.index) else None


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through points; those that are not finite are left out."""
    there = np.isfinite(x) & np.isfinite(y)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[there], y[there], strict=True))
