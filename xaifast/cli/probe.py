"""What a model is found to do on a few inputs, and what else decides about results."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from torch import Tensor

from .. import __version__
from ..model_state import find_modules
from ..models.loading import LoadedModel
from ..stream import is_out_of_memory

_CALLER = "xaifast"


def n_outputs_of(model: LoadedModel, example: Tensor) -> int | None:
    """K of a model that returns ``[b, K]``, None of others; says what the model was given if it fails."""
    try:
        with torch.inference_mode():
            output = model.forward(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{_CALLER}: {model.spec} fails on inputs of shape {list(example.shape)} and {example.dtype} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check that model and data belong together, and "
            "--image-size, --mean, --std or --columns"
        ) from error
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() not in (1, 2):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{_CALLER}: {model.spec} must return [b] or [b, K] for b inputs, got {shape} for {len(example)}; wrap it "
            "in a function that picks its output (py:)"
        )
    return output.shape[1] if output.dim() == 2 else None


def row_flop(model: LoadedModel, example: Tensor) -> float:
    """Floating-point operations of one row in linear layers and convolutions, roughly; the same on every machine.

    (torch's FlopCounterMode imports the compiler, two seconds.)
    """
    total = 100 * example[0].numel()

    def count(module: torch.nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        weight = getattr(module, "weight", None)
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.dim() > 1:
            total += 2 * output.numel() * weight[0].numel()

    modules = {module for root in find_modules(model.forward) for module in root.modules()}
    handles = [module.register_forward_hook(count) for module in modules]
    try:
        with torch.inference_mode():
            model.forward(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return float(total)


def versions(model: str, data: str, *, segments: bool = False) -> dict[str, str]:
    """Versions that may change results of a model on data, each by its name; ``segments``: of superpixels."""
    used = ["torch", "numpy"]
    used += ["transformers"] if "hf:" in model + data else []
    used += ["pillow"] if data.startswith(("imagefolder:", "hf:")) else []
    used += ["scikit-image"] if segments else []
    return {
        "xaifast": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in used},
    }
