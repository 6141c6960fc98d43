"""One script, two imports: Captum's KernelShap and xaifast's drop-in with the same arguments.

Every round runs the floor (the same number of model evaluations on preassembled inputs, at the fastest batch of 16 to
256), then each package at each ``perturbations_per_eval``; medians over rounds. The summary compares default with
default, and Captum at its best setting with the drop-in at that same setting.

    python bench/bench_captum.py [--jobs lenet vit resnet] [--per-eval 1 16 50 100 250 500] [--rounds 5] [--csv FILE]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_jobs import fastest_batch, forward_all, seconds
from environment import describe, pin_threads
from jobs import Job, LeNet5, masked_rows
from results import write
from torch import Tensor

import xaifast

PACKAGES = {"captum": "captum.attr", "xaifast": "xaifast.compat.captum"}


@dataclass
class Script:
    """What the user's script explains: 500 samples, target 3."""

    name: str
    model: Callable[[Tensor], Tensor]
    images: Tensor
    mask: Tensor
    n_samples: int = 500

    def run(self, package: str, per_eval: int) -> Tensor:
        """The script; only the import depends on the package."""
        explainer = importlib.import_module(PACKAGES[package]).KernelShap(self.model)
        return explainer.attribute(
            self.images, target=3, feature_mask=self.mask, n_samples=self.n_samples, perturbations_per_eval=per_eval
        )


def lenet() -> Script:
    """LeNet-5, 32 px, 64 patches, 16 images in one call."""
    return Script("LeNet-5 32 px, M = 64, 16 images", LeNet5().eval(), torch.rand(16, 1, 32, 32), _grid(32, 4))


def vit() -> Script:
    """ViT-tiny, 224 px, 49 patches, one image."""
    model = xaifast.models.VisionTransformer(224, 32, 1000, dim=192, depth=12, heads=3).eval()
    return Script("ViT-tiny 224 px, M = 49, 1 image", model, torch.rand(1, 3, 224, 224), _grid(224, 32))


def resnet() -> Script:
    """ResNet-18 of Hugging Face, random weights, 64 px, 64 patches, one image."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10)
    model = ResNetForImageClassification(config).eval()
    return Script("ResNet-18 64 px, M = 64, 1 image", lambda x: model(x).logits, torch.rand(1, 3, 64, 64), _grid(64, 8))


def _grid(size: int, patch: int) -> Tensor:
    return xaifast.grid_mask((size, size), patch)[None, None]  # [1, 1, H, W]


SCRIPTS = {"lenet": lenet, "vit": vit, "resnet": resnet}


def measure(script: Script, per_evals: list[int], rounds: int) -> list[dict[str, object]]:
    """A row for each package and setting."""
    floor = Job(script.name, script.model, masked_rows(script.images, script.mask[0, 0], script.n_samples), {})
    batch = fastest_batch(floor)
    settings = [(package, per_eval) for per_eval in per_evals for package in PACKAGES]
    for package in PACKAGES:
        script.run(package, per_evals[-1])  # warm-up
    floors: list[float] = []
    times: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(rounds):
        floors.append(seconds(lambda: forward_all(script.model, floor.rows, batch)))
        for setting in settings:
            times[setting].append(seconds(lambda s=setting: script.run(*s)))
    rows = []
    for package, per_eval in settings:
        taken = times[package, per_eval]
        ratios = [t / f for t, f in zip(taken, floors, strict=True)]
        rows.append({
            "job": script.name, "package": package, "perturbations_per_eval": per_eval, "n_samples": script.n_samples,
            "ratio_median": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3), "rounds": rounds, "seconds_median": round(statistics.median(taken), 4),
            "floor_seconds_median": round(statistics.median(floors), 4), "floor_batch": batch,
        })  # fmt: skip
    return rows


def summary(rows: list[dict[str, object]]) -> str:
    """How many times faster the changed import is."""
    taken = {(row["package"], row["perturbations_per_eval"]): row["seconds_median"] for row in rows}
    best = min((per_eval for _, per_eval in taken), key=lambda per_eval: taken["captum", per_eval])
    text = f"at Captum's best setting ({best}) {taken['captum', best] / taken['xaifast', best]:.2f} times faster"
    if ("captum", 1) in taken:
        text = f"default {taken['captum', 1] / taken['xaifast', 1]:.2f} times faster, {text}"
    return text


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=sorted(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--per-eval", nargs="+", type=int, default=[1, 16, 50, 100, 250, 500])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    for package in ("sklearn.linear_model", *PACKAGES.values()):
        importlib.import_module(package)  # before threads are pinned, and not on the first round's clock
    pin_threads(arguments.threads)
    warnings.filterwarnings("ignore", "You are providing multiple inputs")
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    rows = []
    for name in arguments.jobs:
        torch.manual_seed(0)
        measured = measure(SCRIPTS[name](), arguments.per_eval, arguments.rounds)
        for row in measured:
            print(
                f"{row['job']:35s} {row['package']:8s} {row['perturbations_per_eval']:4d} a call "
                f"{row['ratio_median']:7.3f}  [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]  "
                f"{row['seconds_median']:.3f} s (floor {row['floor_seconds_median']:.3f} s at batch "
                f"{row['floor_batch']})",
                flush=True,
            )
        print(f"{measured[0]['job']:35s} {summary(measured)}", flush=True)
        rows += [{**row, **conditions} for row in measured]
    if arguments.csv:
        write(arguments.csv, rows)


if __name__ == "__main__":
    main()
