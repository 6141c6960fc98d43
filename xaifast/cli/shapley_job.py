"""A Kernel SHAP run over a data set, put together from settings and checked on a few inputs."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import __version__
from ..attribution.dataset import ShapleyChunks, chunk_size
from ..attribution.kernel_shap import check_budget
from ..data import open_data
from ..evaluate import Evaluator
from ..model_state import find_modules
from ..models.loading import LoadedModel
from ..players import resolve_players
from ..removal import resolve_removal
from ..stream import is_out_of_memory
from .choices import choose_baselines, choose_features, choose_target
from .inputs import InputLoader, superpixels
from .options import AUTOCAST, REMOVALS, JobSettings

_CALLER = "xaifast"
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
        """Rows a second of the bare model in calls of ``rows``, or of fewer where such a call takes long or much.

        Takes about a tenth of a second, or some calls of a slow model.
        """
        n, rate = min(rows, _PROBE), 0.0
        while True:
            try:
                seconds = self._forward_seconds(n, at_least=0.1 if n == rows else 0.0)
            except Exception as error:
                if not is_out_of_memory(error) or n == 1:
                    raise
                if rate:
                    return rate
                n //= 2
                continue
            rate = n / seconds
            if n == rows or seconds > 0.1:
                return rate
            n = min(rows, 4 * n)

    def _forward_seconds(self, n: int, at_least: float) -> float:
        """Median of calls that together take so many seconds."""
        batch = self.example.repeat(-(-n // len(self.example)), *(1,) * (self.example.dim() - 1))[:n].contiguous()
        dtype = self.compute.options["autocast"]
        seconds: list[float] = []
        with torch.inference_mode(), torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
            self.compute.forward(batch)  # allocates
            while not seconds or sum(seconds) < at_least:
                start = time.perf_counter()
                self.compute.forward(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize(batch.device)
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def result_bytes(self, n_inputs: int) -> int:
        """Roughly what results take on disk."""
        n_values = 2 * (self.manifest["n_players"] + 1) * (self.compute.n_outputs or 1)
        segments = 2 * self.example[0, 0].numel() if self.compute.feature_mask is None else 0
        n_chunks = -(-n_inputs // self.manifest["chunk_size"])
        return n_inputs * (max(4, self.example.element_size()) * n_values + segments + 50) + 1000 * n_chunks + 4000


def prepare(settings: JobSettings, model: LoadedModel, device: str) -> ShapleyJob:
    """Open the data, settle features, baseline, target and chunks, and run the model on a few inputs.

    Raises:
        ValueError, TypeError: what does not fit together; nothing is written yet.
    """
    table = settings.data.startswith(("csv:", "parquet:"))
    columns = settings.columns or (model.feature_names if table else None)
    data = open_data(settings.data, columns=columns, label=settings.label, drop=settings.drop)
    loader = InputLoader(
        data,
        model,
        image_size=(settings.image_size[0], settings.image_size[-1]) if settings.image_size else None,
        mean=settings.mean,
        std=settings.std,
        segments=settings.n_segments if settings.segments else None,
        skip=settings.on_error == "skip",
    )
    example = loader.first(_PROBE)
    feature_mask, features = choose_features(settings, model, data, example)
    baselines, replaced, static = choose_baselines(settings, loader, example, device)
    players = superpixels(example[0], settings.n_segments) if feature_mask is None else feature_mask
    example = example.to(device)
    n_items = min(len(data), settings.limit or len(data))
    target, explained = choose_target(settings.target, model, data, n_items, _n_outputs(model, example))
    evaluator = Evaluator(
        model.forward,
        (example,),
        players=resolve_players(players, (example,), _CALLER),
        baselines=baselines,
        target="predicted" if isinstance(target, Tensor) else target,
        removal=resolve_removal(REMOVALS[settings.removal], _CALLER),
        batch_size=settings.batch_size or "auto",
        autocast=AUTOCAST[settings.autocast],
        caller=_CALLER,
    )
    n_players = settings.n_segments if feature_mask is None else int(feature_mask.max()) + 1
    check_budget(n_players, settings.n_samples, settings.estimator)
    if settings.link == "logit" and not bool(torch.isfinite(torch.logit(evaluator.full)).all()):
        raise ValueError(
            f"{_CALLER}: --link logit needs a model whose answers are probabilities strictly between 0 and 1, got "
            f"answers from {float(evaluator.full.min()):.4g} to {float(evaluator.full.max()):.4g}; leave it out"
        )
    n_samples = min(settings.n_samples - settings.n_samples % 2, 2 ** min(n_players, 62))
    n_outputs = evaluator.full.shape[1] if evaluator.has_output_axis else None
    compute = ShapleyChunks(
        forward=model.forward,
        seed=settings.seed,
        target=target,
        n_outputs=n_outputs,
        feature_mask=feature_mask,
        options={
            "n_samples": settings.n_samples,
            "estimator": settings.estimator,
            "link": settings.link,
            "removal": REMOVALS[settings.removal],
            "baselines": baselines,
            "autocast": AUTOCAST[settings.autocast],
        },
        device=device,
    )
    size = chunk_size(n_samples, n_samples * evaluator.n_background, _row_flop(model, example), n_outputs or 1)
    manifest = {
        "kind": "attributions",
        "method": settings.method,
        "n_items": n_items,
        "n_players": n_players,
        "seed": settings.seed,
        "chunk_size": settings.chunk_size or size,
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
            "target": settings.target,
            "n_samples": settings.n_samples,
            "estimator": settings.estimator,
            "link": settings.link,
            "features": features,
            "removal": settings.removal,
            "baseline": replaced,
            "preprocessing": loader.preprocessing,
            "autocast": settings.autocast,
        },
        "versions": _versions(model.spec, settings),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    if feature_mask is not None:
        static["feature_mask"] = feature_mask
    shown = "are dropped from the sequence" if settings.removal == "token-drop" else f"show {replaced}"
    lines = [
        f"model:    {model.spec}, sha256 {model.fingerprint[:12]}",
        f"data:     {data.spec}, {n_items:,} inputs of {' × '.join(map(str, example.shape[1:]))}",
        f"explains: {explained} by {settings.method} ({settings.estimator})",
        f"features: {features}; absent ones {shown}",
    ]
    return ShapleyJob(loader, compute, manifest, static, example, n_samples, evaluator.n_background, lines)


def _n_outputs(model: LoadedModel, example: Tensor) -> int | None:
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


def _versions(model: str, settings: JobSettings) -> dict[str, str]:
    """Versions that may change results."""
    used = ["torch", "numpy"]
    used += ["transformers"] if "hf:" in model + settings.data else []
    used += ["pillow"] if settings.data.startswith(("imagefolder:", "hf:")) else []
    used += ["scikit-image"] if settings.segments else []
    return {
        "xaifast": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in used},
    }
