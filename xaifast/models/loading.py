"""Loading a model by name: which form, which device, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

FORMS = {
    "hf:DIR_OR_ID": "an image classifier of Hugging Face transformers",
    "py:MODULE:CALLABLE": "your own Python code, which is run",
    "xaifast:DIR": "a model written by xaifast.models.save_model",
}


@dataclass
class LoadedModel:
    """A model and what is known about it.

    Attributes:
        forward: ``nn.Module`` in eval mode, or a callable, ``[b, ...] -> [b, K]`` (or an object with ``.logits``).
        spec: As given by the user.
        fingerprint: sha256 (hex) of its weights and what else decides its answers.
        class_names: Of its outputs.
        preprocess: A list of PIL images or uint8 arrays ``[H, W(, 3)]`` to float32 ``[b, C, H, W]``; None: the model
            brings none.
        preprocessing: JSON description of it, part of a run's identity.
        input_size: H, W it takes.
        patch_size: Side of a vision transformer's patches.
        feature_names: Of a table it takes, in order.
        preprocess_masks: What ``preprocess`` does to the place of pixels, for a list of uint8 masks ``[H, W]`` whose
            values stay as they are: uint8 ``[b, H, W]``; None: unknown.
    """

    forward: Callable = field(repr=False)
    spec: str
    fingerprint: str
    class_names: list[str] | None = None
    preprocess: Callable[[list[object]], Tensor] | None = None
    preprocessing: dict = field(default_factory=dict)
    input_size: tuple[int, int] | None = None
    patch_size: int | None = None
    feature_names: list[str] | None = None
    preprocess_masks: Callable[[list[object]], Tensor] | None = None


def load_model(spec: str, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a model by name.

    Only ``py:`` runs code that is not the package's or transformers' own; weights are read as safetensors or with
    ``weights_only=True``.

    Args:
        spec: ``hf:DIR_OR_ID``, ``py:MODULE:CALLABLE`` or ``xaifast:DIR``; docs/data-and-models.md says what each
            expects.
        device: Where the model goes.

    Raises:
        ValueError: an unknown form, a model of another kind, a processor that does not fit, unreadable files, or no
            such device.
        TypeError: ``py:`` names something that is no model.
        FileNotFoundError: no such directory.
        ImportError: a package is missing; names the extra.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> xaifast.models.save_model(xaifast.models.ConvNet(), directory, class_names=list("0123456789"))
        >>> loaded = load_model(f"xaifast:{directory}")
        >>> loaded.input_size, loaded.class_names[3], loaded.forward.training
        ((8, 8), '3', False)
    """
    if not isinstance(spec, str):
        raise TypeError(f"xaifast.load_model: spec must be text like 'hf:DIR', got {type(spec).__name__}")
    form, _, where = spec.partition(":")
    if form not in {known.partition(":")[0] for known in FORMS} or not where:
        forms = "".join(f"\n  {known:20}{what}" for known, what in FORMS.items())
        raise ValueError(f"xaifast.load_model: a model is one of{forms}\ngot {spec!r}{_hint(spec)}")
    device = _device(device)
    if form == "hf":
        from .huggingface import load_huggingface

        return load_huggingface(spec, where, device)
    if form == "py":
        from .user import load_user

        return load_user(spec, where, device)
    from .saved import load_saved

    return load_saved(spec, where, device)


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(
            f"xaifast.load_model: device must be one that torch can use here, got {str(device)!r} ({error}); "
            "use 'cpu', or install the torch build and driver of this device"
        ) from error
    return device


def _hint(spec: str) -> str:
    """What a name without its form probably meant."""
    path = Path(spec).expanduser()
    if path.is_dir():
        own = (path / "model.safetensors").is_file() and not (path / "preprocessor_config.json").is_file()
        return f"; did you mean {'xaifast' if own else 'hf'}:{spec}?"
    module, _, name = spec.partition(":")
    if name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return f"; did you mean py:{spec}?"
    return f"; did you mean hf:{spec}?" if ":" not in spec and spec.count("/") == 1 else ""
