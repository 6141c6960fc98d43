"""The operators of insertion and deletion curves on inputs of real size: cases as in operators.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from operators import Case, _memory_bound, patches
from torch import Tensor

from xaifast.ops import plan_perturbation, rank_features
from xaifast.ops.perturb import PerturbPlan
from xaifast.reference import perturb as reference
from xaifast.reference import ranking as reference_ranking


def _perturb(name: str, plan: PerturbPlan, n_levels: int) -> Case:
    """Both curves of every input, into a given buffer."""
    counts = [plan.n_features * k // (n_levels - 1) for k in range(n_levels)]
    points = plan.points(counts, counts)
    units = plan.n_inputs * points.shape[0]
    arguments = (plan.x, plan.insertion, plan.deletion, plan.rank, plan.rep, plan.unit, points, 0, units)
    out = plan.rows(points)
    flat = (out.permute(0, 2, 3, 1) if plan.memory_format is torch.channels_last else out).view(units, -1)

    def by_torch(flat: Tensor, *arguments: object) -> Tensor:
        return flat.copy_(reference.perturb_rows(*arguments))

    def ours() -> Tensor:
        plan.rows(points, 0, units, out=out)
        return flat

    read = [plan.x, plan.insertion, plan.deletion, plan.rank, points]
    case = _memory_bound(f"{name}, {units} rows", "perturb_rows", ours, by_torch, (flat, *arguments), flat, read)
    case.out = flat
    return case


def image(device: str, kind: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Case:
    """Pixels, single elements or patches of a 224x224 image between itself, a blur's stand-in and zeros."""
    n = 32 if device == "cpu" else 1024
    x, base = torch.randn(2, 1, 3, 224, 224, device=device)
    values = {"pixels": x[:, :1], "elements": x, "patches": torch.randn(1, 196, device=device)}[kind]
    plan = plan_perturbation(
        x, rank_features(values), insertion_baseline=base, dtype=dtype, memory_format=memory_format,
        feature_mask=patches(224, 16).to(device) if kind == "patches" else None,
    )  # fmt: skip
    layout = ", channels last" if memory_format is torch.channels_last else ""
    return _perturb(f"image 3x224x224 {str(dtype).removeprefix('torch.')}, {kind}{layout}", plan, n)


def digits(device: str) -> Case:
    """Many small images."""
    x = torch.randn(64 if device == "cpu" else 4096, 1, 28, 28, device=device)
    return _perturb(f"{len(x)} images 1x28x28 float32, pixels", plan_perturbation(x, rank_features(x)), 16)


def rank(device: str, n_inputs: int, n_features: int, dtype: torch.dtype) -> Case:
    """Ranks of attributions. Beside torch's stable sort, which gives an order and not yet ranks: shares above one."""
    values = torch.randn(n_inputs, n_features, device=device).to(dtype)
    compiled = torch.compile(reference_ranking.rank_features, fullgraph=True)
    return Case(
        f"{n_inputs} x {n_features} {str(dtype).removeprefix('torch.')}",
        "rank_features",
        {
            "xaifast": lambda: rank_features(values),
            "reference": lambda: reference_ranking.rank_features(values, "most", None),
            "torch.compile": lambda: compiled(values, "most", None),
        },
        lambda: torch.sort(values, dim=-1, descending=True, stable=True),
        "torch.sort",
        values.nbytes + 4 * values.numel(),
    )


_ROWS, _CHANNELS = torch.contiguous_format, torch.channels_last
CURVE_CASES: dict[str, Callable[[str], Case]] = {
    "perturb-pixels-float32": lambda device: image(device, "pixels", torch.float32, _ROWS),
    "perturb-pixels-bfloat16": lambda device: image(device, "pixels", torch.bfloat16, _ROWS),
    "perturb-pixels-channels-last": lambda device: image(device, "pixels", torch.float32, _CHANNELS),
    "perturb-elements-float32": lambda device: image(device, "elements", torch.float32, _ROWS),
    "perturb-patches-float32": lambda device: image(device, "patches", torch.float32, _ROWS),
    "perturb-digits": digits,
    "rank-pixels-float32": lambda device: rank(device, 4, 50176, torch.float32),
    "rank-pixels-float64": lambda device: rank(device, 4, 50176, torch.float64),
    "rank-patches-float32": lambda device: rank(device, 256, 196, torch.float32),
}
