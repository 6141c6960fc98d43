"""Tables: numeric columns as features, one column as label."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .base import DataSource, Loaded, class_ids, require
from .fingerprint import hash_values

if TYPE_CHECKING:
    import pandas

_CALLER = "xaifast.open_data"


class Table(DataSource):
    """Rows of a CSV or Parquet file as float32 ``[F]``.

    Args:
        spec: ``csv:FILE`` or ``parquet:FILE``.
        path: The file.
        columns: Features, in this order; default all columns but ``label``, in the file's order.
        label: Column of classes (integers, text or booleans), numbered in sorted order; empty is unknown, -1.
        drop: Columns left out.

    The fingerprint is that of `hash_values` over features, labels and their names.

    Raises:
        ValueError: not readable; a column that is missing, not numeric, or has missing or infinite values.
        ImportError: pandas, or pyarrow for Parquet, is missing.
    """

    kind = "table"

    def __init__(
        self,
        spec: str,
        path: Path,
        *,
        columns: Sequence[str] | None = None,
        label: str | None = None,
        drop: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec
        frame = _read(path, parquet=spec.startswith("parquet:"))
        names = list(frame.columns)
        columns, drop = list(columns or ()), list(drop or ())
        for name in (*columns, *drop, *([label] if label is not None else [])):
            if name not in names:
                close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:8]
                raise ValueError(f"{_CALLER}: {path} has no column {name!r}; the nearest are {close}")
        twice = [name for name in columns if columns.count(name) > 1 or name in drop or name == label]
        if twice:
            raise ValueError(
                f"{_CALLER}: columns must be different features, neither label nor dropped, got {twice[0]!r} in two "
                "roles; name it once"
            )
        self.feature_names = columns or [name for name in names if name != label and name not in drop]
        if not self.feature_names or frame.empty:
            raise ValueError(
                f"{_CALLER}: {path} must hold at least one row and one feature, got {len(frame)} rows and the features "
                f"{self.feature_names}; check the file, columns and drop"
            )
        self._rows = _features(frame[self.feature_names], path)
        if label is not None:
            self.labels, self.class_names = _labels(frame[label], path)

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """See `hash_values`."""
        return hash_values(
            {
                "rows": self._rows,
                "labels": self.labels,
                "feature_names": self.feature_names,
                "class_names": self.class_names,
            }
        )

    def _items(self, indices: list[int]) -> Loaded:
        return Loaded([self._rows[i] for i in indices], [str(i) for i in indices])


def _read(path: Path, *, parquet: bool) -> pandas.DataFrame:
    pandas = require("pandas", "data", _CALLER)
    if parquet:
        require("pyarrow", "data", _CALLER)
    try:
        frame = pandas.read_parquet(path, engine="pyarrow") if parquet else pandas.read_csv(path, low_memory=False)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parser errors are ValueErrors
        raise ValueError(f"{_CALLER}: {path} cannot be read as {'Parquet' if parquet else 'CSV'}: {error}") from error
    frame.columns = [str(name) for name in frame.columns]
    return frame


def _features(frame: pandas.DataFrame, path: Path) -> Tensor:
    """Float32 ``[N, F]`` of numeric columns without gaps."""
    rows = np.empty(frame.shape, dtype=np.float32)
    for i, name in enumerate(frame.columns):
        column = frame[name]
        if column.dtype.kind not in "biuf":
            example = next((value for value in column if isinstance(value, str)), column.iloc[0])
            raise ValueError(
                f"{_CALLER}: the features of {path} must be numbers, got {column.dtype} in column {name!r}, such as "
                f"{example!r}; encode it as numbers, make it the label, or leave it out (drop, --drop {name})"
            )
        with np.errstate(over="ignore"):  # found below
            rows[:, i] = column.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = {name: int(n) for name, n in zip(frame.columns, (~np.isfinite(rows)).sum(0), strict=True) if n}
    if bad:
        listed = ", ".join(f"{name!r} ({n} of {len(frame)} rows)" for name, n in list(bad.items())[:8])
        raise ValueError(
            f"{_CALLER}: the features of {path} must be finite in float32, got missing or infinite values in {listed}; "
            "fill them, remove the rows, or leave the columns out (drop, --drop)"
        )
    return torch.from_numpy(rows)


def _labels(column: pandas.Series, path: Path) -> tuple[Tensor, list[str]]:
    values = column.dropna()
    if column.dtype.kind == "f":  # integers with gaps are read as floats
        others = values[values % 1 != 0]  # infinity as well
        if len(others):
            raise ValueError(
                f"{_CALLER}: the label {column.name!r} of {path} must hold classes as integers or text, got numbers "
                f"like {others.iloc[0]}; leave it out (drop, --drop {column.name}) if it is "
                "no class"
            )
        values = values.astype(np.int64)
    known = values.tolist()
    if len({type(value) for value in known}) > 1:
        known = [str(value) for value in known]
    present = iter(known)
    return class_ids(None if gone else next(present) for gone in column.isna())
