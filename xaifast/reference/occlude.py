"""Delta propagation in plain torch: the executable specification of `xaifast.ops.occlude`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_NODES = (-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526)  # Gauss-Legendre
_WEIGHTS = (0.3478548451374538, 0.6521451548625461, 0.6521451548625461, 0.3478548451374538)


def _sigmoid_step(z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(z) - sigmoid(z - d), and sigmoid(z - d).

    With a = z - d: sigmoid(z) sigmoid(-a) (1 - e^-d) for d > 0, sigmoid(-z) sigmoid(a) (e^d - 1) else: factors in
    [0, 1].
    """
    a, rise = z - d, torch.expm1(-d.abs())
    return torch.where(d > 0, -z.sigmoid() * (-a).sigmoid(), (-z).sigmoid() * a.sigmoid()) * rise, a.sigmoid()


def _normal_step(z: Tensor, d: Tensor) -> Tensor:
    """Phi(z) - Phi(z - d): the integral of the density by four nodes where it is short, else the plain difference."""
    density = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        density = density + weight * torch.exp(-0.5 * (z - 0.5 * (1 + node) * d).square())
    short = 0.5 * d * density / math.sqrt(2 * math.pi)
    plain = 0.5 * (torch.erf(z * math.sqrt(0.5)) - torch.erf((z - d) * math.sqrt(0.5)))
    return torch.where(d.abs() < (0.5 if d.dtype == torch.float32 else 0.05), short, plain)


def activation_step(name: str, z: Tensor, d: Tensor) -> Tensor:
    """phi(z) - phi(z - d) without subtracting nearly equal numbers.

    name is "identity", "relu", "leaky_relu:SLOPE", "elu:ALPHA", "tanh", "sigmoid", "silu", "gelu" or "gelu_tanh".
    ReLU: min(d, z) - min(z, 0). Others have forms whose terms are all of the size of the result.
    """
    name, _, parameter = name.partition(":")
    if name == "identity":
        return d
    if name in ("relu", "leaky_relu", "elu"):
        relu = torch.minimum(d, z) - z.clamp(max=0)
        if name == "relu":
            return relu
        if name == "leaky_relu":
            return (1 - float(parameter)) * relu + float(parameter) * d
        return relu - float(parameter) * z.clamp(max=0).exp() * torch.expm1(relu - d)
    if name == "tanh":
        return 2 * _sigmoid_step(2 * z, 2 * d)[0]
    if name == "sigmoid":
        return _sigmoid_step(z, d)[0]
    if name == "silu":
        step, left = _sigmoid_step(z, d)
        return z * step + d * left
    if name == "gelu":
        step = _normal_step(z, d)
        return z * step + d * (0.5 * torch.erfc(-z * math.sqrt(0.5)) - step)
    if name == "gelu_tanh":  # z sigmoid(u(z)), u(z) = 2 c (z + k z^3)
        c, k = 2 * math.sqrt(2 / math.pi), 0.044715
        step, left = _sigmoid_step(c * (z + k * z**3), c * d * (1 + k * (3 * z * z - 3 * z * d + d * d)))
        return z * step + d * left
    raise ValueError(f"xaifast.occlude_linear: unknown activation {name!r}")


def player_changes(
    x: Tensor, columns: Tensor, rows: Tensor, n_players: int, order: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """First-layer changes sum_{i in m} x[b, i] columns[i] of rows b * n_players + m: [R, H]."""
    sample, player = rows // n_players, rows % n_players
    if order is None:
        return x[sample, player, None] * columns[player]
    which = sample if order.shape[0] > 1 else torch.zeros_like(sample)
    first, last = offsets[which, player], offsets[which, player + 1]
    position = torch.arange(x.shape[1], device=x.device)
    belongs = (position >= first[:, None]) & (position < last[:, None])  # [R, N] over places in order
    moved = torch.where(belongs, x[sample[:, None], order[which]], 0)
    return torch.zeros_like(moved).scatter_add(1, order[which], moved) @ columns


def round_operand(t: Tensor, precision: str) -> Tensor:
    """What a tensor core would read: t itself, or rounded to 8 (bf16) or 11 (tf32) significant bits, in t's dtype."""
    if precision == "bf16":
        return t.bfloat16().to(t.dtype)
    if precision == "tf32":
        bits = t.float().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).to(t.dtype)
    return t


def occlude_linear(
    x: Tensor,
    columns: Tensor,
    rows: Tensor,
    n_players: int,
    base: Sequence[Tensor],
    weights: Sequence[Tensor],
    activations: Sequence[str],
    order: Tensor | None,
    offsets: Tensor | None,
    readout: Tensor | None,
    precision: str,
) -> Tensor:
    """g(z) - g(z - d) for rows b * n_players + m, d = sum_{i in m} x[b, i] columns[i]: [R, K], or [R, 1] for a readout.

    x is [B, N], columns [N, H]; g applies activations[l] at pre-activation base[l] [B, H_l], then weights[l]
    [H_{l+1}, H_l]; readout [B, H_last] takes one output a sample after them.
    """
    sample = rows // n_players
    d = player_changes(x, columns, rows, n_players, order, offsets)
    for l, (name, z) in enumerate(zip(activations, base, strict=True)):
        d = activation_step(name, z[sample], d)
        if l < len(weights):
            d = round_operand(d, precision) @ round_operand(weights[l], precision).t()
    return d if readout is None else (d * readout[sample]).sum(1, keepdim=True)
