"""Metrics of attributions: functions over batches, and `torchmetrics` classes of the same names in CamelCase.

The classes (`ERmse`, `IouAtK`, ...) are imported on first use and need the extra `metrics`; the functions need nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .agreement import e_rmse, iou_at_k, rank_correlation
from .attribution_shift import attribution_shift
from .clean_score import clean_score
from .curve_result import Curves, MeanCurves
from .curves import insertion_deletion
from .infidelity import infidelity
from .max_sensitivity import max_sensitivity
from .patches import to_patches
from .road import Road, road
from .segmentation import macro_iou, segmentation_difference
from .sensitivity_n import SensitivityN, sensitivity_n
from .srg import srg
from .stability import reproducibility, sparsity
from .thresholds import ThresholdCurves, threshold_curves

if TYPE_CHECKING:
    from ._classes import CleanScore as CleanScore
    from ._classes import ERmse as ERmse
    from ._classes import IouAtK as IouAtK
    from ._classes import MacroIou as MacroIou
    from ._classes import RankCorrelation as RankCorrelation
    from ._classes import Reproducibility as Reproducibility
    from ._classes import SegmentationDifference as SegmentationDifference
    from ._classes import Sparsity as Sparsity

__all__ = [
    "Curves",
    "MeanCurves",
    "Road",
    "SensitivityN",
    "ThresholdCurves",
    "attribution_shift",
    "clean_score",
    "e_rmse",
    "infidelity",
    "insertion_deletion",
    "iou_at_k",
    "macro_iou",
    "max_sensitivity",
    "rank_correlation",
    "reproducibility",
    "road",
    "segmentation_difference",
    "sensitivity_n",
    "sparsity",
    "srg",
    "threshold_curves",
    "to_patches",
]

# Class: the module that holds it.
_CLASSES = {
    "CleanScore": "_classes",
    "ERmse": "_classes",
    "IouAtK": "_classes",
    "MacroIou": "_classes",
    "RankCorrelation": "_classes",
    "Reproducibility": "_classes",
    "SegmentationDifference": "_classes",
    "Sparsity": "_classes",
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("torchmetrics")
    except ImportError as error:
        raise ImportError(f"xaifast.metrics.{name} needs torchmetrics; pip install 'xaifast[metrics]'") from error
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES})
