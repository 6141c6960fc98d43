"""Saving and loading of the package's own networks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ..data.fingerprint import hash_values
from .cnn import MLP, ConvNet
from .loading import LoadedModel
from .vit import VisionTransformer

_CLASSES = {cls.__name__: cls for cls in (ConvNet, MLP, VisionTransformer)}  # all that a file can name


def save_model(model: nn.Module, directory: str | Path, class_names: Sequence[str] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, each completely or not at all.

    The configuration names the weights by their hash, so weights of one saving are never taken for another's.

    Args:
        model: `ConvNet`, `MLP` or `VisionTransformer`, on any device.
        directory: Made if missing.
        class_names: One name an output.

    Raises:
        TypeError: another class.
        ValueError: not one name an output.
    """
    kind = type(model).__name__
    if _CLASSES.get(kind) is not type(model):
        raise TypeError(
            f"xaifast.save_model: model must be one of {sorted(_CLASSES)}, got {kind}; load other models with "
            "py:MODULE:CALLABLE"
        )
    n_classes = model.config["n_classes"]
    if class_names is not None and len(class_names) != n_classes:
        raise ValueError(
            f"xaifast.save_model: class_names must hold a name for each of {n_classes} outputs, got {len(class_names)}"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    config = {
        "format": 1,
        "model": kind,
        "arguments": model.config,
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "weights": hash_values(state),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "model.safetensors", save(state))
    _write(directory / "config.json", json.dumps(config, indent=2).encode())


def load_saved(spec: str, where: str, device: torch.device) -> LoadedModel:
    """Build the network that ``config.json`` names and fill it with its weights.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: not written by `save_model`, an unknown network, or weights that are corrupt or another's.
    """
    directory = Path(where).expanduser()
    config = _read_config(directory)
    cls, class_names = _CLASSES.get(str(config.get("model"))), config.get("class_names")
    if config.get("format") != 1 or cls is None:
        raise ValueError(
            f"xaifast.load_model: config.json of {directory} must be of format 1 with a model of {sorted(_CLASSES)}, "
            f"got format {config.get('format')!r} and model {config.get('model')!r}; use hf:{where} for models of "
            "transformers, or a newer xaifast"
        )
    try:
        with torch.device("meta"):  # draws no random numbers, and takes no memory that the file does not fill
            model = cls(**config["arguments"])
        state = load((directory / "model.safetensors").read_bytes())
        weights = hash_values(state)
        if weights != config["weights"]:
            raise ValueError("the weights are not those that were saved with config.json")
        model.load_state_dict(state, assign=True)
        if class_names is not None and len(class_names) != model.config["n_classes"]:
            raise ValueError(f"class_names must be one an output, got {class_names}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"xaifast.load_model: {directory} must hold its weights, model.safetensors, got none; save the model again"
        ) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"xaifast.load_model: {directory} is corrupt, save the model again: {error!r}") from error
    return LoadedModel(
        forward=model.float().eval().to(device),
        spec=spec,
        fingerprint=hash_values({"weights": weights, "model": config["model"], "arguments": config["arguments"]}),
        class_names=class_names,
        input_size=getattr(model, "input_size", None),
        patch_size=getattr(model, "patch_size", None),
    )


def _read_config(directory: Path) -> dict:
    if not directory.is_dir():
        raise FileNotFoundError(f"xaifast.load_model: no such directory: {directory}")
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"xaifast.load_model: {directory} must hold a config.json written by xaifast.models.save_model, got none"
        ) from None
    except ValueError as error:
        raise ValueError(f"xaifast.load_model: config.json of {directory} is corrupt: {error}") from error
    return config if isinstance(config, dict) else {}


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
