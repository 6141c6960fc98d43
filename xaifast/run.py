"""Stored results, read by index: one safetensors file a chunk of the data set, beside a manifest that says of what.

A run is a directory::

    manifest.json              what was asked of which model and data, and how the data set is cut into chunks
    static.safetensors         tensors shared by all inputs (a feature mask, a background)
    chunks/000000.safetensors  results of the inputs [0, chunk_size), and so on; written once, atomically
    rows/000000.json           model rows a call from this chunk on, where memory ran out
    log/rank0.jsonl            when and how fast; the only files whose bytes depend on time

Nothing in a chunk depends on when, in which order or after how many interruptions it was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor

FORMAT = 1


class StoreError(RuntimeError):
    """A run cannot be read, resumed or written; finished chunks are kept."""


@dataclass(frozen=True)
class Speed:
    """What a run cost.

    Attributes:
        model_rows: Of all finished chunks.
        seconds: Of work; processes side by side add up.
        forward_rows_per_second: Of the bare model, NaN where it was not measured.
    """

    model_rows: int
    seconds: float
    forward_rows_per_second: float

    @property
    def ratio(self) -> float:
        """Time as a multiple of the bare forward's for the same rows."""
        return self.seconds * self.forward_rows_per_second / self.model_rows if self.model_rows else math.nan


