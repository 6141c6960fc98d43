"""Identity by content: sha256 over values, and over many files without reading all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

CONTENT_BYTES = 2**28  # of a file set; 256 MiB


def hash_values(values: Mapping[str, object]) -> str:
    """sha256 (hex) over named values in the order of their names.

    Of tensors and arrays: name, dtype, shape and all bytes, on whatever device they are. Of anything else: its JSON.

    Example:
        >>> a = hash_values({"x": torch.ones(2), "y": [1, "b"]})
        >>> a == hash_values({"y": [1, "b"], "x": torch.ones(2)}), a == hash_values({"x": torch.ones(3), "y": [1, "b"]})
        (True, False)
    """
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            _update(digest, [name, str(value.dtype), list(value.shape)])
            # A view as bytes has no copy of its own; NumPy knows no bfloat16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            _update(digest, [name, value])
    return digest.hexdigest()


def hash_files(
    names: Sequence[str],
    sizes: Sequence[int],
    open_file: Callable[[int], BinaryIO],
    *,
    about: object = None,
    limit: int = CONTENT_BYTES,
) -> str:
    """sha256 (hex) over a set of files: names and sizes of all, contents of as many as ``limit`` bytes allow.

    Sets up to ``limit`` bytes are read completely. Of larger ones, files spread evenly over the list are read until
    ``limit`` bytes are: a changed byte elsewhere, in a file of unchanged size, goes unnoticed.

    Args:
        names: In the set's order.
        sizes: Bytes.
        open_file: Opens the file of a position; called for those that are read.
        about: JSON that belongs to the identity, such as labels.
        limit: Bytes of content.
    """
    digest = hashlib.sha256()
    _update(digest, [list(names), list(sizes), about])
    n, total = len(names), sum(sizes)
    n_read = n if total <= limit else max(1, n * limit // total)
    buffer = memoryview(bytearray(min(limit, 2**20)))
    left = limit
    for position in (k * n // n_read for k in range(n_read)):
        if not sizes[position]:
            continue  # empty or missing
        with open_file(position) as file:
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    """A JSON value with its length, so that what follows cannot be taken for a part of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()  # escapes what UTF-8 cannot hold
    digest.update(len(text).to_bytes(8, "little"))
    digest.update(text)
