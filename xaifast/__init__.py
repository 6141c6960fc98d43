"""xaifast: perturbation-based explanation at the speed of the model's forward pass."""

from __future__ import annotations

import torch  # noqa: F401  (first: the native kernels share its OpenMP runtime)

from . import metrics, models, ops, removal
from .attribution import (
    ShapleyResult,
    XtrainResult,
    feature_ablation,
    kernel_shap,
    occlude_update,
    occlusion,
    rise,
    xtrain,
)
from .metrics import Curves, insertion_deletion
from .ops import quantile_masks
from .players import grid_mask
from .removal import Background
from .run import open_run
from .trajectory import Trajectory

__version__ = "0.1.0"

__all__ = [
    "Background",
    "Curves",
    "ShapleyResult",
    "Trajectory",
    "XtrainResult",
    "__version__",
    "feature_ablation",
    "grid_mask",
    "insertion_deletion",
    "kernel_shap",
    "metrics",
    "models",
    "occlude_update",
    "occlusion",
    "open_run",
    "ops",
    "quantile_masks",
    "removal",
    "rise",
    "xtrain",
]
