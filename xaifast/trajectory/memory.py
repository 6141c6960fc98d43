"""Checkpoints kept in memory."""

from __future__ import annotations

from collections.abc import Collection

from .layout import State


class Memory:
    """Checkpoints as lists of tensors and notes, with the verbs of `Folder`."""

    directory = None

    def __init__(self) -> None:
        self.manifest: dict | None = None
        self.notes: list[dict] = []
        self._tensors: list[State] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(value.numel() * value.element_size() for tensors in self._tensors for value in tensors.values())

    def begin(self, manifest: dict) -> None:
        """Say what will be recorded; nothing has been."""
        self.manifest = manifest

    def append(self, tensors: State, notes: dict) -> None:
        """Keep a checkpoint."""
        # Copies from a GPU lie in pinned memory, which is scarce.
        self._tensors.append({key: value.clone() if value.is_pinned() else value for key, value in tensors.items()})
        self.notes.append(notes)

    def keys(self, t: int) -> Collection[str]:
        """What a checkpoint stores."""
        return self._tensors[t].keys()

    def read(self, t: int) -> State:
        """Tensors of a checkpoint."""
        return self._tensors[t]

    def truncate(self, length: int) -> None:
        """Drop the checkpoints from ``length`` on."""
        del self._tensors[length:], self.notes[length:]
