"""Attribution methods."""

from .ablation import feature_ablation
from .kernel_shap import kernel_shap
from .occlusion import occlusion
from .rise import rise
from .shapley_result import ShapleyResult

__all__ = ["ShapleyResult", "feature_ablation", "kernel_shap", "occlusion", "rise"]
