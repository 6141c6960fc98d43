"""Training of a classifier with plain batches: repeatable by seed, recorded as it goes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import DataSource
from ..training import recording
from ..trajectory import Trajectory


@dataclass(frozen=True)
class Settings:
    """What decides about the weights, beside data and network; ``every`` is ``"epoch"`` or a number of steps."""

    epochs: int
    optimizer: str
    lr: float
    batch_size: int
    test_share: float
    seed: int
    every: str | int


def read_inputs(data: DataSource, caller: str) -> tuple[Tensor, Tensor]:
    """All inputs ``[N, ...]`` and labels ``[N]`` of a data set, those without a label left out.

    Raises:
        ValueError: images, or no labels.
    """
    if data.kind == "images":
        raise ValueError(f"{caller}: {data.spec} must hold numbers, got images; save them as float32 in an npz: file")
    if data.labels is None or not bool((data.labels >= 0).any()):
        raise ValueError(f"{caller}: {data.spec} must have classes, got none; name their column by --label")
    known = (data.labels >= 0).nonzero().flatten()
    x = torch.stack(data.load(known.tolist()).items).float()
    scales = x.flatten(1).std(0)
    if data.kind == "table" and float(scales.max()) > 100 * float(scales[scales > 0].min()):
        warnings.warn(
            f"the columns of {data.spec} differ in size by more than 100 times; a network learns little of the small "
            "ones: bring them to standard deviation 1 first",
            stacklevel=2,
        )
    return x, data.labels[known]


def split(labels: Tensor, share: float, seed: int, caller: str) -> tuple[Tensor, Tensor]:
    """Numbers of the inputs to learn from and of those held out, the same share of each class.

    Raises:
        ValueError: a share that leaves nothing to learn from.
    """
    if not 0 <= share < 1:
        raise ValueError(f"{caller}: --test-share must be at least 0 and less than 1, got {share}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = []
    for k in labels.unique().tolist():
        of_class = order[labels[order] == k]
        held_out.append(of_class[: math.floor(share * len(of_class))])
    away = torch.zeros(len(labels), dtype=torch.bool)
    away[torch.cat(held_out)] = True
    return (~away).nonzero().flatten(), away.nonzero().flatten()


def train_recorded(
    model: nn.Module, traj: Trajectory, x: Tensor, y: Tensor, settings: Settings, *, show_progress: bool = False
) -> None:
    """Train with cross-entropy and record; leaves the model in evaluation mode.

    Args:
        model: Logits ``[b, K]``.
        traj: Empty.
        x, y: Inputs ``[N, ...]`` and classes ``[N]``, on the CPU.
        settings: See `Settings`.
        show_progress: Draw a bar over steps.

    Raises:
        ValueError: training diverged; the weight that is not finite is named.
    """
    from tqdm.auto import tqdm

    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[settings.optimizer]
    optimizer = make(model.parameters(), settings.lr)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(settings.seed)
    total = settings.epochs * -(-len(x) // settings.batch_size)
    model.train()
    with (
        tqdm(total=total, desc="train", unit="step", disable=not show_progress) as bar,
        recording(model, traj, every=settings.every) as loop,
    ):
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(x), generator=draw).split(settings.batch_size):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows].to(device)), y[rows].to(device))
                loss.backward()
                optimizer.step()
                bar.update()
            bar.set_postfix_str(f"loss {float(loss):.3g}", refresh=False)
            loop.end_epoch()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, NaN for no inputs."""
    if not len(x):
        return math.nan
    device = next(model.parameters()).device
    predicted = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(1024)])
    return float((predicted == y).float().mean())
