"""Coalition designs in plain Python: the executable specification of `sample_coalitions`, equal to it bit for bit."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF

# Random streams never share a counter: the domain sits in the top byte of the last counter word.
_ROUNDING, _RANKS, _SUBSETS, _CHAINS = 1, 2, 3, 4

_SATURATED = 1 << 62  # a class of so many coalitions or more is never exhausted
_RANKED = 1 << 31  # classes up to this size are drawn by rank
_GROUP = 4  # neighbouring sizes one of which stands for all in a grouped design


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _M32, (product0 >> 32) ^ c3 ^ k1, product0 & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


class Stream:
    """Random 64-bit words, a function of (seed, block, domain, tag, attempt) alone."""

    def __init__(self, seed: int, block: int, domain: int, tag: int = 0, attempt: int = 0):
        self._key = (seed & _M32, seed >> 32)
        self._tail = (tag, block & _M32, (block >> 32) ^ (domain << 24))
        self._call = attempt << 16
        self._words: list[int] = []

    def word(self) -> int:
        """Return the next 64 bits; one Philox call gives two."""
        if not self._words:
            w0, w1, w2, w3 = philox4x32((self._call, *self._tail), self._key)
            self._words = [w2 | w3 << 32, w0 | w1 << 32]
            self._call += 1
        return self._words.pop()

    def below(self, n: int) -> int:
        """Return a uniform integer in [0, n), n <= 2^31; its bias is below 2^-33."""
        return (self.word() * n) >> 64

    def unit(self) -> float:
        """Return a uniform multiple of 2^-53 in [0, 1)."""
        return (self.word() >> 11) * 2.0**-53


class SizeClass(NamedTuple):
    """Pairs (T, complement) with |T| = k: capacity, expected and drawn number of pairs."""

    k: int
    capacity: int
    expected: float
    drawn: int


def size_classes(n_players: int, n_pairs: int, design: str, seed: int) -> list[SizeClass]:
    """Share the pairs out over the sizes k = 1..M/2: E_k = min(capacity, c q_k), rounded with their sum kept."""
    sizes = range(1, n_players // 2 + 1)
    capacity, law = {}, {}
    for k in sizes:
        middle = 2 * k == n_players  # T and its complement have the same size: each pair is counted once
        capacity[k] = min(math.comb(n_players, k) >> middle, _SATURATED)
        law[k] = 0.5 if middle else 1.0
        if design == "kernel":
            law[k] /= float(k * (n_players - k))

    # Water-filling. The margin keeps open classes further from their capacity than the rounding errors below.
    expected = dict.fromkeys(sizes, -1.0)
    left, open_sizes = n_pairs, list(sizes)
    while open_sizes:
        total = 0.0
        for k in open_sizes:
            total += law[k]
        level = left / total
        full = {k for k in open_sizes if float(capacity[k]) <= level * law[k] + 1e-6}
        if not full:
            break
        for k in full:
            expected[k] = float(capacity[k])
            left -= capacity[k]
        open_sizes = [k for k in open_sizes if k not in full]
    for k in open_sizes:
        expected[k] = level * law[k]

    # Systematic rounding: one uniform number for all, the same in every block.
    stream = Stream(seed, 0, _ROUNDING)
    uniform = stream.unit()
    drawn = {k: capacity[k] for k in sizes if k not in open_sizes}
    sum_before = 0.0
    for k in open_sizes:
        sum_here = float(left) if k == open_sizes[-1] else sum_before + expected[k]
        drawn[k] = math.floor(sum_here + uniform) - math.floor(sum_before + uniform)
        sum_before = sum_here
    if design == "grouped":
        for first in range(0, len(open_sizes), _GROUP):
            gather_group(open_sizes[first : first + _GROUP], capacity, expected, drawn, stream.unit())
    return [SizeClass(k, capacity[k], expected[k], drawn[k]) for k in sizes]


def gather_group(
    group: list[int], capacity: dict[int, int], expected: dict[int, float], drawn: dict[int, int], uniform: float
) -> None:
    """Give all pairs of neighbouring sizes to one of them, chosen in proportion to what they expect.

    Every size keeps its expected number of pairs, hence its weight. Groups with a size that could not take all stay
    as they are.
    """
    total = 0.0
    for k in group:
        total += expected[k]
    if any(capacity[k] < math.ceil(total) + 1 for k in group):
        return
    pairs = sum(drawn[k] for k in group)
    chosen, before = 0, expected[group[0]]
    while chosen < len(group) - 1 and uniform * total >= before:
        chosen += 1
        before += expected[group[chosen]]
    for i, k in enumerate(group):
        drawn[k] = pairs if i == chosen else 0


def unrank(rank: int, n: int, k: int) -> list[int]:
    """Return the k-subset of range(n) that has this rank in lexicographic order."""
    subset = []
    for element in range(n):
        starting_here = math.comb(n - 1 - element, k - 1 - len(subset)) if len(subset) < k else 0
        if rank < starting_here:
            subset.append(element)
        else:
            rank -= starting_here
    return subset


def floyd(stream: Stream, n: int, k: int) -> list[int]:
    """Draw k distinct members of range(n), every subset equally likely, with k numbers (Floyd; Bentley, CACM 1987)."""
    chosen: dict[int, None] = {}
    for j in range(n - k, n):
        t = stream.below(j + 1)
        chosen[j if t in chosen else t] = None
    return list(chosen)


def draw_class(n_players: int, size: SizeClass, first_pair: int, seed: int, block: int) -> list[list[int]]:
    """Return the drawn subsets T of one class, distinct, in draw order."""
    # In the middle class player 0 is in T; the others are chosen among the rest.
    fixed = [0] if 2 * size.k == n_players else []
    n, k = n_players - len(fixed), size.k - len(fixed)
    if size.drawn == size.capacity or size.capacity <= _RANKED:
        if size.drawn == size.capacity:
            ranks: list[int] = list(range(size.capacity))
        else:
            ranks = floyd(Stream(seed, block, _RANKS, size.k), size.capacity, size.drawn)
        return [fixed + [len(fixed) + player for player in unrank(rank, n, k)] for rank in ranks]
    seen: set[frozenset[int]] = set()
    subsets = []
    for pair in range(first_pair, first_pair + size.drawn):
        attempt = 0
        while True:
            subset = floyd(Stream(seed, block, _SUBSETS, pair, attempt), n, k)
            if frozenset(subset) not in seen:
                break
            attempt += 1
        seen.add(frozenset(subset))
        subsets.append(fixed + [len(fixed) + player for player in subset])
    return subsets


def draw_chains(n_players: int, n_pairs: int, seed: int, block: int) -> list[list[int]]:
    """Return the prefixes of random permutations: whole chains of M - 1, or one shortened chain if they do not fit."""
    steps = n_players - 1
    sizes = list(range(1, steps + 1))
    if n_pairs < steps:
        sizes = [1 + (2 * j + 1) * steps // (2 * n_pairs) for j in range(n_pairs)]
    subsets = []
    for chain in range(max(1, n_pairs // steps)):
        stream = Stream(seed, block, _CHAINS, chain)
        order = list(range(n_players))
        for i in range(n_players - 1, 0, -1):
            j = stream.below(i + 1)
            order[i], order[j] = order[j], order[i]
        subsets += [order[:size] for size in sizes]
    return subsets


def sample_coalitions(n_players: int, n_rows: int, design: str, seed: int, block: int) -> tuple[Tensor, Tensor]:
    """Make the design of `xaifast.ops.sample_coalitions`, of which `n_rows` is the exact size."""
    present = np.zeros((n_rows, n_players), dtype=bool)
    present[0] = True
    weights = np.full(n_rows, np.inf)
    n_pairs = (n_rows - 2) // 2
    if n_pairs and design == "chain" and n_rows != 1 << n_players:
        subsets = draw_chains(n_players, n_pairs, seed, block)
        weights[2:] = 1.0
    elif n_pairs:
        classes = size_classes(n_players, n_pairs, design, seed)
        subsets, raw, total = [], [], 0.0
        for size in classes:
            # The mass of the Shapley kernel on a pair over the probability that the pair was drawn, up to a factor.
            mass = 0.5 if 2 * size.k == n_players else 1.0
            raw.append(mass / (float(size.k * (n_players - size.k)) * size.expected))
            total += size.drawn * raw[-1]
        scale = n_pairs / total
        for size, weight in zip(classes, raw, strict=True):
            first = len(subsets)
            subsets += draw_class(n_players, size, first, seed, block)
            weights[2 + 2 * first : 2 + 2 * len(subsets)] = weight * scale
    else:
        subsets = []
    for pair, subset in enumerate(subsets):
        present[2 + 2 * pair, subset] = True
        present[3 + 2 * pair] = ~present[2 + 2 * pair]
    n_words = -(-n_players // 64)
    padded = np.zeros((n_rows, 64 * n_words), dtype=bool)
    padded[:, :n_players] = present
    bits = np.packbits(padded, axis=1, bitorder="little").view("<i8")  # [N, W]
    return torch.from_numpy(bits.astype(np.int64)), torch.from_numpy(weights)


def pack_coalitions(present: Tensor) -> Tensor:
    """Words int64 ``[..., W]`` of a BoolTensor ``[..., M]``: player i in bit ``i % 64`` of word ``i // 64``."""
    n_players = present.shape[-1]
    n_words = -(-n_players // 64)
    padded = torch.nn.functional.pad(present, (0, 64 * n_words - n_players))
    shifts = torch.arange(64, device=present.device)
    return (padded.unflatten(-1, (n_words, 64)).long() << shifts).sum(-1)


def unpack_coalitions(bits: Tensor, n_players: int) -> Tensor:
    """BoolTensor ``[..., M]`` of words int64 ``[..., W]``."""
    shifts = torch.arange(64, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :n_players].bool()
