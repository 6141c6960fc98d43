"""Which checkpoints stand for a whole run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("endpoints", "uniform", "update_norm", "all")


def choose(
    checkpoints: str | list[int], n_steps: int, update_norms: Callable[[], Tensor], length: int, caller: str
) -> list[int]:
    """Numbers of checkpoints, strictly ascending; see `Trajectory.select`.

    Args:
        checkpoints: A name, or numbers in 0..length-1.
        n_steps: Coarse steps.
        update_norms: Makes ``[length - 1]`` sizes of the steps.
        length: Number of checkpoints, at least 2.
        caller: Prefix of messages.
    """
    if isinstance(checkpoints, list):
        if len(checkpoints) < 2 or any(a >= b for a, b in zip(checkpoints, checkpoints[1:], strict=False)):
            raise ValueError(f"{caller}: checkpoints must be two or more, strictly ascending, got {checkpoints}")
        return checkpoints
    if checkpoints not in NAMES:
        names = ", ".join(f'"{name}"' for name in NAMES)
        raise ValueError(f"{caller}: checkpoints must be {names} or a list, got {checkpoints!r}")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"{caller}: n_steps must be a positive int, got {n_steps!r}")
    if checkpoints == "all":
        return list(range(length))
    if checkpoints == "endpoints":
        return [0, length - 1]
    along = torch.arange(length, dtype=torch.float64)
    if checkpoints == "update_norm":
        along[1:] = update_norms().cumsum(0)
    goals = torch.arange(1, n_steps, dtype=torch.float64) * (along[-1] / n_steps)
    nearest = (along[:, None] - goals).abs().argmin(0)  # the earlier of two as near
    return sorted({0, length - 1, *nearest.tolist()})
