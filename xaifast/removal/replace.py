"""Removal by replacement: an absent element shows a baseline, a blur, or background rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.plan import SelectPlan, broadcasts, plan_selection
from ..players import Players
from .base import Background, Prepared, Removal


def gaussian_blur(images: Tensor, kernel: int = 11, sigma: float = 5.0) -> Tensor:
    """Separable Gaussian blur, borders replicated; kernel and width are those of RISE's insertion substrate.

    Args:
        images: ``[B, C, H, W]``, floating.
        kernel: Taps, odd.
        sigma: Standard deviation, pixels.

    Returns:
        ``[B, C, H, W]``; weights sum to one, sums are taken in float32 at least. An image has the same bits alone and
        among others. Cost: ``2 * kernel`` multiply-adds a pixel.

    Raises:
        ValueError: other shapes or dtypes.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"xaifast.gaussian_blur: images must be floating [B, C, H, W], got {images.dtype} {list(images.shape)}; "
            "convert them, or remove by baselines"
        )
    half = kernel // 2
    weights = [math.exp(-0.5 * ((i - half) / sigma) ** 2) for i in range(kernel)]
    total = math.fsum(weights)
    blurred = images.to(torch.promote_types(images.dtype, torch.float32))
    # Sums of shifted images, for a convolution's last bits differ between an image alone and among others.
    for dim, padding in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        padded = F.pad(blurred, padding, mode="replicate")
        shifted = [padded.narrow(dim, i, images.shape[dim]) for i in range(kernel)]
        blurred = shifted[0] * (weights[0] / total)
        for image, weight in zip(shifted[1:], weights[1:], strict=True):
            blurred.add_(image, alpha=weight / total)
    return blurred.to(images.dtype)


def resolve_baselines(
    baselines: object, inputs: tuple[Tensor, ...], caller: str
) -> tuple[tuple[float | Tensor, ...], tuple[Tensor, ...] | None]:
    """Check baselines; return one an input, and background rows instead where a `Background` was given.

    Raises:
        TypeError: kinds or dtypes do not fit.
        ValueError: shapes or the number of baselines do not fit.
    """
    if isinstance(baselines, Background):
        rows = baselines.rows if isinstance(baselines.rows, tuple) else (baselines.rows,)
        _check_number(rows, inputs, "Background", caller)
        for part, x in zip(rows, inputs, strict=True):
            if not isinstance(part, Tensor) or part.shape[1:] != x.shape[1:] or part.shape[0] == 0:
                shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(
                    f"{caller}: Background rows must have shape [R, ...] with R >= 1 and the shape of one input "
                    f"{tuple(x.shape[1:])}, got {shape}"
                )
        if len({part.shape[0] for part in rows}) > 1:
            raise ValueError(
                f"{caller}: all parts of a Background must have the same number of rows, got "
                f"{[part.shape[0] for part in rows]}"
            )
        return (0.0,) * len(inputs), tuple(
            _as_dtype(part, x, "Background rows", caller) for part, x in zip(rows, inputs, strict=True)
        )
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    if len(given) == 1 and isinstance(given[0], int | float):
        given = given * len(inputs)
    _check_number(given, inputs, "baselines", caller)
    resolved = []
    for baseline, x in zip(given, inputs, strict=True):
        if isinstance(baseline, Tensor):
            shape = x.shape if baseline.dim() == x.dim() else x.shape[1:]
            if not broadcasts(baseline.shape, shape):
                raise ValueError(
                    f"{caller}: baselines must be a number or broadcastable to one input {tuple(x.shape[1:])} or to "
                    f"the batch {tuple(x.shape)}, got shape {tuple(baseline.shape)}"
                )
            resolved.append(_as_dtype(baseline, x, "baselines", caller))
        elif isinstance(baseline, int | float):
            if not x.dtype.is_floating_point and not float(baseline).is_integer():
                raise TypeError(
                    f"{caller}: baselines must be integers for inputs of dtype {x.dtype}, got {baseline}; "
                    "pass floating inputs or an integer baseline"
                )
            resolved.append(baseline)
        else:
            raise TypeError(
                f"{caller}: baselines must be a number, a tensor, a tuple of these or xaifast.Background, "
                f"got {type(baseline).__name__}"
            )
    return tuple(resolved), None


