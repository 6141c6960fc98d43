"""The part of a report that shows how attributions formed over training, and what they leave unexplained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..evaluation.scores import mean_and_band
from ..figures import signed_limit
from ..run import Run
from .results import Results

N_CLASSES, N_ROWS, N_EXAMPLES, N_LINES, N_NAMES = 10, 20, 4, 6, 20
NEAR_ZERO = 0.01  # of the largest class's mass
_WIDTH, _HEIGHT = 220, 90  # of a plot of lines, in its own units
_NAMES = {"xtrain": "XtrAIn", "xstep": "Xstep", "xtrain+": "XtrAIn+"}


class FormationPart:
    """What a run of XtrAIn's family says beyond its values, as plain values for the template.

    Args:
        run: A stored run whose manifest has ``formation``.
        results: Its numbers.
        picture: ``picture(index | None, values, limit)``: a map for the template; None for tables.
        class_name, feature_name: Of an output, of a player.
    """

    def __init__(
        self,
        run: Run,
        results: Results,
        picture: Callable[[int | None, np.ndarray, float], dict] | None,
        class_name: Callable[[int], str],
        feature_name: Callable[[int], str],
    ) -> None:
        self._results, self._picture = results, picture
        self._class_name, self._feature_name = class_name, feature_name
        self.manifest, self.about = run.manifest, run.manifest["formation"]

        def read(name: str) -> np.ndarray:
            return run.tensor(name, missing="nan")[results.index].double().numpy()

        self.formed = read("formed")  # [n, C, M]
        self.residual, self.gates_open = read("residual"), read("gates_open")
        self.clean = read("clean_score") if self.about["beside"] else None  # [n, 1 + others]

    def content(self) -> dict:
        """All the template needs."""
        targets, sizes = np.unique(self._results.target, return_counts=True)
        order = np.lexsort((targets, -sizes))
        groups = [(int(targets[i]), np.flatnonzero(self._results.target == targets[i])) for i in order]
        return {
            "method": _NAMES[self.manifest["method"]],
            "gated": self.manifest["method"] == "xtrain+",
            "moments": self._moments(),
            "classes": self._classes(groups[:N_CLASSES]),
            "n_classes": len(groups),
            "examples": self._examples() if self._picture else [],
            "masses": [self._mass(target, rows) for target, rows in sorted(groups[:N_ROWS])],
            "silent": _listed(self._silent(groups)),
            "absent": _listed([self._class_name(k) for k in range(self.about["n_outputs"]) if k not in targets]),
            "clean": self._clean(),
            "scale": self.about["scale"],
            "size": (_WIDTH, _HEIGHT),
        }

    def _moments(self) -> str:
        """Checkpoints that are shown, with the optimizer steps done where they are known."""
        shown, steps = self.about["moments"], self.about["steps"]
        text = f"checkpoints {', '.join(map(str, shown))} of {self.manifest['settings']['checkpoints'][-1]}"
        return text if None in steps else f"{text} (optimizer steps {', '.join(f'{step:,}' for step in steps)})"

    def _classes(self, groups: list[tuple[int, np.ndarray]]) -> list[dict]:
        """Mean maps, or mean values of the largest features, over checkpoints."""
        means = [self.formed[rows].mean(0) for _, rows in groups]  # [C, M] each
        limit = signed_limit(np.stack(means)) if means else 1.0
        ends = (min(0.0, min(m.min() for m in means)), max(0.0, max(m.max() for m in means))) if means else (0.0, 1.0)
        shown = []
        for (target, rows), mean in zip(groups, means, strict=True):
            entry = {"name": self._class_name(target), "n": len(rows), "maps": [], "lines": [], "zero": 0}
            if self._picture:
                entry["maps"] = [self._picture(None, np.nan_to_num(values), limit) for values in mean]
            else:
                entry["lines"], entry["zero"] = self._lines(mean, *ends)
            shown.append(entry)
        return shown

    def _examples(self) -> list[dict]:
        """Some inputs, spread evenly over the data set."""
        n = len(self._results)
        rows = sorted(set(np.linspace(0, n - 1, min(n, N_EXAMPLES)).round().astype(int).tolist())) if n else []
        limit = signed_limit(self.formed[rows]) if rows else 1.0
        return [
            {
                "name": self._class_name(int(self._results.target[i])),
                "index": int(self._results.index[i]),
                "residual": float(self.residual[i]),
                "maps": [
                    self._picture(int(self._results.index[i]), np.nan_to_num(values), limit)
                    for values in self.formed[i]
                ],
            }
            for i in rows
        ]

    def _lines(self, mean: np.ndarray, low: float, high: float) -> tuple[list[dict], float]:
        """Of ``[C, M]`` the features that end largest as paths from 0 at the first checkpoint, and where 0 is."""

        def height(values: np.ndarray) -> np.ndarray:
            return _HEIGHT * (0.98 - 0.96 * (values - low) / ((high - low) or 1.0))

        at = np.array([self.manifest["settings"]["checkpoints"][0], *self.about["moments"]], dtype=float)
        x = _WIDTH * (at - at[0]) / max(at[-1] - at[0], 1)
        lines = []
        for rank, j in enumerate(np.argsort(-np.abs(mean[-1]), kind="stable")[:N_LINES].tolist()):
            y = height(np.append(0, mean[:, j]))
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
            lines.append({"name": self._feature_name(j), "style": f"m{rank}", "path": path, "end": float(mean[-1, j])})
        return lines, float(height(np.zeros(())))

    def _mass(self, target: int, rows: np.ndarray) -> dict:
        """Means over the inputs of a class: of its logit's growth, of what values and residual account for."""
        growth = self._results.full[rows] - self._results.base[rows]
        return {
            "name": self._class_name(target),
            "n": len(rows),
            "growth": float(growth.mean()),
            "sum": float(np.nansum(self._results.values[rows], 1).mean()),
            "residual": float(self.residual[rows].mean()),
            "mass": float(self._results.total[rows].mean()),
            "open": float(self.gates_open[rows].mean()),
        }

    def _silent(self, groups: list[tuple[int, np.ndarray]]) -> list[str]:
        """Classes with next to no mass; the gates of XtrAIn+ leave none where the logit never grew."""
        if self.manifest["method"] != "xtrain+" or not groups:
            return []
        masses = {target: float(self._results.total[rows].mean()) for target, rows in groups}
        most = max(masses.values())
        return [self._class_name(target) for target, mass in sorted(masses.items()) if mass <= NEAR_ZERO * most]

    def _clean(self) -> list[dict]:
        """CleanScore of the run's method and of others, the best first."""
        if self.clean is None or not len(self.clean):
            return []
        mean, band = mean_and_band(self.clean)
        names = [_NAMES[self.manifest["method"]], *self.about["beside"]]
        order = np.argsort(-np.nan_to_num(mean, nan=-1), kind="stable").tolist()
        return [
            {
                "name": names[m],
                "own": m == 0,
                "mean": float(mean[m]),
                "band": float(band[m]),
                "undefined": int(np.isnan(self.clean[:, m]).sum()),
            }
            for m in order
        ]


def _listed(names: list[str]) -> str:
    """The first names, and how many there are beyond."""
    more = len(names) - N_NAMES
    return ", ".join(names[:N_NAMES]) + (f" and {more} more" if more > 0 else "")
