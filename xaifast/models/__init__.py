"""Networks of the package's own, and loading of any model by name."""

from .cnn import MLP, ConvNet
from .loading import LoadedModel, load_model
from .saved import save_model
from .vit import VisionTransformer

__all__ = ["MLP", "ConvNet", "LoadedModel", "VisionTransformer", "load_model", "save_model"]
