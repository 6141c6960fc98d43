"""Networks of the package's own."""

from .vit import VisionTransformer

__all__ = ["VisionTransformer"]
