"""The fit behind `shapley_solvers.Adjusted`: pair differences explained by terms of order one and three.

Everything even cancels in a difference of complements, so the first thing a linear fit cannot explain has order three.
Two regressions take it up. A *ridge* in the players and a few functions of the coalition's size finds the noise level
and a first attribution. A *kernel* regression then models every order-three term at once, each player scaled by its
first attribution (automatic relevance determination). Both are small: no column per triple is ever formed.

With coalitions written as x in {-1, +1}^M and weights lam_i >= 0 of sum one, u(x, x') = sum_i lam_i x_i x'_i, and the
prior covariance of the odd part is u + c u^3 + (odd function of the size). Shapley values are linear functionals: the
Walsh function of an odd set A gives 2 / |A| to each member, hence with q = sum_i lam_i x'_i and s2 = sum_i lam_i^2
the Shapley value of u(., x')^3 for player i is 2 lam_i x'_i (q^2 + 2 s2) - 4 lam_i^2 q
(order one: 6 lam_i x'_i s2 - 4 lam_i^3 x'_i; order three: 2 lam_i x'_i ((q - lam_i x'_i)^2 - s2 + lam_i^2)).

Sources: Rasmussen and Williams, "Gaussian processes for machine learning", 2006, 5.1 (evidence, relevance) and 5.4.2
(leave-one-out residuals from the inverse covariance).
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import _registry

_SIZE_RANK = 5
_SIZE_VARIANCE = 0.03
_EXACT_DIAGONAL = 256
_PROBES = 32
# Rows of the covariance made at a time: a panel of it stays in the L2 cache between its three passes.
_PANEL = 128
# Entries of covariance matrices worked on at a time, of several outputs where they are small: 2 MB stay in the cache.
_BATCH = 1 << 18
# Outputs given to the native kernel at a time, and the most rows it is used for: an output stays in one thread, and one
# large output alone is better off in LAPACK's threads.
_NATIVE_BATCH = 64
_NATIVE_ROWS = 1024
_JITTER = 1e-11


@lru_cache(maxsize=32)
def size_features(n_players: int) -> Tensor:
    """Features of a coalition's size whose products are the odd part of a squared-exponential kernel.

    The kernel is exp(-(t - t')^2 / (2 * 0.5^2)) in t = 2 s / M - 1. Its odd part is a power series in t t' with odd
    powers only, which ends after 20 terms in float64; the leading five singular directions carry all but 2e-8 of it.

    Returns:
        float64 ``[M + 1, Q]`` on the CPU, row s for size s, ``Q = min(5, (M + 1) // 2)``. Cost O(M).
    """
    t = (2 * torch.arange(n_players + 1, dtype=torch.float64, device="cpu") / n_players - 1) / 0.5
    powers = torch.arange(1, 40, 2, dtype=torch.float64, device="cpu")
    series = t[:, None] ** powers * torch.exp(-0.5 * t[:, None] ** 2 - 0.5 * torch.lgamma(powers + 1))
    left, scale, _ = torch.linalg.svd(series, full_matrices=False)
    return (left * scale)[:, : min(_SIZE_RANK, (n_players + 1) // 2)].contiguous()


def probe_signs(n_rows: int) -> Tensor:
    """Fixed pseudo-random signs: float64 ``[n_rows, 32]`` of -1 and +1, from the raw Philox stream of key zero."""
    raw = np.random.Philox(key=0).random_raw(n_rows).astype(np.uint64)
    bits = raw[:, None] >> np.arange(_PROBES, dtype=np.uint64) & np.uint64(1)
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))


class Ridge:
    """Ridge regression in players and size features, its noise level chosen by the evidence.

    One eigendecomposition of the smaller Gram matrix serves every output and every noise level.
    """

    def __init__(self, x: Tensor, sizes: Tensor, size_effect: Tensor, noise: Tensor, floor: float):
        n_rows, n_players = x.shape
        self._root = noise.clamp_min(1e-6).rsqrt()
        columns = torch.cat([x / math.sqrt(n_players), sizes], 1) * self._root[:, None]
        # Thin singular value decomposition by the smaller Gram matrix: columns = left diag(sqrt(values)) basis'.
        if n_rows >= columns.shape[1]:
            values, basis = torch.linalg.eigh(columns.T @ columns)
            self._left = (columns @ basis).mul_(_inverse_roots(values))
        else:
            values, self._left = torch.linalg.eigh(columns @ columns.T)
            basis = (columns.T @ self._left).mul_(_inverse_roots(values))
        self._values = values.clamp_min(0)
        self._effects = basis[:n_players] * (2 / math.sqrt(n_players)) + size_effect @ basis[n_players:]
        self._deviations = self._effects - self._effects.mean(0)
        self._levels = 10 ** torch.linspace(-10, 0, 41, dtype=torch.float64, device=x.device)
        self._unexplained = self._levels[:, None] / (self._values + self._levels[:, None])
        self._volume = -0.5 * self._unexplained.log().sum(1)
        self._floor = floor

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fit outputs ``y [B, n]``: Shapley values ``[B, M]``, noise levels ``[B]``, coordinates' gains ``[B, Q]``."""
        y = y * self._root
        coordinates = _each(self._left.T, y)
        # What no coordinate explains comes from the vectors: subtracting norms would drown it in the heavy first row.
        outside = (y - _each(self._left, coordinates)).square().sum(1, keepdim=True)
        residual = outside + _each(self._unexplained, coordinates.square())
        evidence = 0.5 * y.shape[1] * residual.log() + self._volume
        levels = self._levels[evidence.argmin(1)].clamp_min(self._floor)
        gains = self._values.sqrt() / (self._values + levels[:, None])
        return _each(self._effects, coordinates * gains), levels, gains

    def errors(self, gain: Tensor, left_out: Tensor) -> Tensor:
        """Standard errors ``[M]`` of one output: leave-one-out residuals ``[n]`` through the ridge's linear map."""
        influence = torch.mm(self._deviations * gain, self._left.T)
        return torch.mv(influence.square_(), (left_out * self._root).square()).sqrt_()


class CubicFit:
    """Shapley values of outputs from one paired design, each output fitted by itself.

    Several outputs share a batch, but products are called for each alone, on rows of aligned length: an output's bits
    do not depend on its batch.

    Args:
        present: BoolTensor ``[h, M]``, one coalition of each pair; h >= 1.
        weights: float64 ``[h]``, kernel mass over inclusion probability of the pairs, up to scale.
    """

    def __init__(self, present: Tensor, weights: Tensor):
        n_pairs, n_players = present.shape
        device = weights.device
        new = {"dtype": torch.float64, "device": device}
        # Row 0 is the pair (everybody, nobody), observed without noise.
        x = torch.ones(n_pairs + 1, n_players, **new)
        x[1:].masked_fill_(~present, -1.0)
        table = size_features(n_players).to(device)
        sizes = table[torch.cat([torch.full((1,), n_players, device=device), present.sum(1)])]
        power = sizes[1:].square().sum(1).mean()
        # Pairs of half size show nothing of a size effect.
        scale = torch.where(power > 1e-20 * table.square().max(), (_SIZE_VARIANCE / power).sqrt(), 0.0)
        sizes = sizes * scale
        self._size_effect = (table[-1] - table[0]) * scale / n_players
        variance = 1 / weights
        noise = torch.cat([torch.zeros(1, **new), variance / variance.mean()])
        # Too few pairs can be fitted exactly, and an exact fit says nothing of the noise.
        if n_pairs < n_players - 1:
            floor = 0.02
        else:
            floor = 1e-3 if n_pairs < 1.2 * n_players else 0.0
        self._ridge = Ridge(x, sizes, self._size_effect, noise, floor)
        self._passes = 2 if n_pairs <= 256 else 1
        # With a pair for each triple of players order three is identified: noise may be far below the cubic part.
        self._last_ratios = (0.1, 0.01, 0.0005) if n_pairs >= math.comb(n_players, 3) else (0.1,)

        # The system is filled up to a multiple of 8 by rows of the identity: each matrix of a batch starts aligned.
        self._n_rows = n_pairs + 1
        size = -(-self._n_rows // 8) * 8
        self._columns = torch.zeros(size, n_players + sizes.shape[1], **new)
        self._columns[: self._n_rows] = torch.cat([x, sizes], 1)
        self._x, self._sizes = self._columns[:, :n_players], self._columns[:, n_players:]
        self._noise = noise.clamp_min_(1e-3)
        # Errors need the diagonal of the inverse: exactly for few pairs, from probes for many.
        self._exact = n_pairs <= _EXACT_DIAGONAL
        probes = torch.empty(0, size, **new) if self._exact else probe_signs(size).T.contiguous().to(device)
        small = device.type == "cpu" and size <= _NATIVE_ROWS
        native = _registry.native_cpu("cubic_regression") if small else None
        if native is not None:
            self._regressions = NativeRegressions(self._columns, n_players, probes, native)
        else:
            self._regressions = TorchRegressions(self._columns, n_players, probes)
        self.batch = self._regressions.batch

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Fit outputs.

        Args:
            y: float64 ``[B, h + 1]``, ``B <= batch``: half the total, then the differences of the pairs.

        Returns:
            Shapley values ``[B, M]`` before the efficiency correction and standard errors ``[B, M]``.
        """
        unit = y.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        y = y / unit
        values, levels, gains = self._ridge(y)
        cubic = 3 * levels[:, None]
        left_out = torch.full_like(y, math.nan)
        for step in range(self._passes):
            last = step == self._passes - 1
            relevance = _relevance(values)
            best = torch.full_like(unit, math.inf)
            for ratio in self._last_ratios if last else (0.1,):
                evidence, fitted, residuals = self._solve(y, relevance, cubic, ratio, last)
                better = evidence < best
                best = torch.where(better, evidence, best)
                values = torch.where(better, fitted, values)
                if last:
                    left_out = torch.where(better, residuals, left_out)
        left_out[:, 0] = 0
        errors = torch.stack([self._ridge.errors(*one) for one in zip(gains, left_out, strict=True)])
        return values * unit, errors * unit

    def _solve(
        self, y: Tensor, relevance: Tensor, cubic: Tensor, ratio: float, with_residuals: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kernel regressions.

        Returns:
            Negative log evidence ``[B, 1]`` (infinite if the factorisation failed), Shapley values ``[B, M]`` and
            leave-one-out residuals ``[B, h + 1]`` (None unless asked for).
        """
        n_outputs, n_rows = y.shape
        root = cubic.sqrt()
        # The covariance times sqrt(c): with a = sqrt(c) u its main part is a + a^3.
        padded, diagonal = y.new_zeros(2, n_outputs, len(self._columns))
        padded[:, :n_rows] = y
        diagonal[:, :n_rows] = (self._noise * (ratio * cubic) + _JITTER) * root
        diagonal[:, n_rows:] = 1
        solution = self._regressions(padded, relevance * root, root, diagonal, with_residuals)
        evidence = 0.5 * (n_rows * solution.quadratic.log() + solution.log_determinant)

        alpha = solution.alpha * root
        shift = _each(self._x, relevance)
        squares = relevance.square()
        both = torch.stack([alpha, alpha * (shift.square() + 2 * squares.sum(1, keepdim=True))], 1)
        sums = torch.stack([torch.mm(pair, self._columns) for pair in both])  # [B, 2, M + Q]
        linear, cube = sums[:, :, : relevance.shape[1]].unbind(1)
        values = 2 * relevance * (linear + cubic * cube)
        values -= 4 * cubic * squares * (shift * alpha).sum(1, keepdim=True)
        values += (sums[:, 0, relevance.shape[1] :] * self._size_effect).sum(1, keepdim=True)
        valid = solution.succeeded & values.isfinite().all(1)
        evidence = torch.where(valid, evidence, math.inf)[:, None]
        if not with_residuals:
            return evidence, values, None
        inverse_diagonal = solution.inverse_diagonal[:, :n_rows]
        if not self._exact:
            inverse_diagonal = torch.maximum(inverse_diagonal, 0.1 * inverse_diagonal.mean(1, keepdim=True))
        return evidence, values, solution.alpha[:, :n_rows] / inverse_diagonal


class Solution(NamedTuple):
    """Solutions of ``V alpha = y`` for B outputs. What belongs to an output that did not succeed is unspecified."""

    alpha: Tensor  # [B, n]
    quadratic: Tensor  # [B], y' alpha
    log_determinant: Tensor  # [B], of V
    succeeded: Tensor  # bool [B]
    inverse_diagonal: Tensor | None  # [B, n], of V^-1


class TorchRegressions:
    """Kernel regressions ``V alpha = y`` with V = a + a^3 + c S S' + diag(d) and a = X diag(w) X', an output each.

    Work buffers are made once.

    Args:
        columns: float64 ``[n, M + Q]``, X and S side by side; n is a multiple of 8.
        n_players: M.
        probes: float64 ``[P, n]``, signs which estimate the diagonal of the inverse; P = 0: it is computed exactly.
    """

    def __init__(self, columns: Tensor, n_players: int, probes: Tensor):
        size = len(columns)
        self.batch = max(1, _BATCH // size**2)
        self._x, self._sizes = columns[:, :n_players], columns[:, n_players:]
        self._probes = probes
        self._one = columns.new_ones(())
        self._info = torch.zeros(self.batch, dtype=torch.int32, device=columns.device)
        self._scaled = torch.empty_like(self._x)
        self._panel = columns.new_empty(min(_PANEL, size) * size)
        # The upper triangle by rows is the lower one by columns, as LAPACK wants it.
        self._upper = columns.new_empty(self.batch, size, size)
        # Solutions by columns: the output first, then the probes.
        self._half = columns.new_empty(self.batch, len(probes) + 1, size)
        self._full = torch.empty_like(self._half)

    def __call__(
        self, y: Tensor, weights: Tensor, size_weights: Tensor, diagonal: Tensor, with_inverse: bool
    ) -> Solution:
        """Solve for outputs ``y [B, n]``, ``B <= batch``, with w ``[B, M]``, c ``[B, 1]`` and d ``[B, n]``."""
        n_outputs = len(y)
        factor, info = self._build(weights, size_weights, diagonal), self._info[:n_outputs]
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        n_probes = len(self._probes) if with_inverse else 0
        half, full = self._half[:n_outputs, : n_probes + 1], self._full[:n_outputs, : n_probes + 1]
        half[:, 0] = y
        half[:, 1:] = self._probes[:n_probes]
        for f, h, out in zip(factor, half, full, strict=True):
            torch.linalg.solve_triangular(f, h.T, upper=False, out=h.T)
            torch.linalg.solve_triangular(f.T, h.T, upper=True, out=out.T)
        if not with_inverse:
            inverse_diagonal = None
        elif n_probes:
            inverse_diagonal = (self._probes * full[:, 1:]).mean(1)
        else:
            inverse_diagonal = torch.stack([_inverse_diagonal(f) for f in factor])
        log_determinant = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return Solution(full[:, 0], half[:, 0].square().sum(1), log_determinant, info == 0, inverse_diagonal)

    def _build(self, weights: Tensor, size_weights: Tensor, diagonal: Tensor) -> Tensor:
        """Lower triangles of V ``[B, n, n]``."""
        size = len(self._x)
        for upper, weight, size_weight in zip(self._upper, weights, size_weights, strict=False):
            torch.mul(self._x, weight, out=self._scaled)
            sizes = self._sizes * size_weight.sqrt()
            for start in range(0, size, _PANEL):
                stop = min(start + _PANEL, size)
                panel = upper[start:stop, start:]
                torch.mm(self._scaled[start:stop], self._x[start:].T, out=panel)
                factor = self._panel[: panel.numel()].view(panel.shape)
                panel.mul_(torch.addcmul(self._one, panel, panel, out=factor))
                panel.addmm_(sizes[start:stop], sizes[start:].T)
        covariance = self._upper[: len(weights)].mT
        covariance.diagonal(dim1=1, dim2=2).add_(diagonal)
        return covariance


class NativeRegressions:
    """As `TorchRegressions`, on the CPU: each regression in one thread, an output's bits the same in any company."""

    batch = _NATIVE_BATCH

    def __init__(self, columns: Tensor, n_players: int, probes: Tensor, native: ModuleType):
        self._columns, self._n_players, self._probes = columns, n_players, probes
        self._kernel = native.cubic_regression

    def __call__(
        self, y: Tensor, weights: Tensor, size_weights: Tensor, diagonal: Tensor, with_inverse: bool
    ) -> Solution:
        n_outputs, n_rows = y.shape
        alpha = torch.empty_like(y)
        inverse_diagonal = torch.empty_like(y) if with_inverse else None
        quadratic, log_determinant = y.new_empty(2, n_outputs)
        info = y.new_empty(n_outputs, dtype=torch.int32)
        inputs = [t.contiguous() for t in (self._columns, weights, size_weights, diagonal, y, self._probes)]
        self._kernel(
            *(t.data_ptr() for t in inputs),
            *(t.data_ptr() for t in (alpha, quadratic, log_determinant)),
            inverse_diagonal.data_ptr() if with_inverse else 0,
            info.data_ptr(),
            n_outputs,
            n_rows,
            self._n_players,
            self._columns.shape[1] - self._n_players,
            len(self._probes),
            torch.get_num_threads(),
        )
        return Solution(alpha, quadratic, log_determinant, info == 0, inverse_diagonal)


def _relevance(values: Tensor) -> Tensor:
    """Prior scales ``[B, M]`` of sum one: the players' values, never below a twentieth of the root mean square."""
    rms = values.square().mean(1, keepdim=True).sqrt()
    relevance = torch.where(rms > 0, values.abs() / rms, 1.0) + 0.05
    return relevance / relevance.sum(1, keepdim=True)


def _inverse_roots(values: Tensor) -> Tensor:
    """1 / sqrt of eigenvalues in rising order; 0 for those that are nothing but rounding."""
    return torch.where(values > 1e-14 * values[-1], values.rsqrt(), 0.0)


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Diagonal ``[n]`` of ``(L L')^-1``: sums of squares down the columns of L^-1, zeros above a panel skipped."""
    size = len(factor)
    unit = torch.eye(size, min(_PANEL, size), dtype=factor.dtype, device=factor.device)
    parts = []
    for start in range(0, size, _PANEL):
        rest = size - start
        inverse = torch.linalg.solve_triangular(factor[start:, start:], unit[:rest, :rest], upper=False)
        parts.append(inverse.square().sum(0))
    return torch.cat(parts)


def _each(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix @ row`` for each row: ``[P, Q]``, ``[B, Q]`` -> ``[B, P]``, one product and one fresh vector a row."""
    return torch.stack([torch.mv(matrix, row.clone()) for row in rows])
