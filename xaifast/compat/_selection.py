"""From values of coalitions to Shapley values as shap reports them: all players, or those an l1 penalty keeps.

Kernel SHAP is a weighted regression of a coalition's value on who is present, under the constraint that the effects sum
to the total. To choose players, shap drops the constraint and writes every row twice, once seen from nobody and once
from everybody ("augmented"), lets LARS or the lasso choose, and fits the chosen again without penalty. Over all
coalitions that fit gives each of the chosen its Shapley value and an equal share of what the others had, so it is made
from the Shapley values of all players. `num_features` takes the largest of them instead of LARS's first: LARS starts
from correlations with the total and can leave out a large effect against it.
"""

from __future__ import annotations

import math
import warnings
from functools import cached_property

import numpy as np
import torch

from ..attribution.shapley_solvers import Adjusted, PairedDesign, Wls, choose_estimator, solve_exact
from ..attribution.small_budgets import SmallBudget, is_small, small_design
from ..coalitions import Coalitions

# `choose_estimator` weighs a solve against a coalition of a 0.7 Mflop model. So many rows of a model of tables cost as
# much: the adjusted solve then has at most 2 kflop for every model row, a sixth of a perceptron 30-64-64-2.
_RULE_ROWS = 1000
# Up to so many pairs it is used at any share while there are no more than two for a player, where `Wls` is unstable.
_SMALL_PAIRS = 1024
_DRAWS = 32


def penalises(l1_reg: object, share: float) -> bool:
    """Whether players are to be chosen, when a share of all coalitions is evaluated."""
    if isinstance(l1_reg, str) and l1_reg == "auto":
        warnings.warn(
            "l1_reg='auto' is deprecated, in shap as well: give 'aic', a number of features or False",
            DeprecationWarning,
            stacklevel=4,
        )
        return share < 0.2
    return l1_reg not in (False, 0)


def kept_at_most(l1_reg: object) -> int | None:
    """The number in ``"num_features(number)"``, None for other penalties."""
    if not (isinstance(l1_reg, str) and l1_reg.startswith("num_features(")):
        return None
    number = int(l1_reg[len("num_features(") : -1])
    if number < 0:
        raise ValueError(f"xaifast.KernelExplainer: l1_reg must keep 0 features or more, got {l1_reg!r}")
    return number


