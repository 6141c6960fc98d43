"""What recording costs: a training step of 784-256-128-10 under Adam, with and without a checkpoint after it.

Every contender trains a network of its own; one step of each, in an order that changes, is a round. Medians are
reported. "written" beside them is `write` and `fsync` of as many bytes: the floor of a checkpoint on that disk.

    python bench/bench_trajectory.py [--steps 200] [--batch 64] [--threads 2] [--directory DIR]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_jobs import seconds
from environment import describe, pin_threads
from results import show
from torch import nn
from torch.nn.functional import cross_entropy

from xaifast.trajectory import Trajectory, class_gradients


class Training:
    """A network in training on digits-like data, made anew by seed."""

    def __init__(self, batch: int, record: Callable[[nn.Module, torch.Tensor | None], object], classes: bool = False):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.x, self.y = torch.rand(batch, 784), torch.randint(10, (batch,))
        self.record, self.classes = record, classes
        record(self.model, None)

    def step(self) -> None:
        """One step and what is recorded of it."""
        losses = cross_entropy(self.model(self.x), self.y, reduction="none")
        parts = class_gradients(losses, self.y, self.model[0].weight, 10) if self.classes else None
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        self.record(self.model, parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one by default")
    args = parser.parse_args()
    pin_threads(args.threads)
    root = Path(tempfile.mkdtemp(dir=args.directory))

    def recorder(where: str | None, **settings: object) -> Callable[[nn.Module, torch.Tensor | None], object]:
        traj = Trajectory(root / where if where else None, **settings)
        return lambda model, parts: traj.record(
            model, class_updates=None if parts is None else {"0.weight": -1e-3 * parts}
        )

    trainings = {
        "not recorded": Training(args.batch, lambda model, parts: None),
        "in memory": Training(args.batch, recorder(None)),
        "in memory, bf16": Training(args.batch, recorder(None, deltas="bf16")),
        "in memory, class parts": Training(args.batch, recorder(None), classes=True),
        "directory": Training(args.batch, recorder("exact")),
        "directory, bf16": Training(args.batch, recorder("bf16", deltas="bf16")),
    }
    floor = root / "floor"
    data = bytes(4 * sum(p.numel() for p in trainings["not recorded"].model.parameters()))

    def write() -> None:
        with open(floor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    contenders = {name: training.step for name, training in trainings.items()} | {"written": write}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for _ in range(args.steps):
            for name, work in random.sample(list(contenders.items()), len(contenders)):
                times[name].append(seconds(work))
    finally:
        shutil.rmtree(root)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    base = medians["not recorded"]
    print(describe())
    show(
        [
            {"step": name, "ms": f"{ms:.2f}", "added ms": f"{ms - base:.2f}" if name != "written" else ""}
            for name, ms in medians.items()
        ],
        ("step", "ms", "added ms"),
    )


if __name__ == "__main__":
    main()
