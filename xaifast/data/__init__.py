"""Data sources: images, arrays and tables, read by index and identified by their content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import DataSource, Loaded

__all__ = ["DataSource", "Loaded", "open_data"]

FORMS = {
    "digits": "scikit-learn's handwritten digits",
    "controlled:NAME": "data whose signal is known: digits-{zero,normalised,noise,textured}, table",
    "imagefolder:DIR": "a folder of images, one sub-folder a class",
    "hf:DIR_OR_NAME[:SPLIT]": "an image data set of Hugging Face datasets",
    "npz:FILE": "NumPy arrays",
    "csv:FILE": "a table",
    "parquet:FILE": "a table",
}


def open_data(
    spec: str,
    *,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    drop: Sequence[str] | None = None,
) -> DataSource:
    """Open a data set.

    Nothing in a data file is executed: arrays are read without pickle, and data sets that bring code are refused.

    Args:
        spec: ``digits``, ``controlled:NAME``, ``imagefolder:DIR``, ``hf:DIR_OR_NAME[:SPLIT]``, ``npz:FILE``,
            ``csv:FILE`` or ``parquet:FILE``; ``~`` is the home directory. docs/data-and-models.md says what each
            expects.
        columns: Tables: the features, in this order. Default all columns but the label.
        label: Tables and ``hf:``: the column of classes.
        drop: Tables: columns to leave out.

    Returns:
        A source of ``kind`` ``"images"``, ``"arrays"`` or ``"table"``.

    Raises:
        ValueError: an unknown form, or content that is not what the form expects.
        FileNotFoundError: no such file or directory.
        ImportError: the package that reads this form is not installed; names the extra.

    Example:
        >>> digits = open_data("digits")
        >>> len(digits), digits.load([0]).items[0].shape, int(digits.load([0]).labels)
        (1797, torch.Size([1, 8, 8]), 0)
    """
    if not isinstance(spec, str):
        raise TypeError(f"xaifast.open_data: spec must be text like 'imagefolder:DIR', got {type(spec).__name__}")
    for name, names in (("columns", columns), ("drop", drop)):
        if isinstance(names, str):
            raise TypeError(
                f"xaifast.open_data: {name} must be a list of column names, got {names!r}; pass [{names!r}]"
            )
    form, _, where = spec.partition(":")
    if form not in {known.partition(":")[0] for known in FORMS} or bool(where) == (form == "digits"):
        forms = "".join(f"\n  {known:24}{what}" for known, what in FORMS.items())
        raise ValueError(f"xaifast.open_data: a data set is one of{forms}\ngot {spec!r}{_hint(spec)}")
    if form not in ("csv", "parquet") and (columns or drop or (label and form != "hf")):
        raise ValueError(
            f"xaifast.open_data: columns and drop are for tables (csv:, parquet:) and label for tables and hf:, "
            f"got them with {spec!r}; leave them out"
        )
    if form == "digits":
        from .arrays import Digits

        return Digits()
    if form == "controlled":
        from .known_signal import KnownSignal

        return KnownSignal(spec, where)
    if form == "npz":
        from .arrays import open_npz

        return open_npz(spec, _existing(where))
    if form == "imagefolder":
        from .images import ImageFolder

        return ImageFolder(spec, _existing(where, directory=True))
    if form == "hf":
        from .hub import open_hub

        return open_hub(spec, where, label)
    from .tables import Table

    return Table(spec, _existing(where), columns=columns, label=label, drop=drop)


def _existing(where: str, *, directory: bool = False) -> Path:
    path = Path(where).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"xaifast.open_data: no such file or directory: {where}")
    if path.is_dir() != directory:
        wanted, given = ("directory", "file") if directory else ("file", "directory")
        raise ValueError(f"xaifast.open_data: {where} must be a {wanted}, got a {given}")
    return path


def _hint(spec: str) -> str:
    """What a path without its form probably meant."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"; did you mean imagefolder:{spec} or hf:{spec}?"
    form = path.suffix.removeprefix(".").lower()
    return f"; did you mean {form}:{spec}?" if form in ("npz", "csv", "parquet") else ""
