"""Attribution methods."""

from .ablation import feature_ablation
from .kernel_shap import kernel_shap
from .occlude import occlude_update
from .occlusion import occlusion
from .rise import rise
from .shapley_result import ShapleyResult
from .xtrain import xtrain
from .xtrain_result import XtrainResult

__all__ = [
    "ShapleyResult",
    "XtrainResult",
    "feature_ablation",
    "kernel_shap",
    "occlude_update",
    "occlusion",
    "rise",
    "xtrain",
]
