"""Attribution methods."""

from .kernel_shap import ShapleyResult, kernel_shap

__all__ = ["ShapleyResult", "kernel_shap"]
