"""xaifast: perturbation-based explanation at the speed of the model's forward pass."""

from __future__ import annotations

import torch  # noqa: F401  (first: the native kernels share its OpenMP runtime)

from . import models, ops, removal
from .attribution import ShapleyResult, kernel_shap
from .players import grid_mask
from .removal import Background
from .run import open_run

__version__ = "0.1.0"

__all__ = [
    "Background",
    "ShapleyResult",
    "__version__",
    "grid_mask",
    "kernel_shap",
    "models",
    "open_run",
    "ops",
    "removal",
]
