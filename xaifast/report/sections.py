"""What stands in each section of a report, ready for the template."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np

from ..figures import as_array, display_image, signed_limit
from ..run import Run
from .evaluation import evaluation_part
from .formation import FormationPart
from .formats import count, flatten, number
from .pictures import SMALL, overlay_uri, picture_uri
from .results import Results, read_results

N_CLASSES, N_EXAMPLES, N_CASES, N_BARS, N_DOTS, N_SKIPPED = 20, 6, 8, 10, 120, 100
_METHODS = {"kernel-shap": "Kernel SHAP", "xtrain": "XtrAIn", "xstep": "Xstep", "xtrain+": "XtrAIn+"}
_SIDE = 224  # of pictures kept in memory


class Report:
    """A run and its inputs, turned into plain values for the template.

    Args:
        run: The stored run.
        inputs, evaluation: See `xaifast.report.write_report`.
    """

    def __init__(self, run: Run, inputs: Callable[[int], object] | None, evaluation: Run | None = None) -> None:
        self.run, self.manifest, self.results = run, run.manifest, read_results(run)
        self._inputs, self._shown = inputs, {}
        mask = run.static.get("feature_mask")
        self.mask = None if mask is None else (mask[0] if mask.dim() > 2 else mask).numpy()  # [H, W] or [M]
        self.pictured = self.mask is None or self.mask.ndim == 2
        of_model, of_data = (self.manifest[part].get("class_names") or [] for part in ("model", "data"))
        self.class_names, self.label_names = of_model or of_data, of_data or of_model
        self.wrong = self._wrong(self.results)
        self.limit = signed_limit(self.results.values)
        self.evaluation = evaluation_part(evaluation, self._tile_of)

    def content(self, side: int) -> dict:
        """All the template needs, with pictures of at most ``side`` pixels a side."""
        self.side = side
        return {
            "headline": self.headline,
            "limit": self.limit,
            "beyond": bool((np.abs(np.nan_to_num(self.results.values)) > self.limit).any()),
            "all_zero": len(self.results) > 0 and not np.nan_to_num(self.results.values).any(),
            "pictured": self.pictured,
            "has_inputs": self._inputs is not None,
            "n_dots": N_DOTS,
            "all_outputs": self.results.all_outputs,
            "classes": self.classes(),
            "cases": self.cases(),
            "errors": self.errors(),
            "speed": self.speed(),
            "details": self.details(),
            "evaluation": None if self.evaluation is None else self.evaluation.content(),
            "formation": self.formation(),
            "command": self.manifest.get("command") or self.manifest["settings"].get("command"),
        }

    @property
    def headline(self) -> dict:
        """What was run, in one sentence and a few numbers."""
        run, manifest, results = self.run, self.manifest, self.results
        settings = manifest["settings"]
        speed = self.speed()
        players = (~np.isnan(results.values)).sum(1)
        known = results.relative_error[np.isfinite(results.relative_error)]
        return {
            "explained": self._explained(),
            "method": _METHODS.get(manifest["method"], manifest["method"].replace("-", " ")),
            "model": manifest["model"]["spec"],
            "data": manifest["data"]["spec"],
            "features": settings.get("features"),
            "baseline": settings.get("baseline"),
            "removal": settings.get("removal"),
            "n_samples": settings.get("n_samples"),
            "n_items": len(run),
            "n_done": len(results),
            "n_finished": len(run.finished),
            "n_chunks": run.n_chunks,
            "complete": run.complete,
            "players": sorted({int(players.min()), int(players.max())}) if len(results) else [],
            "rows": speed["rows"],
            "seconds": speed["seconds"],
            "inputs_per_second": len(results) / speed["seconds"] if speed["seconds"] else math.nan,
            "relative_error": float(np.median(known)) if known.size else math.nan,
        }

    def _explained(self) -> str:
        """Which output the run explains, for a sentence."""
        target = str(self.manifest["settings"].get("target"))
        named = {"predicted": "the predicted class", "label": "the labelled class", "all": "every class"}
        if len(self.results) and (self.results.target < 0).all():
            return "the output"
        return named.get(target) or (self.class_name(int(target)) if target.isdigit() else target)

    def classes(self) -> dict:
        """Each class explained, the most frequent first: its mean attributions and some examples."""
        results = self.results
        targets, sizes = np.unique(results.target, return_counts=True)
        order = np.lexsort((targets, -sizes))
        groups = [(int(targets[i]), np.flatnonzero(results.target == targets[i])) for i in order[:N_CLASSES]]
        means = [np.nan_to_num(results.values[rows].mean(0)) for _, rows in groups]
        mean_limit = signed_limit(np.stack(means)) if means else 1.0
        sizes_of = [np.abs(np.nan_to_num(results.values[rows])).mean(0) for _, rows in groups]
        largest = max((float(size.max(initial=0)) for size in sizes_of), default=0) or 1.0
        shown = []
        for (target, rows), mean, size in zip(groups, means, sizes_of, strict=True):
            known = rows[(results.label[rows] >= 0) & (results.predicted[rows] >= 0)]
            entry = {
                "name": self.class_name(target),
                "n": len(rows),
                "n_labelled": len(known),
                "n_wrong": int(self.wrong[known].sum()),
                "mean": None,
                "bars": [],
                "examples": [],
            }
            if self.pictured:
                if self.mask is not None:
                    entry["mean"] = self._picture(None, mean, self.mask, mean_limit)
                entry["examples"] = [self._tile(i) for i in _spread(rows, N_EXAMPLES)]
            else:
                entry["bars"] = self._strips(rows, size, mean, largest)
            shown.append(entry)
        return {"shown": shown, "n": len(targets), "mean_limit": mean_limit, "means": self.mask is not None}

    def formation(self) -> dict | None:
        """How attributions formed over a recorded training; None for other methods."""
        if "formation" not in self.manifest or not len(self.results):
            return None

        def picture(index: int | None, values: np.ndarray, limit: float) -> dict:
            return self._picture(index, values, self.mask, limit)

        shown = picture if self.pictured else None
        return FormationPart(self.run, self.results, shown, self.class_name, self._feature_name).content()

    def cases(self) -> list[dict]:
        """The largest attributions and the most uncertain ones."""
        total, error = self.results.total, self.results.relative_error
        largest = np.lexsort((self.results.index, -total))[:N_CASES]
        doubtful = [i for i in np.lexsort((self.results.index, -np.nan_to_num(error))) if error[i] > 0][:N_CASES]
        groups = [
            ("Largest attributions", "by the sum of absolute values over players", largest),
            ("Most uncertain", "by the relative standard error", doubtful),
        ]
        return [
            {"title": title, "note": note, "tiles": [self._tile(i) for i in rows]}
            for title, note, rows in groups
            if len(rows)
        ]

    def errors(self) -> dict:
        """How the relative standard errors of inputs are distributed; bars in percent of the plot."""
        error = self.results.relative_error
        known = error[np.isfinite(error)]
        content = {"n_unknown": int((~np.isfinite(error)).sum()), "n": len(error), "bars": [], "zero": False, "at": {}}
        content["zero"] = bool(known.size) and not known.any()
        if known.any():
            top = float(np.quantile(known, 0.99))
            counts, edges = np.histogram(np.minimum(known, top), bins=32, range=(0, top))
            content["bars"] = [float(100 * c / counts.max()) for c in counts]
            content["at"] = {"top": top, "beyond": bool((known > top).any())}
            content["at"]["median"] = float(np.median(known))
            content["at"]["worst"] = float(known.max())
        return content

    def speed(self) -> dict:
        """Model rows a second of the job beside those of the bare forward, in all and by chunk."""
        cost, chunks = self.run.speed, self._chunks
        starts = [event for event in self.run.log if event["event"] == "start"]
        world = max((event.get("world", 1) for event in starts), default=1)
        floor = cost.forward_rows_per_second
        rates = [event["model_rows"] / event["seconds"] for event in chunks if event["seconds"] > 0]
        bars = [float(np.mean(part)) for part in np.array_split(rates, min(len(rates), 100))] if rates else []
        top = max([*bars, np.nan_to_num(floor)]) or 1.0
        return {
            "seconds": cost.seconds / world,
            "rows": cost.model_rows,
            "rate": cost.model_rows / cost.seconds if cost.seconds else math.nan,
            "floor": floor,
            "share": 1 / cost.ratio if cost.ratio else math.nan,
            "world": world,
            "starts": sum(event.get("rank", 0) == 0 for event in starts),
            "bars": [100 * bar / top for bar in bars],
            "per_bar": -(-len(rates) // len(bars)) if bars else 1,
            "floor_at": 100 * floor / top,
            "n_chunks": len(chunks),
            "halvings": [
                {"chunk": event["chunk"], "rows": event["rows"]}
                for event in self.run.log
                if event["event"] == "out of memory"
            ],
            "skipped": sorted((self.run.name(i), why) for i, why in list(self.run.skipped.items())[:N_SKIPPED]),
            "n_skipped": len(self.run.skipped),
        }

    def details(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Settings, model, data, versions and machine, as tables."""
        manifest = self.manifest
        start = next((event for event in self.run.log if event["event"] == "start"), {})
        machine = {
            "device": start.get("device_name") or manifest.get("device"),
            "threads": start.get("threads") or manifest.get("threads"),
            "processes": start.get("world"),
            "model rows a call": manifest.get("rows"),
        }
        hidden = ("class_names", "feature_names", "command")
        groups = {
            "Settings": manifest["settings"] | {"seed": manifest.get("seed"), "inputs a chunk": manifest["chunk_size"]},
            "Model": manifest["model"],
            "Data": manifest["data"] | {"inputs": count(len(self.run), "input")},
            "Versions": manifest.get("versions"),
            "Machine": machine,
        }
        tables = []
        for title, group in groups.items():
            group = {key: value for key, value in (group or {}).items() if key not in hidden}
            tables.append((title, flatten(group)))
        return [(title, rows) for title, rows in tables if rows]

    def class_name(self, k: int) -> str:
        """Of an output."""
        if k < 0:
            return "the output"
        return str(self.class_names[k]) if k < len(self.class_names) else f"class {k}"

    @cached_property
    def _chunks(self) -> list[dict]:
        """Events of finished chunks in the order of the data; the last of each where one was computed twice."""
        last = {event["chunk"]: event for event in self.run.log if event["event"] == "chunk"}
        return [last[chunk] for chunk in self.run.finished if chunk in last]

    def _wrong(self, results: Results) -> np.ndarray:
        """``[n]``: whether the model predicts another class than the label; by name where some names are common."""
        known = (results.label >= 0) & (results.predicted >= 0)
        wrong = known & (results.label != results.predicted)
        if self.class_names != self.label_names and set(self.class_names) & set(self.label_names):
            for i in np.flatnonzero(known):
                wrong[i] = self.label_name(int(results.label[i])) != self.class_name(int(results.predicted[i]))
        return wrong

    def label_name(self, k: int) -> str:
        """Of a label."""
        return str(self.label_names[k]) if k < len(self.label_names) else f"class {k}"

    def _tile_of(self, index: int) -> dict | None:
        """The tile of an input by its number in the data set; None where there is no result of it."""
        (found,) = np.nonzero(self.results.index == index)
        return self._tile(int(found[0])) if len(found) else None

    def _tile(self, i: int) -> dict:
        """One input: picture and facts; ``i`` counts in the results."""
        results, index = self.results, int(self.results.index[i])
        label, predicted = int(results.label[i]), int(results.predicted[i])
        tile = {
            "name": self.run.name(index),
            "target": self.class_name(int(results.target[i])) if results.target[i] >= 0 else None,
            "label": self.label_name(label) if label >= 0 else None,
            "predicted": self.class_name(predicted) if predicted >= 0 else None,
            "wrong": bool(self.wrong[i]),
            "base": float(results.base[i]),
            "full": float(results.full[i]),
            "total": float(results.total[i]),
            "error": float(results.relative_error[i]),
            "picture": None,
            "bars": [],
        }
        if self.pictured:
            segments = self.mask if self.mask is not None else self.run.segments(index).numpy()
            tile["picture"] = self._picture(index, results.values[i], segments, self.limit)
        else:
            tile["bars"] = self._steps(index, results.values[i], results.errors[i])
        return tile

    def _picture(self, index: int | None, values: np.ndarray, segments: np.ndarray, limit: float) -> dict:
        shown = None if index is None else self._input(index)
        return {
            "base": None if shown is None else picture_uri(shown, self.side),
            "over": overlay_uri(values, segments, limit, self.side),
            "shape": segments.shape,
            "squares": max(segments.shape) <= SMALL,
        }

    def _input(self, index: int) -> np.ndarray | None:
        """An input for display, reduced to what a report can show and kept."""
        if self._inputs is None:
            return None
        if index not in self._shown:
            x = as_array(self._inputs(index))
            if self.pictured:
                x = display_image(x)
                step = max(1, min(x.shape[:2]) // (2 * _SIDE))
                x = x[::step, ::step].astype(np.float32)
            self._shown[index] = x
        return self._shown[index]

    def _feature_name(self, player: int) -> str:
        names = self.manifest["data"].get("feature_names") or []
        return str(names[player]) if player < len(names) else f"feature {player}"

    def _strips(self, rows: np.ndarray, size: np.ndarray, mean: np.ndarray, largest: float) -> list[dict]:
        """Features of a class, the largest mean ``|value|`` first, with the values of some inputs as dots."""
        chosen = _spread(rows, N_DOTS)
        strips = []
        for player in np.lexsort((np.arange(len(size)), -size))[:N_BARS]:
            values = self.results.values[chosen, player]
            at = 50 + 48 * np.clip(np.nan_to_num(values) / self.limit, -1, 1)
            strips.append(
                {
                    "name": self._feature_name(int(player)),
                    "size": float(size[player]),
                    "mean": float(mean[player]),
                    "width": float(100 * size[player] / largest),
                    "dots": [(float(x), bool(v < 0)) for x, v in zip(at, values, strict=True)],
                }
            )
        return strips

    def _steps(self, index: int, values: np.ndarray, errors: np.ndarray) -> list[dict]:
        """The largest values of a row, as bars around zero in percent of the track."""
        row = self._input(index)
        values = np.nan_to_num(values)
        top = float(np.abs(values).max(initial=0)) or 1.0
        bars = []
        for player in np.lexsort((np.arange(len(values)), -np.abs(values)))[:5]:
            name, value = self._feature_name(int(player)), float(values[player])
            given = row is not None and row.ndim == 1 and len(row) == len(values)
            bars.append(
                {
                    "name": f"{name} = {number(float(row[player]))}" if given else name,
                    "value": value,
                    "error": float(errors[player]),
                    "left": 50 + 50 * min(value, 0) / top,
                    "width": 50 * abs(value) / top,
                }
            )
        return bars


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly spread over them."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
