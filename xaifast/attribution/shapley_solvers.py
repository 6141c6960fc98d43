"""From values of coalitions to Shapley values. Knows nothing of models; float64 on any device.

Paired designs hold coalitions T with their complements. With d_T = (v(T) - v(complement)) / 2 and
D = v(everybody) - v(nobody) all terms of even order cancel, and `Wls` and `Adjusted` estimate the values from d and D
alone. A solver is made once for a design and called once for each input with all outputs of that input, so that no
result depends on which other inputs share the design.

Sources: Lundberg and Lee, "A unified approach to interpreting model predictions", 2017 (the weighted least squares);
Covert and Lee, "Improving KernelSHAP", 2021 (pairing); Musco and Witter, "Leverage SHAP", 2025 (sizes and weights);
Mitchell et al., "Sampling permutations for Shapley value estimation", 2022 (antithetic permutations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.coalitions import unpack_coalitions
from ._adjusted import CubicFit

# Rows of the coefficient matrix of `solve_exact` made at a time.
_EXACT_CHUNK = 1 << 14
# Flops of solving per model evaluation up to which `Adjusted` is worth its time: three times a 0.7 Mflop model.
_ADJUSTED_FLOPS = 2e6
_ADJUSTED_PAIRS = 2048
# Fewest pairs per player for which a standard error is honest.
_ERROR_PAIRS = 1.2


@dataclass(frozen=True, eq=False)
class PairedDesign:
    """Pairs of a coalition and its complement.

    Attributes:
        present: BoolTensor ``[h, M]``, one coalition of each pair, neither empty nor full.
        weights: float64 ``[h]``, positive: Shapley kernel mass over inclusion probability, up to scale.
    """

    present: Tensor
    weights: Tensor

    def __post_init__(self):
        if self.present.dtype != torch.bool or self.present.ndim != 2 or self.present.shape[1] == 0:
            raise ValueError(
                "xaifast.PairedDesign: present must be a bool tensor [pairs, players] with a player or more, got "
                f"{self.present.dtype} {list(self.present.shape)}; pass one coalition of each pair"
            )
        if self.weights.dtype != torch.float64 or self.weights.shape != self.present.shape[:1]:
            raise ValueError(
                f"xaifast.PairedDesign: weights must be float64 [{self.present.shape[0]}], one for each pair, got "
                f"{self.weights.dtype} {list(self.weights.shape)}; pass one weight a pair"
            )
        if not bool(((self.weights > 0) & self.weights.isfinite()).all()):
            raise ValueError(
                "xaifast.PairedDesign: weights must be positive and finite, got others; leave out the full and the "
                "empty coalition, whose weights are infinite"
            )
        sizes = self.present.sum(1)
        if bool(((sizes == 0) | (sizes == self.n_players)).any()):
            raise ValueError(
                "xaifast.PairedDesign: a pair must hold neither nobody nor everybody, got such a pair; the two are "
                "exact constraints of every solver and are given to it as `total`"
            )

    @property
    def n_pairs(self) -> int:
        """h."""
        return self.present.shape[0]

    @property
    def n_players(self) -> int:
        """M."""
        return self.present.shape[1]

    @classmethod
    def from_bits(cls, bits: Tensor, weights: Tensor, n_players: int) -> PairedDesign:
        """Read a packed design: rows full, empty, then each T followed by its complement.

        Args:
            bits: int64 ``[N, W]``, N even, ``W = ceil(M / 64)``.
            weights: float64 ``[N]``, infinite in the first two rows.
            n_players: M.
        """
        words = -(-n_players // 64)
        if bits.dtype != torch.int64 or bits.ndim != 2 or bits.shape[1] != words or len(bits) < 2 or len(bits) % 2:
            raise ValueError(
                f"xaifast.PairedDesign.from_bits: bits must be int64 [N, {words}] with N even for {n_players} players, "
                f"got {bits.dtype} {list(bits.shape)}; pass the design of sample_coalitions"
            )
        if weights.shape != bits.shape[:1]:
            raise ValueError(
                f"xaifast.PairedDesign.from_bits: weights must have one entry for each of the {len(bits)} rows, got "
                f"{list(weights.shape)}; pass the weights of the same design"
            )
        present = unpack_coalitions(bits, n_players)
        if not bool((present[0::2] ^ present[1::2]).all()) or not bool(present[0].all()):
            raise ValueError(
                "xaifast.PairedDesign.from_bits: rows must be the full coalition, the empty one, then each coalition "
                "followed by its complement, got another order; pass the design of sample_coalitions"
            )
        return cls(present[2::2].contiguous(), weights[2::2].contiguous())


def _check_outputs(name: str, design: PairedDesign, differences: Tensor, total: Tensor) -> None:
    if differences.dtype != torch.float64 or total.dtype != torch.float64:
        raise TypeError(
            f"xaifast.{name}: differences and total must be float64, got {differences.dtype} and {total.dtype}; "
            "subtract and solve in double precision"
        )
    if differences.ndim != 2 or len(differences) != design.n_pairs or not 0 < len(total) == differences.shape[1]:
        raise ValueError(
            f"xaifast.{name}: differences must be [{design.n_pairs}, K] and total [K], got {list(differences.shape)} "
            f"and {list(total.shape)}; pass one difference for each pair and output"
        )


def _efficient(values: Tensor, total: Tensor) -> Tensor:
    """Spread what is missing to the total equally over the players; twice, as the first sum is itself rounded."""
    for _ in range(2):
        values = values + (total - values.sum(0)) / len(values)
    return values


def _pseudo_inverse(a: Tensor) -> tuple[Tensor, int]:
    """Pseudo-inverse ``[M, h]`` and rank of ``a [h, M]``, whose rows are orthogonal to the ones.

    With enough rows: Cholesky of the Gram matrix and one Newton step, which squares the error that forming the Gram
    matrix makes. Close to singular, or with fewer rows than players: singular value decomposition, minimum norm.
    """
    n_rows, n_players = a.shape
    if n_rows >= n_players - 1:
        gram = a.T @ a
        # Fills the null direction 1 without touching its complement.
        gram += gram.trace() / n_players**2
        factor, info = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal()
        if int(info) == 0 and bool(pivots.min() > 1e-5 * pivots.max()):
            inverse = torch.cholesky_solve(a.T, factor)
            return 2 * inverse - (inverse @ a) @ inverse, n_players - 1
    left, singular, right = torch.linalg.svd(a, full_matrices=False)
    kept = singular > 1e-10 * singular[0]
    inverse = (right.T * torch.where(kept, 1 / singular, 0.0)) @ left.T
    return inverse, int(kept.sum())


class Wls:
    """Kernel SHAP proper: weighted least squares under the exact constraint sum(values) = total.

    Centred at the equal split the problem is linear in the differences: values = total / M + P (d - xbar total) with
    one matrix P ``[M, h]`` for all inputs and outputs. Additive games are exact for every design of full rank, games
    of order two as well. Deficient designs (h < M - 1 always) get the solution of minimum norm.

    Standard errors are leave-one-pair-out (jackknife, HC3). An interval is value +- t * std_error with the quantile of
    Student's t with h - M + 1 degrees of freedom; it is conservative for few samples per player. NaN below 1.2 M pairs,
    for a deficient design, and where one pair alone determines a direction and cannot be left out.

    Cost: 4 M^2 h for the design, 6 M h for each output; 24 M h bytes.
    """

    def __init__(self, design: PairedDesign):
        self._design = design
        n_players = design.n_players
        x = design.present.double() - 0.5
        self._mean = x.mean(1)
        self._x = x.sub_(self._mean[:, None])
        if design.n_pairs == 0:
            self._map, self.rank = self._x.T, 0
        else:
            root = design.weights.sqrt()
            inverse, self.rank = _pseudo_inverse(self._x * root[:, None])
            self._map = inverse.mul_(root)
        self._map -= self._map.mean(0)
        self.full_rank = self.rank == n_players - 1
        self._has_errors = self.full_rank and design.n_pairs >= _ERROR_PAIRS * n_players
        if self._has_errors:
            free = 1 - (self._x * self._map.T).sum(1)
            self._leave_out = torch.where(free > 1e-9, 1 / free, math.nan)
            self._squares = self._map.square()

    def __call__(self, differences: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for the outputs of one input.

        Args:
            differences: float64 ``[h, K]``, (v(T) - v(complement)) / 2.
            total: float64 ``[K]``, v(everybody) - v(nobody).

        Returns:
            Values and standard errors, each float64 ``[M, K]``.
        """
        values, errors, _ = self.fit(differences, total)
        return values, errors

    def fit(self, differences: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As a call, and the residuals float64 ``[h, K]``."""
        _check_outputs("Wls", self._design, differences, total)
        target = torch.addcmul(differences, self._mean[:, None], total, value=-1)
        deviation = self._map @ target
        values = _efficient(deviation + total / self._design.n_players, total)
        residuals = torch.addmm(target, self._x, deviation, alpha=-1)
        if not self._has_errors:
            return values, torch.full_like(values, math.nan), residuals
        errors = (self._squares @ (residuals * self._leave_out[:, None]).square()).sqrt()
        return values, errors, residuals


class Adjusted:
    """Kernel SHAP adjusted for interactions of order three; the default where its solve is cheap.

    On the same evaluations about 0.6 of the error of `Wls`. A ridge regression finds the noise and a first
    attribution, a kernel regression with one scale per player then fits order one and three together (see
    `_adjusted`). Each output is fitted by itself: its bits do not depend on the other outputs.

    Where the least-squares fit leaves nothing over, the game is additive as far as anybody can see and the exact
    `Wls` is returned. "Nothing" is a root mean square below 1e-10 of the differences, or below `output_eps` if that is
    more: values that are rounded to that spacing show no smaller interaction. With f spare pairs a game with
    interactions passes for additive with a chance of about threshold^f; the test is made once that is below 1e-9
    (f = h - M + 1: 1 in float64, 2 in float32, 5 in bfloat16).

    Standard errors are leave-one-pair-out residuals of the kernel fit carried through the ridge's linear map; for an
    interval of 95 % take 1.96 of them (a little narrow below 4 M samples). Exact leave-one-out for h <= 256; above, by
    32 fixed probes, within about 7 %. NaN below 1.2 M pairs: the shrinkage cannot be seen with fewer.

    Cost per output: passes (2 M h^2 + h^3 / 3), two passes for h <= 256, else one, and h^3 or 128 h^2 for the errors;
    8 (h + 1)^2 bytes once. On the CPU, below 1024 pairs, a native kernel does an output in one thread and half of the
    bytes.
    """

    def __init__(self, design: PairedDesign, output_eps: float = torch.finfo(torch.float64).eps):
        self._design = design
        self._wls = Wls(design)
        self._fit = CubicFit(design.present, design.weights) if design.n_pairs else None
        self._has_errors = design.n_pairs >= _ERROR_PAIRS * design.n_players
        spare = design.n_pairs - self._wls.rank
        threshold = max(1e-10, output_eps)
        guarded = self._wls.full_rank and spare > 0 and threshold**spare < 1e-9
        self._additive = threshold * math.sqrt(spare / design.n_pairs) if guarded else -1.0

    def __call__(self, differences: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for the outputs of one input.

        Args:
            differences: float64 ``[h, K]``, (v(T) - v(complement)) / 2.
            total: float64 ``[K]``, v(everybody) - v(nobody).

        Returns:
            Values and standard errors, each float64 ``[M, K]``.
        """
        _check_outputs("Adjusted", self._design, differences, total)
        if self._fit is None:
            return self._wls(differences, total)
        # One output at a time: the last bits of a product depend on the number of its columns.
        columns = [(d.contiguous(), t.clone()) for d, t in zip(differences.split(1, 1), total.split(1), strict=True)]
        linear = [self._wls.fit(*column) for column in columns]
        additive = torch.stack(
            [r.norm() <= self._additive * d.norm() for (d, _), (_, _, r) in zip(columns, linear, strict=True)]
        )
        wls_values, wls_errors = (torch.cat([fit[i] for fit in linear], 1) for i in (0, 1))
        outputs = torch.cat([0.5 * total[None], differences]).T.contiguous()
        fits = [self._fit(chunk) for chunk in outputs.split(self._fit.batch)]
        values = _efficient(torch.cat([v for v, _ in fits]).T, total)
        errors = torch.cat([e for _, e in fits]).T
        values = torch.where(additive, wls_values, values)
        errors = torch.where(additive, wls_errors, errors)
        return values, errors if self._has_errors else torch.full_like(errors, math.nan)


def solve_exact(bits: Tensor, values: Tensor, n_players: int) -> Tensor:
    """Shapley values from the values of all coalitions.

    Args:
        bits: int64 ``[2^M, 1]``, every coalition once, in any order.
        values: float64 ``[2^M, K]``, v of each row.
        n_players: M, at most 62.

    Returns:
        float64 ``[M, K]``.

    Raises:
        ValueError: rows that are not all coalitions.

    Cost 2 M K 2^M; about 20 MB beside a byte for each row.
    """
    n_rows = len(bits)
    if bits.dtype != torch.int64 or bits.ndim != 2 or not 1 <= n_players <= 62 or bits.shape != (1 << n_players, 1):
        raise ValueError(
            f"xaifast.solve_exact: bits must be int64 [2^M, 1], every coalition once, got {bits.dtype} "
            f"{list(bits.shape)} for M = {n_players}; sample with n_samples >= 2^M or use another estimator"
        )
    if values.dtype != torch.float64 or values.ndim != 2 or len(values) != n_rows:
        raise ValueError(
            f"xaifast.solve_exact: values must be float64 [{n_rows}, K], got {values.dtype} {list(values.shape)}; "
            "pass one row for each coalition"
        )
    word = bits[:, 0]
    seen = torch.zeros(n_rows, dtype=torch.bool, device=bits.device)
    seen[word & (n_rows - 1)] = True
    if not bool(seen.all()) or bool(((word < 0) | (word >= n_rows)).any()):
        raise ValueError(
            f"xaifast.solve_exact: bits must hold each of the {n_rows} coalitions once, got repeated or foreign rows; "
            "pass the design of sample_coalitions with n_samples >= 2^M"
        )
    # A member of a coalition of size s counts with joins[s], everybody else with -joins[s + 1].
    joins = torch.tensor(
        [0.0] + [1 / (n_players * math.comb(n_players - 1, s)) for s in range(n_players)] + [0.0],
        dtype=torch.float64,
        device=bits.device,
    )
    base = values[word.argmin()]
    result = torch.zeros(n_players, values.shape[1], dtype=torch.float64, device=values.device)
    for start in range(0, n_rows, _EXACT_CHUNK):
        present = unpack_coalitions(bits[start : start + _EXACT_CHUNK], n_players)
        size = present.sum(1)
        coefficients = torch.where(present, joins[size][:, None], -joins[size + 1][:, None])
        result.addmm_(coefficients.T, values[start : start + _EXACT_CHUNK] - base)
    return _efficient(result, values[word.argmax()] - base)


def solve_permutation(
    present: Tensor, first: Tensor, second: Tensor, full: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapley values from antithetic permutations.

    A chain of coalitions, each holding the one before, with their complements gives the marginal contributions of
    one order of the players and of its reverse; the two are averaged. A chain that is shorter than M - 1 adds several
    players at a step and shares the step's difference equally among them.

    Args:
        present: BoolTensor ``[h, M]``, rising coalitions: whole chains of M - 1, or one shorter chain.
        first: float64 ``[h, K]``, values of the coalitions.
        second: float64 ``[h, K]``, values of their complements.
        full: float64 ``[K]``, value of everybody.
        empty: float64 ``[K]``, value of nobody.

    Returns:
        Values float64 ``[M, K]``, and standard errors over the chains (an antithetic chain is one sample): NaN for
        fewer than two chains.
    """
    n_pairs, n_players = present.shape
    length = max(1, min(n_pairs, n_players - 1))
    if n_pairs % length:
        raise ValueError(
            f"xaifast.solve_permutation: pairs must be whole chains of {length} for {n_players} players, got "
            f"{n_pairs}; pass the chain design"
        )
    if first.shape != second.shape or len(first) != n_pairs or not full.shape == empty.shape == first.shape[1:]:
        raise ValueError(
            f"xaifast.solve_permutation: values must be [{n_pairs}, K] twice and [K] twice, got {list(first.shape)}, "
            f"{list(second.shape)}, {list(full.shape)} and {list(empty.shape)}; pass one row for each pair"
        )
    if any(v.dtype != torch.float64 for v in (first, second, full, empty)):
        raise TypeError("xaifast.solve_permutation: values must be float64, got others; convert them before")
    total = full - empty
    if n_pairs == 0:
        values = (total / n_players).expand(n_players, -1).clone()
        return values, torch.full_like(values, math.nan)
    chains = present.view(-1, length, n_players)
    if not bool((chains[:, 1:] | ~chains[:, :-1]).all()) or not bool((chains.sum(2).diff(dim=1) > 0).all()):
        raise ValueError(
            "xaifast.solve_permutation: each coalition of a chain must hold the one before and more, got another "
            "order; pass the chain design, rows as they come"
        )
    n_chains, n_outputs = len(chains), first.shape[1]
    # Averaging an order with its reverse leaves the rise of the pair differences from -total / 2 to total / 2.
    differences = (first - second).mul_(0.5).view(n_chains, length, n_outputs)
    ends = (0.5 * total).expand(n_chains, 1, n_outputs)
    steps = torch.cat([-ends, differences, ends], 1).diff(dim=1)  # [C, L + 1, K]
    entry = length - chains.sum(1)  # [C, M], the step at which a player comes in
    share = torch.zeros(n_chains, length + 1, dtype=torch.float64, device=present.device)
    share.scatter_add_(1, entry, torch.ones_like(entry, dtype=torch.float64))
    per_chain = (steps / share[:, :, None]).gather(1, entry[:, :, None].expand(-1, -1, n_outputs))  # [C, M, K]
    values = _efficient(per_chain.mean(0), total)
    if n_chains < 2:
        return values, torch.full_like(values, math.nan)
    return values, per_chain.std(0) / math.sqrt(n_chains)


def choose_estimator(n_players: int, n_samples: int, n_outputs: int) -> str:
    """Name the estimator that `estimator="auto"` takes: ``"exact"``, ``"adjusted"`` or ``"wls"``.

    All coalitions are enumerated if the samples reach. Else `Adjusted` where its solve costs at most about as much as
    the evaluations it saves over `Wls`, reckoned per model evaluation and for a small model.

    Args:
        n_players: M.
        n_samples: Coalitions per input, the full and the empty one included.
        n_outputs: Outputs explained per input.
    """
    if n_samples >= 1 << n_players:
        return "exact"
    pairs = n_samples // 2 - 1
    passes = 2 if pairs <= 256 else 1
    flops = n_outputs * passes * pairs * (pairs / 6 + n_players)
    return "adjusted" if pairs <= _ADJUSTED_PAIRS and flops <= _ADJUSTED_FLOPS else "wls"
