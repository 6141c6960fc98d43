"""What every data source is."""

from __future__ import annotations

import importlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor


@dataclass
class Loaded:
    """Some inputs of a data source.

    Attributes:
        items: Images: PIL images (RGB) or uint8 arrays ``[H, W]`` or ``[H, W, 3]``; tables and arrays: a floating
            tensor a row. None where reading failed.
        names: File name relative to the folder, or row number.
        labels: int64 ``[b]``, -1 unknown; None where the source has no labels.
        failures: Why an item could not be read, by position in this call.
    """

    items: list[object]
    names: list[str]
    labels: Tensor | None = None
    failures: dict[int, str] = field(default_factory=dict)


class DataSource(ABC):
    """Inputs in a fixed order, read by index.

    Attributes:
        kind: ``"images"`` (items go through the model's preprocessing), ``"table"`` or ``"arrays"`` (model inputs).
        spec: As given by the user.
        class_names: Of the labels, or None.
        feature_names: Of a table's columns in order, or None.
        labels: int64 ``[N]`` of all inputs, -1 unknown, or None.
    """

    kind: str
    spec: str
    class_names: list[str] | None = None
    feature_names: list[str] | None = None
    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the content, independent of where it lies and of when it was written."""

    @abstractmethod
    def _items(self, indices: list[int]) -> Loaded:
        """Items, names and failures of valid indices."""

    def load(self, indices: Sequence[int]) -> Loaded:
        """Read some inputs, in the order asked for.

        An image that cannot be read does not raise: its item is None and ``failures`` says why.

        Raises:
            IndexError: an index outside ``0..N-1``.
        """
        indices = [operator.index(i) for i in indices]
        outside = [i for i in indices if not 0 <= i < len(self)]
        if outside:
            raise IndexError(
                f"xaifast.data: indices into {self.spec} must lie in 0..{len(self) - 1}, got {outside[0]}; "
                "ask for inputs that exist"
            )
        loaded = self._items(indices)
        if self.labels is not None:
            loaded.labels = self.labels[torch.tensor(indices, dtype=torch.int64)]
        return loaded


def class_ids(values: Iterable[object]) -> tuple[Tensor, list[str]]:
    """Classes as ids in sorted order, -1 for None; int64 ``[N]`` and the names.

    Example:
        >>> class_ids(["dog", None, "cat"])
        (tensor([ 1, -1,  0]), ['cat', 'dog'])
    """
    values = list(values)
    classes = sorted({value for value in values if value is not None})
    ids = {value: i for i, value in enumerate(classes)}
    return torch.tensor([ids.get(value, -1) for value in values], dtype=torch.int64), [str(value) for value in classes]


def require(module: str, extra: str, caller: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{caller} needs {module.partition('.')[0]}; pip install 'xaifast[{extra}]'") from error
