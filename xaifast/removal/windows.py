"""Removal by sliding windows: rectangles of an input, of any number of dimensions, show the baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.plan import SelectPlan
from ..players import Players
from .base import Prepared, Removal
from .replace import Replace, empty_rows, row_bytes, slice_background


@dataclass(frozen=True)
class Grid:
    """Windows over one input: from index 0 on, a stride apart, until every element is covered; the last is cut off.

    Attributes:
        shape: Of one input.
        window: Size along each of its dimensions, at most the shape's.
        stride: Steps, at most the window's where there is more than one.
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows along each dimension."""
        dims = zip(self.shape, self.window, self.stride, strict=True)
        return tuple(1 + math.ceil((size - window) / stride) for size, window, stride in dims)

    @property
    def starts(self) -> Tensor:
        """int64 ``[N, D]``: first index of every window, the last dimension fastest."""
        axes = [
            stride * torch.arange(count, device="cpu") for count, stride in zip(self.counts, self.stride, strict=True)
        ]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))

    def average(self, values: Tensor) -> Tensor:
        """Mean over the windows that cover an element: ``[B, N, K]`` to ``[B, *shape, K]``.

        Separable: along each dimension a sum of at most ``ceil(window / stride)`` gathered values, in the order of the
        windows, so that no input's bits depend on another's.
        """
        batch, _, n_outputs = values.shape
        maps = values.reshape(batch, *self.counts, n_outputs)
        dims = zip(self.shape, self.window, self.stride, self.counts, strict=True)
        for dim, (size, window, stride, count) in enumerate(dims, start=1):
            if count > 1:
                maps = _average(maps, dim, size, window, stride, count)
        return maps.expand(batch, *self.shape, n_outputs)

    def cells(self) -> tuple[Tensor, Tensor]:
        """The cells that the windows' edges cut the input into, as players.

        Returns:
            Player ids, int64, broadcastable to the input; BoolTensor ``[N, M]``, whether a window covers a cell.
        """
        ids = torch.zeros((), dtype=torch.int64, device="cpu")
        covers = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        dims = zip(self.shape, self.window, self.stride, self.counts, strict=True)
        for size, window, stride, count in dims:
            starts = stride * torch.arange(count, device="cpu")
            ends = (starts + window).clamp(max=size)
            edges = torch.cat((starts, ends)).unique()[:-1]
            along = torch.searchsorted(edges, torch.arange(size, device="cpu"), right=True) - 1
            along = along if len(edges) > 1 else along[:1]
            ids = ids.unsqueeze(-1) * len(edges) + along
            covered = (edges >= starts[:, None]) & (edges < ends[:, None])  # [count, edges]
            covers = (covers[:, None, :, None] & covered[None, :, None, :]).flatten(0, 1).flatten(1)
        return ids, covers


def _average(values: Tensor, dim: int, size: int, window: int, stride: int, count: int) -> Tensor:
    element = torch.arange(size, device=values.device)
    first = (element - window).div(stride, rounding_mode="floor").add(1).clamp(min=0)
    last = element.div(stride, rounding_mode="floor").clamp(max=count - 1)
    shape = (-1, *(1,) * (values.dim() - dim - 1))
    total = values.index_select(dim, first)
    for offset in range(1, math.ceil(window / stride)):
        index = first + offset
        more = values.index_select(dim, index.clamp(max=count - 1))
        total = total + torch.where((index <= last).reshape(shape), more, 0)
    return total / (last - first + 1).reshape(shape)


@dataclass(frozen=True)
class Windows:
    """Windows of a tuple of inputs, each of one of them.

    Attributes:
        code: int64 ``[N, 1 + D]``: which input tensor, -1 for none, then the window's first index along each dimension.
    """

    code: Tensor

    @classmethod
    def of(cls, grids: tuple[Grid, ...]) -> Windows:
        """All windows of all inputs, those of the first input first."""
        width = max(len(grid.shape) for grid in grids)
        parts = []
        for i, grid in enumerate(grids):
            part = torch.zeros(math.prod(grid.counts), 1 + width, dtype=torch.int64, device="cpu")
            part[:, 0], part[:, 1 : 1 + len(grid.shape)] = i, grid.starts
            parts.append(part)
        return cls(torch.cat(parts))

    def describe(self, index: int, n: int) -> str:
        """Where the window starts."""
        tensor, *start = self.code[n].tolist()
        if tensor < 0:
            return "unchanged"
        return f"window {n} of input tensor {tensor} at {start}"


@dataclass(frozen=True)
class PreparedWindows(Prepared):
    """Rows that are copies of an input with one window written over."""

    plans: tuple[SelectPlan, ...]
    grids: tuple[Grid, ...]

    @property
    def n_background(self) -> int:
        """R of the background, 1 without one."""
        return self.plans[0].n_background

    @property
    def row_bytes(self) -> int:
        """Bytes of a row over all inputs."""
        return sum(row_bytes(plan) for plan in self.plans)

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """Row buffers in each input's memory layout."""
        return tuple(empty_rows(plan, n_rows) for plan in self.plans)

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A copy of the inputs and a scatter of the baseline."""
        unit = torch.arange(start, stop, device=code.device)
        owner, window = unit.div(code.shape[0], rounding_mode="floor"), code[unit % code.shape[0]]
        for i, (plan, grid, buffer) in enumerate(zip(self.plans, self.grids, out, strict=True)):
            rows = physical(buffer, plan).view(stop - start, self.n_background, -1)  # [U, R, F]
            if self.n_background == 1:
                torch.index_select(plan.x, 0, owner, out=rows[:, 0])
            else:
                rows.copy_(plan.x.index_select(0, owner)[:, None])
            index = self._covered(plan, grid, window[:, 1:])[:, None].expand(-1, self.n_background, -1)  # [U, R, L]
            if plan.baseline.dim() == 2:
                shown = plan.baseline.expand(stop - start, -1, -1).gather(2, index)
            else:
                shown = plan.baseline.index_select(0, owner).gather(2, index)
            mine = (window[:, 0] == i)[:, None, None]
            rows.scatter_(2, index, torch.where(mine, shown, rows.gather(2, index)))
        return out

    def _covered(self, plan: SelectPlan, grid: Grid, starts: Tensor) -> Tensor:
        """Flat indices int64 ``[U, L]``, in physical order, of what windows cover; cut off by repeating the last."""
        order = range(len(grid.shape))
        if plan.memory_format is torch.channels_last:
            order = (1, 2, 0)
        index = torch.zeros(len(starts), 1, dtype=torch.int64, device=starts.device)
        for d in order:
            along = starts[:, d, None] + torch.arange(grid.window[d], device=starts.device)
            along = along.clamp(max=grid.shape[d] - 1)
            index = (index[:, :, None] * grid.shape[d] + along[:, None, :]).flatten(1)
        return index

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The model on the occluded inputs."""
        return forward(*rows, *args)

    def background_slice(self, start: int, stop: int) -> PreparedWindows:
        """Only background rows ``[start, stop)``."""
        return PreparedWindows(tuple(slice_background(plan, start, stop) for plan in self.plans), self.grids)


def physical(buffer: Tensor, plan: SelectPlan) -> Tensor:
    """Rows ``[n, ...]`` in the order of the plan's elements: a contiguous view."""
    return buffer.permute(0, 2, 3, 1) if plan.memory_format is torch.channels_last else buffer


@dataclass(frozen=True)
class SlidingWindow(Removal):
    """What a window covers takes the baseline's value, by selection. Reads `Windows` and takes no players.

    Attributes:
        grids: One an input tensor.
        replace: What the windows show.
    """

    grids: tuple[Grid, ...]
    replace: Replace

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedWindows:
        """Lay out inputs and baselines."""
        nobody = tuple(torch.zeros((), dtype=torch.int64, device=x.device) for x in inputs)
        whole = Players(nobody, (False,) * len(inputs), 1, None)
        plans = self.replace.prepare(forward, inputs, whole, baselines, args, caller).plans
        return PreparedWindows(plans, self.grids)

    def clean(self, players: Players | None) -> Windows:
        """A window of no input."""
        width = max(len(grid.shape) for grid in self.grids)
        return Windows(torch.tensor([[-1, *itertools.repeat(0, width)]], device="cpu"))
