"""A run of XtrAIn, Xstep or XtrAIn+ over a data set, put together from settings and checked on a few inputs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attribution.dataset import Batch, chunk_size
from ..attribution.xtrain import xtrain
from ..data import open_data
from ..data.fingerprint import hash_values
from ..data.known_signal import KnownSignal
from ..evaluation.clean import BESIDE, clean_scores
from ..jobs import Chunk
from ..models.loading import LoadedModel
from ..stream import part_of_job
from ..trajectory import Trajectory, TrajectoryError
from .choices import choose_features, choose_target
from .inputs import InputLoader
from .job import PROBE, DatasetJob
from .options import JobSettings
from .probe import n_outputs_of, row_flop, versions

METHODS = ("xtrain", "xstep", "xtrain+")
OPTIONS = ("trajectory", "checkpoints", "direction", "gate", "mode")
MOMENTS = 8  # checkpoints whose maps are kept for the report
_CALLER = "xaifast explain"
_ROWS, _LEAST = 256, 32  # model rows a call; inputs a chunk, each of which reads all checkpoints
_UNUSED = {  # options that say how inputs are occluded, and what they are where nobody gives them
    "removal": "baseline", "baseline": None, "background": None, "segments": None, "link": "identity",
    "n_samples": 512, "estimator": "auto", "autocast": "none",
}  # fmt: skip


@dataclass
class XtrainChunks:
    """Turns the batches of a data set into chunks of XtrAIn's values.

    Attributes:
        forward: The model, as it was at the last checkpoint.
        traj: Its training.
        target: LongTensor ``[N]``, an output, or ``"predicted"``.
        feature_mask: Of every input.
        moments: Numbers of the steps after which maps are kept.
        choices: Further arguments of `xtrain`.
        signal: bool ``[N, ...]`` where the data know it, else None.
        n_samples, seed: Of the Kernel SHAP beside.
        device: Where the model is.
    """

    forward: nn.Module
    traj: Trajectory
    target: int | str | Tensor
    feature_mask: Tensor
    moments: list[int]
    choices: dict
    signal: Tensor | None
    n_samples: int
    seed: int
    device: str | torch.device = "cpu"
    options: dict = field(default_factory=lambda: {"autocast": None})

    def __call__(self, chunk: int, batch: Batch, rows: int) -> Chunk:
        """Explain a batch with ``rows`` model rows a call."""
        kept = torch.tensor(batch.kept, dtype=torch.int64)
        n_players, n_steps = int(self.feature_mask.max()) + 1, len(self.moments)
        count = len(batch.names)
        sizes = {
            "values": (n_players,), "std_errors": (n_players,), "base_values": (), "full_values": (), "residual": (),
            "gates_open": (), "formed": (n_steps, n_players), "formed_logits": (n_steps,),
        }  # fmt: skip
        if self.signal is not None:
            sizes["clean_score"] = (1 + len(BESIDE),)
        tensors = {name: torch.full((count, *size), torch.nan) for name, size in sizes.items()}
        tensors |= {name: torch.full((count,), -1) for name in ("target", "predicted")} | {"label": batch.labels}
        if batch.kept:
            for name, values in self._explain(batch, kept, rows).items():
                tensors[name][kept] = values.cpu().to(tensors[name].dtype)
        return Chunk(tensors, batch.names, batch.skipped)

    def _explain(self, batch: Batch, kept: Tensor, rows: int) -> dict[str, Tensor]:
        x = batch.inputs.to(self.device)
        predicted = self._predict(x, rows)
        target = predicted if self.target == "predicted" else self.target
        if isinstance(self.target, Tensor):
            target = self.target[batch.start + kept].to(self.device)
        found = xtrain(
            self.forward,
            self.traj,
            x,
            target=target,
            feature_mask=self.feature_mask,
            per_step=True,
            batch_size=rows,
            **self.choices,
        )
        moments = torch.tensor(self.moments)
        made = {
            "values": found.values,
            "base_values": found.logits[0],
            "full_values": found.logits[-1],
            "residual": found.residual,
            "target": found.target,
            "predicted": predicted,
            "gates_open": torch.ones(len(x)) if found.gates is None else found.gates.double().mean(0),
            "formed": found.formed()[moments].transpose(0, 1),
            "formed_logits": found.logits[moments + 1].T,
        }
        if self.signal is not None:
            with part_of_job(lambda units: None):
                made["clean_score"] = clean_scores(
                    self.forward,
                    x,
                    self.signal[batch.start + kept].to(self.device),
                    found.values,
                    self.feature_mask,
                    target=found.target,
                    n_samples=self.n_samples,
                    seed=self.seed,
                    first_index=batch.start,
                    rows=rows,
                )
        return made

    @torch.no_grad()
    def _predict(self, x: Tensor, rows: int) -> Tensor:
        outputs = [self.forward(part) for part in x.split(rows)]
        return torch.cat([getattr(output, "logits", output).argmax(1) for output in outputs])


@dataclass
class XtrainJob(DatasetJob):
    """A run over a recorded training."""

    loader: InputLoader
    compute: XtrainChunks
    counted: ClassVar[tuple[str, str]] = ("checkpoints", "occluded rows")

    def result_bytes(self, n_inputs: int) -> int:
        """Roughly what results take on disk."""
        n_values = (2 + len(self.compute.moments)) * self.manifest["n_players"] + 30
        n_chunks = -(-n_inputs // self.manifest["chunk_size"])
        return n_inputs * (4 * n_values + 50) + 1500 * n_chunks + 4000


def add_options(parser: argparse.ArgumentParser) -> None:
    """What these methods take beside the others'."""
    how = parser.add_argument_group("methods of recorded training (xtrain, xstep, xtrain+)")
    how.add_argument("--trajectory", metavar="DIR", type=Path, help="the recorded training (xaifast train --record)")
    how.add_argument(
        "--checkpoints",
        metavar="WHICH",
        help="xstep, xtrain+: endpoints, uniform, update_norm (8 steps, xstep's default) or numbers like 0,5,20",
    )
    how.add_argument("--direction", choices=["symmetric", "forward", "reverse"], help="which halves (symmetric)")
    how.add_argument("--gate", choices=["step", "step_feature", "class_update"], help="xtrain+: what counts (step)")
    how.add_argument("--mode", choices=["exact", "linear"], help="exact, or first order")


