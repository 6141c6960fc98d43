"""What settings choose: features, what replaces them, and the output explained."""

from __future__ import annotations

import difflib

import numpy as np
import torch
from torch import Tensor

from ..data import DataSource, open_data
from ..models.loading import LoadedModel
from ..players import grid_mask
from ..removal import Background
from .inputs import InputLoader
from .options import JobSettings

_CALLER = "xaifast"
_GRID = 7  # patches a side where nobody says
_MEAN_OF = 256  # inputs behind --baseline mean
_BACKGROUND_ROWS = 100


def choose_features(
    settings: JobSettings, model: LoadedModel, data: DataSource, example: Tensor
) -> tuple[Tensor | None, str]:
    """Feature mask shared by all inputs, None for superpixels, and its description."""
    spatial = example.dim() == 4
    if (settings.patch or settings.segments) and not spatial:
        raise ValueError(
            f"{_CALLER}: --patch and --segments are for images, got inputs of shape {list(example.shape[1:])}; leave "
            "them out"
        )
    if settings.segments:
        return None, f"at most {settings.n_segments} SLIC superpixels an image"
    if spatial:
        height, width = example.shape[-2:]
        step = model.patch_size or 1
        patch = settings.patch or step * max(1, round(min(height, width) / _GRID / step))
        mask = grid_mask((height, width), patch)
        return mask, f"{int(mask.max()) + 1} patches of {patch} × {patch} pixels"
    mask = torch.arange(example[0].numel()).reshape(example.shape[1:])
    return mask, f"{mask.numel()} {'columns' if data.kind == 'table' else 'elements'}"


def choose_baselines(
    settings: JobSettings, loader: InputLoader, example: Tensor, device: str
) -> tuple[object, str, dict[str, Tensor]]:
    """What absent features show: for `kernel_shap`, in words, and as tensors of the store."""
    flat = example.dim() == 2
    if settings.removal in ("blur", "token-drop") and (settings.baseline or settings.background):
        raise ValueError(
            f"{_CALLER}: --removal {settings.removal} knows no baseline; leave out --baseline and --background"
        )
    if settings.background and not flat:
        raise ValueError(f"{_CALLER}: --background is for tables; use --baseline for images")
    if settings.background and settings.baseline:
        raise ValueError(f"{_CALLER}: --background and --baseline exclude each other; leave one out")
    if settings.removal == "blur":
        return 0.0, "a Gaussian blur of the image", {}
    if settings.removal == "token-drop":
        return 0.0, "nothing", {}
    if settings.baseline == "mean":
        mean = loader.first(_MEAN_OF).double().mean(0).to(example.dtype)
        return mean.to(device), f"the mean of the first {_MEAN_OF} inputs", {"baseline": mean}
    if settings.baseline is not None:
        try:
            value = float(settings.baseline)
        except ValueError:
            raise ValueError(f'{_CALLER}: --baseline must be a number or "mean", got {settings.baseline!r}') from None
        return value, f"{value:g}", {}
    if not flat:
        return 0.0, "0 (in the model's input scale)", {}
    rows, described = _background_rows(settings, loader)
    rows = rows.to(example.dtype)
    return Background(rows.to(device)), described, {"background": rows}


def _background_rows(settings: JobSettings, loader: InputLoader) -> tuple[Tensor, str]:
    given = settings.background or str(_BACKGROUND_ROWS)
    if not given.isdigit():
        table = open_data(given, columns=loader.data.feature_names, label=None, drop=None)
        return torch.stack(table.load(range(len(table))).items), f"{len(table)} background rows of {given}"
    if int(given) < 1:
        raise ValueError(f"{_CALLER}: --background must be at least 1, got {given}")
    n = min(int(given), len(loader.data))
    picked = np.sort(np.random.default_rng(settings.seed).choice(len(loader.data), n, replace=False))
    return torch.stack(loader.data.load(picked.tolist()).items), f"{n} background rows of the data"


def choose_target(
    given: str, model: LoadedModel, data: DataSource, n_items: int, n_outputs: int | None
) -> tuple[int | str | Tensor | None, str]:
    """Target for `ShapleyChunks` and its description; class numbers are checked by the evaluator."""
    if n_outputs is None:
        if given not in ("predicted", "all"):
            raise ValueError(
                f"{_CALLER}: --target chooses among a model's outputs, but {model.spec} returns one number an input; "
                "leave it out"
            )
        return None, "the output"
    if given == "all":
        return None, "all classes"
    if given == "predicted":
        return given, "the predicted class"
    if given == "label":
        return _outputs_of_labels(model, data, n_items, n_outputs), "the labelled class"
    names = model.class_names or data.class_names or []
    if given in names:
        return names.index(given), f"class {given}"
    if given.lstrip("-").isdigit():
        number = int(given)
        return number, f"class {number}" + (f" ({names[number]})" if 0 <= number < len(names) else "")
    near = difflib.get_close_matches(given, names, n=3) or names[:5]
    known = f"; nearest known: {', '.join(near)}" if near else ", and neither model nor data names its classes"
    raise ValueError(
        f'{_CALLER}: --target must be "predicted", "label", "all", a class number or a class name, got {given!r}{known}'
    )


def _outputs_of_labels(model: LoadedModel, data: DataSource, n_items: int, n_outputs: int) -> Tensor:
    """The model's output of each input's label, ``[N]``: by name where both name their classes and some names are
    common, else by number.
    """
    outputs = torch.full((n_items,), -1) if data.labels is None else data.labels[:n_items]
    ours, theirs = model.class_names, data.class_names
    if ours and theirs and ours != theirs and set(ours) & set(theirs):
        by_label = torch.tensor([ours.index(name) if name in ours else -1 for name in theirs])
        outputs = torch.where(outputs < 0, outputs, by_label[outputs])
    lost = ((outputs < 0) | (outputs >= n_outputs)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{_CALLER}: --target label needs a label among the model's {n_outputs} classes for every input, but "
            f"{len(lost)} of {n_items} have none, the first is {data.load(lost[:1]).names[0]}; use --target predicted"
        )
    return outputs
