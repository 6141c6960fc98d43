"""Token removal in plain torch: the executable specification of `xaifast.ops.tokens` and its `compact_rows`
operator."""

from __future__ import annotations

import torch
from torch import Tensor

from xaifast.reference.masking import present_entries


def kept_tokens(bits: Tensor, index: Tensor, length: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Positions of the first `length` present tokens of every unit, in order: (positions [U, length], counts [U]).

    Positions beyond a unit's count are arbitrary but valid (0 where there are fewer than `length` tokens).
    """
    present = present_entries(bits, index, start, stop)  # [U, T]
    order = torch.sort(present.logical_not().to(torch.uint8), dim=1, stable=True).indices[:, :length]
    short = length - order.shape[1]
    return torch.nn.functional.pad(order, (0, max(short, 0))), present.sum(1)


def compact_rows(x: Tensor, bits: Tensor, index: Tensor, length: int, start: int, stop: int) -> Tensor:
    """Present tokens of the units start..stop, in order, then zeros: [stop - start, length, D].

    x is [B, T, D], index [T] or [B, T]. A unit with more than `length` present tokens is filled with NaN (-1 in integer
    types): nothing is dropped silently.
    """
    inputs = torch.arange(start, stop, device=x.device) // bits.shape[-2]
    order, counts = kept_tokens(bits, index, length, start, stop)
    if x.shape[1] == 0:
        return x.new_zeros(stop - start, length, x.shape[2])
    rows = x[inputs[:, None], order]  # [U, length, D]
    filled = torch.arange(length, device=x.device) < counts[:, None]  # [U, length]
    rows = torch.where(filled[..., None], rows, torch.zeros((), dtype=x.dtype, device=x.device))
    overflow = torch.full((), float("nan") if x.is_floating_point() else -1, dtype=x.dtype, device=x.device)
    return torch.where((counts > length)[:, None, None], overflow, rows)


def compact_tokens(tokens: Tensor, present: Tensor, token_players: Tensor, length: int) -> Tensor:
    """Loop form over bool coalitions [N, M] or [B, N, M]: [B, N, length, D], ValueError where a coalition does not
    fit."""
    n_inputs, _, width = tokens.shape
    present = present.expand(n_inputs, *present.shape[-2:])
    players = token_players.expand(n_inputs, tokens.shape[1])
    out = tokens.new_zeros(n_inputs, present.shape[1], length, width)
    for b in range(n_inputs):
        for n in range(present.shape[1]):
            kept = [t for t, p in enumerate(players[b].tolist()) if p < 0 or present[b, n, p]]
            if len(kept) > length:
                raise ValueError(f"coalition {n} of input {b} keeps {len(kept)} tokens, more than length {length}")
            out[b, n, : len(kept)] = tokens[b, kept]
    return out