def prepare(args: argparse.Namespace, settings: JobSettings, model: LoadedModel, device: str) -> XtrainJob:
    """Open data and trajectory, settle features and target, and run the method on a few inputs.

    Raises:
        ValueError, TypeError: what does not fit together; nothing is written yet.
    """
    _check(args, settings, model)
    table = settings.data.startswith(("csv:", "parquet:"))
    columns = settings.columns or (model.feature_names if table else None)
    data = open_data(settings.data, columns=columns, label=settings.label, drop=settings.drop)
    loader = InputLoader(
        data,
        model,
        image_size=(settings.image_size[0], settings.image_size[-1]) if settings.image_size else None,
        mean=settings.mean,
        std=settings.std,
        skip=settings.on_error == "skip",
    )
    example = loader.first(PROBE)
    mask, features = choose_features(settings, model, data, example)
    example = example.to(device)
    n_items = min(len(data), settings.limit or len(data))
    n_outputs = n_outputs_of(model, example)
    if n_outputs is None or settings.target == "all":
        raise ValueError(
            f"{_CALLER}: --method {settings.method} explains one of several outputs, got "
            f"{'a model with one output' if n_outputs is None else '--target all'}; choose one by --target"
        )
    target, explained = choose_target(settings.target, model, data, n_items, n_outputs)
    traj = _open(args.trajectory, model.forward)
    choices = {
        name: value
        for name, value in (("direction", args.direction), ("gate", args.gate), ("mode", args.mode))
        if value is not None
    }
    choices |= {"variant": settings.method, **_checkpoints(args, settings.method)}
    tried = int(target[0]) if isinstance(target, Tensor) else target
    probe = xtrain(model.forward, traj, example[:1], target=tried, feature_mask=mask, **choices)
    n_players, n_steps = probe.values.shape[1], len(probe.steps)
    moments = sorted({round(k * n_steps / MOMENTS) - 1 for k in range(1, MOMENTS + 1)} - {-1})
    signal = data.signal if isinstance(data, KnownSignal) else None
    compute = XtrainChunks(
        model.forward, traj, target, mask, moments, choices, signal, max(512, 3 * n_players), settings.seed, device
    )
    halves = 2 if args.direction in (None, "symmetric") else 1
    n_rows = 3 if args.mode == "linear" else halves * n_players
    size = chunk_size(n_steps * n_players, n_rows * (n_steps + 1), row_flop(model, example), 1)
    manifest = {
        "kind": "attributions",
        "method": settings.method,
        "n_items": n_items,
        "n_players": n_players,
        "seed": settings.seed,
        "chunk_size": settings.chunk_size or max(_LEAST, size),
        "rows": settings.batch_size or _ROWS,
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
            "features": features,
            "preprocessing": loader.preprocessing,
            "trajectory": _identity(traj),
            "checkpoints": [probe.steps[0][0], *(end for _, end in probe.steps)],
            "direction": args.direction or "symmetric",
            "gate": (args.gate or "step") if settings.method == "xtrain+" else None,
            "mode": args.mode or "exact",
        },
        "formation": {
            "moments": [probe.steps[s][1] for s in moments],
            "steps": [traj.steps[probe.steps[s][1]] for s in moments],
            "n_outputs": n_outputs,
            "beside": list(BESIDE) if signal is not None else [],
            "scale": data.scale if signal is not None else None,
        },
        "versions": versions(model.spec, settings.data),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    lines = [
        f"model:    {model.spec}, sha256 {model.fingerprint[:12]}",
        f"data:     {data.spec}, {n_items:,} inputs of {' × '.join(map(str, example.shape[1:]))}",
        f"training: {args.trajectory}, {len(traj)} checkpoints, of which {n_steps + 1} are used",
        f"explains: {explained} by {settings.method}",
        f"features: {features}; their updates are occluded, not their values",
    ]
    return XtrainJob(loader, compute, manifest, {"feature_mask": mask}, example, n_steps + 1, n_rows, lines)


