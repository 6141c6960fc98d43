"""At which points curves are taken and how their areas are computed: ours and four other tools'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Convention:
    """How a tool takes curves.

    Attributes:
        name: None for ours, else the tool.
        counts: ``(P, S) -> `` int64 counts of perturbed features, ascending to P; an int P.
        steps: ``(P, width) -> `` steps S where the user names none.
        area: ``(curves [..., N], fractions [..., N]) -> [...]``, float64.
        baselines: Of insertion and deletion where the user names none.
        has_start: Whether the unperturbed point is on the curve.
        channels: Whether every channel value of an image is a feature.
    """

    name: str | None
    counts: Callable[[int, int], Tensor]
    steps: Callable[[int, int], int]
    area: Callable[[Tensor, Tensor], Tensor]
    baselines: tuple[object, object] = (0.0, 0.0)
    has_start: bool = True
    channels: bool = False


def rounded_counts(n_features: int | Tensor, steps: int) -> Tensor:
    """k_s = floor(s P / S + 1/2) for s = 0..S: int64 ``[S+1]``, or ``[B, S+1]`` for P of each input ``[B]``.

    Example:
        >>> rounded_counts(5, 2).tolist()
        [0, 3, 5]
    """
    s = torch.arange(steps + 1, device="cpu")
    n = n_features[:, None] if isinstance(n_features, Tensor) else n_features
    return (2 * s * n + steps).div(2 * steps, rounding_mode="floor")


def trapezoid_area(curves: Tensor, fractions: Tensor) -> Tensor:
    """Area over the true fractions: sum_s (f_s - f_{s-1}) (y_s + y_{s-1}) / 2."""
    return torch.trapezoid(curves.double(), fractions.double(), dim=-1)


def even_area(curves: Tensor, fractions: Tensor) -> Tensor:
    """Mean of neighbours' means, whatever the widths: (sum - y_0 / 2 - y_N / 2) / N."""
    return torch.trapezoid(curves.double(), dx=1.0, dim=-1) / max(curves.shape[-1] - 1, 1)


def unit_area(curves: Tensor, fractions: Tensor) -> Tensor:
    """Area with every step one wide: sum - y_0 / 2 - y_N / 2."""
    return torch.trapezoid(curves.double(), dx=1.0, dim=-1)


def _even_counts(n_features: int, steps: int) -> Tensor:
    """0, k, 2 k, ... P with k = ceil(P / S): the last step is the rest."""
    step = -(-n_features // steps)
    return torch.arange(-(-n_features // step) + 1, device="cpu").mul(step).clamp(max=n_features)


def _truncated_counts(n_features: int, steps: int) -> Tensor:
    """The integer parts of S + 1 evenly spaced numbers from 0 to P, as NumPy spaces them."""
    return torch.from_numpy(np.linspace(0, n_features, steps + 1, dtype=np.int32).astype(np.int64))


OURS = Convention(None, rounded_counts, lambda n, width: 50, trapezoid_area, ("blur", 0.0))
CONVENTIONS = {
    "rise": Convention("rise", _even_counts, lambda n, width: math.ceil(n / width), even_area, ("blur", 0.0)),
    "torchcam": Convention("torchcam", _even_counts, lambda n, width: 20, trapezoid_area),
    "xplique": Convention("xplique", _truncated_counts, lambda n, width: 10, even_area),
    "quantus": Convention(
        "quantus", lambda n, steps: _even_counts(n, steps)[1:], lambda n, width: n, unit_area, (None, "black"),
        has_start=False, channels=True,
    ),
}  # fmt: skip


def resolve_convention(compat: str | None, caller: str) -> Convention:
    """The convention a user's argument means."""
    if compat is None:
        return OURS
    if compat not in CONVENTIONS:
        raise ValueError(f"{caller}: compat must be None or one of {', '.join(CONVENTIONS)}, got {compat!r}")
    return CONVENTIONS[compat]


def resolve_steps(steps: object, n_features: int, default: int, caller: str) -> int:
    """Steps S with 1 <= S <= P; the default is lowered to P.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    if steps is None:
        return min(default, n_features)
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise TypeError(f"{caller}: steps must be an int, got {type(steps).__name__}")
    if not 1 <= steps <= n_features:
        raise ValueError(
            f"{caller}: steps must lie in 1..{n_features}, the number of features, got {steps}; leave it out for "
            f"{min(default, n_features)}"
        )
    return int(steps)
