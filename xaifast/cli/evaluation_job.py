"""An evaluation of stored runs over their data set, put together from options and checked on a few inputs."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attribution.dataset import chunk_size
from ..data.segmentations import FORMS, Segmentations
from ..evaluate import Evaluator
from ..evaluation.dataset import EvaluationChunks, Explained
from ..evaluation.methods import GRADIENT_COST, is_differentiable
from ..models.loading import LoadedModel
from ..players import grid_mask, resolve_players
from ..removal import resolve_removal
from ..run import Run
from .explained import ExplainedInputs, method_names, open_inputs, open_model, open_runs
from .inputs import InputLoader
from .job import PROBE, DatasetJob
from .options import AUTOCAST, REMOVALS
from .probe import n_outputs_of, row_flop, versions

_CALLER = "xaifast evaluate"
_STEPS = 50
_GRID = 14  # patches a side for segmentations where the run has none
_MEAN_OF = 256
_SHOWN = {
    "blur": "a Gaussian blur of the image",
    "mean": "the mean of the image's channel",
    "noise": "noise N(0, 1)",
    "black": "the smallest value of the input",
}


@dataclass
class EvaluationJob(DatasetJob):
    """An evaluation."""

    loader: ExplainedInputs
    compute: EvaluationChunks

    def result_bytes(self, n_inputs: int) -> int:
        """Roughly what results take on disk."""
        n_methods = len(self.manifest["settings"]["methods"])
        n_numbers = n_methods * (2 * (self.compute.steps + 1) + len(self.compute.scores))
        n_chunks = -(-n_inputs // self.manifest["chunk_size"])
        size = max(4, self.example.element_size())
        return n_inputs * (size * n_numbers + 8 * (self.compute.steps + 1) + 50) + 1500 * n_chunks + 4000


def prepare(args: argparse.Namespace, device: str) -> EvaluationJob:
    """Open runs, model and data, settle methods, features and curves, and run the model on a few inputs.

    Raises:
        StoreError, ValueError, TypeError: what does not fit together; nothing is written yet.
    """
    runs, n_items = open_runs(args.runs, args.limit)
    segmentations = Segmentations(args.segmentation, args.segmentation_format) if args.segmentation else None
    model = open_model(runs[0], args.model, device)
    skip = args.on_error == "skip"
    inputs = open_inputs(runs[0], model, args.data, segmentations, skip_masks=skip)
    masks = [run.static.get("feature_mask") for run in runs]
    shape = inputs.first(1).shape[1:]
    spatial = len(shape) == 3
    if not spatial and (args.level == "pixels" or segmentations is not None):
        raise ValueError(
            f"{_CALLER}: --level pixels and --segmentation are for images, got inputs of shape {list(shape)}; leave "
            "them out"
        )
    by_player = not spatial or _by_player(args, runs, masks)
    notes = [] if segmentations is None else _missing(segmentations, inputs, n_items, skip=skip)
    loader = ExplainedInputs(inputs, runs, by_player=by_player, skip=skip)
    first = loader.first(n_items, PROBE)
    notes += [] if segmentations is None else _one_sided(segmentations, first.batch.masks)
    example = first.batch.inputs.to(device)
    n_outputs = n_outputs_of(model, example)
    one_output = n_outputs in (None, 1)
    target = None if one_output else first.target.to(device)
    compared = _compared(args, model, example, target)
    methods = method_names(runs, compared)
    baselines, shown, static = _baselines(args, runs[0], inputs, shape)
    patch = _patch(masks[0], example) if spatial else None
    compute = EvaluationChunks(
        forward=model.forward,
        one_output=one_output,
        masks=masks,
        compared=compared,
        by_player=by_player,
        n_players=runs[0].manifest["n_players"],
        scores=[],
        steps=1,
        baselines={name: x.to(device) if isinstance(x, Tensor) else x for name, x in baselines.items()},
        score=args.score or ("logit" if one_output else "softmax"),
        seed=args.seed,
        window=patch or 1,
        hidden=static["baseline"].to(device) if "baseline" in static else 0.0,
        n_masks=args.rise_masks,
        patch=args.segmentation_patch or patch,
        options={
            "removal": REMOVALS[args.removal],
            "order": args.order,
            "autocast": AUTOCAST[args.autocast],
        },
        device=device,
    )
    rows = args.batch_size or _auto_rows(compute, first, example)
    n_features = _n_features(runs, masks, n_items, example, by_player=by_player)
    probe = compute.probe(first, rows)  # in one step: what is wrong with options, model and data is said here
    compute.steps = _steps(args, n_features)
    compute.scores = _scores(len(methods), one_baseline=probe.one_baseline, segmented=segmentations is not None)
    curve_evaluations = probe.n_evaluations + 2 * (compute.steps - 1)
    evaluations = len(methods) * curve_evaluations + sum(_cost(name, compute, example) for name in compared)
    manifest = {
        "kind": "evaluation",
        "method": "insertion-deletion",
        "n_items": n_items,
        "n_players": n_features,
        "seed": args.seed,
        "chunk_size": args.chunk_size or chunk_size(evaluations, evaluations, row_flop(model, example), 1),
        "rows": rows,
        "model": {**runs[0].manifest["model"], "spec": model.spec},
        "data": {**runs[0].manifest["data"], "spec": inputs.data.spec},
        "settings": {
            "methods": methods,
            "scores": compute.scores,
            "level": "players" if by_player else "pixels",
            "features": runs[0].manifest["settings"]["features"] if by_player else f"{n_features} pixels",
            "steps": compute.steps,
            "curve_evaluations": curve_evaluations,
            "order": args.order,
            "score": compute.score,
            "target": runs[0].manifest["settings"]["target"],
            "removal": args.removal,
            "insertion_baseline": shown["insertion"],
            "deletion_baseline": shown["deletion"],
            "runs": [_identity(run) for run in runs],
            "rise_masks": args.rise_masks if "rise" in compared else None,
            "occlusion_window": compute.window if "occlusion" in compared else None,
            "segmentation": None if segmentations is None else _described(segmentations, compute.patch),
            "preprocessing": inputs.preprocessing,
            "autocast": args.autocast,
        },
        "versions": versions(model.spec, inputs.data.spec),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    if by_player and masks[0] is not None:
        static["feature_mask"] = masks[0]
    lines = [
        *notes,
        f"model:    {model.spec}, sha256 {model.fingerprint[:12]}",
        f"data:     {inputs.data.spec}, {n_items:,} inputs of {' × '.join(map(str, shape))}",
        f"methods:  {', '.join(methods)}",
        f"curves:   {manifest['settings']['features']}, {args.order} important first, in {compute.steps} steps; "
        f"{_replacement(args, shown)}; score {compute.score}",
    ]
    return EvaluationJob(loader, compute, manifest, static, example, evaluations, 1, lines)


def _scores(n_methods: int, *, one_baseline: bool, segmented: bool) -> list[str]:
    """Names of what is stored of every input and method."""
    names = ["insertion_auc", "deletion_auc", *(["srg"] if one_baseline else []), "sparsity"]
    names += ["rank_correlation", "iou_top"] if n_methods > 1 else []
    return names + (["segmentation_difference", "macro_iou"] if segmented else [])


def _by_player(args: argparse.Namespace, runs: list[Run], masks: list[Tensor | None]) -> bool:
    """Whether curves perturb players: if runs share them and nobody wants pixels."""
    same = all(
        run.manifest["settings"]["features"] == runs[0].manifest["settings"]["features"]
        and (mask is None) == (masks[0] is None)
        and (mask is None or torch.equal(mask, masks[0]))
        for run, mask in zip(runs, masks, strict=True)
    )
    if args.level == "players" and not same:
        features = sorted({run.manifest["settings"]["features"] for run in runs})
        raise ValueError(
            f"{_CALLER}: runs must share their players for --level players, got {' and '.join(features)}; pass "
            "--level pixels"
        )
    return same and args.level != "pixels"


def _compared(args: argparse.Namespace, model: LoadedModel, example: Tensor, target: Tensor | None) -> list[str]:
    """Methods made on the fly."""
    if args.compare is None:
        return ["random", *(["gradient-x-input"] if is_differentiable(model.forward, example, target) else [])]
    if "rise" in args.compare and example.dim() != 4:
        raise ValueError(f"{_CALLER}: --compare rise is for images, got {list(example.shape[1:])}; leave it out")
    if "gradient-x-input" in args.compare and not is_differentiable(model.forward, example, target):
        raise ValueError(f"{_CALLER}: {model.spec} has no gradient; leave gradient-x-input out of --compare")
    return list(dict.fromkeys(args.compare))


def _baselines(
    args: argparse.Namespace, run: Run, inputs: InputLoader, shape: torch.Size
) -> tuple[dict[str, object], dict[str, str], dict[str, Tensor]]:
    """What perturbed features show: for `insertion_deletion`, in words, and as tensors of the store."""
    given = {"insertion": args.insertion_baseline, "deletion": args.deletion_baseline}
    if args.removal in ("blur", "token-drop"):
        if any(given.values()):
            raise ValueError(
                f"{_CALLER}: --removal {args.removal} knows no baseline; leave out --insertion-baseline and "
                "--deletion-baseline"
            )
        text = _SHOWN["blur"] if args.removal == "blur" else "nothing"
        return {}, dict.fromkeys(given, text), {}
    flat = len(shape) == 1
    default = dict.fromkeys(given, "mean" if flat else "zero")
    if len(shape) == 3:
        default["insertion"] = "blur"
    baselines, shown, static = {}, {}, {}
    for name, value in given.items():
        value = value or default[name]
        if value == "mean" and flat:
            if "baseline" not in static:
                rows = run.static.get("background")
                rows = inputs.first(_MEAN_OF) if rows is None else rows
                static["baseline"] = rows.double().mean(0).to(rows.dtype)
            background = run.static.get("background")
            of = f"first {_MEAN_OF} inputs" if background is None else f"run's {len(background)} background rows"
            baselines[name], shown[name] = static["baseline"], f"the mean of the {of}"
        elif value in _SHOWN:
            baselines[name], shown[name] = value, _SHOWN[value]
        else:
            try:
                baselines[name] = 0.0 if value == "zero" else float(value)
            except ValueError:
                raise ValueError(
                    f"{_CALLER}: --{name}-baseline must be a number, zero, {', '.join(_SHOWN)}, got {value!r}"
                ) from None
            shown[name] = f"{baselines[name]:g}"
    return baselines, shown, static


def _replacement(args: argparse.Namespace, shown: dict[str, str]) -> str:
    if args.removal == "token-drop":
        return "absent patches are dropped from the sequence"
    return f"insertion into {shown['insertion']}, deletion to {shown['deletion']}"


def _patch(mask: Tensor | None, example: Tensor) -> int:
    """Side of the patches for segmentations and occlusion: the run's where it has some, else a 14th of the image."""
    height, width = example.shape[-2:]
    if mask is not None and mask.dim() == 2:
        side = int((mask[:, 0] == 0).sum())
        if side > 1 and torch.equal(mask, grid_mask((height, width), side)):
            return side
    return max(1, round(min(height, width) / _GRID))


