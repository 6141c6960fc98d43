"""Insertion and deletion curves of inputs, and of a data set of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MeanCurves:
    """Curves of a data set: means over inputs with normal 95 % bands.

    Attributes:
        fractions: ``[S+1]``; the mean over inputs where they differ.
        insertion, deletion: ``[S+1]``; insertion None where there is none.
        insertion_band, deletion_band: ``[S+1]``, half of the band: 1.96 standard errors of the mean; NaN for one input.
        insertion_auc, deletion_auc: ``[]``, mean areas.
        insertion_auc_band, deletion_auc_band: ``[]``, half of their intervals.
        n_inputs: How many inputs.
    """

    fractions: Tensor
    insertion: Tensor | None
    deletion: Tensor
    insertion_band: Tensor | None
    deletion_band: Tensor
    insertion_auc: Tensor | None
    deletion_auc: Tensor
    insertion_auc_band: Tensor | None
    deletion_auc_band: Tensor
    n_inputs: int


@dataclass(frozen=True)
class Curves:
    """Insertion and deletion curves of inputs and their areas; made by `xaifast.insertion_deletion`.

    Attributes:
        fractions: Share of features inserted or deleted, ``[S+1]`` from 0 to 1; ``[B, S+1]`` where inputs have
            different numbers of players. Without the 0 under ``compat="quantus"``.
        insertion: ``[B, S+1]``, score with that share of features shown over the insertion baseline; None under
            ``compat="quantus"``.
        deletion: ``[B, S+1]``, score with that share of features replaced by the deletion baseline.
        insertion_auc: ``[B]``, area under the insertion curve (higher is better with ``order="most"``), or None.
        deletion_auc: ``[B]``, area under the deletion curve (lower is better with ``order="most"``).
        n_evaluations: Model rows spent on each input.
        targets: LongTensor ``[B]``, the output scored; None where the model has one.
        order: ``"most"``, ``"least"`` or ``"random"``.
        compat: Whose points and areas these are; None for ours.
        one_baseline: Whether insertion and deletion have the same baseline.
    """

    fractions: Tensor
    insertion: Tensor | None
    deletion: Tensor
    insertion_auc: Tensor | None
    deletion_auc: Tensor
    n_evaluations: int
    targets: Tensor | None
    order: str
    compat: str | None
    one_baseline: bool

    @property
    def srg(self) -> Tensor | None:
        """Symmetric relevance gain ``[B]``: area of the least-first minus area of the most-first deletion curve.

        With one baseline an insertion curve, read backwards, is the deletion curve of the reverse order, so the gain is
        the insertion's area minus the deletion's (the other way round for ``order="least"``). None where the baselines
        differ or there is no insertion: the areas then belong to different games.

        Source: Bluecher, Vielhaben and Strodthoff, "Decoupling pixel flipping and occlusion strategy for consistent XAI
        benchmarks", TMLR 2024.
        """
        if not self.one_baseline or self.insertion_auc is None:
            return None
        gain = self.insertion_auc - self.deletion_auc
        return -gain if self.order == "least" else gain

    def mean(self) -> MeanCurves:
        """Curves of the data set: means over inputs with normal 95 % bands.

        With ``score="accuracy"`` these are accuracy curves.
        """
        fractions = self.fractions if self.fractions.dim() == 1 else self.fractions.double().mean(0)
        insertion, insertion_band = _mean_and_band(self.insertion)
        deletion, deletion_band = _mean_and_band(self.deletion)
        insertion_auc, insertion_auc_band = _mean_and_band(self.insertion_auc)
        deletion_auc, deletion_auc_band = _mean_and_band(self.deletion_auc)
        return MeanCurves(
            fractions.to(self.deletion.dtype), insertion, deletion, insertion_band, deletion_band, insertion_auc,
            deletion_auc, insertion_auc_band, deletion_auc_band, self.deletion.shape[0],
        )  # fmt: skip

    @classmethod
    def cat(cls, curves: Iterable[Curves]) -> Curves:
        """Curves of several batches as one, in their order; of one baseline where all are.

        Raises:
            ValueError: nothing given, or curves that were not taken alike.
        """
        curves = tuple(curves)
        if not curves:
            raise ValueError("xaifast.Curves.cat: curves must hold at least one, got none")
        first, *rest = curves
        for other in rest:
            for name in ("order", "compat"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"xaifast.Curves.cat: curves must agree in {name}, got {getattr(first, name)!r} and "
                        f"{getattr(other, name)!r}"
                    )
            if other.deletion.shape[1] != first.deletion.shape[1]:
                raise ValueError(
                    f"xaifast.Curves.cat: curves must have the same points, got {first.deletion.shape[1]} and "
                    f"{other.deletion.shape[1]}; give steps"
                )
        fractions = first.fractions
        if any(one.fractions.shape != fractions.shape or not torch.equal(one.fractions, fractions) for one in rest):
            fractions = torch.cat([one.fractions.expand(one.deletion.shape) for one in curves])
        return cls(
            fractions, _cat(curves, "insertion"), _cat(curves, "deletion"), _cat(curves, "insertion_auc"),
            _cat(curves, "deletion_auc"), max(one.n_evaluations for one in curves), _cat(curves, "targets"),
            first.order, first.compat, all(one.one_baseline for one in curves),
        )  # fmt: skip

    def plot(self, index: int | None = None, *, label: str = "score") -> object:
        """Draw the data set's mean curves with their bands, or one input's (needs the extra ``report``).

        Args:
            index: Which input; None for the mean over all.
            label: What the score is.

        Returns:
            ``matplotlib.figure.Figure``; areas stand in the legend.

        Raises:
            IndexError: no such input.
        """
        from ._curve_plot import plot_curves

        return plot_curves(self, index, label)

    def __repr__(self) -> str:
        batch, points = self.deletion.shape
        insertion = "" if self.insertion_auc is None else f"insertion area {_short(self.insertion_auc)}, "
        tool = "" if self.compat is None else f" of {self.compat}"
        return (
            f"Curves({batch} inputs, {points} points{tool}, {self.order} first; {insertion}deletion area "
            f"{_short(self.deletion_auc)}; {self.n_evaluations} evaluations an input)"
        )


def _short(areas: Tensor) -> str:
    return f"{float(areas.double().mean()):.3g}"


def _cat(curves: Sequence[Curves], name: str) -> Tensor | None:
    parts = [getattr(one, name) for one in curves]
    return None if any(part is None for part in parts) else torch.cat(parts)


def _mean_and_band(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Mean over inputs and 1.96 standard errors of it."""
    if values is None:
        return None, None
    wide, n = values.double(), values.shape[0]
    spread = wide.std(0) if n > 1 else torch.full_like(wide[0], math.nan)
    return wide.mean(0).to(values.dtype), (1.96 * spread / math.sqrt(n)).to(values.dtype)
