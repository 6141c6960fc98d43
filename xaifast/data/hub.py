"""Image data sets in the format of Hugging Face datasets, from disk or from the Hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from .base import DataSource, Loaded, class_ids, require
from .fingerprint import hash_files
from .images import decode_all, file_size

if TYPE_CHECKING:
    import datasets


class HubImages(DataSource):
    """The images of one split; made by `open_hub`. Items are RGB, names are row numbers.

    The fingerprint is that of `hash_files` over the encoded images, with all labels.
    """

    kind = "images"

    def __init__(self, spec: str, split: datasets.Dataset, label: str | None) -> None:
        import datasets

        self.spec = spec
        image = _image_column(split.features, spec)
        label = _label_column(split.features, spec, label)
        # Encoded, so that decoding and what it does to broken images are the same for all sources.
        self._images = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._column = image
        if label is not None:
            values = split.select_columns([label]).with_format("arrow")[:][label].to_pylist()
            feature = split.features[label]
            if isinstance(feature, datasets.ClassLabel):
                self.class_names = list(feature.names)
            if all(isinstance(value, int | None) for value in values):
                self.labels = torch.tensor([-1 if value is None else int(value) for value in values])
            else:
                self.labels, self.class_names = class_ids(values)

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        """See `hash_files`."""
        import pyarrow.compute as pc

        stored = self._images.with_format("arrow")[:][self._column]
        sizes = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
        paths = pc.struct_field(stored, "path").to_pylist() if None in sizes else []
        sizes = [file_size(paths[i]) if size is None else size for i, size in enumerate(sizes)]
        about = [self.class_names, self.labels.tolist() if self.labels is not None else None]
        return hash_files([str(i) for i in range(len(self))], sizes, self._open, about=about)

    def _items(self, indices: list[int]) -> Loaded:
        return decode_all(self._open, indices, [str(i) for i in indices])

    def _open(self, index: int) -> BinaryIO:
        stored = self._images[index][self._column] or {}
        if stored.get("bytes") is None and stored.get("path"):
            return open(stored["path"], "rb", buffering=0)
        return io.BytesIO(stored.get("bytes") or b"")


def open_hub(spec: str, where: str, label: str | None) -> HubImages:
    """Open ``DIR_OR_NAME[:SPLIT]``.

    A directory is read with ``load_from_disk`` if ``save_to_disk`` wrote it, else with ``load_dataset``; anything else
    is a name on the Hub. The split is by default ``test``, else ``validation``, else the only one. Data sets that bring
    code are refused.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: cannot be read; no such split, image or label column.
        ImportError: datasets or Pillow is missing.
    """
    datasets = require("datasets", "hf", "xaifast.open_data")
    require("PIL", "data", "xaifast.open_data")
    name, wanted = where, None
    if not Path(where).expanduser().exists() and ":" in where:
        name, _, wanted = where.rpartition(":")
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"xaifast.open_data: no such directory: {name}")
    try:
        if any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            # Resolved, because names such as "imagefolder" are readers of the library.
            # Version 4 dropped data sets that are programs; before it they could be refused.
            safe = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
            loaded = datasets.load_dataset(str(path.resolve()) if path.is_dir() else name, **safe)
    except ImportError:
        raise
    except Exception as error:  # whatever the library makes of the files
        raise ValueError(
            f"xaifast.open_data: {name} must be a directory written by save_to_disk, one that load_dataset reads or a "
            f"data set on the Hub, got: {error}"
        ) from error
    return HubImages(spec, _split(loaded, wanted, name), label)


def _split(loaded: datasets.Dataset | datasets.DatasetDict, wanted: str | None, name: str) -> datasets.Dataset:
    if not isinstance(loaded, dict):
        if wanted is not None:
            raise ValueError(
                f"xaifast.open_data: {name} is one data set without splits, got split {wanted!r}; leave ':{wanted}' out"
            )
        return loaded
    default = list(loaded)[:1] if len(loaded) == 1 else []
    candidates = [wanted] if wanted is not None else ["test", "validation", *default]
    for candidate in candidates:
        if candidate in loaded:
            return loaded[candidate]
    raise ValueError(
        f"xaifast.open_data: the split of {name} must be one of {sorted(loaded)}, got "
        f"{repr(wanted) if wanted is not None else 'none'}; append it, as in hf:{name}:{sorted(loaded)[0]}"
    )


def _image_column(features: datasets.Features, spec: str) -> str:
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) == 1 or "image" in images:
        return "image" if "image" in images else images[0]
    columns = {column: getattr(feature, "dtype", type(feature).__name__) for column, feature in features.items()}
    raise ValueError(
        f"xaifast.open_data: {spec} must have one image column, or one that is named 'image', got {len(images)} among "
        f"{columns}; cast the column to datasets.Image() or remove the others"
    )


def _label_column(features: datasets.Features, spec: str, wanted: str | None) -> str | None:
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if wanted is None and "label" not in features and len(classes) > 1:
        raise ValueError(f"xaifast.open_data: {spec} has several label columns, {classes}; choose one with label")
    column = wanted or ("label" if "label" in features else next(iter(classes), None))
    if column is None:
        return None
    dtype = getattr(features.get(column), "dtype", "")
    if not str(dtype).startswith(("int", "uint", "bool", "string", "large_string")):
        given = f"a column of {dtype}" if dtype else f"none of that name among {list(features)}"
        raise ValueError(
            f"xaifast.open_data: the label {column!r} of {spec} must be a column of integers or text, got {given}; "
            "choose another with label"
        )
    return column