def _n_features(runs: list[Run], masks: list[Tensor | None], n_items: int, example: Tensor, *, by_player: bool) -> int:
    """Features of an input, of that with the fewest players where they differ."""
    if not by_player:
        return example.shape[-2] * example.shape[-1]
    if masks[0] is not None:
        return int(masks[0].max()) + 1
    skipped = runs[0].skipped
    counts = runs[0].tensor("n_players", missing="nan")[:n_items]
    return min(int(n) for i, n in enumerate(counts.tolist()) if i not in skipped)


def _steps(args: argparse.Namespace, n_features: int) -> int:
    if args.steps and args.steps > n_features:
        raise ValueError(
            f"{_CALLER}: --steps must be at most the number of features, got {args.steps} for {n_features}; lower it"
        )
    return args.steps or min(_STEPS, n_features)


def _auto_rows(compute: EvaluationChunks, first: Explained, example: Tensor) -> int:
    """Model rows a call, as the engine chooses them."""
    evaluator = Evaluator(
        compute.forward,
        (example,),
        players=resolve_players(compute.players(first), (example,), _CALLER),
        removal=resolve_removal(compute.options["removal"], _CALLER),
        autocast=compute.options["autocast"],
        caller=_CALLER,
    )
    return evaluator.batch_size


def _cost(name: str, compute: EvaluationChunks, example: Tensor) -> int:
    """Evaluations that a method made on the fly takes for an input."""
    if name == "rise":
        return compute.n_masks + 1
    if name == "gradient-x-input":
        return GRADIENT_COST
    if name == "random":
        return 0
    window, stride = compute.occlusion_window(example)
    sizes = example.shape[2:] if example.dim() > 2 else example.shape[1:]
    windows = 1
    for size in sizes:
        windows *= max(0, -(-(size - window) // stride)) + 1
    return windows + 1


def _missing(segmentations: Segmentations, inputs: InputLoader, n_items: int, *, skip: bool) -> list[str]:
    """A note about images without a mask.

    Raises:
        ValueError: there are some and they are not to be skipped, or there is no mask at all.
    """
    names = getattr(inputs.data, "names", None) or list(map(str, range(n_items)))
    reasons = segmentations.missing(names[:n_items])
    if not reasons:
        return []
    listed = "; ".join(list(reasons.values())[:3]) + ("; ..." if len(reasons) > 3 else "")
    said = f"{len(reasons):,} of {n_items:,} images have no segmentation of their own: {listed}"
    if not skip or len(reasons) == n_items:
        remedy = "check the directory" if len(reasons) == n_items else "add them, or pass --on-error skip"
        raise ValueError(f"{_CALLER}: {said}; {remedy}")
    return [f"note: {said}; they are left out of what is compared with segmentations"]


def _one_sided(segmentations: Segmentations, masks: Tensor) -> list[str]:
    """A note where the first masks, ``[b, H, W]``, look as if they were read in a wrong way."""
    found = masks[masks.isfinite()].unique()
    if len(found) != 1:
        return []
    return [
        f"note: the first segmentations hold nothing but {'object' if found.item() else 'background'}, read as "
        f"{segmentations.form} ({FORMS[segmentations.form]}); check --segmentation-format"
    ]


def _described(segmentations: Segmentations, patch: int | None) -> dict:
    return {
        "sha256": segmentations.fingerprint(),
        "format": f"{segmentations.form}: {FORMS[segmentations.form]}",
        "patch": patch,
    }


def _identity(run: Run) -> dict:
    """What a run's values are of, whatever it is called and wherever it lies."""
    sections = ("kind", "method", "seed", "model", "data", "settings", "static")
    content = json.loads(json.dumps({name: run.manifest.get(name) for name in sections}))
    for what in ("model", "data"):
        del content[what]["spec"]
    text = json.dumps(content, sort_keys=True).encode()
    return {"method": run.manifest["method"], "sha256": hashlib.sha256(text).hexdigest()}
