"""Small budgets: designs and a solve where there are about as many coalitions as unknowns, so each must tell its own.

Let m coalitions be evaluated besides nobody and everybody. The M values add up to the total, so M - 1 equations
determine them in an additive game. Three regimes:

- n < 2 M: pairs of complements would hold half the equations that single coalitions do. The prefixes of one
  permutation, which determine all values, then single coalitions of the Shapley kernel's law; least squares.
- n = 2 M: the prefixes with their complements, an antithetic permutation: sums over pairs of players are exact as well.
- more, below 80: pairs of the kernel's law, of sixteen designs the one whose equations are best conditioned. Below 1.2
  pairs a player the mean of `Wls`, which follows every difference, and `Adjusted`, which shrinks them; then `Adjusted`.

Sources: Castro, Gomez and Tejada, 2009, and Mitchell et al., 2022 (permutations); Lundberg and Lee, 2017 (the law of
the others); the regimes are measured (bench/bench_dropin_error.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..coalitions import Coalitions
from .shapley_solvers import Adjusted, PairedDesign, Wls

_LARGE = 80  # coalitions from which hardly any design confuses two players
_FEW_PAIRS = 1.2  # pairs a player below which `Adjusted` shrinks too much
_DRAWS = 16
_STEP = 0x1E3779B97F4A7C15  # seeds of neighbours have no design in common
_ROUNDINGS = 16  # spacings of the largest output by which an additive model may err


def is_small(n_players: int, n_samples: int) -> bool:
    """Whether a budget, nobody and everybody included, is better spent by these designs than by leverage scores."""
    return n_samples < min(2**n_players, max(_LARGE, 2 * n_players + 2))


def small_design(n_players: int, n_samples: int, *, seed: int, block: int = 0) -> Coalitions:
    """Draw the design of a small budget.

    Args:
        n_players: M, at least 3.
        n_samples: n, at least 4, `is_small`.
        seed: Of the design, 0..2**63-1.
        block: Designs of different blocks hold other coalitions.

    Returns:
        n coalitions below ``2 M``, from there on whole pairs.
    """
    if n_samples < 2 * n_players:
        return _single(n_players, n_samples - 2, seed, block)
    if n_samples // 2 == n_players:
        return Coalitions.sample(n_players, n_samples, "chain", seed=seed, block=block)
    # Seeds, unlike blocks, round the numbers of coalitions of each size differently.
    seeds = [(seed + draw * _STEP) % 2**63 for draw in range(_DRAWS)]
    drawn = [Coalitions.sample(n_players, n_samples, "kernel", seed=one, block=block) for one in seeds]
    signs = 2 * torch.stack([one.present[1:] for one in drawn]).double() - 1  # [16, n - 1, M]
    signs[:, 0] = 1  # the constraint: all values add up to the total
    smallest = torch.linalg.svdvals(signs)[:, -1].round(decimals=6)  # equal ones are so on every machine
    return drawn[int(smallest.argmax())]


def _single(n_players: int, n_inner: int, seed: int, block: int) -> Coalitions:
    """Prefixes of one permutation, thinned where they are too many, then coalitions without their complements."""
    n_prefixes = min(n_inner, n_players - 1)
    chain = Coalitions.sample(n_players, 2 * n_prefixes + 2, "chain", seed=seed, block=block).present
    ends, prefixes = chain[:2], chain[2::2]
    parts = [ends, prefixes]
    if n_inner > n_prefixes:
        pairs = Coalitions.sample(n_players, 2 * (n_inner - n_prefixes) + 2, "kernel", seed=seed, block=block).present
        first, second = pairs[2::2], pairs[3::2]
        swap = torch.arange(len(first), device="cpu") % 2 == 1  # pairs come by size: small and large coalitions in turn
        first, second = torch.where(swap[:, None], second, first), torch.where(swap[:, None], first, second)
        # The prefix of k players is row k - 1. Prefixes hold each other, so of a pair at most one is among them.
        known = (first == prefixes[first.sum(1) - 1]).all(1)
        parts.append(torch.where(known[:, None], second, first))
    present = torch.cat(parts)
    weights = torch.ones(len(present), dtype=torch.float64, device="cpu")
    weights[:2] = math.inf
    return Coalitions.from_present(present, weights)


class SmallBudget:
    """The solve that belongs to `small_design`.

    Where least squares leave nothing over but rounding, they are taken: the model is additive as far as anybody can
    see. Standard errors are those of `Adjusted` where it alone is used, else NaN.

    Args:
        present: BoolTensor ``[n, M]``, the rows of the design.
        weights: float64 ``[n]``.
        output_eps: Spacing of the model's outputs relative to them.
        absent: BoolTensor ``[M]``, players that do not occur in the input; None where all do.
    """

    def __init__(self, present: Tensor, weights: Tensor, output_eps: float, absent: Tensor | None = None) -> None:
        inner, weights = present[2:], weights[2:]
        self._paired = len(inner) >= 2 * (present.shape[1] - 1)
        if self._paired:
            inner, weights = inner[::2], weights[::2]
        self._rows: Tensor | slice = slice(None)
        if absent is not None:
            inner = inner[:, ~absent]
            self._rows = inner.any(1) & ~inner.all(1)
            inner, weights = inner[self._rows], weights[self._rows]
        design = PairedDesign(inner.contiguous(), weights.contiguous())
        self._wls = Wls(design)
        self._share = 0.0  # of `Adjusted`
        if self._paired and design.n_pairs >= design.n_players:
            self._share = 0.5 if design.n_pairs < _FEW_PAIRS * design.n_players else 1.0
            self._adjusted = Adjusted(design, output_eps)
        spare = max(design.n_pairs - self._wls.rank, 0)
        self._rounding = _ROUNDINGS * output_eps * math.sqrt(spare)

    @property
    def full_rank(self) -> bool:
        """Whether the coalitions determine all values."""
        return self._wls.full_rank

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for outputs, each by itself: its bits do not depend on the others.

        Args:
            values: float64 ``[n, K]``, rows as in the design.

        Returns:
            Values and standard errors, each float64 ``[M', K]`` over the players that occur.
        """
        total, inner = values[0] - values[1], values[2:]
        # A coalition's value seen from halfway between nobody and everybody is for `Wls` what a pair's difference is.
        seen = (inner[::2] - inner[1::2]) / 2 if self._paired else inner - values[1] - total / 2
        seen = seen[self._rows]
        columns = zip(seen.split(1, 1), total.split(1), strict=True)
        fits = [self._wls.fit(one.contiguous(), its_total.clone()) for one, its_total in columns]
        phi, errors, residuals = (torch.cat(part, 1) for part in zip(*fits, strict=True))
        if not self._share:
            return phi, torch.full_like(errors, math.nan)
        adjusted, adjusted_errors = self._adjusted(seen, total)
        additive = residuals.norm(dim=0) <= self._rounding * values.abs().amax(0)
        phi = torch.where(additive, phi, phi + self._share * (adjusted - phi))
        if self._share < 1:
            return phi, torch.full_like(errors, math.nan)
        return phi, torch.where(additive, errors, adjusted_errors)
