"""What an evaluation found: the scores of methods an image, their mean curves, and the file that others read."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.base import require
from ..metrics import Curves
from ..run import Run


@dataclass(frozen=True)
class Score:
    """A number an image and method.

    Attributes:
        title: For people; ``{first}`` is the method that others are compared with.
        larger_is_better: None where neither end is better.
        of_order: Whether perturbing the least important features first turns that round.
    """

    title: str
    larger_is_better: bool | None = None
    of_order: bool = False


SCORES = {
    "insertion_auc": Score("insertion area", True, of_order=True),
    "deletion_auc": Score("deletion area", False, of_order=True),
    "srg": Score("insertion area − deletion area", True, of_order=True),
    "sparsity": Score("mean importance (sparsity)"),
    "rank_correlation": Score("rank correlation with {first}"),
    "iou_top": Score("top tenth shared with {first}"),
    "segmentation_difference": Score("difference from segmentation", False),
    "macro_iou": Score("macro IoU with segmentation", True),
}


@dataclass(frozen=True)
class Scores:
    """All scores of the finished chunks, inputs that could not be read left out.

    Attributes:
        methods: R names.
        index: ``[n]``, numbers of the inputs in the data set.
        values: Float ``[n, R]`` by name of the score, in the order of `SCORES`; NaN where there is none.
        label, predicted, target: ``[n]``, -1 where there is none.
        order: ``"most"`` or ``"least"``: which features were perturbed first.
    """

    methods: list[str]
    index: np.ndarray
    values: dict[str, np.ndarray]
    label: np.ndarray
    predicted: np.ndarray
    target: np.ndarray
    order: str

    def title(self, name: str) -> str:
        """Of a score, for people."""
        return SCORES[name].title.format(first=self.methods[0])

    def larger_is_better(self, name: str) -> bool | None:
        """Which end of a score is better, None where neither is."""
        score = SCORES[name]
        turned = score.of_order and self.order == "least"
        return score.larger_is_better if not turned else not score.larger_is_better

    def means(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and half of its 95 % interval (normal) of each method, over the images that have the score."""
        return mean_and_band(self.values[name])


def mean_and_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 and 1.96 standard errors of it; without NaNs; NaN bands below two values."""
    values = values.astype(np.float64)
    n = np.isfinite(values).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nansum(values, axis=0) / n
        variance = np.nansum((values - mean) ** 2, axis=0) / (n - 1)
        return np.where(n > 0, mean, np.nan), np.where(n > 1, 1.96 * np.sqrt(variance / n), np.nan)


def read_scores(run: Run) -> Scores:
    """Read the scores of an evaluation, finished or not.

    Raises:
        StoreError: nothing is finished yet, or a chunk is corrupt.
    """
    rows = _rows(run)

    def read(name: str) -> np.ndarray:
        return run.tensor(name, missing="nan")[rows].numpy()

    settings = run.manifest["settings"]
    return Scores(
        methods=list(settings["methods"]),
        index=rows,
        values={name: read(name) for name in SCORES if name in settings["scores"]},
        label=read("label"),
        predicted=read("predicted"),
        target=read("target"),
        order=settings["order"],
    )


def read_curves(run: Run) -> dict[str, Curves]:
    """Curves of each method of an evaluation, finished or not; inputs that could not be read are left out.

    Raises:
        StoreError: nothing is finished yet, or a chunk is corrupt.
    """
    rows, settings = _rows(run), run.manifest["settings"]
    names = ("fractions", "insertion", "deletion", "insertion_auc", "deletion_auc", "target")
    read = {name: run.tensor(name, missing="nan")[rows] for name in names}
    fractions, target = read["fractions"], read["target"]
    alike = len(rows) > 0 and bool((fractions == fractions[0]).all())
    return {
        method: Curves(
            fractions=fractions[0] if alike else fractions,
            insertion=read["insertion"][:, m],
            deletion=read["deletion"][:, m],
            insertion_auc=read["insertion_auc"][:, m],
            deletion_auc=read["deletion_auc"][:, m],
            n_evaluations=settings["curve_evaluations"],
            targets=None if bool((target < 0).all()) else target,
            order=settings["order"],
            compat=None,
            one_baseline="srg" in settings["scores"],
        )
        for m, method in enumerate(settings["methods"])
    }


def write_scores(run: Run, path: Path, form: str = "csv") -> Path:
    """Write the scores as a table, a row an image and method.

    Columns: ``index``, ``name``, ``label``, ``predicted``, ``target``, ``method`` and the scores. What there is none of
    is empty. Numbers of a CSV file read back as they are stored.

    Args:
        run: The evaluation, finished or not.
        path: The file.
        form: ``"csv"`` or ``"parquet"``.

    Raises:
        ImportError: pyarrow is missing (Parquet). StoreError: a chunk is corrupt.
    """
    scores = read_scores(run)
    n, n_methods = len(scores.index), len(scores.methods)
    columns: dict[str, list] = {"index": np.repeat(scores.index, n_methods).tolist()}
    columns["name"] = [name for i in scores.index.tolist() for name in [run.name(i)] * n_methods]
    for name in ("label", "predicted", "target"):
        columns[name] = [k if k >= 0 else None for k in np.repeat(getattr(scores, name), n_methods).tolist()]
    columns["method"] = scores.methods * n
    numbers = {name: values.reshape(-1) for name, values in scores.values.items()}
    if form == "parquet":
        pyarrow = require("pyarrow", "data", "xaifast.write_scores")
        parquet = require("pyarrow.parquet", "data", "xaifast.write_scores")
        for name in ("name", "method"):  # of files and folders, which may be any bytes
            columns[name] = [text.encode(errors="backslashreplace").decode() for text in columns[name]]
        arrays = {name: pyarrow.array(x, mask=np.isnan(x)) for name, x in numbers.items()}
        parquet.write_table(pyarrow.table({**columns, **arrays}), path)
        return path
    # NumPy writes the fewest digits from which the number, in its own precision, is read again.
    texts = [["" if np.isnan(x) else str(x) for x in values] for values in numbers.values()]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *numbers])
        writer.writerows(zip(*columns.values(), *texts, strict=True))
    return path


def _rows(run: Run) -> np.ndarray:
    """Inputs of the finished chunks that could be read."""
    done = [np.arange(*run.bounds(chunk)) for chunk in run.finished]
    rows = np.concatenate(done) if done else np.arange(0)
    return rows[~np.isin(rows, list(run.skipped))]
