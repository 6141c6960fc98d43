"""Ranks of features in plain torch: the executable specification of `xaifast.ops.ranking`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xaifast.reference.coalitions import philox4x32

_ORDERS = 5  # the domain of these random streams, beside those of the designs


def places(permutation: Tensor) -> Tensor:
    """Inverse of permutations [..., M] along the last dimension: the place of every element, int32."""
    ascending = torch.arange(permutation.shape[-1], dtype=torch.int32, device=permutation.device)
    blank = torch.zeros_like(permutation, dtype=torch.int32)
    return blank.scatter(-1, permutation, ascending.expand_as(permutation))


def rank_features(values: Tensor, order: str, compat: str | None) -> Tensor:
    """Places of values [..., M] in descending order, int32; order "least" is its exact reverse.

    Ties go by ascending index and NaNs, which tie with each other, come last. "torchcam": NaNs come first. "rise" and
    "xplique": NaNs come first and ties go by descending index. "quantus": as None.
    """
    if values.is_floating_point():
        values = torch.where(values == 0, 0, values)  # -0.0 ties with 0.0
    if compat in ("rise", "xplique"):
        ranks = values.shape[-1] - 1 - places(torch.argsort(values, dim=-1, stable=True))
    elif compat == "torchcam" or not values.is_floating_point():
        ranks = places(torch.argsort(values, dim=-1, stable=True, descending=True))
    else:
        ranks = places(torch.argsort(-values, dim=-1, stable=True))
    return values.shape[-1] - 1 - ranks if order == "least" else ranks


def random_stream(seed: int, index: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """First counter and key of the words of a data-set index: those of `Stream(seed, index, domain)` of the designs."""
    return (0, 0, index & 0xFFFFFFFF, index >> 32 ^ _ORDERS << 24), (seed & 0xFFFFFFFF, seed >> 32)


def random_words(seed: int, first_index: int, n_rows: int, n_features: int) -> Tensor:
    """Random int64 [n_rows, n_features], row r a function of (seed, first_index + r): what random orders sort."""
    calls = np.arange(-(-n_features // 2), dtype=np.uint64)
    rows = np.empty((n_rows, len(calls), 2), dtype=np.uint64)
    for r in range(n_rows):
        (_, *counter), key = random_stream(seed, first_index + r)
        w0, w1, w2, w3 = philox4x32((calls, *(np.full_like(calls, c) for c in counter)), key)
        rows[r] = np.stack((w0 | w1 << np.uint64(32), w2 | w3 << np.uint64(32)), 1)
    return torch.from_numpy(rows.reshape(n_rows, -1)[:, :n_features].view(np.int64))


def random_ranks(seed: int, first_index: int, n_rows: int, n_features: int) -> Tensor:
    """A random permutation a row: int32 [n_rows, n_features]."""
    return rank_features(random_words(seed, first_index, n_rows, n_features), "most", None)
