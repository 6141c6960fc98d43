"""Removal by rank: nested sets of features, as insertion and deletion curves ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.perturb import PerturbPlan, plan_perturbation
from ..players import Players
from .base import Removal
from .replace import PreparedRows, _layout


@dataclass(frozen=True)
class RankPoints:
    """Points of curves, the same for every input.

    Attributes:
        points: int64 ``[N, 2]`` of (count, 0 insertion | 1 deletion).
        n_features: What counts run up to.
    """

    points: Tensor
    n_features: int

    @property
    def code(self) -> Tensor:
        """The points."""
        return self.points

    def describe(self, index: int, n: int) -> str:
        """Which curve, and how far along."""
        count, deletes = self.points[n].tolist()
        return f"{'deletion' if deletes else 'insertion'} point {count} of {self.n_features}"

    @classmethod
    def of(cls, insertion: Tensor, deletion: Tensor, n_features: int) -> RankPoints:
        """From the counts of both curves, int64 ``[N]`` each, insertion first."""
        kinds = torch.arange(2, device="cpu").repeat_interleave(
            torch.tensor([len(insertion), len(deletion)], device="cpu")
        )
        return cls(torch.stack((torch.cat((insertion, deletion)), kinds), 1), n_features)


@dataclass(frozen=True)
class PreparedRanked(PreparedRows):
    """Rows of a curve's points, one kernel a chunk."""

    plans: tuple[PerturbPlan, ...]

    @property
    def n_background(self) -> int:
        """A row a point."""
        return 1


@dataclass(frozen=True)
class Ranked(Removal):
    """The first features are inserted into one baseline or deleted into another, by selection.

    Insertion point k shows ``where(rank < k, x, insertion)``, deletion point k ``where(rank < k, deletion, x)``.

    Attributes:
        ranks: Integers ``[B, *map]``, broadcastable to one input, or ``[B, M]`` with a feature mask.
        feature_mask: Player ids, or None.
        insertion: Number, or tensor broadcastable to one input or of the inputs' rank.
        deletion: The same; the very same object where one baseline serves both.
    """

    ranks: Tensor
    feature_mask: Tensor | None
    insertion: float | Tensor
    deletion: float | Tensor

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedRanked:
        """Lay out the input, both baselines and the ranks as the kernel reads them."""
        (x,) = inputs
        plan = plan_perturbation(
            x.detach(),
            self.ranks,
            insertion_baseline=self.insertion,
            deletion_baseline=self.deletion,
            feature_mask=self.feature_mask,
            memory_format=_layout(x),
        )
        return PreparedRanked((plan,))

    def clean(self, players: Players | None) -> RankPoints:
        """Nothing deleted."""
        return RankPoints(torch.tensor([[0, 1]], device="cpu"), self.ranks[0].numel())
