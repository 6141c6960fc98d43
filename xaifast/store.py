"""Results on disk, written: chunks and manifest appear complete or not at all (`xaifast.run` says where)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from .run import FORMAT, Run, StoreError, checksum

_DECIDES = ("format", "kind", "method", "n_items", "seed", "model", "data", "settings", "static")
_REMARKS = ("versions", "threads", "device")
_HASHED = ("model.spec", "data.spec", "data.label")  # where things lie; what they are is in the hashes
_FOLDERS = ("chunks", "rows", "log")


class Store(Run):
    """A run being written. One process a rank; ranks share nothing but the directory.

    Opening it makes the run, or takes up one that is there: whatever decides about results must then be the same.

    Args:
        directory: Made if needed.
        manifest: See `Run`; ``chunk_size`` and ``rows`` of a run that is there take precedence.
        static: Tensors shared by all inputs.
        rank: Of this process.
        world: Number of processes.

    Raises:
        StoreError: another model, data set or setting; a corrupt chunk; another process at work; the disk.
    """

    def __init__(
        self, directory: str | Path, manifest: dict, static: Mapping[str, Tensor], *, rank: int = 0, world: int = 1
    ) -> None:
        self.directory, self.rank, self.world = Path(directory), rank, world
        manifest = {"format": FORMAT, **manifest, "static": checksum(static)}
        manifest = json.loads(json.dumps(manifest))  # as it will be read again
        for folder in _FOLDERS:
            self._disk(lambda path=self.directory / folder: path.mkdir(parents=True, exist_ok=True))
        self._lock()
        try:
            for folder in (".", *_FOLDERS):  # not those of a run inside this one, which has a lock of its own
                for left in (self.directory / folder).glob(f".*.{rank}.tmp"):  # by a kill: the lock's holder is alone
                    left.unlink()
            chunks = any((self.directory / "chunks").iterdir())  # asked first: the manifest is older than any chunk
            if not (self.directory / "manifest.json").exists():
                if chunks:
                    raise StoreError(
                        f"xaifast: {self.directory} holds chunks without the manifest.json that says what they are of; "
                        "restore it, or choose another --out"
                    )
                self._write("static.safetensors", save(dict(static)))
                self._write("manifest.json", json.dumps(manifest, indent=1).encode(), replace=False)
            super().__init__(directory)
            self._compare(manifest)
            self.verify()
        except BaseException:
            self.close()
            raise

    def remarks(self, manifest: Mapping) -> list[str]:
        """What differs from the run's beginning and may change the last digits of further results."""
        ours = json.loads(json.dumps(manifest))
        return [
            f"{key} were {self.manifest.get(key)} and are {ours.get(key)}"
            for key in _REMARKS
            if self.manifest.get(key) != ours.get(key)
        ]

    @property
    def pending(self) -> list[int]:
        """Chunks of this rank that are not finished."""
        return sorted(set(range(self.rank, self.n_chunks, self.world)) - set(self.finished))

    def rows(self, chunk: int) -> int:
        """Model rows a call for a chunk: what the run began with, or less since a chunk of this rank before it."""
        rows = self.manifest["rows"]
        for path in (self.directory / "rows").glob("*.json"):
            if path.stem.isdigit() and int(path.stem) <= chunk and (chunk - int(path.stem)) % self.world == 0:
                rows = min(rows, json.loads(path.read_text())["rows"])
        return rows

    def shrink(self, chunk: int, rows: int | None) -> None:
        """Record that a chunk, and this rank's after it, run with fewer rows a call; None withdraws it."""
        name = f"rows/{chunk:06d}.json"
        if rows is None:
            self._disk(lambda: (self.directory / name).unlink(missing_ok=True))
        else:
            self._write(name, json.dumps({"rows": rows}).encode())

    def write(
        self, chunk: int, tensors: Mapping[str, Tensor], names: list[str], skipped: Mapping[int, str] | None = None
    ) -> None:
        """Write a finished chunk: all of it or nothing.

        Args:
            chunk: Its number.
            tensors: Results ``[stop - start, ...]`` each, ``(start, stop) = bounds(chunk)``.
            names: Of its inputs.
            skipped: Reason by data-set index of inputs without result.
        """
        start, stop = self.bounds(chunk)
        wrong = {name: list(t.shape) for name, t in tensors.items() if t.dim() == 0 or t.shape[0] != stop - start}
        if wrong or len(names) != stop - start:
            raise ValueError(
                f"xaifast.Store.write: chunk {chunk} holds {stop - start} inputs, got {len(names)} names and {wrong}"
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        notes = {
            "chunk": chunk,
            "rows": self.rows(chunk),
            "names": names,
            "skipped": {str(i): why for i, why in sorted((skipped or {}).items())},
        }
        notes["checksum"] = checksum(tensors, notes)
        # One metadata key: safetensors keeps several in a hash map, whose order changes from process to process.
        data = save(tensors, metadata={"xaifast": json.dumps(notes)})
        self._write(self.chunk_path(chunk).relative_to(self.directory), data)

    def note(self, event: str, **details: object) -> None:
        """Append to this rank's log."""
        line = json.dumps({"time": round(time.time(), 3), "rank": self.rank, "event": event, **details})

        def append() -> None:
            with open(self.directory / "log" / f"rank{self.rank}.jsonl", "a") as file:
                file.write(line + "\n")

        self._disk(append)

    def close(self) -> None:
        """Let another process work on this rank's chunks."""
        os.close(self._lock_file)

    def _lock(self) -> None:
        path = self.directory / f".rank{self.rank}.lock"
        self._lock_file = self._disk(lambda: os.open(path, os.O_CREAT | os.O_RDWR, 0o644))
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system, also after a kill
        except OSError as error:
            os.close(self._lock_file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StoreError(f"xaifast: cannot lock {path} ({error.strerror}); use a local file system") from None
            raise StoreError(
                f"xaifast: another process (rank {self.rank}) is working on {self.directory}; wait for it or stop it, "
                "or choose another --out"
            ) from None

    def _compare(self, manifest: dict) -> None:
        there = self.manifest
        for what in ("model", "data"):
            if there[what]["sha256"] != manifest[what]["sha256"]:
                raise StoreError(
                    f"xaifast: {self.directory} holds results of another {what}: it began with "
                    f"{there[what]['spec']!r}, sha256 {there[what]['sha256']}, and {manifest[what]['spec']!r} has "
                    f"sha256 {manifest[what]['sha256']}; restore the {what}, or choose another --out"
                )
        changed = [
            f"{key} was {_short(old)}, is {_short(new)}"
            for section in _DECIDES
            for key, old, new in _differences(section, there.get(section), manifest.get(section))
            if key not in _HASHED
        ]
        if changed:
            raise StoreError(
                f"xaifast: {self.directory} was begun with other settings: {'; '.join(changed)}; repeat the first "
                "command, or choose another --out"
            )

    def _write(self, name: str | Path, data: bytes, *, replace: bool = True) -> None:
        """Write a file so that under its name there is all of it or nothing.

        With ``replace=False`` a file that another process made first stays.
        """
        path = self.directory / name
        temporary = path.with_name(f".{path.name}.{self.rank}.tmp")

        def write() -> None:
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, path)
                    return
                with suppress(FileExistsError):
                    os.link(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            temporary.unlink()

        self._disk(write)

    def _disk(self, action: object) -> object:
        try:
            return action()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free space and run the same command again" if full else "make it writable or choose another --out"
            raise StoreError(
                f"xaifast: cannot write to {self.directory}: {error.strerror}; finished chunks are kept: {remedy}"
            ) from error


def _differences(name: str, old: object, new: object) -> list[tuple[str, object, object]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(name, old, new)]
    keys = [*old, *(key for key in new if key not in old)]
    return [found for key in keys for found in _differences(f"{name}.{key}", old.get(key), new.get(key))]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
