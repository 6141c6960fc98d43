"""Pictures as data URIs: small, the same bytes for the same pixels, and no figure for each."""

from __future__ import annotations

import base64
import io

import numpy as np

from ..figures import display_image, signed_rgba

SMALL = 64  # up to this side pixels are shown as squares, losslessly


def picture_uri(x: np.ndarray, side: int) -> str:
    """A picture ``[H, W]`` or ``[H, W, 3]`` in 0..1 as PNG if small, else as WebP of at most ``side`` pixels a side."""
    image = _image(np.rint(255 * display_image(x)).astype(np.uint8))
    if max(image.size) <= SMALL:
        return _uri(image, "PNG", optimize=True)
    image.thumbnail((side, side))
    return _uri(image, "WEBP", quality=78, method=4)


def overlay_uri(values: np.ndarray, segments: np.ndarray, limit: float, side: int) -> str:
    """Values ``[M]`` as colours over the elements ``[H, W]`` of their players; ids below zero are transparent."""
    colours = signed_rgba(np.append(values, np.nan), limit)  # [M + 1, 4]
    image = _image(colours[segments])
    if max(image.size) > max(side, SMALL):
        image.thumbnail((side, side), resample=0)
    return _uri(image, "PNG", optimize=True)


def _image(pixels: np.ndarray) -> object:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("xaifast.write_report needs Pillow; pip install 'xaifast[report]'") from error
    return Image.fromarray(pixels)


def _uri(image: object, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
