"""Shapley values of a call, what they add up to, and ways to look at them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..players import Players


@dataclass(frozen=True)
class ShapleyResult:
    """Shapley values and what they add up to.

    Attributes:
        values: ``[B, M]``, or ``[B, M, K]`` where all outputs were asked for; the inputs' floating dtype, at least
            float32. Sums over players to ``full_values - base_values``, in link space.
        base_values: ``[B(, K)]``, value of the empty coalition, in link space.
        full_values: ``[B(, K)]``, value of the full coalition, in link space.
        std_errors: Like ``values``; NaN where no honest value exists (fewer than 1.2 M pairs, one permutation).
        n_evaluations: Model rows spent on each input.
        estimator: What was used: ``"wls"``, ``"adjusted"``, ``"permutation"`` or ``"exact"``.
        targets: LongTensor ``[B]``, the output explained; None where all are, or the model has one.
        predicted: LongTensor ``[B]``, the largest output of the clean input; None where the model has one output.
    """

    values: Tensor
    base_values: Tensor
    full_values: Tensor
    std_errors: Tensor
    n_evaluations: int
    estimator: str
    targets: Tensor | None
    predicted: Tensor | None
    _players: Players = field(repr=False)
    _inputs: tuple[Tensor, ...] = field(repr=False)

    def expand(self) -> Tensor | tuple[Tensor, ...]:
        """Values spread over the elements of the inputs: the inputs' shape, with the K axis last where there is one."""
        maps = self._players.expand(self.values, self._inputs)
        return maps if len(maps) > 1 else maps[0]

    def plot(
        self,
        index: int | list[int] | None = None,
        *,
        output: int | None = None,
        names: list[str] | None = None,
        max_items: int = 8,
    ) -> object:
        """Draw some inputs (needs the extra ``report``): images as picture, values over it and standard errors,
        anything else as bars from the base to the full value, the largest first.

        Args:
            index: Which inputs; None for the first ``max_items``.
            output: Which output where values have a K axis; None for the one with the largest full value of each input.
            names: M names of players, for bars.
            max_items: Inputs drawn where ``index`` does not say.

        Returns:
            ``matplotlib.figure.Figure``; notebooks show it, ``.savefig(path)`` writes it.

        Raises:
            IndexError, ValueError: an input, an output or names that do not fit.
        """
        from ._plot import plot_result

        return plot_result(self, index, output, names, max_items)

    def to_shap(self) -> object:
        """As a ``shap.Explanation`` (needs the extra ``compat``): values, base values and, for tabular inputs with one
        player a column, the data.
        """
        try:
            import shap
        except ImportError as error:
            raise ImportError("ShapleyResult.to_shap needs shap; pip install 'xaifast[compat]'") from error
        data, mask = None, self._players.masks[0]
        if len(self._inputs) == 1 and torch.equal(mask, torch.arange(self.values.shape[1], device=mask.device)):
            data = self._inputs[0].cpu().numpy()
        return shap.Explanation(values=self.values.cpu().numpy(), base_values=self.base_values.cpu().numpy(), data=data)

    def __repr__(self) -> str:
        batch, players = self.values.shape[:2]
        outputs = f", {self.values.shape[2]} outputs" if self.values.dim() == 3 else ""
        norm = self.values.double().norm()
        error = float(self.std_errors.double().norm() / norm) if norm > 0 else math.nan
        quality = f"relative standard error {error:.2g}"
        if self.estimator == "exact":
            quality = "exact"
        elif bool(torch.isnan(self.std_errors).any()):
            quality = "too few evaluations for standard errors"
        return (
            f"ShapleyResult({batch} inputs, {players} players{outputs}; {self.estimator}, "
            f"{self.n_evaluations} evaluations an input; {quality})"
        )
