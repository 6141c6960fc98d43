"""Image classifiers of Hugging Face transformers, with their own preprocessing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.base import require
from ..data.fingerprint import hash_values
from .loading import LoadedModel

if TYPE_CHECKING:
    import transformers

_CALLER = "xaifast.load_model"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_VOLATILE = ("transformers_version", "dtype", "torch_dtype")  # change with the library, not with the model


class Preprocessing:
    """A model's image processor, as a function of PIL images or uint8 arrays.

    Attributes:
        description: What it does, as JSON.
        size: H, W of what it returns.
    """

    def __init__(self, processor: transformers.BaseImageProcessor, n_channels: int) -> None:
        self._processor, self._mode = processor, _MODES[n_channels]
        description = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
        if not description.get("do_normalize", True):
            description.update(image_mean=None, image_std=None)
        self.description = json.loads(json.dumps({**description, "mode": self._mode}, default=str))
        sizes = {self(_blank(height, width)).shape[2:] for height, width in ((48, 64), (64, 48))}
        if len(sizes) > 1:
            raise ValueError(
                f"it keeps shapes, 48 x 64 and 64 x 48 become {[tuple(size) for size in sizes]}; set size to a height "
                "and width, or do_center_crop"
            )
        self.size = tuple(sizes.pop())

    def __call__(self, items: list[object]) -> Tensor:
        """Items to float32 ``[b, C, H, W]``; grey and coloured ones are converted to what the model takes."""
        from PIL import Image

        images = (item if isinstance(item, Image.Image) else Image.fromarray(item) for item in items)
        arrays = [np.atleast_3d(np.asarray(image.convert(self._mode))) for image in images]
        made = self._processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
        return made["pixel_values"].float()

    def masks(self, items: list[np.ndarray]) -> Tensor:
        """Masks uint8 ``[H, W]`` resized and cropped as images are, each pixel taking the nearest value: uint8
        ``[b, H, W]``.
        """
        arrays = [np.repeat(mask[..., None], len(self._mode), 2) for mask in items]
        unmixed = {"resample": 0, "do_rescale": False, "do_normalize": False}
        made = self._processor(images=arrays, return_tensors="pt", input_data_format="channels_last", **unmixed)
        return made["pixel_values"][:, 0].to(torch.uint8)


def load_huggingface(spec: str, where: str, device: torch.device) -> LoadedModel:
    """Load an image classifier and its image processor from a directory or the Hub.

    Weights become float32. No code that comes with the model is run.

    Raises:
        FileNotFoundError: a path that does not exist; the Hub is not asked.
        ValueError: no image classifier, weights that are missing or unreadable, or an image processor that is missing
            or does not fit the model.
        ImportError: transformers or Pillow is missing.
    """
    require("transformers", "hf", _CALLER)
    require("PIL", "data", _CALLER)
    path = Path(where).expanduser()
    if not path.is_dir() and (where.startswith((".", "/", "~")) or where.count("/") > 1):
        raise FileNotFoundError(f"{_CALLER}: no such directory: {where}")
    name = str(path) if path.is_dir() else where
    with _quiet(keep_bars=not path.is_dir()):
        config, stored = _read_config(name)
        model = _read_weights(name, config)
        vision = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
        preprocess = _read_processor(name, getattr(vision, "num_channels", 3))
    _check_size(name, model, preprocess, getattr(vision, "image_size", None))
    class_names = [config.id2label.get(i, str(i)) for i in range(config.num_labels)]
    generic = class_names == [f"LABEL_{i}" for i in range(config.num_labels)]
    return LoadedModel(
        forward=model.to(device),
        spec=spec,
        fingerprint=hash_values({**model.state_dict(), "config": stored}),
        class_names=None if generic else class_names,
        preprocess=preprocess,
        preprocess_masks=preprocess.masks,
        preprocessing=preprocess.description,
        input_size=preprocess.size,
        patch_size=_patch_size(vision),
    )


def _read_config(name: str) -> tuple[transformers.PretrainedConfig, dict]:
    """The configuration of an image classifier, and as stored, without what only says who wrote it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        stored, _ = transformers.PretrainedConfig.get_config_dict(name)
    except Exception as error:  # whatever the library makes of the files
        raise ValueError(
            f"{_CALLER}: {name} must be a model of transformers, with a config.json and without code of its own, on "
            f"disk or on the Hub, got: {error}"
        ) from error
    known = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in known:
        given = (getattr(config, "architectures", None) or [config.model_type])[0]
        raise ValueError(
            f"{_CALLER}: {name} must be an image classifier (ViTForImageClassification, ResNetForImageClassification "
            f"and others of transformers' AutoModelForImageClassification, {len(known)} kinds), got {given}; wrap "
            "other models with py:MODULE:CALLABLE"
        )
    return config, _without_volatile(stored)


