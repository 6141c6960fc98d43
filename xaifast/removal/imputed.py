"""Removal by imputation: a removed pixel shows what its neighbours suggest, plus noise (ROAD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import IMPUTATION, normal_units
from ..players import Players
from ._multigrid import solve_holes
from .base import Prepared, Removal
from .replace import _layout


def linear_impute(images: Tensor, removed: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Fill removed pixels so that each is the weighted mean of its neighbours.

    x_i = sum_j w_ij x_j / sum_j w_ij over the up to eight neighbours j inside the image, removed ones included, with
    w = 1/6 for direct and 1/12 for diagonal neighbours; pixels that are not removed stay. All images and channels are
    solved together by multigrid-preconditioned conjugate gradients, about ten iterations whatever the shares and
    shapes of the holes. An image's result does not depend on the others, on a CPU bit for bit.

    Args:
        images: ``[B, C, H, W]``, floating; float16 and bfloat16 are solved in float32. What removed pixels hold is not
            read.
        removed: BoolTensor ``[B, H, W]``.
        tolerance: Of the residual, relative to that of filling with the mean of the pixels that are left. Errors of
            pixels are then some 1e-5 of an image's range in float32.

    Returns:
        ``[B, C, H, W]`` in the images' dtype.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; an image of which nothing is left.
        RuntimeError: no convergence: pixels that are left are not finite, or too little tolerance for the dtype.

    Cost: O(C H W) an iteration; memory of some ten images each.

    Source: Rong, Leemann, Borisov, Kasneci and Kasneci, "A consistent and efficient evaluation strategy for attribution
    methods", ICML 2022, Section 4.3, and the weights and borders of its public code.

    Example:
        >>> image = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> removed = torch.zeros(1, 5, 5, dtype=torch.bool)
        >>> removed[0, 1:3, 1:3] = True
        >>> torch.allclose(linear_impute(image, removed), image, atol=1e-5)
        True
    """
    caller = "xaifast.removal.linear_impute"
    check_images(images, caller)
    batch, _, height, width = images.shape
    if not isinstance(removed, Tensor) or removed.dtype != torch.bool or removed.shape != (batch, height, width):
        given = f"{removed.dtype} {list(removed.shape)}" if isinstance(removed, Tensor) else type(removed).__name__
        raise ValueError(f"{caller}: removed must be a BoolTensor {[batch, height, width]}, got {given}")
    empty = removed.flatten(1).all(1)
    if bool(empty.any()):
        raise ValueError(
            f"{caller}: removed must leave a pixel of every image, got none in image {int(empty.nonzero()[0])}; "
            "nothing is known to fill from"
        )
    return solve_holes(images.detach().to(_solved_in(images)), removed, tolerance, caller).to(images.dtype)


def check_images(images: object, caller: str) -> None:
    """Images are a floating tensor ``[B, C, H, W]``."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or images.numel() == 0:
        given = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{caller}: images must be floating [B, C, H, W] with B >= 1, got {given}; convert them")


def _solved_in(images: Tensor) -> torch.dtype:
    return torch.promote_types(images.dtype, torch.float32)


@dataclass(frozen=True)
class RankRanges:
    """Ranges of ranks that are removed, the same for every input.

    Attributes:
        code: int64 ``[N, 2]``: first rank removed, and one past the last.
        n_pixels: What ranks run up to.
    """

    code: Tensor
    n_pixels: int

    def describe(self, index: int, n: int) -> str:
        """How many pixels are imputed, and from which end."""
        first, stop = self.code[n].tolist()
        return f"imputation of {stop - first} of {self.n_pixels} pixels from rank {first}"


@dataclass(frozen=True)
class PreparedImputed(Prepared):
    """Images, the order of their pixels, and their noise."""

    x: Tensor  # [B, C, H, W], in the dtype that is solved in
    ranks: Tensor  # int32 [B, H, W]
    noise: Tensor | None  # [B, C, H, W]
    dtype: torch.dtype  # of rows
    memory_format: torch.memory_format
    caller: str

    @property
    def row_bytes(self) -> int:
        """Bytes of an image."""
        return self.x[0].numel() * self.dtype.itemsize

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """A buffer in the input's memory layout."""
        shape = (n_rows, *self.x.shape[1:])
        return (torch.empty(shape, dtype=self.dtype, device=self.x.device, memory_format=self.memory_format),)

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One batched solve; it synchronises once an iteration."""
        units = torch.arange(start, stop, device=self.x.device)
        b = units // len(code)
        first, end = code[units % len(code), :, None, None].unbind(1)  # [U, 1, 1]
        ranks = self.ranks[b]
        removed = (ranks >= first) & (ranks < end)
        filled = solve_holes(self.x[b], removed, 1e-6, self.caller)
        if self.noise is not None:
            filled += torch.where(removed[:, None], self.noise[b], 0)
        out[0].copy_(filled)
        return out

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The model on the imputed images."""
        return forward(*rows, *args)


@dataclass(frozen=True)
class Imputed(Removal):
    """Noisy linear imputation of pixels by rank; perturbations are `RankRanges`.

    Attributes:
        ranks: int32 ``[B, H, W]``.
        noise: Standard deviation of what is added to imputed pixels, in the images' units.
        seed: Of the noise, which is a function of seed, data-set index, channel and pixel.
        first_index: Data-set index of the first input.
    """

    ranks: Tensor
    noise: float
    seed: int
    first_index: int

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedImputed:
        """Draw the noise."""
        (x,) = inputs
        x = x.detach()
        solved = x.to(_solved_in(x))
        noise = None
        if self.noise > 0:
            stream = dict(domain=IMPUTATION, seed=self.seed, first_index=self.first_index)
            noise = torch.empty_like(solved, memory_format=torch.contiguous_format)
            for b, drawn in enumerate(noise):  # in float64 of one image only
                drawn.copy_(self.noise * normal_units(b, b + 1, 1, drawn.numel(), **stream).view(drawn.shape))
        return PreparedImputed(solved, self.ranks, noise, x.dtype, _layout(x), caller)

    def clean(self, players: Players | None) -> RankRanges:
        """Nothing removed."""
        return RankRanges(torch.zeros(1, 2, dtype=torch.int64, device="cpu"), self.ranks[0].numel())
