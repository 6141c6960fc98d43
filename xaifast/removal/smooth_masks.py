"""RISE's masks, random and smooth, and the removal that fades an image into its baseline by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import MASKS, uniform_units
from ..ops.plan import SelectPlan
from ..players import Players
from .base import Prepared, Removal
from .replace import Replace, empty_rows, row_bytes, slice_background

_ENDLESS = 2**62  # masks are samples of one input


@dataclass(frozen=True)
class MaskLaw:
    """How masks are drawn: a grid of cells, each 1 with probability p, enlarged, and cut out at a random place.

    A grid ``[g, g']`` becomes an image of ``(g + 1) c x (g' + 1) c'`` pixels, ``c = ceil(H / g)``, by bilinear
    interpolation between the cells' centres, constant beyond the outermost; the mask is its part ``[H, W]`` from
    row ``y`` and column ``x``, uniform in ``[0, c) x [0, c')``.

    Attributes:
        size: Height and width of the masks.
        cells: g and g'.
        p: Probability of a cell.
        seed: 0..2**63-1.
    """

    size: tuple[int, int]
    cells: tuple[int, int]
    p: float
    seed: int

    @property
    def cell(self) -> tuple[int, int]:
        """c and c': pixels of a cell, and places the mask can be cut out at."""
        return math.ceil(self.size[0] / self.cells[0]), math.ceil(self.size[1] / self.cells[1])

    def draw(self, first: int, n: int) -> tuple[Tensor, Tensor]:
        """Grids and places of masks ``first .. first + n``, each a function of the seed and its number alone.

        Returns:
            bool ``[n, g, g']``; int64 ``[n, 2]``, y and x.
        """
        n_cells = math.prod(self.cells)
        units = uniform_units(
            first, first + n, _ENDLESS, n_cells + 2, domain=MASKS, seed=self.seed, first_index=0
        )  # [n, cells + 2]
        places = (units[:, n_cells:] * torch.tensor(self.cell, device="cpu")).long()
        return (units[:, :n_cells] < self.p).unflatten(1, self.cells), places

    def enlargement(self, axis: int) -> Tensor:
        """Weights of the cells along an axis, for every place: float64 ``[c, size, g]``."""
        cell, cells, size = self.cell[axis], self.cells[axis], self.size[axis]
        pixel = torch.arange(cell, device="cpu")[:, None] + torch.arange(size, device="cpu")  # of the enlarged image
        centre = ((pixel.double() + 0.5) * cells / ((cells + 1) * cell) - 0.5).clamp(0, cells - 1)
        return (1 - (centre[..., None] - torch.arange(cells, device="cpu")).abs()).clamp(min=0)

    def enlarge(self, grids: Tensor, places: Tensor) -> Tensor:
        """Masks ``[n, H, W]`` of drawn grids, in their dtype and on their device."""
        rows, columns = (self.enlargement(axis).to(grids)[places[:, axis]] for axis in (0, 1))
        return rows @ grids @ columns.mT


@dataclass(frozen=True)
class SmoothMasks:
    """Masks as perturbations, the same for all inputs.

    Attributes:
        code: int64 ``[N, W]``: the bytes of floating masks ``[N, H * W]``, rows filled up to whole words.
        first: Number of the first; None for the mask of ones.
    """

    code: Tensor
    first: int | None = None

    @classmethod
    def of(cls, masks: Tensor, first: int | None = None) -> SmoothMasks:
        """From floating masks ``[N, H, W]``."""
        flat = masks.flatten(1)
        per_word = 8 // flat.element_size()
        return cls(torch.nn.functional.pad(flat, (0, -flat.shape[1] % per_word)).view(torch.int64), first)

    def describe(self, index: int, n: int) -> str:
        """The mask's number."""
        return "unchanged" if self.first is None else f"mask {self.first + n}"


@dataclass(frozen=True)
class PreparedBlend(Prepared):
    """Rows between baselines and inputs.

    Attributes:
        plan: Images and baselines.
        baseline: ``[1, R, F]`` or ``[B, R, F]``; None where all are zero.
    """

    plan: SelectPlan
    baseline: Tensor | None

    @classmethod
    def of(cls, plan: SelectPlan) -> PreparedBlend:
        """Look once whether there is a baseline to add."""
        nothing = plan.n_background == 1 and not bool(plan.baseline.any())
        return cls(plan, None if nothing else _with_inputs_axis(plan.baseline))

    @property
    def n_background(self) -> int:
        """R of the background, 1 without one."""
        return self.plan.n_background

    @property
    def row_bytes(self) -> int:
        """Bytes of a row and of its mask."""
        return row_bytes(self.plan) // self.plan.shape[0] * (1 + self.plan.shape[0])

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """A row buffer in the input's memory layout."""
        return (empty_rows(self.plan, n_rows),)

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All channels of a pixel have one weight; one input after the other, so that no mask is copied."""
        n, (channels, *sides) = len(code), self.plan.shape
        size = math.prod(sides)
        masks = code.view(self.plan.x.dtype)[:, :size]
        inner = self.plan.memory_format is torch.channels_last
        pixels = (size, channels) if inner else (channels, size)
        buffer = (out[0].permute(0, 2, 3, 1) if inner else out[0]).view(-1, self.n_background, *pixels)
        for owner in range(start // n, (stop - 1) // n + 1):
            low, high = max(start, owner * n), min(stop, (owner + 1) * n)
            weight = masks[low - owner * n : high - owner * n, None].unsqueeze(-1 if inner else -2)
            shown = buffer[low - start : high - start]
            # Operations that round once: no bit depends on where a vector of the processor ends.
            torch.mul(self.plan.x[owner].view(pixels).expand_as(shown), weight, out=shown)
            if self.baseline is not None:
                behind = self.baseline[owner if len(self.baseline) > 1 else 0]
                shown += behind.unflatten(1, pixels) * (1 - weight)
        return out

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The model on the blended images."""
        return forward(*rows, *args)

    def background_slice(self, start: int, stop: int) -> PreparedBlend:
        """Only background rows ``[start, stop)``."""
        plan = slice_background(self.plan, start, stop)
        return PreparedBlend(plan, _with_inputs_axis(plan.baseline))


def _with_inputs_axis(baseline: Tensor) -> Tensor:
    """``[R, F]`` or ``[B, R, F]`` as ``[1 or B, R, F]``."""
    return baseline if baseline.dim() == 3 else baseline[None]


@dataclass(frozen=True)
class Blend(Removal):
    """``m x + (1 - m) baseline`` for soft masks m: unlike in selection, NaN behind a weight of zero shows.

    Attributes:
        replace: What the baseline is.
        ones: The mask ``[1, H, W]`` that leaves images as they are, in their dtype.
    """

    replace: Replace
    ones: Tensor

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedBlend:
        """Lay out images and baselines."""
        nobody = Players((torch.zeros((), dtype=torch.int64, device=inputs[0].device),), (False,), 1, None)
        return PreparedBlend.of(self.replace.prepare(forward, inputs, nobody, baselines, args, caller).plans[0])

    def clean(self, players: Players | None) -> SmoothMasks:
        """The mask of ones."""
        return SmoothMasks.of(self.ones)
