"""A Kernel SHAP run over a data set, put together from settings and checked on a few inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attribution.dataset import ShapleyChunks, chunk_size
from ..attribution.kernel_shap import check_budget
from ..data import open_data
from ..evaluate import Evaluator
from ..models.loading import LoadedModel
from ..players import resolve_players
from ..removal import resolve_removal
from .choices import choose_baselines, choose_features, choose_target
from .inputs import InputLoader, superpixels
from .job import PROBE, DatasetJob
from .options import AUTOCAST, REMOVALS, JobSettings
from .probe import n_outputs_of, row_flop, versions

_CALLER = "xaifast"


@dataclass
class ShapleyJob(DatasetJob):
    """A Kernel SHAP run."""

    loader: InputLoader
    compute: ShapleyChunks

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
    example = loader.first(PROBE)
    feature_mask, features = choose_features(settings, model, data, example)
    baselines, replaced, static = choose_baselines(settings, loader, example, device)
    players = superpixels(example[0], settings.n_segments) if feature_mask is None else feature_mask
    example = example.to(device)
    n_items = min(len(data), settings.limit or len(data))
    target, explained = choose_target(settings.target, model, data, n_items, n_outputs_of(model, example))
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
    size = chunk_size(n_samples, n_samples * evaluator.n_background, row_flop(model, example), n_outputs or 1)
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
            "label": settings.label,
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
        "versions": versions(model.spec, settings.data, segments=bool(settings.segments)),
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
