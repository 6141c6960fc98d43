"""Filling of removed pixels by linear interpolation of their neighbours: a sparse system for each image, many at once.

A removed pixel is the weighted mean of its up to eight neighbours inside the image, direct ones counting twice as much
as diagonal ones. That is a discrete Laplace equation on the removed pixels with the others as boundary values:
symmetric, positive definite, ill-conditioned for large holes. It is solved by conjugate gradients preconditioned with
one multigrid cycle (Tatebe, "The multigrid preconditioned conjugate gradient method", 1993).

Only elementwise operations and sums over one image occur, so that an image's bits do not depend on its neighbours (on a
GPU, as far as the order of a sum does not).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 0.9  # of Jacobi: eigenvalues reach 2 on thin shapes, 4/3 elsewhere
_SWEEPS = 6  # on the coarsest grid, at most 2 x 2
_MAX_ITERATIONS = 100  # 12 are usual for a relative residual of 1e-6
_PIECE = {"cpu": 2**19, "cuda": 2**26}  # elements solved at once: a vector stays in the cache, or in memory


def solve_holes(images: Tensor, removed: Tensor, tolerance: float, caller: str) -> Tensor:
    """Images ``[S, C, H, W]`` with the pixels of ``removed [S, H, W]`` interpolated; float32 or float64.

    Raises:
        RuntimeError: a residual is still above ``tolerance`` after the allowed iterations.
    """
    filled = torch.empty_like(images, memory_format=torch.contiguous_format)
    piece = max(1, _PIECE.get(images.device.type, 2**26) // images[0].numel())
    for start in range(0, images.shape[0], piece):
        part = slice(start, start + piece)
        filled[part] = _solve(images[part].contiguous(), removed[part, None], tolerance, caller)
    return filled


@dataclass(frozen=True)
class _Level:
    """A grid and its operator ``A e = unknown (weight e - neighbours(e))``; scaled by 12, so that weights are whole."""

    unknown: Tensor  # [S, 1, h, w], 0 or 1
    weight: Tensor  # [S, 1, h, w]: diagonal plus 4, for `neighbours` counts the pixel itself four times
    smoother: Tensor  # [S, 1, h, w]: damping / diagonal, 0 where known
    kept: Tensor  # [S, 1, h, w]: 1 - smoother weight

    @classmethod
    def make(cls, unknown: Tensor, to_known: Tensor) -> _Level:
        """From the unknown pixels and the weight of each one's edges to known ones."""
        weight = (_neighbours(unknown) + to_known) * unknown
        smoother = torch.where(unknown > 0, _DAMPING / (weight - 4), 0)
        return cls(unknown, weight, smoother, 1 - smoother * weight)

    def apply(self, e: Tensor) -> Tensor:
        return (self.weight * e).sub_(_neighbours(e).mul_(self.unknown))

    def smooth(self, e: Tensor, residual: Tensor) -> Tensor:
        """A damped Jacobi step, e + smoother (residual - A e), in place."""
        change = _neighbours(e).add_(residual).mul_(self.smoother)
        return e.mul_(self.kept).add_(change)


def _levels(unknown: Tensor) -> list[_Level]:
    """Grids of half the resolution each, down to 2 x 2.

    A coarse pixel is unknown where a fine one that it contributes to is. Edges between coarse pixels have the fine
    grid's weights (the energy of a gradient in the plane does not depend on the scale; on a line it halves with it),
    edges to known pixels are summed, as in the Galerkin product: where few pixels are known, these decide.
    """
    to_known = _neighbours(1 - unknown) * unknown
    levels = [_Level.make(unknown, to_known)]
    while max(unknown.shape[-2:]) > 2:
        to_known = _restrict(to_known)
        unknown = (_restrict(unknown) > 0).to(unknown)
        levels.append(_Level.make(unknown, to_known))
    return levels