class Run:
    """A stored run, read by index. Made by `open_run`.

    Tensors are memory-mapped: ``run[i]`` touches one row of each. A run that is still being written, or was
    interrupted, can be read as far as it got.

    Attributes:
        directory: Where it is.
        manifest: What was asked: ``kind``, ``method``, ``model``, ``data``, ``settings``, ``seed``, ``n_items``,
            ``chunk_size``, ``rows`` (model rows a call), ``versions``, ``threads``, ``device``.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        try:
            self.manifest: dict = json.loads(path.read_text())
        except FileNotFoundError:
            raise StoreError(
                f"xaifast.open_run: a run holds a manifest.json, but {self.directory} has none; give the directory "
                "passed as --out"
            ) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"xaifast.open_run: cannot read {path} ({error}); restore it or start a new run") from None
        given = self.manifest.get("format") if isinstance(self.manifest, dict) else None
        if given != FORMAT:
            raise StoreError(
                f"xaifast.open_run: {path} must have format {FORMAT}, got {given!r}; it was written by another version "
                "of xaifast, or by another program"
            )
        self._open = lru_cache(maxsize=16)(self._open_chunk)

    def __reduce__(self) -> tuple:
        return Run, (self.directory,)  # workers of a data loader open files of their own

    def __len__(self) -> int:
        """Inputs of the data set, finished or not."""
        return self.manifest["n_items"]

    def __repr__(self) -> str:
        done = len(self.finished)
        state = "complete" if done == self.n_chunks else f"{done} of {self.n_chunks} chunks finished"
        return f"Run({self.manifest['method']}, {len(self)} inputs, {state}, {str(self.directory)!r})"

    @property
    def n_chunks(self) -> int:
        """Chunks of the data set."""
        return -(-len(self) // self.manifest["chunk_size"])

    @property
    def finished(self) -> list[int]:
        """Numbers of the chunks on disk, ascending."""
        names = (path.stem for path in (self.directory / "chunks").glob("*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit() and int(name) < self.n_chunks)

    @property
    def complete(self) -> bool:
        """Whether every chunk is finished."""
        return len(self.finished) == self.n_chunks

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First and one past the last index of a chunk's inputs."""
        size = self.manifest["chunk_size"]
        return chunk * size, min(len(self), (chunk + 1) * size)

    @cached_property
    def static(self) -> dict[str, Tensor]:
        """Tensors shared by all inputs."""
        path = self.directory / "static.safetensors"
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            tensors = {}
        except (SafetensorError, OSError) as error:
            raise StoreError(f"xaifast.open_run: {path} is corrupt ({error}); restore it or start a new run") from None
        if checksum(tensors) != self.manifest["static"]:
            raise StoreError(f"xaifast.open_run: {path} is not the one the run began with; restore it")
        return tensors

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Results of one input.

        Raises:
            IndexError: no such input.
            StoreError: its chunk is not finished, or corrupt.
        """
        file, row = self._locate(index)
        item = {name: file.get_slice(name)[row : row + 1][0] for name in file.keys()}  # noqa: SIM118
        if "n_players" in item:  # players differ between inputs: rows are filled up to the longest of the chunk
            n = int(item["n_players"])
            item |= {name: item[name][:n] for name in ("values", "std_errors") if name in item}
        return item

    def tensor(self, name: str, *, missing: str = "error") -> Tensor:
        """One result of all inputs, ``[N, ...]``, in memory.

        Args:
            name: For example ``"values"``.
            missing: ``"error"``, or ``"nan"`` to fill rows of unfinished chunks with NaN (integers: -1). Rows shorter
                than the longest (superpixels) are filled the same way.

        Raises:
            KeyError: no such result. StoreError: chunks are missing.
        """
        finished = self.finished
        if len(finished) < self.n_chunks and missing != "nan":
            raise StoreError(
                f"xaifast: {len(finished)} of {self.n_chunks} chunks of {self.directory} are finished; finish the run, "
                'or pass missing="nan"'
            )
        parts = {}
        for chunk in finished:
            file = self._open(chunk)
            if name not in file.keys():  # noqa: SIM118
                raise KeyError(f"the run holds {', '.join(sorted(file.keys()))}, not {name!r}")
            parts[chunk] = file.get_tensor(name)
        if not parts:
            raise StoreError(f"xaifast: no chunk of {self.directory} is finished yet; nothing to read")
        some = next(iter(parts.values()))
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts.values()), strict=True)]
        result = torch.full((len(self), *shape), torch.nan if some.is_floating_point() else -1, dtype=some.dtype)
        for chunk, part in parts.items():
            start, stop = self.bounds(chunk)
            result[(slice(start, stop), *(slice(size) for size in part.shape[1:]))] = part
        return result

    def chunk(self, chunk: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Results of a finished chunk's inputs, all or those named, in memory.

        Raises:
            StoreError: it is not finished, or corrupt.
        """
        file = self._open(chunk)
        return {name: file.get_tensor(name) for name in names or sorted(file.keys())}

    def name(self, index: int) -> str:
        """What the data source calls an input: a file, a row."""
        index = self._valid(index)
        chunk, row = divmod(index, self.manifest["chunk_size"])
        return self.notes(chunk)["names"][row]

    @property
    def skipped(self) -> dict[int, str]:
        """Inputs of finished chunks that could not be read, with the reason; their results are NaN."""
        return {int(i): why for chunk in self.finished for i, why in self.notes(chunk)["skipped"].items()}

    def segments(self, index: int) -> Tensor | None:
        """Feature mask of an input: its own superpixels, or the one shared by all; None for whole rows of a table."""
        file, row = self._locate(index)
        if "segments" in file.keys():  # noqa: SIM118
            return file.get_slice("segments")[row : row + 1][0].long()
        return self.static.get("feature_mask")

    def notes(self, chunk: int) -> dict:
        """What a chunk says beside its tensors: ``names``, ``skipped``, ``rows`` (model rows a call).

        Raises:
            StoreError: it is not finished, or corrupt.
        """
        metadata = self._open(chunk).metadata() or {}
        try:
            return json.loads(metadata["xaifast"])
        except (KeyError, ValueError) as error:
            raise corrupt(self.chunk_path(chunk), f"its notes cannot be read, {error!r}") from None

    @property
    def log(self) -> list[dict]:
        """Events of all processes, in the order of their time."""
        events = []
        for path in sorted((self.directory / "log").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # a line that a kill cut short
                    events.append(json.loads(line))
        return sorted(events, key=lambda event: event["time"])

    @property
    def speed(self) -> Speed:
        """What the finished chunks cost, beside the bare forward measured when processes started."""
        log = self.log
        chunks = {event["chunk"]: event for event in log if event["event"] == "chunk"}
        floors = [event["forward_rows_per_second"] for event in log if event["event"] == "start"]
        return Speed(
            model_rows=sum(event["model_rows"] for event in chunks.values()),
            seconds=sum(event["seconds"] for event in chunks.values()),
            forward_rows_per_second=median(floors) if floors else math.nan,
        )

    def verify(self) -> None:
        """Read every finished chunk and compare checksums.

        Raises:
            StoreError: names the first corrupt chunk.
        """
        for chunk in self.finished:
            path = self.chunk_path(chunk)
            notes = self.notes(chunk)
            try:
                tensors = load(path.read_bytes())
            except (SafetensorError, OSError) as error:
                raise corrupt(path, str(error)) from None
            if notes.pop("checksum", None) != checksum(tensors, notes):
                raise corrupt(path, "its checksum differs")

    def chunk_path(self, chunk: int) -> Path:
        """File of a chunk."""
        return self.directory / "chunks" / f"{chunk:06d}.safetensors"

    def _valid(self, index: int) -> int:
        with suppress(TypeError):
            index = operator.index(index)
        if not isinstance(index, int) or not 0 <= index < len(self):
            raise IndexError(f"the run holds inputs 0..{len(self) - 1}, got {index!r}")
        return index

    def _locate(self, index: int) -> tuple[safe_open, int]:
        chunk, row = divmod(self._valid(index), self.manifest["chunk_size"])
        return self._open(chunk), row

    def _open_chunk(self, chunk: int) -> safe_open:
        path = self.chunk_path(chunk)
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            start, stop = self.bounds(chunk)
            raise StoreError(
                f"xaifast: inputs {start}..{stop - 1} of {self.directory} are not finished; run the command that made "
                "it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise corrupt(path, str(error)) from None


def open_run(directory: str | Path) -> Run:
    """Open a stored result, finished or not.

    Args:
        directory: What was passed as ``--out``.

    Returns:
        `Run`: ``run[i]`` is a dict of one input's tensors, ``run.tensor("values")`` all of them.

    Raises:
        StoreError: no run there, or not readable.
    """
    return Run(directory)


def corrupt(path: Path, why: str) -> StoreError:
    """The error for a damaged chunk."""
    return StoreError(
        f"xaifast: {path} is corrupt ({why}); all other chunks are kept: delete it and run the command that made the "
        "run again to have it computed anew"
    )


def checksum(tensors: Mapping[str, Tensor], notes: Mapping | None = None) -> str:
    """Hash of tensors by name and of what goes with them."""
    digest = hashlib.blake2b(json.dumps(notes).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
