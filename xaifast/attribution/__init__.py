"""Attribution methods."""

from .kernel_shap import kernel_shap
from .shapley_result import ShapleyResult

__all__ = ["ShapleyResult", "kernel_shap"]
