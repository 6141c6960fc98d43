"""Stored runs to be evaluated: do they belong together, where are their model and data, and what they say by input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..attribution.dataset import Batch
from ..data import DataSource, open_data
from ..data.segmentations import Segmentations
from ..evaluation.dataset import Explained
from ..models.loading import LoadedModel, load_model
from ..run import Run, StoreError, open_run
from .inputs import InputLoader

_CALLER = "xaifast evaluate"


def open_runs(directories: Sequence[Path], limit: int | None) -> tuple[list[Run], int]:
    """Runs of the same model, data and outputs, and how many of their inputs are evaluated.

    Raises:
        StoreError: no such run, one that is corrupt, not finished that far, or not like the first.
    """
    runs = [open_run(directory) for directory in directories]
    for run in runs:
        if (kind := run.manifest.get("kind")) != "attributions":
            raise StoreError(
                f"{_CALLER}: runs must be those of xaifast explain, but {run.directory} holds {kind!r}; name the "
                "directory that was given to explain as --out"
            )
        _compare(runs[0], run)
        run.verify()
    n_items = min(len(run) for run in runs)
    n_items = min(n_items, limit or n_items)
    for run in runs:
        done = set(run.finished)
        missing = [chunk for chunk in range(run.n_chunks) if chunk not in done]
        if missing and run.bounds(missing[0])[0] < n_items:
            there = run.bounds(missing[0])[0]
            part = f", or evaluate the first {there:,} by --limit {there}" if there else ""
            raise StoreError(
                f"{_CALLER}: {run.directory} is not finished, {len(done)} of {run.n_chunks} chunks are there; finish "
                f"it{part}:\n  {run.manifest.get('command', 'the command that began it')}"
            )
    return runs, n_items


def _compare(first: Run, other: Run) -> None:
    for what in ("model", "data"):
        ours, theirs = (run.manifest[what]["sha256"] for run in (first, other))
        if ours != theirs:
            raise StoreError(
                f"{_CALLER}: runs must be of one {what}, got sha256 {ours} in {first.directory} and {theirs} in "
                f"{other.directory}; evaluate them one by one"
            )
    for name, remedy in (("target", "explain the same outputs"), ("preprocessing", "explain them alike")):
        ours, theirs = (run.manifest["settings"].get(name) for run in (first, other))
        if name == "target":  # of all outputs, that of the predicted class is evaluated
            ours, theirs = ("predicted" if x == "all" else x for x in (ours, theirs))
        if ours != theirs:
            raise StoreError(
                f"{_CALLER}: runs must have one {name}, got {ours!r} in {first.directory} and {theirs!r} in "
                f"{other.directory}; {remedy}, or evaluate them one by one"
            )


def method_names(runs: Sequence[Run], compared: Sequence[str]) -> list[str]:
    """A name for each run, its method if that tells them apart, else its directory; then those made on the fly."""
    paths = [run.directory.resolve() for run in runs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{_CALLER}: runs must be different ones, got {twice} more than once; name it once")
    for names in ([run.manifest["method"] for run in runs], [path.name for path in paths], list(map(str, paths))):
        if len({*names, *compared}) == len(names) + len(compared):
            break
    return [*names, *compared]


def open_model(run: Run, spec: str | None, device: str) -> LoadedModel:
    """The model a run explained, wherever it lies now.

    Raises:
        StoreError: it is another one, both hashes are shown, or it lies elsewhere now.
    """
    with _where(run, "model", spec):
        model = load_model(spec or run.manifest["model"]["spec"], device=device)
    _same(run, "model", model.spec, model.fingerprint)
    return model


def open_inputs(
    run: Run,
    model: LoadedModel,
    spec: str | None,
    segmentations: Segmentations | None,
    *,
    skip_masks: bool,
) -> InputLoader:
    """The data a run explained, preprocessed as it was; masks of NaN where there are none if ``skip_masks``.

    Raises:
        StoreError: the data or their preprocessing are others, or they lie elsewhere now.
    """
    recorded, settings = run.manifest["data"], run.manifest["settings"]
    table = recorded["kind"] == "table"
    with _where(run, "data", spec):
        data: DataSource = open_data(
            spec or recorded["spec"],
            columns=recorded["feature_names"] if table else None,
            label=recorded.get("label"),
        )
    _same(run, "data", data.spec, data.fingerprint())
    given = settings.get("preprocessing") or {}
    own = data.kind == "images" and model.preprocess is None
    loader = InputLoader(
        data,
        model,
        image_size=tuple(given["image_size"]) if own and given.get("image_size") else None,
        mean=given.get("image_mean") if own else None,
        std=given.get("image_std") if own else None,
        skip=True,
        segmentations=segmentations,
        skip_masks=skip_masks,
    )
    if json.loads(json.dumps(loader.preprocessing)) != settings.get("preprocessing"):
        raise StoreError(
            f"{_CALLER}: images must be prepared as for {run.directory}, {settings.get('preprocessing')}, got "
            f"{loader.preprocessing}; restore the model's preprocessing"
        )
    return loader


@contextmanager
def _where(run: Run, what: str, spec: str | None) -> Iterator[None]:
    """Says by which option to name what is no longer where it was."""
    try:
        yield
    except FileNotFoundError as error:
        if spec is not None:
            raise
        raise StoreError(
            f"{error}; {run.directory} explained {run.manifest[what]['spec']!r}: go where it was explained, or say "
            f"where the {what} now lies by --{what}"
        ) from error


def _same(run: Run, what: str, spec: str, sha256: str) -> None:
    recorded = run.manifest[what]
    if sha256 != recorded["sha256"]:
        raise StoreError(
            f"{_CALLER}: {run.directory} explained another {what}: {recorded['spec']!r} with sha256 "
            f"{recorded['sha256']}, but {spec!r} has sha256 {sha256}; restore it, or say where it lies now by --{what}"
        )


class ExplainedInputs:
    """Inputs by index with the attributions of runs.

    Args:
        inputs: Of the runs' data.
        runs: Which belong together.
        by_player: Whether their players must be the same.
        skip: Whether inputs that can no longer be read, or have no mask, are left out; else they raise.
    """

    def __init__(self, inputs: InputLoader, runs: Sequence[Run], *, by_player: bool, skip: bool) -> None:
        self.inputs, self.runs, self._by_player, self._skip = inputs, runs, by_player, skip
        self._skipped = {i for run in runs for i in run.skipped}

    def __call__(self, start: int, stop: int) -> Explained:
        """The inputs ``[start, stop)``.

        Raises:
            ValueError: an input cannot be read that could be when it was explained, or runs differ in its players or
                output; names it.
        """
        batch = self.inputs(start, stop)
        lost = next((i for i in sorted(batch.skipped) if i not in self._skipped), None)
        if lost is not None and not self._skip:
            raise ValueError(
                f"{_CALLER}: cannot read {batch.names[lost - start]}, which was explained: {batch.skipped[lost]}; "
                "restore it, or pass --on-error skip"
            )
        batch = self._without(batch, self._skipped)
        rows = [[_row(run, start + i) for i in batch.kept] for run in self.runs]
        for others in rows[1:]:
            for i, ours, theirs in zip(batch.kept, rows[0], others, strict=True):
                self._check(batch.names[i], ours, theirs)
        values = [pad_sequence([row["values"] for row in part], True, torch.nan) for part in rows if part]
        segments = [
            torch.stack([row["segments"].long() for row in part]) if part and "segments" in part[0] else None
            for part in rows
        ]
        batch.segments = segments[0]
        predicted, target = (torch.tensor([int(row[name]) for row in rows[0]]) for name in ("predicted", "target"))
        return Explained(batch, values, segments, predicted, target)

    def first(self, n_items: int, n: int) -> Explained:
        """The first block of ``n`` inputs in which some can be read.

        Raises:
            ValueError: none of the data set's can be.
        """
        for start in range(0, n_items, n):
            loaded = self(start, min(n_items, start + n))
            if loaded.batch.kept:
                return loaded
        raise ValueError(f"{_CALLER}: none of the {n_items:,} inputs can be read")

    def picture(self, index: int) -> object:
        """See `InputLoader.picture`."""
        return self.inputs.picture(index)

    def _check(self, name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        if int(ours["target"]) != int(theirs["target"]):
            raise ValueError(
                f"{_CALLER}: runs must explain the same outputs, got {int(ours['target'])} and "
                f"{int(theirs['target'])} for {name}; evaluate them one by one"
            )
        if self._by_player and "segments" in ours and not torch.equal(ours["segments"], theirs["segments"]):
            raise ValueError(
                f"{_CALLER}: runs must have the same superpixels to be compared by player, but those of {name} "
                "differ; pass --level pixels"
            )

    @staticmethod
    def _without(batch: Batch, skipped: set[int]) -> Batch:
        """Without the inputs that runs left out."""
        gone = [i for i in batch.kept if batch.start + i in skipped]
        if not gone:
            return batch
        rows = [row for row, i in enumerate(batch.kept) if i not in gone]
        reasons = batch.skipped | {batch.start + i: "left out when it was explained" for i in gone}
        masks = None if batch.masks is None else batch.masks[rows]
        kept = [batch.kept[row] for row in rows]
        return Batch(batch.start, batch.inputs[rows], kept, batch.names, batch.labels, skipped=reasons, masks=masks)


def _row(run: Run, index: int) -> dict[str, Tensor]:
    """Results of an input for one output: of all, the predicted one."""
    row = run[index]
    if row["values"].dim() == 2:
        target = row["predicted"] if row["predicted"] >= 0 else row["full_values"].argmax()
        row |= {"target": target, "values": row["values"][:, target]}
    return row
