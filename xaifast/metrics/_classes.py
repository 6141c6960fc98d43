"""The metrics as `torchmetrics.Metric` classes: sums over updates, in float64, that add up across processes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .agreement import check_k, error_rows, iou_rows, rank_correlation_rows
from .clean_score import check_kind, clean_score_rows
from .segmentation import check_threshold, difference_rows, mean_overlap, overlap_counts
from .stability import importance_rows, spread_rows


class _Mean(Metric):
    """Mean over inputs; those without a value (NaN) are left out and counted. Subclasses may pool sums beside.

    The state is one float64 vector: total, inputs with a value, inputs without, pooled sums. `MetricCollection` merges
    metrics for good whose states have equal names and, after the first batch, equal values. Two metrics may agree on a
    batch by chance, so the state's name says class and settings.
    """

    full_state_update = False

    def __init__(self, *settings: object, n_pooled: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._name = re.sub(r"\W", "_", "_".join(["sums", type(self).__name__, *map(str, settings)]))
        self.add_state(self._name, torch.zeros(3 + n_pooled, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def _sums(self) -> Tensor:
        return getattr(self, self._name)

    @property
    def undefined(self) -> int:
        """Inputs given to this process that had no value (NaN) and are left out of the mean."""
        return int(self._sums[2])

    def _add(self, rows: Tensor, *pooled: Tensor) -> None:
        defined = ~rows.isnan()
        sums = torch.stack([rows.where(defined, 0).sum(), defined.sum(), (~defined).sum(), *pooled])
        setattr(self, self._name, self._sums + sums)

    def compute(self) -> Tensor:
        """The mean over all inputs with a value, a float64 scalar; NaN where there are none."""
        total, n_defined = self._sums[:2]
        return total / n_defined

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value, several, or that of `compute()`: (figure, axes)."""
        return self._plot(val, ax)


class ERmse(_Mean):
    """`xaifast.metrics.e_rmse` over a data set: the mean over inputs, or of all elements together where `pooled`.

    Example:
        >>> metric = ERmse()
        >>> metric.update(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        >>> metric.compute()
        tensor(1.7678, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, pooled: bool = False, **kwargs: Any) -> None:
        super().__init__(pooled, n_pooled=2, **kwargs)
        self.pooled = pooled

    def update(self, pred: Tensor, ref: Tensor) -> None:
        """Add a batch, `[B, M]` each."""
        errors = error_rows(pred, ref)
        self._add(errors, errors.square().sum() * pred.shape[1], errors.new_tensor(pred.numel()))

    def compute(self) -> Tensor:
        """The error over all inputs, a float64 scalar; NaN where there are none."""
        if not self.pooled:
            return super().compute()
        total, n_elements = self._sums[3:]
        return (total / n_elements).sqrt()


class IouAtK(_Mean):
    """`xaifast.metrics.iou_at_k` over a data set: the mean over inputs.

    Example:
        >>> metric = IouAtK(2)
        >>> metric.update(torch.tensor([[5.0, 4.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, 2.0, 1.0]]))
        >>> metric.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, k: int, **kwargs: Any) -> None:
        check_k(k)
        super().__init__(k, **kwargs)
        self.k = k

    def update(self, pred: Tensor, ref: Tensor) -> None:
        """Add a batch, `[B, M]` each."""
        self._add(iou_rows(pred, ref, self.k))


class RankCorrelation(_Mean):
    """`xaifast.metrics.rank_correlation` over a data set: the mean over inputs without a constant map.

    `undefined` counts the others.

    Example:
        >>> metric = RankCorrelation()
        >>> metric.update(torch.tensor([[0.1, 0.2, 0.9], [1.0, 1.0, 1.0]]), torch.tensor([[3, 5, 4], [1, 2, 3]]))
        >>> metric.compute(), metric.undefined
        (tensor(0.5000, dtype=torch.float64), 1)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = -1.0, 1.0

    def update(self, pred: Tensor, ref: Tensor) -> None:
        """Add a batch, `[B, M]` each."""
        self._add(rank_correlation_rows(pred, ref))


class SegmentationDifference(_Mean):
    """`xaifast.metrics.segmentation_difference` over a data set: the mean over inputs that are not ignored as a whole.

    Example:
        >>> metric = SegmentationDifference(ignore_value=255)
        >>> metric.update(torch.tensor([[0.75, 0.25, 0.9]]), torch.tensor([[1, 0, 255]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, ignore_value: float | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        self.ignore_value = ignore_value

    def update(self, importance: Tensor, seg: Tensor) -> None:
        """Add a batch, `[B, M]` each."""
        self._add(difference_rows(importance, seg, self.ignore_value))


class MacroIou(_Mean):
    """`xaifast.metrics.macro_iou` over a data set: the mean over inputs, or of all patches together where `pooled`.

    Example:
        >>> metric = MacroIou()
        >>> metric.update(torch.tensor([[0.9, 0.6, 0.2, 0.1]]), torch.tensor([[1, 0, 0, 0]]))
        >>> metric.compute()
        tensor(0.5833, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(
        self, threshold: float = 0.5, ignore_value: float | None = None, pooled: bool = False, **kwargs: Any
    ) -> None:
        check_threshold(threshold)
        super().__init__(threshold, ignore_value, pooled, n_pooled=4, **kwargs)
        self.threshold, self.ignore_value, self.pooled = threshold, ignore_value, pooled

    def update(self, importance: Tensor, seg: Tensor) -> None:
        """Add a batch, `[B, M]` each."""
        counts = overlap_counts(importance, seg, self.threshold, self.ignore_value)
        self._add(mean_overlap(counts), *counts.sum(0).flatten())

    def compute(self) -> Tensor:
        """The overlap over all inputs, a float64 scalar; NaN where there are none."""
        return mean_overlap(self._sums[3:].unflatten(0, (2, 2))) if self.pooled else super().compute()


class Sparsity(_Mean):
    """`xaifast.metrics.sparsity` over a data set: the mean over inputs.

    Example:
        >>> metric = Sparsity()
        >>> metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def update(self, importance: Tensor) -> None:
        """Add a batch, `[B, M]`."""
        self._add(importance_rows(importance))


class Reproducibility(_Mean):
    """`xaifast.metrics.reproducibility` over a data set: the mean over inputs.

    An update takes all runs of its inputs; runs are not spread over updates.

    Example:
        >>> metric = Reproducibility()
        >>> metric.update(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, importance_runs: Tensor) -> None:
        """Add a batch, `[R, B, M]`."""
        self._add(spread_rows(importance_runs))


class CleanScore(_Mean):
    """`xaifast.metrics.clean_score` over a data set: the mean over inputs with a score; `undefined` counts the others.

    Example:
        >>> metric = CleanScore()
        >>> metric.update(torch.tensor([[3.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([True, False, False]))
        >>> metric.compute(), metric.undefined
        (tensor(0.7500, dtype=torch.float64), 1)
    """

    is_differentiable = True
    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, kind: str = "energy", **kwargs: Any) -> None:
        check_kind(kind)
        super().__init__(kind, **kwargs)
        self.kind = kind

    def update(self, attributions: Tensor, signal_mask: Tensor) -> None:
        """Add a batch, `[B, ...]` and its mask."""
        self._add(clean_score_rows(attributions, signal_mask, self.kind))