def _solve(images: Tensor, removed: Tensor, tolerance: float, caller: str) -> Tensor:
    levels = _levels(removed.to(images))
    fine = levels[0]
    mean = _total(torch.where(removed, 0, images)) / (~removed).sum((-1, -2), keepdim=True)  # the start
    known = torch.where(removed, 0, images - mean)
    size = known.abs().amax((-1, -2), keepdim=True)
    size = torch.where(size > 0, size, 1)  # squares of what is solved for neither vanish nor overflow
    residual = fine.apply(known / size).neg_()
    # No residual is known better than its terms are rounded, whose weights are 16 together.
    goal = (tolerance * _total(residual * residual).sqrt()).clamp(min=16 * torch.finfo(images.dtype).eps)
    step = torch.zeros_like(images)
    direction = rho = None
    for _ in range(_MAX_ITERATIONS):
        going = ~(_total(residual * residual).sqrt() <= goal)  # [S, C, 1, 1]; what has converged stays as it is
        if not bool(going.any()):
            return torch.where(removed, mean + size * step, images)
        z = _cycle(levels, residual)
        rho, rho_before = _total(residual * z), rho
        direction = z if direction is None else z.add_(torch.where(going, rho / rho_before, 0) * direction)
        image_of = fine.apply(direction)
        length = torch.where(going, rho / _total(direction * image_of), 0)
        step += length * direction
        residual -= length * image_of
    raise RuntimeError(
        f"{caller}: the interpolation of removed pixels must converge to a relative residual of {tolerance:g} within "
        f"{_MAX_ITERATIONS} iterations, but {int(going.any(1).sum())} of {len(going)} images did not; check that the "
        "images are finite, or pass float64 images"
    )


def _cycle(levels: list[_Level], residual: Tensor) -> Tensor:
    """An approximate solution by one V-cycle, a symmetric linear function of the residual."""
    level, coarser = levels[0], levels[1:]
    e = level.smoother * residual
    if not coarser:
        for _ in range(_SWEEPS):
            level.smooth(e, residual)
        return e
    left = _neighbours(e).mul_(level.unknown).add_(level.kept * residual)  # residual - A e
    correction = _cycle(coarser, _restrict(left))
    e += _interpolate(correction, residual.shape[-2:]).mul_(level.unknown)
    return level.smooth(e, residual)


def _neighbours(x: Tensor) -> Tensor:
    """Weighted sum of the 3 x 3 pixels around each, inside the image: weights 4, 2 (direct), 1 (diagonal)."""
    for dim in (-1, -2):
        y, n = x + x, x.shape[dim] - 1
        y.narrow(dim, 0, n).add_(x.narrow(dim, 1, n))
        y.narrow(dim, 1, n).add_(x.narrow(dim, 0, n))
        x = y
    return x


def _restrict(fine: Tensor) -> Tensor:
    """The transpose of `_interpolate`: ``[..., h, w]`` to ``[..., h // 2 + 1, w // 2 + 1]``; on lines twice that."""
    gain = 2 if min(fine.shape[-2:]) <= 2 else 1  # (A / 2) e = r is solved as A e = 2 r, see `_levels`
    for dim in (-2, -1):
        even, odd = _alternate(fine, dim)
        size = list(fine.shape)
        size[dim] = size[dim] // 2 + 1
        coarse, half = fine.new_zeros(size), odd * 0.5
        coarse.narrow(dim, 0, even.shape[dim]).copy_(even)
        coarse.narrow(dim, 0, odd.shape[dim]).add_(half)
        coarse.narrow(dim, 1, odd.shape[dim]).add_(half)
        fine = coarse
    return fine if gain == 1 else gain * fine


def _interpolate(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, ``[..., h // 2 + 1, w // 2 + 1]`` to ``size``: coarse pixel k is fine pixel 2 k, others are means."""
    for dim in (-1, -2):
        shape = list(coarse.shape)
        shape[dim] = size[dim]
        fine = coarse.new_empty(shape)
        even, odd = _alternate(fine, dim)
        n = odd.shape[dim]
        even.copy_(coarse.narrow(dim, 0, even.shape[dim]))
        odd.copy_((coarse.narrow(dim, 0, n) + coarse.narrow(dim, 1, n)).mul_(0.5))
        coarse = fine
    return coarse


def _alternate(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Views of the even and the odd rows (dim -2) or columns (dim -1)."""
    return (x[..., ::2], x[..., 1::2]) if dim == -1 else (x[..., ::2, :], x[..., 1::2, :])


def _total(x: Tensor) -> Tensor:
    """Sum over each map ``[S, C, H, W]``: ``[S, C, 1, 1]``; rows first, so that threads do not share a sum."""
    return x.sum(-1, keepdim=True).sum(-2, keepdim=True)
