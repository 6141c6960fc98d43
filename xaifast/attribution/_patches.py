"""Patches: rectangles of maps, one for each window, of one size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Along one axis of a map: what each window changes, and a box of one length around it.

    Attributes:
        size: Of the map.
        low: int64 ``[count]``, first index that window i changes.
        high: One past the last.
    """

    size: int
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, size: int, low: Tensor, high: Tensor) -> Span:
        """Cut off at the map's borders; a window that changes nothing has an empty span."""
        low = low.clamp(0, size - 1)
        return cls(size, low, torch.maximum(low, high.clamp(max=size)))

    @property
    def length(self) -> int:
        """Of the box."""
        return max(1, int((self.high - self.low).max()))

    @property
    def start(self) -> Tensor:
        """First index of the box, int64 ``[count]``."""
        return self.low.clamp(max=self.size - self.length)

    @property
    def everything(self) -> Tensor:
        """Indices of the whole map for every window, int64 ``[count, size]``."""
        return torch.arange(self.size, device="cpu").expand(len(self.low), -1)

    def through(self, kernel: int, stride: int, padding: int, dilation: int, size: int) -> Span:
        """What changes after a sliding kernel, in a map of another size."""
        reach = dilation * (kernel - 1)
        low = (self.low + padding - reach + stride - 1).div(stride, rounding_mode="floor")
        high = (self.high - 1 + padding).div(stride, rounding_mode="floor") + 1
        return Span.of(size, low, high)

    def joined(self, other: Span) -> Span:
        """What either changes."""
        return Span(self.size, torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def needs(self, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
        """Indices, int64 ``[count, l]``, of the kernel's input that give this box; beyond the borders too."""
        length = (self.length - 1) * stride + dilation * (kernel - 1) + 1
        return self.start[:, None] * stride - padding + torch.arange(length, device="cpu")

    def same_box(self, other: Span) -> bool:
        """Whether both have one box."""
        return self.length == other.length and bool((self.start == other.start).all())


@dataclass(frozen=True)
class Axis:
    """Where to read each index of a region: in the patch, else in the clean map, else it is padding.

    Attributes:
        patch: int64 ``[count, l]``, index in the patch or -1.
        clean: int64 ``[count, l]``, index in the map or -1.
    """

    patch: Tensor
    clean: Tensor

    @classmethod
    def of(cls, indices: Tensor, span: Span, device: torch.device) -> Axis:
        """Of indices ``[count, l]`` of a map with these patches."""
        inside = indices - span.start[:, None]
        patch = torch.where((inside >= 0) & (inside < span.length), inside, -1)
        clean = torch.where((indices >= 0) & (indices < span.size), indices, -1)
        return cls(patch.to(device), clean.to(device))


@dataclass(frozen=True)
class Chunk:
    """Where the rows of a chunk come from.

    Attributes:
        owner: int64 ``[n]``, input among those the clean maps are of.
        row: int64 ``[n]``, the window's number along the height.
        column: The same along the width.
    """

    owner: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Region:
    """A rectangle of a map for each window, to be read from patches and, around them, clean maps.

    Attributes:
        rows: Its indices along the height.
        columns: Along the width.
        fill: What padding shows.
    """

    rows: Axis
    columns: Axis
    fill: float

    def read(self, patch: Tensor, clean: Tensor, chunk: Chunk) -> Tensor:
        """From patches ``[n, C, p, q]`` and clean maps ``[b, C, H, W]`` the regions ``[n, C, l, m]``, channels last.

        All are pixels of one table, so that a region is one gathering of rows of C numbers.
        """
        n, channels = patch.shape[:2]
        table = torch.cat((patch.new_full((1, channels), self.fill), _pixels(clean), _pixels(patch)))
        row, column = self.rows, self.columns
        unit, first = torch.arange(n, device=patch.device), 1 + clean[:, 0].numel()
        in_patch = _numbers(first, unit, row.patch[chunk.row], column.patch[chunk.column], patch)
        in_clean = _numbers(1, chunk.owner, row.clean[chunk.row], column.clean[chunk.column], clean)
        index = torch.where(in_patch > 0, in_patch, in_clean)  # [n, l, m]
        return table.index_select(0, index.flatten()).view(*index.shape, channels).permute(0, 3, 1, 2)


def _pixels(maps: Tensor) -> Tensor:
    """``[n, C, H, W]`` as ``[n H W, C]``; a view where channels lie innermost."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _numbers(first: int, image: Tensor, row: Tensor, column: Tensor, maps: Tensor) -> Tensor:
    """Rows of the table, ``[n, l, m]``, at which pixels of maps lie; 0, the padding, where an index is -1."""
    line = first + (image[:, None] * maps.shape[2] + row) * maps.shape[3]  # [n, l]
    inside = (row >= 0)[:, :, None] & (column >= 0)[:, None]
    return torch.where(inside, line[:, :, None] + column[:, None], 0)
