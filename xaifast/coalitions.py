"""What is asked about every input: coalitions, sets of present players, bit-packed, with weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .ops.coalitions import pack_coalitions, sample_coalitions, unpack_coalitions


class Perturbations(Protocol):
    """Perturbed versions of every input, one model evaluation each; coalitions are one kind."""

    @property
    def code(self) -> Tensor:
        """int64 ``[N, W]``, or ``[B, N, W]`` where inputs differ: what the removal's rows are made from."""

    def describe(self, index: int, n: int) -> str:
        """Perturbation ``n`` of input ``index`` in words, for messages."""


@dataclass(frozen=True)
class Coalitions:
    """A design: which players are present in which evaluation.

    Row 0 is the full coalition, row 1 the empty one; then come pairs of a coalition and its complement (single
    coalitions below ``2 M`` rows of `small_design`). The bits stay on the CPU, where sizes and groups are decided; a
    GPU gets a copy (a few KB) when rows are made.

    Attributes:
        bits: int64 words ``[N, W]``, or ``[B, N, W]`` with one design an input; player i is bit ``i % 64`` of word
            ``i // 64``.
        weights: float64 ``[N]`` (or ``[B, N]``), infinite for the full and the empty coalition.
        n_players: M.
    """

    bits: Tensor
    weights: Tensor
    n_players: int

    @property
    def code(self) -> Tensor:
        """The bits."""
        return self.bits

    def describe(self, index: int, n: int) -> str:
        """How many players are present."""
        present = self.present[..., n, :]
        present = present[index] if present.dim() == 2 else present
        return f"coalition {n} ({int(present.sum())} of {present.numel()} players present)"

    @property
    def n_coalitions(self) -> int:
        """N, coalitions of one input."""
        return self.bits.shape[-2]

    @cached_property
    def present(self) -> Tensor:
        """BoolTensor ``[..., N, M]``."""
        return unpack_coalitions(self.bits, self.n_players)

    @classmethod
    def sample(cls, n_players: int, n_samples: int, design: str, *, seed: int, block: int = 0) -> Coalitions:
        """One design for all inputs of a call (see `xaifast.ops.sample_coalitions`)."""
        bits, weights = sample_coalitions(n_players, n_samples, design, seed=seed, block=block, device="cpu")
        return cls(bits, weights, n_players)

    @classmethod
    def stack(cls, designs: Sequence[Coalitions]) -> Coalitions:
        """One design for each input, all with as many coalitions."""
        bits, weights = (torch.stack([getattr(one, name) for one in designs]) for name in ("bits", "weights"))
        return cls(bits, weights, designs[0].n_players)

    @classmethod
    def from_present(cls, present: Tensor, weights: Tensor | None = None) -> Coalitions:
        """From a BoolTensor ``[N, M]`` or ``[B, N, M]``; weights default to ones."""
        if weights is None:
            weights = torch.ones(present.shape[-2], dtype=torch.float64, device=present.device)
        return cls(pack_coalitions(present), weights, present.shape[-1])
