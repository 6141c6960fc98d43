"""Checkpoints on disk: a safetensors file each, in a chain of checksums.

A recorded run is a directory::

    manifest.json                 names, shapes, dtypes and order of the tensors, how differences are stored
    records/000000.safetensors    the start, and then what each checkpoint changed; written once, atomically
    head.json                     how many there are, so that missing last ones are noticed

Every file holds its number, its checksum and that of the file before it (the first: of the manifest). A kill at any
moment leaves the checkpoints whose `append` had returned, and perhaps the next.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from ..run import checksum
from .layout import State

FORMAT = 1
_Result = TypeVar("_Result")


class TrajectoryError(RuntimeError):
    """A recorded run cannot be read, continued or written; what is recorded is kept."""


class Folder:
    """A directory of checkpoints, made by the first one.

    Attributes:
        directory: Where it is.
        manifest: What `begin` was given; None before.
        notes: Of every checkpoint.

    Raises:
        TrajectoryError: something else lies there, or files are missing, swapped or corrupt.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.manifest: dict | None = None
        self.notes: list[dict] = []
        self._keys: list[frozenset[str]] = []
        self._clean = False
        if self.directory.exists() and not self.directory.is_dir():
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} must be a directory, got a file; choose another"
            )
        files = self._files()
        if (self.directory / "manifest.json").exists():
            self.manifest = self._read_manifest()
        elif files:
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} holds checkpoints without the manifest.json that says of what; "
                "restore it, or choose another directory"
            )
        for t in files:
            self._open(t)
        if not files:
            self.manifest = None  # a kill before the first checkpoint
        self._check_head()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of checkpoints."""
        return sum(self._path(t).stat().st_size for t in range(len(self.notes)))

    def begin(self, manifest: dict) -> None:
        """Make the directory and say what will be recorded."""
        if self._files():
            raise self._taken(self._path(0))
        self._disk(lambda: (self.directory / "records").mkdir(parents=True, exist_ok=True))
        manifest = json.loads(json.dumps({"kind": "trajectory", "format": FORMAT, **manifest}))
        self._write(self.directory / "manifest.json", json.dumps(manifest, indent=1).encode(), replace=True)
        self.manifest = manifest

    def append(self, tensors: State, notes: dict) -> None:
        """Write a checkpoint; it is on disk when this returns.

        Raises:
            TrajectoryError: the disk, or another process that records to this directory.
        """
        t = len(self.notes)
        notes = {"record": t, "previous": self._link(t), **notes}
        notes["checksum"] = checksum(tensors, notes)
        if not self._clean:  # what a kill left
            for left in (self.directory / "records").glob(".*.tmp"):
                left.unlink(missing_ok=True)
            self._clean = True
        self._write(self._path(t), save(dict(tensors), metadata={"xaifast": json.dumps(notes)}), replace=False)
        self.notes.append(notes)
        self._keys.append(frozenset(tensors))
        self._write_head()

    def keys(self, t: int) -> Collection[str]:
        """What a checkpoint stores."""
        return self._keys[t]

    def read(self, t: int) -> State:
        """Tensors of a checkpoint.

        Raises:
            TrajectoryError: the file is missing, or its content is not what was written.
        """
        try:
            tensors = load(self._path(t).read_bytes())
        except (SafetensorError, OSError) as error:
            raise self._broken(t, str(error)) from None
        notes = {key: value for key, value in self.notes[t].items() if key != "checksum"}
        if checksum(tensors, notes) != self.notes[t]["checksum"]:
            raise self._broken(t, "its checksum differs")
        return tensors

    def truncate(self, length: int) -> None:
        """Delete the checkpoints from ``length`` on, the last one first."""
        while len(self.notes) > length:
            self._write_head(len(self.notes) - 1)
            self._disk(lambda: self._path(len(self.notes) - 1).unlink(missing_ok=True))
            del self.notes[-1], self._keys[-1]

    def _path(self, t: int) -> Path:
        return self.directory / "records" / f"{t:06d}.safetensors"

    def _files(self) -> range:
        found = {int(path.stem) for path in (self.directory / "records").glob("*.safetensors") if path.stem.isdigit()}
        missing = sorted(set(range(max(found, default=-1))) - found)
        if missing:
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} must hold a file for each of its {max(found) + 1} checkpoints, "
                f"but {', '.join(self._path(t).name for t in missing[:4])} {'is' if len(missing) == 1 else 'are'} "
                "missing; restore what is missing, or delete the files after it and head.json to keep the checkpoints "
                "before"
            )
        return range(len(found))

    def _read_manifest(self) -> dict:
        path = self.directory / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise TrajectoryError(f"xaifast.Trajectory: cannot read {path} ({error}); restore it") from None
        given = (manifest.get("kind"), manifest.get("format")) if isinstance(manifest, dict) else manifest
        if given != ("trajectory", FORMAT):
            raise TrajectoryError(
                f"xaifast.Trajectory: {path} must be of a trajectory of format {FORMAT}, got {given}; the directory "
                "holds something else, or was written by another version of xaifast: choose another directory"
            )
        return manifest

    def _open(self, t: int) -> None:
        """Read the notes of a checkpoint and see that it follows the one before."""
        try:
            with safe_open(self._path(t), framework="pt") as file:
                notes = json.loads(file.metadata()["xaifast"])
                keys = frozenset(file.keys())
            number, previous = notes["record"], notes["previous"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._broken(t, repr(error)) from None
        if number != t or previous != self._link(t):
            of = "comes from another run, or the one before it does" if number == t else f"is checkpoint {number}"
            raise TrajectoryError(
                f"xaifast.Trajectory: checkpoints must lie in the order they were recorded in, but {self._path(t)} "
                f"{of}; give the files the names they had"
            )
        self.notes.append(notes)
        self._keys.append(keys)

    def _link(self, t: int) -> str:
        return self.notes[t - 1]["checksum"] if t else checksum({}, self.manifest)

    def _check_head(self) -> None:
        length = 0
        with suppress(OSError, ValueError, KeyError, TypeError):  # it only counts
            length = int(json.loads((self.directory / "head.json").read_bytes())["length"])
        if length > len(self.notes):
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} must hold {length} checkpoints, but the last "
                f"{length - len(self.notes)} are missing; restore them, or delete head.json to keep the first "
                f"{len(self.notes)}"
            )

    def _write_head(self, length: int | None = None) -> None:
        """In place, by one system call that no kill can cut: replacing the file would wait for the disk again."""
        text = json.dumps({"length": len(self.notes) if length is None else length}).ljust(32)

        def write() -> None:
            file = os.open(self.directory / "head.json", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, text.encode(), 0)
            finally:
                os.close(file)

        self._disk(write)

    def _broken(self, t: int, why: str) -> TrajectoryError:
        return TrajectoryError(
            f"xaifast.Trajectory: {self._path(t)} is corrupt ({why}); restore it, or delete it, all after it and "
            f"head.json to keep the first {t} checkpoints"
        )

    @staticmethod
    def _taken(path: object) -> TrajectoryError:
        return TrajectoryError(
            f"xaifast.Trajectory: {path} exists: another process or Trajectory has recorded to this directory since it "
            "was opened; record each run to a directory of its own, or open this one again to go on"
        )

    def _write(self, path: Path, data: bytes, *, replace: bool) -> None:
        """Write a file so that under its name there is all of it or nothing; without ``replace`` none may be there."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def write() -> None:
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, path)
                else:
                    os.link(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()

        self._disk(write)

    def _disk(self, action: Callable[[], _Result]) -> _Result:
        try:
            return action()
        except FileExistsError as error:
            raise self._taken(error.filename2 or error.filename) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free space and record again" if full else "make it writable, or choose another directory"
            raise TrajectoryError(
                f"xaifast.Trajectory: cannot write to {self.directory}: {error.strerror}; the {len(self.notes)} "
                f"checkpoints before are kept: {remedy}"
            ) from error
