"""Insertion and deletion curves as multiples of the forward floor, beside loops as other tools write them.

The floor is the number of model evaluations of both curves, with shared end points, on preassembled inputs at the
fastest batch of 16 to 256. Floor and contenders are interleaved in every round; ratios are taken within a round;
medians are reported. Everyone's areas are compared before anything is timed.

    python bench/bench_curves.py [--jobs resnet lenet vit ...] [--rounds 7] [--no-peers] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from bench_jobs import main
from jobs import Job, LeNet5
from torch import Tensor, nn

import xaifast
from xaifast.removal import TokenDrop, TokenSelect

Areas = tuple[Tensor, Tensor]  # insertion and deletion, [B]


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet18(n_classes: int = 200) -> nn.Module:
    """ResNet-18's layers for images of 64 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1)]
    for before, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(before, width, stride), Block(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


def probability(model: nn.Module, rows: Tensor, target: Tensor) -> Tensor:
    """Softmax probability of each row's target."""
    return model(rows).softmax(1).gather(1, target[:, None])[:, 0]


@torch.inference_mode()
def by_rank_masks(model: nn.Module, x: Tensor, maps: Tensor, steps: int, batch: int = 32) -> Areas:
    """Both curves in one chunked batch, rank masks on the device, end points reused: the way of torch-cam."""
    n_inputs, n = x.shape[0], maps[0].numel()
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = (
        torch.empty_like(order).scatter_(1, order, torch.arange(n).expand_as(order)).view(n_inputs, 1, *maps.shape[1:])
    )
    counts = torch.arange(steps + 1) * n // steps
    target = model(x).argmax(1)
    clean, empty = probability(model, x, target), probability(model, torch.zeros_like(x), target)
    points = [(b, k, kind) for b in range(n_inputs) for kind in (0, 1) for k in counts[1:-1].tolist()]
    scores = []
    for start in range(0, len(points), batch):
        b, k, kind = torch.tensor(points[start : start + batch]).unbind(1)
        shown = (rank[b] < k[:, None, None, None]) ^ (kind[:, None, None, None] == 1)
        scores.append(probability(model, torch.where(shown, x[b], 0.0), target[b]))
    inner = torch.cat(scores).view(n_inputs, 2, -1)
    insertion = torch.cat((empty[:, None], inner[:, 0], clean[:, None]), 1)
    deletion = torch.cat((clean[:, None], inner[:, 1], empty[:, None]), 1)
    fractions = counts / n
    return torch.trapezoid(insertion, fractions, dim=1), torch.trapezoid(deletion, fractions, dim=1)


@torch.inference_mode()
def by_steps(model: nn.Module, x: Tensor, maps: Tensor, steps: int) -> Areas:
    """A step after the other, written in place through NumPy, all inputs a call: the way of RISE."""
    order = np.flip(np.argsort(maps.flatten(1).numpy(), axis=1, kind="stable"), 1)
    size, n_inputs, channels = order.shape[1] // steps, x.shape[0], x.shape[1]
    target = model(x).argmax(1)
    areas = []
    for start, end in ((torch.zeros_like(x), x), (x, torch.zeros_like(x))):
        now, final = start.clone().numpy().reshape(n_inputs, channels, -1), end.numpy().reshape(n_inputs, channels, -1)
        scores = []
        for i in range(steps + 1):
            scores.append(probability(model, torch.from_numpy(now).view_as(x), target).numpy())
            where = order[:, size * i : size * (i + 1)]
            rows = np.arange(n_inputs)[:, None]
            now[rows, :, where] = final[rows, :, where]
        curve = np.stack(scores, 1)
        areas.append(torch.from_numpy((curve.sum(1) - curve[:, 0] / 2 - curve[:, -1] / 2) / steps))
    return areas[0], areas[1]


def by_quantus(model: nn.Module, x: Tensor, maps: Tensor, steps: int) -> tuple[str, Callable[[], object]]:
    """PixelFlipping twice, for it has no insertion, and its name with its evaluations.

    Features are channel values and a step must divide the number of pixels, so it may take fewer steps than asked for.
    """
    import quantus

    n, n_pixels = x[0].numel(), x[0, 0].numel()
    per_step = next(k for k in range(n // steps, n_pixels + 1) if n_pixels % k == 0)
    metric = quantus.PixelFlipping(features_in_step=per_step, perturb_baseline=0.0, disable_warnings=True)
    given = dict(
        x_batch=x.numpy(), y_batch=model(x).argmax(1).numpy(), a_batch=maps[:, None].numpy(), device="cpu",
        channel_first=True, softmax=True,
    )  # fmt: skip

    def both() -> object:
        with torch.inference_mode():
            return [metric(model, **given) for _ in range(2)]

    return f"Quantus, deletion, 2 x {n // per_step}", both


def nested_rows(x: Tensor, n: int) -> Tensor:
    """``n`` rows of each input with ever more of it removed, ``[B * n, ...]``, for the floor."""
    level = torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(0))
    cut = torch.linspace(0, 1, n).view(n, 1, 1, 1)
    return torch.cat([torch.where(level < cut, row, 0.0) for row in x])


def check(ours: xaifast.Curves, others: dict[str, Areas]) -> None:
    """Everyone computes the same areas."""
    for name, areas in others.items():
        for got, expected in zip(areas, (ours.insertion_auc, ours.deletion_auc), strict=True):
            if not torch.allclose(got.float(), expected, atol=1e-4):
                raise AssertionError(f"{name} has other areas: {got.tolist()} and {expected.tolist()}")


def pixel_job(name: str, model: nn.Module, x: Tensor, steps: int) -> Job:
    """Both curves over pixels with one baseline."""
    maps = torch.randn(x.shape[0], *x.shape[2:], generator=torch.Generator().manual_seed(1))

    def ours() -> xaifast.Curves:
        return xaifast.insertion_deletion(model, x, maps, steps=steps, insertion_baseline=0.0)

    peers: dict[str, Callable[[], object]] = {
        "rank masks (torch-cam's way)": lambda: by_rank_masks(model, x, maps, steps),
        "steps in NumPy (RISE's way)": lambda: by_steps(model, x, maps, steps),
    }
    check(ours(), {peer: work() for peer, work in peers.items()})
    if find_spec("quantus") is not None:
        peer, work = by_quantus(model, x, maps, steps)
        peers[peer] = work
    return Job(name, model, nested_rows(x, 2 * steps), {"curves": ours}, peers)


def blur_job(name: str, model: nn.Module, x: Tensor, steps: int) -> Job:
    """The default: insertion into a blur, deletion to 0, so one evaluation more."""
    maps = torch.randn(x.shape[0], *x.shape[2:], generator=torch.Generator().manual_seed(1))
    contenders = {"curves": lambda: xaifast.insertion_deletion(model, x, maps, steps=steps)}
    return Job(f"{name}, blur", model, nested_rows(x, 2 * steps + 1), contenders)


def resnet(make: Callable[..., Job]) -> Job:
    """ResNet-18-like, 64 px, 16 images, 64 steps."""
    torch.manual_seed(0)
    return make("ResNet-18-like 64 px, 16 images, 64 steps", resnet18().eval(), torch.rand(16, 3, 64, 64), 64)


def lenet(make: Callable[..., Job]) -> Job:
    """LeNet-5, 32 px, 64 images, 32 steps."""
    torch.manual_seed(0)
    return make("LeNet-5 32 px, 64 images, 32 steps", LeNet5().eval(), torch.rand(64, 1, 32, 32), 32)


def vit_job() -> Job:
    """ViT-tiny, 224 px, patch 32: a step a patch, 16 images."""
    torch.manual_seed(0)
    model = xaifast.models.VisionTransformer(224, 32, 1000, dim=192, depth=12, heads=3).eval()
    x, mask = torch.rand(16, 3, 224, 224), xaifast.grid_mask((224, 224), 32)
    scores = torch.randn(16, 49)

    def ours(**kwargs: object) -> Callable[[], object]:
        return lambda: xaifast.insertion_deletion(model, x, scores, steps=49, feature_mask=mask, **kwargs)

    contenders = {
        "pixels": ours(insertion_baseline=0.0),
        "TokenSelect": ours(insertion_baseline=0.0, removal=TokenSelect()),
        "TokenDrop": ours(removal=TokenDrop()),
    }
    return Job("ViT-tiny 224 px, 49 patches, 16 images, 49 steps", model, nested_rows(x, 98), contenders)


JOBS = {
    "resnet": partial(resnet, pixel_job),
    "resnet-blur": partial(resnet, blur_job),
    "lenet": partial(lenet, pixel_job),
    "lenet-blur": partial(lenet, blur_job),
    "vit": vit_job,
}


if __name__ == "__main__":
    main(__doc__, JOBS)
