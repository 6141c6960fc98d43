"""Designs: which coalitions are evaluated, bit-packed, and with which weights."""

from __future__ import annotations

import math
import operator
from typing import Literal

import torch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.reference import coalitions as reference

Design = Literal["leverage", "kernel", "chain", "grouped"]
DESIGNS: tuple[str, ...] = ("leverage", "kernel", "chain", "grouped")  # positions are the native codes
MAX_PLAYERS = 4096


def sample_coalitions(
    n_players: int,
    n_samples: int,
    design: Design = "leverage",
    *,
    seed: int = 0,
    block: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a paired design of distinct coalitions.

    Row 0 is the full coalition and row 1 the empty one; rows 2 + 2p and 3 + 2p are T_p and its complement. Designs:

    - ``"leverage"``: every size is expected equally often, capped by the number of coalitions there are; sizes that are
      exhausted are complete, the rest is drawn without repetition (leverage scores: Musco and Witter, ICLR 2025).
    - ``"kernel"``: the same with sizes in proportion to the Shapley kernel, 1 / (k (M - k)).
    - ``"chain"``: prefixes of random permutations and their complements (antithetic permutation sampling); chains are
      whole, or one thinned chain where not even one fits; pairs stay in chain order.
    - ``"grouped"``: as ``"leverage"``, but of every four neighbouring sizes one, chosen at random, takes all pairs: a
      quarter of the sizes, hence larger batches where rows of one size are evaluated together. Every size is still
      expected equally often; the error measured is that of ``"leverage"`` within a few percent (docs/estimators.md).

    In all but the chains, pairs are sorted by size k = |T_p| <= M/2 and a pair weighs mu_k / (k (M - k) E_k): the
    Shapley kernel over the expected number of pairs of its size, with mean 1. Sizes and weights depend on
    (M, n, design, seed) only; `block` changes the members. n_samples >= 2^M gives all coalitions, for every design.

    Args:
        n_players: M, 1 to 4096.
        n_samples: coalitions to spend, at least 4 (M = 1: 2); the design has `design_size(...)` rows.
        design: which law the sizes follow.
        seed: of the counter-based generator (Philox4x32-10), 0 to 2^63 - 1. No global random state is used.
        block: index of the design among those of one seed, 0 to 2^63 - 1.
        device: of the results; the design is always drawn on the CPU.

    Returns:
        Bits, int64 ``[N, W]`` with W = ceil(M / 64) and player i in bit ``i % 64`` of word ``i // 64``; and weights,
        float64 ``[N]``, infinite in rows 0 and 1 (exact constraints).

    Raises:
        ValueError: a size, the design, the seed or the block is out of range.
        TypeError: a size, the seed or the block is no integer.

    Costs O(N M) time; equal on every platform, bit for bit.
    """
    design_size(n_players, n_samples, design)
    for name, value in (("seed", seed), ("block", block)):
        if not 0 <= _integer(name, value) < 1 << 63:
            raise ValueError(f"xaifast.sample_coalitions: {name} must be between 0 and 2^63 - 1, got {value}")
    return torch.ops.xaifast.sample_coalitions(n_players, n_samples, design, seed, block, device=device)


def design_size(n_players: int, n_samples: int, design: Design = "leverage") -> int:
    """Return N, the rows of the design that `sample_coalitions` makes of a budget.

    2^M if the budget reaches it; else the budget rounded down to an even number, for ``"chain"`` to whole chains of
    2 (M - 1) rows besides the two constraints (a budget below one chain is spent on a thinned one).
    """
    m, n = _integer("n_players", n_players), _integer("n_samples", n_samples)
    if design not in DESIGNS:
        raise ValueError(f"xaifast.sample_coalitions: design must be one of {', '.join(DESIGNS)}, got {design!r}")
    if not 1 <= m <= MAX_PLAYERS:
        advice = "; group elements into players, e.g. patches by xaifast.grid_mask" if m > MAX_PLAYERS else ""
        raise ValueError(f"xaifast.sample_coalitions: n_players must be between 1 and {MAX_PLAYERS}, got {m}{advice}")
    minimum = 2 if m == 1 else 4
    if n < minimum:
        raise ValueError(
            f"xaifast.sample_coalitions: n_samples must be at least {minimum} for {m} players (the full and the empty "
            f"coalition{' and one pair' if m > 1 else ''}), got {n}"
        )
    if m < 63 and n >= 1 << m:
        return 1 << m
    pairs = (n - 2) // 2
    if design == "chain" and pairs >= m - 1:
        pairs -= pairs % (m - 1)
    return 2 + 2 * pairs


def pack_coalitions(present: Tensor) -> Tensor:
    """Pack a BoolTensor ``[..., M]`` of present players into int64 words ``[..., W]``, W = ceil(M / 64)."""
    if present.dtype != torch.bool:
        raise TypeError(f"xaifast.pack_coalitions: present must be a bool tensor, got {present.dtype}; call .bool()")
    if present.dim() == 0:
        raise ValueError("xaifast.pack_coalitions: present must have shape [..., M], got a scalar")
    native = _registry.native_cpu("pack_coalitions") if _registry.undisturbed(present) else None
    if native is None:
        return reference.pack_coalitions(present)
    present, n_players = present.contiguous(), present.shape[-1]
    bits = present.new_empty(*present.shape[:-1], -(-n_players // 64), dtype=torch.int64)
    native.pack_bits(bits.data_ptr(), present.data_ptr(), math.prod(present.shape[:-1]), n_players)
    return bits


def unpack_coalitions(bits: Tensor, n_players: int) -> Tensor:
    """Unpack int64 words ``[..., W]`` into a BoolTensor ``[..., M]``; the inverse of `pack_coalitions`."""
    if bits.dtype != torch.int64:
        raise TypeError(f"xaifast.unpack_coalitions: bits must be an int64 tensor, got {bits.dtype}")
    n_words = -(-n_players // 64)
    if bits.dim() == 0 or bits.shape[-1] != n_words:
        raise ValueError(
            f"xaifast.unpack_coalitions: bits must have shape [..., {n_words}] for {n_players} players, "
            f"got {list(bits.shape)}"
        )
    native = _registry.native_cpu("unpack_coalitions") if _registry.undisturbed(bits) else None
    if native is None:
        return reference.unpack_coalitions(bits, n_players)
    bits = bits.contiguous()
    present = bits.new_empty(*bits.shape[:-1], n_players, dtype=torch.bool)
    native.unpack_bits(present.data_ptr(), bits.data_ptr(), math.prod(bits.shape[:-1]), n_players)
    return present


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"xaifast.sample_coalitions: {name} must be an integer, got {value!r}") from None


def _sample(
    n_players: int, n_samples: int, design: str, seed: int, block: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    n_rows = design_size(n_players, n_samples, design)
    native = _registry.native_cpu("sample_coalitions")
    if native is None:
        bits, weights = reference.sample_coalitions(n_players, n_rows, design, seed, block)
    else:
        bits = torch.empty((n_rows, -(-n_players // 64)), dtype=torch.int64, device="cpu")
        weights = torch.empty(n_rows, dtype=torch.float64, device="cpu")
        code = DESIGNS.index(design)
        native.sample_coalitions(n_players, n_rows, code, seed, block, bits.data_ptr(), weights.data_ptr())
    target = device or torch.get_default_device()
    return bits.to(target), weights.to(target)


def _sample_fake(
    n_players: int, n_samples: int, design: str, seed: int, block: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    n_rows = design_size(n_players, n_samples, design)
    bits = torch.empty((n_rows, -(-n_players // 64)), dtype=torch.int64, device=device)
    return bits, torch.empty(n_rows, dtype=torch.float64, device=device)


_registry.register(
    "sample_coalitions(int n_players, int n_samples, str design, int seed, int block, *, Device? device=None)"
    " -> (Tensor, Tensor)",
    {"CompositeExplicitAutograd": _sample},
    _sample_fake,
)
