"""What training did to each feature's part in an output, and ways to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..players import Players


@dataclass(frozen=True)
class XtrainResult:
    """Attributions of XtrAIn, and what they were added up from. B inputs, M players, S steps (T - 1 for all of them).

    Attributes:
        values: ``[B, M]``; with ``include_rest`` ``[B, M + 1]``, biases and later layers last.
        residual: ``[B]``, change of the target's logit that values do not account for: ``sum_t m_t (f_c(theta_t+1) -
            f_c(theta_t)) - sum_i values_i``, m_t the gates (1 but for ``"xtrain+"``). Interactions, and the rest.
        per_step: ``[S, B, M (+ 1)]``, A_i of every step before any gate; None unless asked for.
        gates: bool ``[S, B]``, which steps count (``"xtrain+"``), else None.
        logits: float64 ``[S + 1, B]``, of the target at the checkpoints used.
        steps: Numbers of the checkpoints each step leads from and to.
        variant: ``"xtrain"``, ``"xstep"`` or ``"xtrain+"``.
        target: LongTensor ``[B]``.
        certified: Share of the occluded rows whose later layers were proved to act linearly, and skipped; None where
            the model allows no such proof.
        error: With ``verify``, largest difference to the float64 values of a sample of inputs, relative to the largest
            of these; else None.
    """

    values: Tensor
    residual: Tensor
    per_step: Tensor | None
    gates: Tensor | None
    logits: Tensor
    steps: list[tuple[int, int]]
    variant: str
    target: Tensor
    certified: float | None
    error: float | None
    _players: Players = field(repr=False)
    _inputs: Tensor = field(repr=False)
    _clamped: bool = field(repr=False, default=False)

    def expand(self) -> Tensor:
        """Values spread over the elements of the inputs, in their shape; without the rest."""
        return self._players.expand(self.values[:, : self._players.n_players], (self._inputs,))[0]

    def formed(self) -> Tensor:
        """Values after each step, gates applied: ``[S, B, M (+ 1)]``, the last equal to ``values`` but for rounding.

        Raises:
            ValueError: ``per_step`` was not asked for.
        """
        if self.per_step is None:
            raise ValueError("XtrainResult.formed: the steps were not kept; call xaifast.xtrain with per_step=True")
        parts = self.per_step.double()
        if self._clamped:
            parts = parts.clamp(min=0)
        if self.gates is not None:
            parts = torch.where(self.gates[:, :, None], parts, 0)
        return parts.cumsum(0).to(self.per_step.dtype)

    def plot(
        self,
        index: int | Sequence[int] | None = None,
        *,
        names: Sequence[str] | None = None,
        max_items: int = 4,
        max_checkpoints: int = 8,
    ) -> object:
        """Draw how attributions formed over training (needs the extra ``report``): images as a row of maps over
        checkpoints, anything else as lines of the largest players. Without ``per_step`` the end alone, as maps or bars.

        Args:
            index: Which inputs; None for the first ``max_items``.
            names: M names of players, for lines and bars.
            max_items: Inputs drawn where ``index`` does not say.
            max_checkpoints: Maps a row at most.

        Returns:
            ``matplotlib.figure.Figure``; notebooks show it, ``.savefig(path)`` writes it.

        Raises:
            IndexError, ValueError: an input or names that do not fit.
        """
        from ._xtrain_plot import plot_result

        return plot_result(self, index, names, max_items, max_checkpoints)

    def __repr__(self) -> str:
        batch, players = len(self.values), self._players.n_players
        rest = " and the rest" if self.values.shape[1] > players else ""
        notes = [f"{len(self.steps)} steps"]
        if self.gates is not None:
            notes.append(f"gates open {float(self.gates.double().mean()):.0%}")
        if self.certified is not None:
            notes.append(f"certified {self.certified:.0%}")
        if self.error is not None:
            notes.append(f"relative error {self.error:.1g}")
        return f"XtrainResult({self.variant}: {batch} inputs, {players} players{rest}; {', '.join(notes)})"
