"""Segmentations of images: mask files found by name, read as object, background and what is neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from .base import require
from .fingerprint import hash_files
from .images import file_size, image_files, read_image

BACKGROUND, IGNORED, OBJECT = 0, 128, 255  # what padding adds is background

FORMS = {
    "binary": "every value above 0 is object",
    "pets": "Oxford-IIIT Pet trimaps: 1 object, 2 background, 3 border, which is ignored",
    "cub": "CUB-200-2011: grey values from 128 on, marked by most annotators, are object",
}


class Segmentations:
    """A folder of mask images, sub-folders included, one for each image of a data set.

    A mask belongs to the image of the same path without its extension (``dogs/7.jpg`` and ``dogs/7.png``), or else to
    that of the same stem (``7``), which must then be the stem of one mask only. Hidden files and folders are left out.

    Args:
        directory: Where masks are.
        form: A key of `FORMS`.

    Raises:
        ValueError: an unknown form, or no images there. FileNotFoundError: no such directory.
        ImportError: Pillow is missing.
    """

    def __init__(self, directory: str | Path, form: str = "binary") -> None:
        require("PIL", "data", "xaifast.Segmentations")
        if form not in FORMS:
            raise ValueError(f"xaifast.Segmentations: form must be one of {', '.join(FORMS)}, got {form!r}")
        self.directory, self.form = Path(directory).expanduser(), form
        if not self.directory.is_dir():
            raise FileNotFoundError(f"xaifast.Segmentations: no such directory: {directory}")
        self._by_path: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for parts in sorted(image_files(self.directory, ())):
            name = PurePosixPath(*parts)
            self._by_path.setdefault(str(name.with_suffix("")), []).append(str(name))
            self._by_stem.setdefault(name.stem, []).append(str(name))
        if not self._by_path:
            raise ValueError(f"xaifast.Segmentations: {directory} must hold mask images, got none; check the path")

    def find(self, name: str) -> str:
        """The mask of an image, by its name in the data set: a path relative to the folder.

        Raises:
            ValueError: there is none, or more than one.
        """
        path = PurePosixPath(name)
        found = self._by_path.get(str(path.with_suffix(""))) or self._by_stem.get(path.stem, [])
        if len(found) == 1:
            return found[0]
        several = f"{len(found)} masks ({', '.join(found[:3])})" if found else "no mask"
        raise ValueError(f"{name} has {several} in {self.directory}")

    def load(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The mask of an image: uint8 ``[H, W]`` of `OBJECT`, `BACKGROUND` and `IGNORED`.

        Args:
            name: Of the image.
            size: H, W of the image; the mask's must be the same.

        Raises:
            ValueError: no mask, one that cannot be read, or one that is not of this size or form.
        """
        mask = self.find(name)
        try:
            with open(self.directory / mask, "rb") as file:
                codes = _READERS[self.form](np.asarray(read_image(file)))
        except (OSError, ValueError) as error:
            raise ValueError(f"mask {mask} of {name} cannot be read: {error}") from error
        if codes.shape != tuple(size):
            raise ValueError(
                f"mask {mask} of {name} must have the image's size, {size[0]} x {size[1]} (height, width), got "
                f"{codes.shape[0]} x {codes.shape[1]}"
            )
        return codes

    def fingerprint(self) -> str:
        """See `hash_files`; names are relative to the folder."""
        names = sorted(name for found in self._by_path.values() for name in found)
        paths = [self.directory / name for name in names]
        return hash_files(names, [file_size(path) for path in paths], lambda i: open(paths[i], "rb", buffering=0))

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Why images have no mask, by name; those that have one are left out."""
        reasons = {}
        for name in names:
            try:
                self.find(name)
            except ValueError as error:
                reasons[name] = str(error)
        return reasons


def _binary(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3:  # colours; a last channel of two or four is transparency
        values = values[..., : 3 if values.shape[2] > 2 else 1].any(2)
    return np.where(values > 0, OBJECT, BACKGROUND).astype(np.uint8)


def _pets(values: np.ndarray) -> np.ndarray:
    values = _grey(values)
    others = np.setdiff1d(values, (1, 2, 3))
    if others.size:
        raise ValueError(f"trimaps hold 1, 2 and 3, got {others[:4].tolist()}; choose another form")
    return np.array([BACKGROUND, OBJECT, BACKGROUND, IGNORED], np.uint8)[values]


def _cub(values: np.ndarray) -> np.ndarray:
    values = _grey(values)
    if values.dtype != np.uint8:
        raise ValueError(f"grey values must be of 8 bits, got {values.dtype}; choose another form")
    return np.where(values >= 128, OBJECT, BACKGROUND).astype(np.uint8)


def _grey(values: np.ndarray) -> np.ndarray:
    """The one channel of a mask; others must be transparency or repeat it."""
    if values.ndim == 3:
        channels = values[..., : 3 if values.shape[2] > 2 else 1]
        if (channels != channels[..., :1]).any():
            raise ValueError("values must be grey, got colours; choose another form")
        values = channels[..., 0]
    return values


_READERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"binary": _binary, "pets": _pets, "cub": _cub}
