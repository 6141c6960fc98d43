"""Brute force and small models for tests; written apart from the package."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


def shapley_by_subsets(value, n_players: int) -> Tensor:
    """Shapley values of ``value(frozenset) -> Tensor`` by the subset formula, ``[M, ...]``."""
    players = range(n_players)
    phi = []
    for i in players:
        others = [j for j in players if j != i]
        total = 0.0
        for size in range(n_players):
            weight = math.factorial(size) * math.factorial(n_players - size - 1) / math.factorial(n_players)
            for subset in itertools.combinations(others, size):
                total = total + weight * (value(frozenset((*subset, i))) - value(frozenset(subset)))
        phi.append(total)
    return torch.stack(phi)


def brute_force(forward, x: Tensor, baseline: Tensor, mask: Tensor, n_players: int) -> Tensor:
    """Shapley values of one input ``x [...]`` with players ``mask [...]``, one model call a coalition."""
    cache: dict[frozenset, Tensor] = {}

    def value(present: frozenset) -> Tensor:
        if present not in cache:
            kept = torch.zeros_like(mask, dtype=torch.bool)
            for player in present:
                kept |= mask == player
            cache[present] = forward(torch.where(kept, x, baseline)[None])[0].double()
        return cache[present]

    return shapley_by_subsets(value, n_players)


class IntegerNet(nn.Module):
    """Small integers through relu and products: exact in float64, so no row depends on its batch."""

    def __init__(self, n_features: int, n_outputs: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randint(-3, 4, (n_features, 8), generator=generator).double()
        self.second = torch.randint(-3, 4, (8, n_outputs), generator=generator).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(x.flatten(1).double() @ self.first)
        return (hidden * hidden.roll(1, 1)) @ self.second


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random integers -4..4 as floats."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small_cnn(dtype: torch.dtype = torch.float64, channels: int = 1, n_outputs: int = 4, seed: int = 0) -> nn.Module:
    """A small convolutional net in evaluation mode; leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(n_outputs)
        )
        net(torch.zeros(1, channels, 8, 8))
    return net.to(dtype).eval()
