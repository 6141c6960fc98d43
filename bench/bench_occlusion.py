"""Occlusion and RISE as multiples of the forward floor, beside Captum and RISE's own loop.

The floor is the job's number of model evaluations on preassembled inputs at the fastest batch of 16 to 256. Floor,
contenders and peers are interleaved in every round; ratios are taken within a round; medians are reported. Everyone's
maps are compared before anything is timed.

    python bench/bench_occlusion.py [--jobs occlusion rise lenet] [--rounds 7] [--no-peers] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_curves import resnet18
from bench_jobs import main
from jobs import Job, LeNet5
from torch import Tensor, nn

import xaifast
from xaifast.removal.smooth_masks import MaskLaw

WINDOW, STRIDE = 8, 4


def occluded_rows(x: Tensor) -> Tensor:
    """Every window of every image, for the floor."""
    rows = []
    for image in x:
        for top in range(0, x.shape[2] - WINDOW + 1, STRIDE):
            for left in range(0, x.shape[3] - WINDOW + 1, STRIDE):
                row = image.clone()
                row[:, top : top + WINDOW, left : left + WINDOW] = 0
                rows.append(row)
    return torch.stack(rows)


def captum_occlusion(model: nn.Module, x: Tensor, per_eval: int) -> Callable[[], Tensor]:
    """Captum, so many windows a call."""

    def explain() -> Tensor:
        from captum.attr import Occlusion

        shape, strides = (x.shape[1], WINDOW, WINDOW), (x.shape[1], STRIDE, STRIDE)
        return Occlusion(model).attribute(x, shape, strides, target=3, perturbations_per_eval=per_eval)

    return explain


@torch.inference_mode()
def rise_loop(model: nn.Module, x: Tensor, masks: Tensor, batch: int) -> Tensor:
    """All masks stored, an image after the other: the way of RISE's code."""
    maps = []
    for image in x:
        scores = [model(part[:, None] * image).softmax(1) for part in masks.split(batch)]
        maps.append(torch.cat(scores)[:, 3] @ masks.flatten(1))
    return torch.stack(maps).view(len(x), *masks.shape[1:]) / (len(masks) * 0.5)


def occlusion_job() -> Job:
    """ResNet-18's layers, 64 px, window 8, stride 4: 225 windows an image, 4 images."""
    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.randn(4, 3, 64, 64)

    def ours(**options: object) -> Callable[[], Tensor]:
        return lambda: xaifast.occlusion(model, x, window=WINDOW, stride=STRIDE, target=3, **options)

    contenders = {"occlusion": ours(), "receptive fields": ours(receptive_field=True)}
    others = {f"Captum, {n} a call": captum_occlusion(model, x, n) for n in (1, 8, 32)}
    check({**contenders, **others})
    return Job("ResNet-18 64 px, window 8, stride 4, 4 images", model, occluded_rows(x), contenders, others)


def rise_job(name: str, model: nn.Module, x: Tensor, n_masks: int) -> Job:
    """RISE with 7 x 7 cells."""
    law = MaskLaw(tuple(x.shape[2:]), (7, 7), 0.5, 0)
    grids, places = law.draw(0, n_masks)
    masks = law.enlarge(grids.float(), places)
    contenders = {"rise": lambda: xaifast.rise(model, x, n_masks=n_masks, target=3)}
    others = {"RISE's loop, masks given": lambda: rise_loop(model, x, masks, 100)}
    check({**contenders, **others})
    rows = torch.cat([masks[:, None] * image for image in x])
    return Job(f"{name}, {n_masks} masks", model, rows, contenders, others)


def resnet_rise() -> Job:
    """ResNet-18's layers, 64 px, 4 images."""
    torch.manual_seed(0)
    return rise_job("RISE, ResNet-18 64 px, 4 images", resnet18().eval(), torch.rand(4, 3, 64, 64), 256)


def lenet_rise() -> Job:
    """LeNet-5, 32 px, 16 images."""
    torch.manual_seed(0)
    return rise_job("RISE, LeNet-5 32 px, 16 images", LeNet5().eval(), torch.rand(16, 1, 32, 32), 1000)


JOBS = {"occlusion": occlusion_job, "rise": resnet_rise, "lenet": lenet_rise}


def check(contenders: dict[str, Callable[[], Tensor]]) -> None:
    """Everyone computes the same maps."""
    (first, expected), *others = [(name, explain()) for name, explain in contenders.items()]
    for name, maps in others:
        if (maps - expected).abs().max() > 1e-4 * expected.abs().max() + 1e-6:
            raise AssertionError(f"{name} has other maps than {first}, by {(maps - expected).abs().max().item():g}")


if __name__ == "__main__":
    main(__doc__, JOBS)