class Regression:
    """One design, and everything that is computed once for it; an input's bits do not depend on the others.

    Few coalitions have designs of their own (`small_budgets`). Of larger ones that could determine all values the first
    that does is taken: with few more coalitions than needed some do not.

    Args:
        n_players: M, at least 2.
        nsamples: Coalitions, even; nobody and everybody not counted.
        seed: Of the design.
        n_background: Model rows a coalition, which decide how much time the solve may take.
        output_eps: Spacing of the model's outputs relative to them.
    """

    def __init__(self, n_players: int, nsamples: int, seed: int, n_background: int, output_eps: float) -> None:
        self.n_players, self._n_background, self._output_eps = n_players, n_background, output_eps
        self._exact = nsamples + 2 == 2**n_players
        self._small = None
        if is_small(n_players, nsamples + 2):
            self.coalitions = small_design(n_players, nsamples + 2, seed=seed)
            self._small = SmallBudget(self.coalitions.present, self.coalitions.weights, output_eps)
            full_rank = self._small.full_rank
        else:
            full_rank = self._draw(nsamples, seed)
        if not full_rank:
            warnings.warn(
                f"xaifast.KernelExplainer: {nsamples} coalitions do not determine the values of {n_players} features, "
                "and the solution of least norm is taken; raise nsamples or group features",
                UserWarning,
                stacklevel=4,
            )

    def _draw(self, nsamples: int, seed: int) -> bool:
        """Draw a large design; whether it determines all values."""
        for block in range(_DRAWS):
            self.coalitions = Coalitions.sample(self.n_players, nsamples + 2, "leverage", seed=seed, block=block)
            if self._exact:
                return True
            self._pairs = PairedDesign.from_bits(self.coalitions.bits, self.coalitions.weights, self.n_players)
            self._wls = Wls(self._pairs)
            if self._wls.full_rank:
                return True
        return False

    def solve(self, values: np.ndarray) -> np.ndarray:
        """Shapley values float64 ``[B, M, K]`` of values ``[B, n, K]``, rows as in the design; no player left out."""
        linked = torch.from_numpy(values)
        if self._exact:
            return np.stack([solve_exact(self.coalitions.bits, one, self.n_players).numpy() for one in linked])
        apart = values.shape[0], values.shape[2]  # inputs and outputs, which these fits keep apart: all are one call
        if self._small is not None:
            phi, _ = self._small(linked.transpose(0, 1).flatten(1))
            return phi.unflatten(1, apart).transpose(0, 1).numpy()
        differences, totals = (linked[:, 2::2] - linked[:, 3::2]) / 2, linked[:, 0] - linked[:, 1]
        if self._affords_adjusted(values.shape[2]):
            phi, _ = self._adjusted(differences.transpose(0, 1).flatten(1), totals.flatten())
            return phi.unflatten(1, apart).transpose(0, 1).numpy()
        return np.stack([self._wls(*one)[0].numpy() for one in zip(differences, totals, strict=True)])

    def select(self, values: np.ndarray, l1_reg: str | float) -> np.ndarray:
        """As `solve`, with effects for the chosen players only and zero for the others."""
        phi = self.solve(values)
        n_kept = kept_at_most(l1_reg)
        for b, k in np.ndindex(phi.shape[0], phi.shape[2]):
            if n_kept is not None:
                kept = np.argsort(-np.abs(phi[b, :, k]), kind="stable")[:n_kept]
            else:
                kept = self._penalised(values[b, :, k], l1_reg)
            effects = phi[b, kept, k]
            rest = phi[b, :, k].sum() - effects.sum()
            phi[b, :, k] = 0
            phi[b, kept, k] = effects + rest / max(len(effects), 1)
        return phi

    def _affords_adjusted(self, n_outputs: int) -> bool:
        if self._pairs.n_pairs <= min(2 * self.n_players, _SMALL_PAIRS):
            return True
        outputs = math.ceil(n_outputs * _RULE_ROWS / self._n_background)
        return choose_estimator(self.n_players, self.coalitions.n_coalitions, outputs) == "adjusted"

    @cached_property
    def _adjusted(self) -> Adjusted:
        return Adjusted(self._pairs, self._output_eps)

    @cached_property
    def _augmented(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[2 n, M]`` and the roots of their weights ``[2 n]``; weights scaled as shap's, so that penalties mean
        the same.
        """
        present = self.coalitions.present[2:].double().numpy()  # [n, M]
        weights, sizes = self.coalitions.weights[2:].numpy(), present.sum(1)
        weights = weights / weights.sum()
        roots = np.sqrt(np.concatenate([weights * (self.n_players - sizes), weights * sizes]))
        return np.concatenate([present, present - 1]) * roots[:, None], roots

    def _penalised(self, values: np.ndarray, l1_reg: str | float) -> np.ndarray:
        """Players that a lasso keeps, from values ``[n]``, its penalty given or chosen by an information criterion."""
        try:
            from sklearn.linear_model import Lasso, LassoLarsIC
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError(
                f"xaifast.KernelExplainer: l1_reg={l1_reg!r} chooses features with scikit-learn; pip install "
                "'xaifast[compat]', or pass \"num_features(10)\" or False"
            ) from error
        rows, roots = self._augmented
        targets = np.concatenate([values[2:] - values[1], values[2:] - values[0]]) * roots
        if l1_reg in ("auto", "aic", "bic"):
            rows = StandardScaler(with_mean=False).fit_transform(rows)
            fit = LassoLarsIC(criterion="aic" if l1_reg == "auto" else l1_reg).fit(rows, targets)
        else:
            fit = Lasso(alpha=l1_reg).fit(rows, targets)
        return np.flatnonzero(fit.coef_)