def _check_number(given: tuple, inputs: tuple[Tensor, ...], name: str, caller: str) -> None:
    if len(given) != len(inputs):
        raise ValueError(f"{caller}: {name} must hold one entry an input ({len(inputs)}), got {len(given)}")


def _as_dtype(baseline: Tensor, x: Tensor, name: str, caller: str) -> Tensor:
    if baseline.dtype.is_floating_point and not x.dtype.is_floating_point:
        raise TypeError(
            f"{caller}: {name} of dtype {baseline.dtype} cannot stand in inputs of dtype {x.dtype}; "
            "pass floating inputs or integer baselines"
        )
    if baseline.device != x.device:
        raise ValueError(
            f"{caller}: {name} must be on the inputs' device {x.device}, got {baseline.device}; move it with .to()"
        )
    return baseline.detach().to(x.dtype)


def row_bytes(plan: SelectPlan) -> int:
    """Bytes of one masked row."""
    return plan.x.shape[1] * plan.x.element_size()


def empty_rows(plan: SelectPlan, n_rows: int) -> Tensor:
    """A buffer of ``n_rows`` masked rows in the plan's layout."""
    shape, x = (n_rows, *plan.shape), plan.x
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=plan.memory_format)


def slice_background(plan: SelectPlan, start: int, stop: int) -> SelectPlan:
    """The plan with background rows ``[start, stop)`` only."""
    return replace(plan, baseline=plan.baseline[..., start:stop, :].contiguous())


@dataclass(frozen=True)
class PreparedRows(Prepared):
    """Rows selected between inputs and baselines, one plan an input tensor."""

    plans: tuple[SelectPlan, ...]

    @property
    def n_background(self) -> int:
        """R of the background, 1 without one."""
        return self.plans[0].n_background

    @property
    def row_bytes(self) -> int:
        """Bytes of a row over all inputs."""
        return sum(row_bytes(plan) for plan in self.plans)

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """Row buffers in each input's memory layout."""
        return tuple(empty_rows(plan, n_rows) for plan in self.plans)

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One kernel an input tensor."""
        return tuple(plan.rows(code, start, stop, out=buffer) for plan, buffer in zip(self.plans, out, strict=True))

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The model on the masked inputs."""
        return forward(*rows, *args)

    def background_slice(self, start: int, stop: int) -> PreparedRows:
        """Only background rows ``[start, stop)``."""
        return PreparedRows(tuple(slice_background(plan, start, stop) for plan in self.plans))


@dataclass(frozen=True)
class Replace(Removal):
    """Absent elements take the baseline's value, by selection: what is absent cannot leak.

    Attributes:
        substrate: Makes the baseline from the inputs, ``[B, ...] -> [B, ...]``; None takes ``baselines``.
    """

    substrate: Callable[[Tensor], Tensor] | None = None

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedRows:
        """Lay out inputs, baselines and masks as the kernel reads them."""
        background = None
        if self.substrate is None:
            resolved, background = resolve_baselines(baselines, inputs, caller)
        else:
            if not (isinstance(baselines, int | float) and baselines == 0):
                raise ValueError(
                    f"{caller}: baselines must be left out when removal makes its own, got {type(baselines).__name__}"
                )
            resolved = tuple(self._substitute(x, caller) for x in inputs)
        plans = []
        for i, (x, mask, baseline) in enumerate(zip(inputs, players.masks, resolved, strict=True)):
            rows = None if background is None else background[i]
            plans.append(plan_selection(x.detach(), mask, baseline, background=rows, memory_format=_layout(x)))
        return PreparedRows(tuple(plans))

    def _substitute(self, x: Tensor, caller: str) -> Tensor:
        with torch.no_grad():
            made = self.substrate(x.detach())
        if not isinstance(made, Tensor) or made.shape != x.shape:
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"{caller}: removal must return a tensor of the inputs' shape {tuple(x.shape)}, got {shape}"
            )
        return made.to(x)


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format rows are made in: the input's own."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