def _check(args: argparse.Namespace, settings: JobSettings, model: LoadedModel) -> None:
    if args.trajectory is None:
        raise ValueError(
            f"{_CALLER}: --method {settings.method} needs the recorded training, got none; name it by --trajectory "
            "(xaifast train --record makes one)"
        )
    given = [name for name, value in _UNUSED.items() if getattr(settings, name) != value]
    if given:
        raise ValueError(
            f"{_CALLER}: --{given[0].replace('_', '-')} says how inputs are occluded, which --method {settings.method} "
            "does not do; leave it out"
        )
    if not isinstance(model.forward, nn.Module):
        raise TypeError(
            f"{_CALLER}: --method {settings.method} needs a torch.nn.Module, got {type(model.forward).__name__} from "
            f"{model.spec}; return the module itself"
        )


def _open(directory: Path, model: nn.Module) -> Trajectory:
    """The recorded training, which must end in the model.

    Raises:
        ValueError: nothing recorded there, or another model.
    """
    try:
        traj = Trajectory(directory)
        if len(traj) < 2:
            raise ValueError(
                f"{_CALLER}: --trajectory must hold two checkpoints or more, got {len(traj)} in {directory}; record "
                "after training steps too"
            )
        last = traj[-1]
    except TrajectoryError as error:
        raise ValueError(f"{_CALLER}: {error}") from error
    ours = model.state_dict()
    other = sorted(set(ours) ^ set(last)) or [n for n in ours if not torch.equal(ours[n].cpu(), last[n])]
    if other:
        raise ValueError(
            f"{_CALLER}: the training in {directory} must end in the model that is explained, but {other[0]} differs; "
            "name the model that was trained there by --model"
        )
    return traj


def _checkpoints(args: argparse.Namespace, method: str) -> dict:
    if args.checkpoints is None:
        return {}
    if method == "xtrain":
        raise ValueError(f"{_CALLER}: --method xtrain adds up all steps; use xstep, or leave --checkpoints out")
    if args.checkpoints in ("endpoints", "uniform", "update_norm"):
        return {"checkpoints": args.checkpoints}
    try:
        return {"checkpoints": [int(t) for t in args.checkpoints.split(",")]}
    except ValueError:
        raise ValueError(
            f"{_CALLER}: --checkpoints must be endpoints, uniform, update_norm or numbers like 0,5,20, got "
            f"{args.checkpoints!r}"
        ) from None


def _identity(traj: Trajectory) -> dict:
    """What tells trainings apart that end in the same model: how far each parameter went in each step."""
    norms = {name: traj.update_norms(name) for name in traj.parameters}
    return {"n_checkpoints": len(traj), "sha256": hash_values({"steps": traj.steps, **norms})}
