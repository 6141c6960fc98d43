"""Rows of a piecewise linear network in which no unit changes sign: one product with the Jacobian serves them all.

With slopes m_l = phi'(z_l), the Jacobian of a sample is J = W_L m_{L-1} W_{L-1} .. m_1. Where no unit changes sign the
change of the outputs is J d exactly. The first layer is looked at unit by unit. For the later ones
``|dz_l,j| <= ||W_l,j m_{l-1}|| ||dz_{l-1}||`` and ``||dz_l|| <= min(||W_l m_{l-1}||_F, ||W_l||_2 max m) ||dz_{l-1}||``
bound the norm of d below which they keep their signs: the radius.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import _registry
from ...ops.occlude import NativeSteps
from ...reference.occlude import player_changes
from .chain import slope

PIECEWISE = ("identity", "relu", "leaky_relu")
_SPECTRAL = 1024  # the largest smaller side for which a spectral norm is computed


def is_piecewise(name: str | None) -> bool:
    """Whether an activation is linear on both sides of 0."""
    return name is None or name.partition(":")[0] in PIECEWISE


def jacobians(base: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str], last: Tensor | None) -> Tensor:
    """J ``[B, K, H]`` of what follows the first layer; with ``last [B, H_last]`` of one output a sample, ``[B, 1, H]``.

    ``weights`` are as many as activations, or one fewer with ``last`` or where the last activation ends the network.
    """
    slopes = [slope(name, z) for name, z in zip(names, base, strict=True)]  # [B, H_l]
    weights = list(weights)
    if last is not None:
        product = last[:, None]
    elif len(weights) == len(base):
        product = weights.pop().expand(base[0].shape[0], -1, -1)
    else:
        product = torch.eye(base[-1].shape[1], dtype=base[0].dtype, device=base[0].device)
        product = product.expand(base[0].shape[0], -1, -1)
    for m in reversed(slopes[1:]):
        product = (product * m[:, None]) @ weights.pop()
    return product * slopes[0][:, None]


def radii(base: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Norm of the first layer's change below which no later unit changes sign, ``[B]``."""
    n_inputs = base[0].shape[0]
    radius = base[0].new_full((n_inputs,), torch.inf)
    growth = base[0].new_ones(n_inputs)  # of the norm, from the first layer to the one before
    for l in range(1, len(base)):
        m, weight = slope(names[l - 1], base[l - 1]), weights[l - 1]
        reach = (m.square() @ weight.square().t()).sqrt()  # [B, H_l]
        if names[l] != "identity":
            room = torch.where(reach > 0, base[l].abs() / (reach * growth[:, None]), torch.inf)
            radius = torch.minimum(radius, room.amin(1))
        if l + 1 < len(base):
            factor = reach.norm(dim=1)
            if min(weight.shape) <= _SPECTRAL:
                factor = torch.minimum(factor, torch.linalg.matrix_norm(weight, 2) * m.abs().amax(1))
            growth = growth * factor
    return radius


class Certifier:
    """Says of rows whether no unit changes sign.

    Args:
        base, weights, names: Pre-activations in float64, later weights and activations, all piecewise linear.
        dtype: In which rows are computed.
    """

    def __init__(self, base: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype):
        margin = 1 - 1000 * torch.finfo(dtype).eps  # for the rounding of norms and sums
        self._radius = (radii(base, weights, names) * margin).to(dtype)
        self._bounded = names[0] != "identity"
        nearest = base[0].abs().amin(1) * margin if self._bounded else torch.full_like(base[0][:, 0], torch.inf)
        self._nearest, self._first, self._dtype = nearest.to(dtype), base[0].to(dtype).contiguous(), dtype

    def __call__(
        self,
        x: Tensor,
        columns: Tensor,
        rows: Tensor,
        n_players: int,
        order: Tensor | None,
        offsets: Tensor | None,
        start: int,
    ) -> Tensor:
        """bool ``[R]``; rows count the samples of x from 0, which are those of the base from ``start``."""
        stop = start + x.shape[0]
        radius, nearest = self._radius[start:stop].contiguous(), self._nearest[start:stop].contiguous()
        first = self._first[start:stop]
        largest, norms = columns.abs().amax(1), columns.norm(dim=1)
        native = _registry.native_cpu("occlude_linear") if x.is_cpu else None
        if native is None:
            return _certify(x, columns, rows, n_players, order, offsets, radius, first if self._bounded else None)
        steps = NativeSteps(native, x, columns, rows, n_players, [first], ["relu"], order, offsets)
        flags = torch.empty(rows.shape[0], dtype=torch.uint8)
        bounds = (largest.data_ptr(), norms.data_ptr(), nearest.data_ptr(), radius.data_ptr())
        if rows.shape[0]:
            native.occlude_certify(flags.data_ptr(), *bounds, *steps.arguments(0, 0, rows.shape[0]))
        return flags.bool()


def _certify(x, columns, rows, n_players, order, offsets, radius, first) -> Tensor:
    parts = []
    for some in rows.split(max(1, 2**22 // columns.shape[1])):
        d, sample = player_changes(x, columns, some, n_players, order, offsets), some // n_players
        kept = d.norm(dim=1) < radius[sample]
        if first is not None:
            z = first[sample]
            kept &= torch.where(z > 0, d <= z, d >= z).all(1)
        parts.append(kept)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=rows.device)