def _without_volatile(config: dict) -> dict:
    return {
        name: _without_volatile(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _VOLATILE and not name.startswith("_")
    }


def _read_weights(name: str, config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The model in float32 and eval mode, all of whose weights come from the files."""
    import transformers

    try:
        model, report = transformers.AutoModelForImageClassification.from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True
        )
    except ImportError:
        raise
    except Exception as error:  # whatever the library makes of the files
        raise ValueError(f"{_CALLER}: the weights of {name} cannot be read: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{_CALLER}: the weights of {name} must be those of a {type(model).__name__}, but {len(missing)} are "
            f"missing ({', '.join(missing[:4])}) and would be random: the files hold {config.architectures}; fine-tune "
            "it, or choose a checkpoint that was"
        )
    return model.float().eval()


def _read_processor(name: str, n_channels: int) -> Preprocessing:
    """The model's image processor; that of Pillow, so that results do not depend on whether torchvision is there."""
    import transformers

    if n_channels not in _MODES:
        raise ValueError(
            f"{_CALLER}: images must have {' or '.join(map(str, _MODES))} channels, but {name} takes {n_channels}; "
            "wrap the model with py:MODULE:CALLABLE and give it arrays"
        )
    major = int(transformers.__version__.partition(".")[0])
    choice = {"backend": "pil"} if major >= 5 else {"use_fast": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **choice)
        stored, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        if not stored.keys() & {"image_processor_type", "do_resize", "size", "image_mean"}:
            # The library makes up a processor with default values.
            kind = stored.get("tokenizer_class") or stored.get("feature_extractor_type") or "something else"
            raise ValueError(f"its preprocessor_config.json is that of a {kind}")
    except ImportError:
        raise
    except Exception as error:  # whatever the library makes of the files
        tokenizer = (Path(name) / "tokenizer_config.json").is_file()
        raise ValueError(
            f"{_CALLER}: {name} must hold its image processor (preprocessor_config.json), got "
            f"{'that of a text tokenizer' if tokenizer else 'none that can be read'} ({error}); write the one the "
            "model was trained with there: AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(DIR)"
        ) from error
    try:
        preprocess = Preprocessing(processor, n_channels)
        n_made = preprocess(_blank(*preprocess.size)).shape[1]
        if n_made != n_channels:
            raise ValueError(f"it makes {n_made} channels")
    except Exception as error:  # whatever the library makes of a wrong configuration
        raise ValueError(
            f"{_CALLER}: the image processor of {name} must turn images of any shape into {n_channels} channels "
            f"(num_channels of its config) of one size, but {type(processor).__name__} does not: {error!r}; use the "
            "one the model was trained with"
        ) from error
    return preprocess


def _check_size(name: str, model: torch.nn.Module, preprocess: Preprocessing, expected: int | list | None) -> None:
    """Compare sizes of processor and configuration; where they differ, the model says whether it takes any size."""
    expected = tuple(expected) if isinstance(expected, list | tuple) else (expected, expected)
    if expected in (preprocess.size, (None, None)):
        return
    text = f"{preprocess.size[0]} x {preprocess.size[1]} (image processor) and {expected[0]} x {expected[1]} (config)"
    try:
        with torch.inference_mode():
            model(preprocess(_blank(*expected)))
    except Exception as error:  # models refuse in their own ways
        raise ValueError(
            f"{_CALLER}: image processor and config of {name} must agree on the size of images, got {text}; use the "
            f"processor the model was trained with, or correct size or crop_size in preprocessor_config.json ({error})"
        ) from error
    warnings.warn(f"{_CALLER}: image sizes of {name} differ, {text}; the model takes the first", stacklevel=4)


def _patch_size(config: transformers.PretrainedConfig) -> int | None:
    """Of plain vision transformers: other networks call other things so."""
    patch = getattr(config, "patch_size", None)
    plain = isinstance(getattr(config, "num_attention_heads", None), int) and isinstance(
        getattr(config, "hidden_size", None), int
    )
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        patch = patch[0]
    return patch if plain and isinstance(patch, int) else None


def _blank(height: int, width: int) -> list[np.ndarray]:
    return [np.zeros((height, width, 3), np.uint8)]


@contextmanager
def _quiet(*, keep_bars: bool) -> Iterator[None]:
    """Without the library's advice, and without its progress bars where nothing is downloaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not keep_bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
