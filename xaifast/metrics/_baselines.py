"""What a curve's removed features show: numbers, tensors, functions, and the named substrates of the literature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import BASELINE, normal_units
from ..removal import gaussian_blur
from ..removal.replace import resolve_baselines

NAMES = ("blur", "zero", "mean", "noise", "black")


def resolve_baseline(
    baseline: object,
    x: Tensor,  # [B, *feat]
    name: str,
    caller: str,
    *,
    seed: int = 0,
    first_index: int = 0,
) -> float | Tensor:
    """A number, or a tensor broadcastable to one input or of the inputs' rank, from what a user gives.

    ``"blur"``: `gaussian_blur`; ``"mean"``: of each image and channel; ``"noise"``: N(0, 1); ``"zero"``; ``"black"``:
    the smallest value of each input; a callable ``inputs -> [B, *feat]``.

    Raises:
        TypeError, ValueError: a kind, name, shape or dtype that does not fit.
    """
    if isinstance(baseline, str):
        if baseline not in NAMES:
            names = ", ".join(f'"{known}"' for known in NAMES)
            raise ValueError(
                f"{caller}: {name} must be a number, a tensor, a callable or one of {names}, got {baseline!r}"
            )
        return _named(baseline, x.detach(), name, caller, seed, first_index)
    if callable(baseline):
        with torch.no_grad():
            made = baseline(x.detach())
        if not isinstance(made, Tensor) or made.shape != x.shape:
            given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"{caller}: {name} must return a tensor of the inputs' shape {tuple(x.shape)}, got {given}"
            )
        baseline = made.to(x.device)
    if isinstance(baseline, bool) or not isinstance(baseline, int | float | Tensor):
        raise TypeError(
            f"{caller}: {name} must be a number, a tensor, a callable or a name, got {type(baseline).__name__}"
        )
    (resolved,), _ = resolve_baselines(baseline, (x,), f"{caller} ({name})")
    return resolved


def same_baseline(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether two resolved baselines show the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _named(baseline: str, x: Tensor, name: str, caller: str, seed: int, first_index: int) -> float | Tensor:
    if baseline == "zero":
        return 0.0
    if baseline == "black":
        return x.flatten(1).amin(1).view(-1, *(1,) * (x.dim() - 1))
    if not x.is_floating_point() or (baseline != "noise" and x.dim() != 4):
        raise ValueError(
            f'{caller}: {name}="{baseline}" needs floating {"inputs" if baseline == "noise" else "images [B, C, H, W]"}'
            f", got {x.dtype} {list(x.shape)}; give a number, a tensor or a callable"
        )
    if baseline == "noise":
        n = x[0].numel()
        drawn = normal_units(0, len(x), 1, n, domain=BASELINE, seed=seed, first_index=first_index)
        return drawn.view(x.shape).to(x)
    if baseline == "mean":
        return x.mean((2, 3), keepdim=True, dtype=torch.float64).to(x.dtype)
    return gaussian_blur(x)
