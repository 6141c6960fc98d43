"""Arrays: model inputs as they are, or images as uint8."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import DataSource, Loaded, class_ids, require
from .fingerprint import hash_values

_INPUTS = ("x", "inputs", "images", "X")
_LABELS = ("y", "labels", "label")


class Arrays(DataSource):
    """Inputs held in memory, ``[N, ...]``: floating ones are model inputs, uint8 ones images.

    The fingerprint is that of `hash_values` over inputs, labels and class names.
    """

    def __init__(
        self, spec: str, inputs: np.ndarray, labels: Tensor | None = None, class_names: list[str] | None = None
    ) -> None:
        self.spec, self.labels, self.class_names = spec, labels, class_names
        self.kind = "images" if inputs.dtype == np.uint8 else "arrays"
        self._inputs = inputs

    def __len__(self) -> int:
        return len(self._inputs)

    def fingerprint(self) -> str:
        """See `hash_values`."""
        return hash_values({"inputs": self._inputs, "labels": self.labels, "class_names": self.class_names})

    def _items(self, indices: list[int]) -> Loaded:
        rows = [self._inputs[i] for i in indices]
        return Loaded(
            rows if self.kind == "images" else [torch.from_numpy(row) for row in rows], list(map(str, indices))
        )


class Digits(Arrays):
    """Scikit-learn's handwritten digits: 1797 inputs, float32 ``[1, 8, 8]`` in 0..1."""

    def __init__(self) -> None:
        images, digits = require("sklearn.datasets", "data", "xaifast.open_data").load_digits(return_X_y=True)
        inputs = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
        super().__init__("digits", inputs, torch.from_numpy(digits).long(), [str(digit) for digit in range(10)])


def open_npz(spec: str, path: Path) -> Arrays:
    """Inputs and labels of an ``.npz`` file, read without pickle.

    Inputs ``x`` (or ``inputs``, ``images``, ``X``, or the only array): float32 or float64 ``[N, ...]`` (float16 becomes
    float32), or uint8 ``[N, H, W]`` or ``[N, H, W, 3]``. Labels ``y`` (or ``labels``, ``label``): integers, or text
    that is numbered in sorted order.

    Raises:
        ValueError: not such a file, pickled objects, no such array, or one of another dtype or shape.
    """
    arrays = _read(path)
    inputs_name = next((name for name in _INPUTS if name in arrays), None)
    others = [name for name in arrays if name not in _LABELS]
    if inputs_name is None and len(others) == 1:
        inputs_name = others[0]
    if inputs_name is None:
        raise ValueError(
            f"xaifast.open_data: {path} must hold the inputs as one of {_INPUTS}, got the arrays {list(arrays)}; rename"
        )
    inputs = arrays[inputs_name]
    where = f"xaifast.open_data: array {inputs_name!r} of {path}"
    if inputs.dtype == np.uint8:
        if inputs.ndim not in (3, 4) or (inputs.ndim == 4 and inputs.shape[3] != 3):
            raise ValueError(
                f"{where} holds uint8, so it must be images [N, H, W] or [N, H, W, 3], got {inputs.shape}; transpose "
                "them, or save model inputs as float32"
            )
    elif inputs.dtype.kind != "f" or inputs.dtype.itemsize > 8:
        raise ValueError(
            f"{where} must hold model inputs (float32 or float64) or images (uint8), got dtype {inputs.dtype}; "
            "use .astype"
        )
    if inputs.ndim < 2 or inputs.size == 0:
        raise ValueError(f"{where} must have shape [N, ...] and at least one element, got {inputs.shape}; reshape")
    inputs = inputs.astype(np.float32 if inputs.dtype == np.float16 else inputs.dtype.newbyteorder("="), copy=False)
    labels_name = next((name for name in _LABELS if name in arrays and name != inputs_name), None)
    if labels_name is None:
        return Arrays(spec, np.ascontiguousarray(inputs))
    labels, class_names = _labels(arrays[labels_name], len(inputs), f"array {labels_name!r} of {path}")
    return Arrays(spec, np.ascontiguousarray(inputs), labels, class_names)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"xaifast.open_data: {path} must be an .npz file, got something else; write it with np.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise ValueError(
                        f"array {name!r} holds Python objects, which are not loaded because loading them can run "
                        "code; save numbers or text"
                    ) from error
                if not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{name!r} is no array; write it with np.savez")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"xaifast.open_data: {path} cannot be read: {error}") from error
    return arrays


def _labels(labels: np.ndarray, n: int, where: str) -> tuple[Tensor, list[str] | None]:
    if labels.shape != (n,):
        raise ValueError(f"xaifast.open_data: {where} must hold one label an input, shape ({n},), got {labels.shape}")
    if labels.dtype.kind == "U":
        return class_ids(labels.tolist())
    whole = labels.dtype.kind in "biu" or (
        labels.dtype.kind == "f" and bool((np.isfinite(labels) & (labels == np.round(labels))).all())
    )
    if not whole:
        raise ValueError(
            f"xaifast.open_data: {where} must hold classes as integers or text, got dtype {labels.dtype}; leave other "
            "targets out of the file"
        )
    return torch.from_numpy(labels.astype(np.int64)), None
