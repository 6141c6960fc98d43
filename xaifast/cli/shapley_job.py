"""A Kernel SHAP run over a data set, put together from a command's arguments and checked on a few inputs."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import platform
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..attribution.dataset import ShapleyChunks, chunk_size
from ..attribution.kernel_shap import check_budget
from ..data import DataSource, open_data
from ..evaluate import Evaluator
from ..model_state import find_modules
from ..models.loading import LoadedModel
from ..players import grid_mask, resolve_players
from ..removal import Background, TokenDrop, TokenSelect, resolve_removal
from .inputs import InputLoader, superpixels

REMOVALS = {"baseline": None, "blur": "blur", "token-drop": TokenDrop(), "token-select": TokenSelect()}
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_CALLER = "xaifast explain"
_GRID = 7  # patches a side where nobody says
_MEAN_OF = 256  # inputs behind --baseline mean
_BACKGROUND_ROWS = 100
_PROBE = 8  # inputs the model is tried on


@dataclass
class ShapleyJob:
    """What a run needs.

    Attributes:
        loader: Inputs by index.
        compute: Batches to chunks.
        manifest, static: Of the store.
        example: A few inputs, on the model's device.
        n_samples: Evaluations an input.
        n_background: Model rows an evaluation.
        lines: What is to be done, for people.
    """

    loader: InputLoader
    compute: ShapleyChunks
    manifest: dict
    static: dict[str, Tensor]
    example: Tensor
    n_samples: int
    n_background: int
    lines: list[str]

    def forward_rate(self, rows: int) -> float:
        """Rows a second of the bare model in calls of ``rows``, or of fewer where such a call takes long."""
        n = min(rows, _PROBE)
        while True:
            batch = self.example.repeat(-(-n // len(self.example)), *(1,) * (self.example.dim() - 1))[:n].contiguous()
            seconds = []
            with torch.inference_mode():
                for _ in range(3):  # the first call allocates
                    start = time.perf_counter()
                    self.compute.forward(batch)
                    if batch.is_cuda:
                        torch.cuda.synchronize(batch.device)
                    seconds.append(time.perf_counter() - start)
            if n == rows or min(seconds) > 0.1:
                return n / min(seconds)
            n = min(rows, 4 * n)

    def result_bytes(self, n_inputs: int) -> int:
        """Roughly what results take on disk."""
        per_player = 8 * self.manifest["n_players"] * (self.compute.n_outputs or 1)
        segments = 2 * self.example[0, 0].numel() if self.compute.feature_mask is None else 0
        return n_inputs * (per_player + segments + 100) + 4000


def prepare(args: argparse.Namespace, model: LoadedModel, device: str) -> ShapleyJob:
    """Open the data, settle features, baseline, target and chunks, and run the model on a few inputs.

    Raises:
        ValueError, TypeError: what does not fit together; nothing is written yet.
    """
    table = args.data.startswith(("csv:", "parquet:"))
    columns = args.columns or (model.feature_names if table else None)
    data = open_data(args.data, columns=columns, label=args.label, drop=args.drop)
    loader = InputLoader(
        data,
        model,
        image_size=(args.image_size[0], args.image_size[-1]) if args.image_size else None,
        mean=args.mean,
        std=args.std,
        segments=args.n_segments if args.segments else None,
        skip=args.on_error == "skip",
    )
    example = loader.first(_PROBE)
    feature_mask, features = _features(args, model, data, example)
    baselines, replaced = _baselines(args, loader, example)
    one_output = _try_model(model, example.to(device)) == 1
    target, explained = (None, "the output") if one_output else _target(args.target, model, data)
    evaluator = Evaluator(
        model.forward,
        (example.to(device),),
        players=resolve_players(
            superpixels(example[0], args.n_segments) if feature_mask is None else feature_mask, (example,), _CALLER
        ),
        baselines=baselines,
        target="predicted" if target == "label" else target,
        removal=resolve_removal(REMOVALS[args.removal], _CALLER),
        batch_size=args.batch_size or "auto",
        autocast=AUTOCAST[args.autocast],
        caller=_CALLER,
    )
    n_players = args.n_segments if feature_mask is None else int(feature_mask.max()) + 1
    check_budget(n_players, args.n_samples, args.estimator)
    n_samples = min(args.n_samples - args.n_samples % 2, 2 ** min(n_players, 62))
    n_outputs = evaluator.full.shape[1] if evaluator.has_output_axis else None
    compute = ShapleyChunks(
        forward=model.forward,
        seed=args.seed,
        target=target,
        n_outputs=n_outputs,
        feature_mask=feature_mask,
        options={
            "n_samples": args.n_samples,
            "estimator": args.estimator,
            "link": args.link,
            "removal": REMOVALS[args.removal],
            "baselines": baselines,
            "autocast": AUTOCAST[args.autocast],
        },
        outputs=_outputs_by_label(model, data),
        device=device,
    )
    n_items = min(len(data), args.limit or len(data))
    size = chunk_size(
        n_samples, n_samples * evaluator.n_background, _row_flop(model, example.to(device)), n_outputs or 1
    )
    manifest = {
        "kind": "attributions",
        "method": args.method,
        "n_items": n_items,
        "n_players": n_players,
        "seed": args.seed,
        "chunk_size": args.chunk_size or size,
        "rows": evaluator.batch_size,
        "model": {"spec": model.spec, "sha256": model.fingerprint, "class_names": model.class_names},
        "data": {
            "spec": data.spec,
            "sha256": data.fingerprint(),
            "kind": data.kind,
            "class_names": data.class_names,
            "feature_names": data.feature_names,
        },
        "settings": {
            "target": args.target,
            "n_samples": args.n_samples,
            "estimator": args.estimator,
            "link": args.link,
            "features": features,
            "removal": args.removal,
            "baseline": replaced,
            "preprocessing": loader.preprocessing,
            "autocast": args.autocast,
            "on_error": args.on_error,
        },
        "versions": _versions(args),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    static = {"feature_mask": feature_mask} if feature_mask is not None else {}
    if isinstance(baselines, Background):
        static["background"] = baselines.rows
    elif isinstance(baselines, Tensor):
        static["baseline"] = baselines
    shown = "are dropped from the sequence" if args.removal == "token-drop" else f"show {replaced}"
    lines = [
        f"model:    {model.spec}, sha256 {model.fingerprint[:12]}",
        f"data:     {data.spec}, {n_items:,} inputs of {' × '.join(map(str, example.shape[1:]))}",
        f"explains: {explained} by {args.method} ({args.estimator})",
        f"features: {features}; absent ones {shown}",
    ]
    return ShapleyJob(loader, compute, manifest, static, example.to(device), n_samples, evaluator.n_background, lines)


def _features(
    args: argparse.Namespace, model: LoadedModel, data: DataSource, example: Tensor
) -> tuple[Tensor | None, str]:
    """Feature mask shared by all inputs, None for superpixels, and its description."""
    spatial = example.dim() == 4
    if (args.patch or args.segments) and not spatial:
        raise ValueError(
            f"{_CALLER}: --patch and --segments are for images, got inputs of shape {list(example.shape[1:])}; leave "
            "them out"
        )
    if args.segments:
        return None, f"at most {args.n_segments} SLIC superpixels an image"
    if spatial:
        height, width = example.shape[-2:]
        step = model.patch_size or 1
        patch = args.patch or step * max(1, round(min(height, width) / _GRID / step))
        mask = grid_mask((height, width), patch)
        return mask, f"{int(mask.max()) + 1} patches of {patch} × {patch} pixels"
    mask = torch.arange(example[0].numel()).reshape(example.shape[1:])
    return mask, f"{mask.numel()} {'columns' if data.kind == 'table' else 'elements'}"


def _baselines(args: argparse.Namespace, loader: InputLoader, example: Tensor) -> tuple[object, str]:
    """What absent features show, for `kernel_shap`, and its description."""
    flat = example.dim() == 2
    if args.removal in ("blur", "token-drop") and (args.baseline or args.background):
        raise ValueError(
            f"{_CALLER}: --removal {args.removal} knows no baseline; leave out --baseline and --background"
        )
    if args.background and not flat:
        raise ValueError(f"{_CALLER}: --background is for tables; use --baseline for images")
    if args.background and args.baseline:
        raise ValueError(f"{_CALLER}: --background and --baseline exclude each other; leave one out")
    if args.removal == "blur":
        return 0.0, "a Gaussian blur of the image"
    if args.removal == "token-drop":
        return 0.0, "nothing"
    if args.baseline == "mean":
        return loader.first(_MEAN_OF).double().mean(0).to(example.dtype), f"the mean of the first {_MEAN_OF} inputs"
    if args.baseline is not None:
        try:
            value = float(args.baseline)
        except ValueError:
            raise ValueError(f'{_CALLER}: --baseline must be a number or "mean", got {args.baseline!r}') from None
        return value, f"{value:g}"
    if not flat:
        return 0.0, "0 (in the model's input scale)"
    rows, described = _background_rows(args, loader)
    return Background(rows.to(example.dtype)), described


def _background_rows(args: argparse.Namespace, loader: InputLoader) -> tuple[Tensor, str]:
    given = args.background or str(_BACKGROUND_ROWS)
    if not given.isdigit():
        table = open_data(given, columns=loader.data.feature_names, label=None, drop=None)
        return torch.stack(table.load(range(len(table))).items), f"{len(table)} background rows of {given}"
    if int(given) < 1:
        raise ValueError(f"{_CALLER}: --background must be at least 1, got {given}")
    n = min(int(given), len(loader.data))
    picked = np.sort(np.random.default_rng(args.seed).choice(len(loader.data), n, replace=False))
    return torch.stack(loader.data.load(picked.tolist()).items), f"{n} background rows of the data"


def _target(given: str, model: LoadedModel, data: DataSource) -> tuple[int | str | None, str]:
    """Target for `ShapleyChunks` and its description; class numbers are checked by the evaluator."""
    if given == "all":
        return None, "all classes"
    if given in ("predicted", "label"):
        return given, "the predicted class" if given == "predicted" else "the labelled class"
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


def _outputs_by_label(model: LoadedModel, data: DataSource) -> Tensor | None:
    """The model's output of each label, by name, where both name their classes and some names are common."""
    ours, theirs = model.class_names, data.class_names
    if not ours or not theirs or ours == theirs or not set(ours) & set(theirs):
        return None
    return torch.tensor([ours.index(name) if name in ours else -1 for name in theirs])


def _try_model(model: LoadedModel, example: Tensor) -> int:
    """Dimensions of the model's output; says what the model was given if it fails."""
    try:
        with torch.inference_mode():
            output = model.forward(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{_CALLER}: {model.spec} fails on inputs of shape {list(example.shape)} and {example.dtype} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check that model and data belong together, and "
            "--image-size, --mean, --std or --columns"
        ) from error
    return getattr(output, "logits", output).dim()


def _row_flop(model: LoadedModel, example: Tensor) -> float:
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


def _versions(args: argparse.Namespace) -> dict[str, str]:
    """Versions that may change results."""
    used = ["torch", "numpy"]
    used += ["transformers"] if "hf:" in args.model + args.data else []
    used += ["pillow"] if args.data.startswith(("imagefolder:", "hf:")) else []
    used += ["scikit-image"] if args.segments else []
    return {
        "xaifast": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in used},
    }
