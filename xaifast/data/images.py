"""Image files: decoding that reports instead of raising, and folders of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from .base import DataSource, Loaded, require
from .fingerprint import hash_files

if TYPE_CHECKING:
    from PIL import Image

# Fixed, so that a folder is the same data set whatever Pillow was built with.
_NAMES = ("avif", "bmp", "gif", "jfif", "jp2", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
EXTENSIONS = frozenset(f".{name}" for name in _NAMES)
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")  # none that starts a program


def read_image(file: BinaryIO) -> Image.Image:
    """An image as it is stored, turned as its EXIF orientation says.

    Raises:
        ValueError: no image, or a broken one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=[name for name in _FORMATS if _can_read(name)]) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("not an image in a format that is read here") from None
    except (OSError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def decode_image(file: BinaryIO) -> Image.Image:
    """An RGB image of 8 bits a channel: turned as its EXIF orientation says, transparency dropped, 16 bits scaled.

    Raises:
        ValueError: no image, a broken one, or one whose range of values is unknown.
    """
    image = read_image(file)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # palettes with transparency in bytes cannot be converted directly
    return image.convert("RGB")


def _can_read(name: str) -> bool:
    from PIL import Image

    if name not in Image.OPEN:
        Image.init()
    return name in Image.OPEN


def _scale(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits in 8: Pillow's own conversion would cut off everything above 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"grey values must be of 8 or 16 bits, got mode {image.mode} with {values.min()}..{values.max()}"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))


def decode_all(open_file: Callable[[int], BinaryIO], indices: Sequence[int], names: list[str]) -> Loaded:
    """Decode images; those that cannot be read are reported, whatever is wrong with them."""
    loaded = Loaded([], names)
    for position, index in enumerate(indices):
        image = None
        try:
            with open_file(index) as file:
                image = decode_image(file)
        except OSError as error:
            loaded.failures[position] = error.strerror or str(error)
        except Exception as error:  # decoders raise what they like on broken files
            known = isinstance(error, ValueError)
            loaded.failures[position] = str(error) if known else f"{type(error).__name__}: {error}"
        loaded.items.append(image)
    return loaded


def file_size(path: str | Path | None) -> int:
    """Bytes of a file, 0 where there is none: whoever decodes it will say so."""
    return os.path.getsize(path) if path and os.path.exists(path) else 0


class ImageFolder(DataSource):
    """A folder of images: every sub-folder is a class (sorted), or none where the images lie in the folder itself.

    Sub-folders of classes are searched; hidden files and folders are not. The order is that of the relative names, part
    by part. Items are RGB. The fingerprint is that of `hash_files` over relative names and contents.

    Raises:
        ValueError: no images, or images beside class folders.
        ImportError: Pillow is missing.
    """

    kind = "images"

    def __init__(self, spec: str, directory: Path) -> None:
        require("PIL", "data", "xaifast.open_data")
        self.spec, self.directory = spec, directory
        files = sorted(image_files(directory, ()))  # tuples of the relative path's parts
        classes = sorted(entry.name for entry in os.scandir(directory) if _visible(entry) and entry.is_dir())
        if not files:
            raise ValueError(
                f"xaifast.open_data: {directory} must hold images ({' '.join(sorted(EXTENSIONS))}), got none; "
                "check the path"
            )
        beside = [parts[0] for parts in files if len(parts) == 1]
        if classes and beside:
            raise ValueError(
                f"xaifast.open_data: {directory} must hold either images or one sub-folder a class, got "
                f"{beside[0]} beside the folder {classes[0]}; move one of them away"
            )
        self.names = ["/".join(parts) for parts in files]
        if classes:
            ids = {name: i for i, name in enumerate(classes)}
            self.class_names = classes
            self.labels = torch.tensor([ids[parts[0]] for parts in files])

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """See `hash_files`; names are relative to the folder, class names belong to the identity."""
        sizes = [file_size(self.directory / name) for name in self.names]
        return hash_files(self.names, sizes, self._open, about=self.class_names)

    def _items(self, indices: list[int]) -> Loaded:
        return decode_all(self._open, indices, [self.names[i] for i in indices])

    def _open(self, index: int) -> BinaryIO:
        return open(self.directory / self.names[index], "rb", buffering=0)


def _visible(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".")


def image_files(folder: Path | str, parts: tuple[str, ...], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Relative paths, in parts, of the images below a folder. Links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in filter(_visible, entries):
            if entry.is_dir():
                yield from image_files(entry.path, (*parts, entry.name), (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield (*parts, entry.name)
