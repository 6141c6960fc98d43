"""The numbers of a stored run that a report speaks about, one output an input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..run import Run


@dataclass
class Results:
    """Inputs of the finished chunks that could be read; float64 and int64 arrays.

    Attributes:
        index: ``[n]``, their numbers in the data set.
        values: ``[n, M]``; NaN beyond an input's own players.
        errors: ``[n, M]``, standard errors.
        base: ``[n]``, value without any player.
        full: ``[n]``, value of the whole input.
        target: ``[n]``, the output explained, the predicted one where all are; -1 where the model has one output.
        label: ``[n]``, -1 unknown.
        predicted: ``[n]``, -1 where the model has one output.
        all_outputs: Whether the run holds further outputs.
    """

    index: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    base: np.ndarray
    full: np.ndarray
    target: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    all_outputs: bool

    def __len__(self) -> int:
        return len(self.index)

    @property
    def total(self) -> np.ndarray:
        """``[n]``: sum of ``|value|`` over players."""
        return np.nansum(np.abs(self.values), axis=1)

    @property
    def relative_error(self) -> np.ndarray:
        """``[n]``: L2 norm of the standard errors over that of the values; 0 where both are 0, NaN where unknown."""
        there = ~np.isnan(self.values)
        size = np.sqrt(np.nansum(self.values**2, axis=1))
        error = np.sqrt((np.where(there, self.errors, 0.0) ** 2).sum(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(error == 0, 0.0, np.where(size > 0, error / size, np.nan))


_NAMES = ("values", "std_errors", "base_values", "full_values", "target", "label", "predicted")


def read_results(run: Run) -> Results:
    """Read the finished chunks, one at a time, and keep of each input what is explained.

    Raises:
        StoreError: a chunk is corrupt.
    """
    skipped = run.skipped
    parts: list[dict[str, Tensor]] = []
    all_outputs = False
    for chunk in run.finished:
        start, stop = run.bounds(chunk)
        kept = torch.tensor([i - start for i in range(start, stop) if i not in skipped], dtype=torch.int64)
        part = {name: x[kept] for name, x in run.chunk(chunk, _NAMES).items()}
        part["index"] = kept + start
        if part["values"].dim() == 3:
            all_outputs = True
            part["target"] = torch.where(part["predicted"] >= 0, part["predicted"], part["full_values"].argmax(1))
            at, k = torch.arange(len(kept)), part["target"]
            for name in ("values", "std_errors"):
                part[name] = part[name][at, :, k]
            for name in ("base_values", "full_values"):
                part[name] = part[name][at, k]
        parts.append(part)
    width = max((part["values"].shape[1] for part in parts), default=0)

    def gather(name: str, dtype: torch.dtype) -> np.ndarray:
        rows = [part[name].to(dtype) for part in parts]
        if name in ("values", "std_errors"):
            rows = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=torch.nan) for x in rows]
        empty = (0, 0) if name in ("values", "std_errors") else (0,)
        return torch.cat(rows).numpy() if rows else torch.zeros(empty, dtype=dtype).numpy()

    whole, real = torch.int64, torch.float64
    return Results(
        index=gather("index", whole),
        values=gather("values", real),
        errors=gather("std_errors", real),
        base=gather("base_values", real),
        full=gather("full_values", real),
        target=gather("target", whole),
        label=gather("label", whole),
        predicted=gather("predicted", whole),
        all_outputs=all_outputs,
    )
