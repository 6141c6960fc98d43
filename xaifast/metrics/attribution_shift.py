"""Attribution shift: how far the other features' attributions move when some features are occluded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..evaluate import as_inputs
from ..model_state import check_deterministic
from ..removal.replace import resolve_baselines
from ..stream import Stream, auto_rows

_CALLER = "xaifast.metrics.attribution_shift"


def attribution_shift(
    explain: Callable[..., Tensor],
    inputs: Tensor,
    occluded: Tensor | Sequence[Tensor],
    *,
    baselines: float | Tensor = 0.0,
    additional_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    allow_training_mode: bool = False,
) -> Tensor:
    """Relative change of the attributions outside of an occluded set.

    With S the occluded features, phi(x) the attribution and x' the input where S shows the baseline::

        shift_j = phi_j(x) - phi_j(x')                     for j not in S
        result  = mean_j |shift_j| / mean_j |phi_j(x)|     over j not in S

    Occlusion of inputs moves the attributions of features that were not touched, because the model sees an input it was
    not trained on; attributions that occlude parameters see only what the input's own values do.

    Args:
        explain: ``explain(rows, *additional_args)``, floating, ``[b, ...]`` of the inputs' shape, or of images ``[b, H,
            W]`` or ``[b, 1, H, W]``; rows are explained together, each by itself.
        inputs: ``[B, ...]``.
        occluded: bool, True in S: ``[...]`` for all inputs, or ``[B, ...]``; axes of 1 are shared. Or a list of R such
            sets, each compared with the clean attribution, which is computed once.
        baselines: What occluded features show: a number or a tensor ``[...]`` or ``[B, ...]``. They are selected: NaN
            behind them cannot leak.
        additional_args: Passed on after the inputs; tensors with leading B go with their input (targets, for example).
        batch_size: Inputs explained in one call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        allow_training_mode: Allow active dropout and batch statistics in what ``explain`` holds.

    Returns:
        ``[B]``, or ``[B, R]`` for a list, in the explanation's dtype, at least float32; summed in float64. 0 is best;
        infinite where only the clean attribution is 0 outside of S, NaN where both are or S holds all features. A pixel
        of a map without channels is in S where any of its channels is.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; attributions that are not finite are named by
            input.

    Cost: R + 1 explanations an input.

    Source: attribution shift of XtrAIn (arXiv 2606.10877); the formula is derived from its definition in words.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, 3.0])
        >>> gated = lambda x: weight * x * x[:, :1]  # every attribution depends on feature 0
        >>> x = torch.ones(1, 3)
        >>> attribution_shift(gated, x, [torch.tensor([True, False, False]), torch.tensor([False, True, False])])
        tensor([[1., 0.]])
    """
    (x,) = as_inputs(inputs, _CALLER)
    if not callable(explain):
        raise TypeError(f"{_CALLER}: explain must be callable, got {type(explain).__name__}")
    several = isinstance(occluded, list | tuple)
    sets = [_as_set(mask, x) for mask in (occluded if several else [occluded])]
    if not sets:
        raise ValueError(f"{_CALLER}: occluded must hold at least one set, got an empty list")
    (baseline,), background = resolve_baselines(baselines, (x,), _CALLER)
    if background is not None:
        raise TypeError(f"{_CALLER}: baselines must be a number or a tensor, got a Background; give one of its rows")
    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'{_CALLER}: batch_size must be "auto" or a positive int, got {batch_size!r}')
    if not allow_training_mode:
        check_deterministic(explain, _CALLER)
    x, batch = x.detach(), x.shape[0]
    if batch_size == "auto":
        batch_size = auto_rows(x[0].numel() * x.element_size(), x.device, flat=x.dim() == 2)
    args = additional_args if isinstance(additional_args, tuple) else (additional_args,)
    args = () if additional_args is None else args
    shown = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand(x.shape)
    result = torch.full((batch, len(sets)), torch.nan, dtype=torch.float64, device=x.device)
    dtype = torch.float32

    def compare(start: int, stop: int) -> None:
        nonlocal dtype
        rows = x[start:stop]
        mine = tuple(
            arg[start:stop] if isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch else arg
            for arg in args
        )
        clean = _explained(explain, rows, mine, start)
        dtype = torch.promote_types(dtype, clean.dtype)
        for r, mask in enumerate(sets):
            mask = mask[start:stop]
            moved = _explained(explain, torch.where(mask, shown[start:stop], rows), mine, start)
            if moved.shape != clean.shape:
                raise ValueError(
                    f"{_CALLER}: explain must return the same shape for occluded inputs as for clean ones, "
                    f"{list(clean.shape)}, got {list(moved.shape)}"
                )
            kept = ~_as_map(mask, clean)
            shift = torch.where(kept, (clean.double() - moved.double()).abs(), 0).flatten(1).sum(1)
            size = torch.where(kept, clean.double().abs(), 0).flatten(1).sum(1)
            result[start:stop, r] = shift / size

    with Stream(
        batch, batch_size, show_progress=show_progress, description="attribution_shift", unit="input"
    ) as stream:
        stream.run(batch, compare)
    return (result if several else result[:, 0]).to(dtype)


def _as_set(mask: object, x: Tensor) -> Tensor:
    """One occluded set as bool ``[B, ...]``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{_CALLER}: occluded must be a bool tensor or a list of such, got {given}; compare, mask > 0")
    wide = mask[None] if mask.dim() == x.dim() - 1 else mask
    if wide.dim() != x.dim() or any(m not in (1, n) for m, n in zip(wide.shape, x.shape, strict=True)):
        raise ValueError(
            f"{_CALLER}: occluded must have the shape of an input {list(x.shape[1:])} or of the inputs "
            f"{list(x.shape)}, with 1 for axes it is shared along, got {list(mask.shape)}"
        )
    return wide.to(x.device).expand(x.shape)


def _as_map(mask: Tensor, phi: Tensor) -> Tensor:
    """The set as a map of the attributions: channels of a pixel together where these have none."""
    if mask.shape == phi.shape:
        return mask
    if mask.dim() == 4:
        together = mask.any(1, keepdim=phi.dim() == 4)
        if together.shape == phi.shape:
            return together
    raise ValueError(
        f"{_CALLER}: explain must return attributions of the rows' shape {list(mask.shape)}, or a map of images "
        f"without channels, got {list(phi.shape)}; spread those of players over their elements"
    )


def _explained(explain: Callable[..., Tensor], rows: Tensor, args: tuple, start: int) -> Tensor:
    phi = explain(rows, *args)
    if not isinstance(phi, Tensor) or not phi.is_floating_point() or phi.dim() == 0 or len(phi) != len(rows):
        given = f"{phi.dtype} {list(phi.shape)}" if isinstance(phi, Tensor) else type(phi).__name__
        raise ValueError(f"{_CALLER}: explain must return a floating tensor [{len(rows)}, ...], got {given}")
    bad = ~phi.isfinite().reshape(len(rows), -1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{_CALLER}: attributions must be finite, got NaN or infinity for input {start + int(bad.nonzero()[0])} or "
            "that input occluded; check the model and the explanation"
        )
    return phi.detach().to(rows.device)
