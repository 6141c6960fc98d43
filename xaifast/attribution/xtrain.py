"""XtrAIn: what training did to each input feature's part in an output, by occluding updates of the first layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from ..evaluate import as_inputs
from ..players import Players, resolve_players
from ..stream import Stream, auto_rows
from ..trajectory import Trajectory
from ..trajectory.layout import unwrap
from ._xtrain_walk import Batches, Rule, Walk, walk
from .occlude import resolve_target
from .xtrain_result import XtrainResult

_CALLER = "xaifast.xtrain"
_CHOICES = {
    "variant": ("xtrain", "xstep", "xtrain+"),
    "direction": ("symmetric", "forward", "reverse"),
    "context": ("endpoint", "old", "new"),
    "gate": ("step", "step_feature", "class_update"),
    "mode": ("exact", "linear"),
}
_SAMPLE = 4  # inputs that `verify` evaluates again


def xtrain(
    model: nn.Module,
    traj: Trajectory,
    inputs: Tensor,
    *,
    target: int | str | Tensor,
    variant: str = "xtrain",
    feature_mask: Tensor | None = None,
    checkpoints: str | Sequence[int] | None = None,
    direction: str = "symmetric",
    context: str = "endpoint",
    gate: str = "step",
    mode: str = "exact",
    first_layer: str | None = None,
    include_rest: bool = False,
    per_step: bool = False,
    verify: bool = False,
    precision: str | None = None,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    allow_training_mode: bool = False,
) -> XtrainResult:
    """Attributions from a recorded training run: parameter updates are occluded, not inputs.

    With theta_0..theta_T the checkpoints, W1 the first layer's weight and c the target::

        F_i = f_c(x; theta_t+1) - f_c(x; theta_t+1 with i's columns of W1 as in theta_t)     undone at arrival
        R_i = f_c(x; theta_t with i's columns of W1 as in theta_t+1) - f_c(x; theta_t)       applied at departure
        A_i^t = (F_i + R_i) / 2          values_i = sum_t m_t A_i^t

    where i is a player, in convolutions and embeddings with a copy of the weight at each place of its own (virtual
    untying). Reversing the run negates every A_i^t exactly (Inverse Property); a player whose elements are 0, or whose
    columns did not change, gets exactly 0. The sum is not complete: ``residual`` says what is left.

    Args:
        model: The network that was recorded, in evaluation mode; its own weights are not read or changed.
        traj: At least two checkpoints of it.
        inputs: ``[B, ...]``, preprocessed as in training; token ids for embeddings.
        target: int, LongTensor ``[B]``, or ``"predicted"``: the largest logit at the last checkpoint used.
        variant: ``"xtrain"`` adds up all steps (m_t = 1); ``"xstep"`` coarse steps between few checkpoints;
            ``"xtrain+"`` the steps that ``gate`` lets pass.
        feature_mask: Player ids, see `xaifast.grid_mask`; None makes every element a player.
        checkpoints: Of ``"xstep"`` (None: ``"update_norm"``) and, if not all, ``"xtrain+"``: ``"endpoints"``,
            ``"uniform"``, ``"update_norm"`` (8 steps, equal arc length of the first layer), or ascending numbers;
            ``traj.select`` makes others.
        direction: ``"symmetric"`` (above), ``"forward"`` (F alone) or ``"reverse"`` (R alone).
        context: Biases and later layers in both halves: ``"endpoint"``: as at the end of its own; ``"old"``: as in
            theta_t; ``"new"``: as in theta_t+1. Reversing a run also swaps the last two.
        gate: ``"step"``: m_t = 1 where f_c grew from theta_t to theta_t+1. ``"step_feature"``: of these, max(A_i, 0).
            ``"class_update"``: A_i of class c's part of the update alone, which must have been recorded.
        mode: ``"exact"``, or ``"linear"``: first order, A_i = x_i (g_t + g_t+1)^T d_i / 2 with g the gradient by the
            first layer's output; a forward and a backward pass a checkpoint.
        first_layer: Name of the first layer, where it is not found.
        include_rest: One more player behind the others, everything but W1, exact in both modes, with its own
            checkpoints' values in every context.
        per_step: Keep every A_i^t: ``S B M`` numbers.
        verify: Evaluate up to 4 inputs a second time, by running the network in float64, and report the error.
        precision: ``"float32"`` (activations of clean inputs in float64), ``"float64"``, ``"tf32"``, ``"bf16"``; None:
            float64 where the model or the inputs are.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Rows a model call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        `XtrainResult`; values in float32 (float64 for that precision), added up in float64.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; a run of another architecture by the tensor
            that differs.
        xaifast.trajectory.TrajectoryError: a checkpoint is missing or corrupt.

    Cost: a base evaluation a checkpoint and 2 M occluded rows a step and input, of which rank-one updates, zeros and
    certified rows spare most (`xaifast.occlude_update`). Each checkpoint is read once. Memory: ``B M`` numbers and a
    chunk of inputs. An input's last bits may depend on the rows computed with it, as those of matrix products do.

    Source: XtrAIn, arXiv 2606.10877; its equations were not available and are derived (docs/xtrain.md).

    Example:
        >>> model, traj = torch.nn.Linear(3, 2), xaifast.Trajectory()
        >>> _ = traj.record(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([1.0, -2.0, 0.0]))
        >>> _ = traj.record(model)
        >>> xaifast.xtrain(model, traj, torch.ones(1, 3), target=1).values
        tensor([[ 1., -2.,  0.]])
    """
    given = dict(variant=variant, direction=direction, context=context, gate=gate, mode=mode)
    for name, value in given.items():
        if value not in _CHOICES[name]:
            known = ", ".join(f'"{choice}"' for choice in _CHOICES[name])
            raise ValueError(f"{_CALLER}: {name} must be one of {known}, got {value!r}")
    if variant != "xtrain+" and gate != "step":
        raise ValueError(f'{_CALLER}: gate belongs to variant="xtrain+", got {gate!r} with {variant!r}; leave it out')
    if target is None:
        raise ValueError(
            f'{_CALLER}: target must be an int, a LongTensor [B] or "predicted", got None; call once for each output'
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(traj, Trajectory):
        raise TypeError(f"{_CALLER}: traj must be an xaifast.Trajectory, got {type(traj).__name__}")
    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'{_CALLER}: batch_size must be "auto" or a positive int, got {batch_size!r}')
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{_CALLER}: inputs must be a tensor [B, ...], got {type(inputs).__name__}")
    (x,) = as_inputs(inputs, _CALLER)
    model, x = unwrap(model), x.detach()
    players = resolve_players(feature_mask, (x,), _CALLER)
    precision = precision or _precision(model, x)
    options = dict(first_layer=first_layer, batch_size=batch_size, allow_training_mode=allow_training_mode)
    batches = Batches(model, x, players, additional_forward_args, caller=_CALLER, precision=precision, **options)
    layer = batches(0, 1).occluder.weight_name
    chosen = _checkpoints(traj, variant, checkpoints, layer)

    rows = auto_rows(8 * x[0].numel(), x.device, flat=x.dim() == 2)
    rows = rows if batch_size == "auto" else min(rows, batch_size)
    stream = Stream(len(x) * len(chosen), rows, show_progress=show_progress, description="xtrain", unit="input")
    states = traj.states(chosen)
    first = next(states)
    logits = batches.logits(traj[chosen[-1]] if isinstance(target, str) else first, rows)
    targets = resolve_target(target, logits, _CALLER)

    parts, order = None, torch.arange(len(x), device=x.device)
    if gate == "class_update":
        parts, order = _class_parts(traj, chosen, layer), targets.argsort(stable=True)
        batches = batches.take(order)
    rule = Rule(direction, context, gate if variant == "xtrain+" else None, mode, include_rest, per_step)
    dtype = torch.float64 if precision == "float64" else torch.float32
    made = dict(n_columns=players.n_players + include_rest, n_steps=len(chosen) - 1, rule=rule, parts=parts)
    walks = [Walk(batches, targets[order], stream=stream, dtype=dtype, **made)]
    if verify:
        sample = torch.arange(0, len(x), -(-len(x) // _SAMPLE), device=x.device)  # places in the order
        plain = batches.take(sample, plain=True)
        quiet = Stream(0, rows, show_progress=False, description="", unit="")
        walks.append(Walk(plain, targets[order[sample]], stream=quiet, dtype=torch.float64, **made))
    with stream:
        walk(chain([first], states), walks)
    error = _relative(walks[0].values[sample], walks[1].values) if verify else None
    return _result(walks[0], order, error, variant, chosen, targets, players, x, dtype)


def _result(
    done: Walk,
    order: Tensor,
    error: float | None,
    variant: str,
    chosen: list[int],
    targets: Tensor,
    players: Players,
    x: Tensor,
    dtype: torch.dtype,
) -> XtrainResult:
    """In the order in which inputs were given."""
    back = order.argsort()
    growth = torch.where(done.gates, done.logits.diff(dim=0), 0).sum(0)
    return XtrainResult(
        values=done.values[back].to(dtype),
        residual=(growth - done.values.sum(1))[back].to(dtype),
        per_step=None if done.per_step is None else done.per_step[:, back],
        gates=done.gates[:, back] if variant == "xtrain+" else None,
        logits=done.logits[:, back],
        steps=list(pairwise(chosen)),
        variant=variant,
        target=targets,
        certified=done.certified,
        error=error,
        _players=players,
        _inputs=x,
        _clamped=done.clamped,
    )


def _checkpoints(traj: Trajectory, variant: str, wanted: str | Sequence[int] | None, layer: str) -> list[int]:
    """Numbers of the checkpoints to use."""
    if len(traj) < 2:
        raise ValueError(f"{_CALLER}: traj must hold two checkpoints or more, got {len(traj)}; record after steps too")
    if variant == "xtrain" and wanted is not None:
        raise ValueError(
            f'{_CALLER}: variant="xtrain" adds up all steps, got checkpoints={wanted!r}; leave it out, or use "xstep"'
        )
    if wanted is None:
        wanted = "update_norm" if variant == "xstep" else "all"
    return traj.select(wanted, layer=layer if layer in traj.parameters else None)


def _class_parts(traj: Trajectory, chosen: list[int], layer: str) -> Callable[[int], Tensor]:
    """Parts ``[K, *shape]`` of the update of a coarse step, the sum of those of its steps."""

    def parts(step: int) -> Tensor:
        total = torch.zeros(0)
        for t in range(chosen[step], chosen[step + 1]):
            recorded = traj.class_updates(t).get(layer)
            if recorded is None:
                raise ValueError(
                    f'{_CALLER}: gate="class_update" needs the part of each class in every update of {layer}, got none '
                    f"for step {t}; pass class_updates to Trajectory.record, or use another gate"
                )
            new = recorded.parts.double()
            if len(total) < len(new):  # a step without the last classes may have been recorded with fewer
                total = torch.cat((total.reshape(len(total), *new.shape[1:]), new.new_zeros(new[len(total) :].shape)))
            total[: len(new)] += new
        return total

    return parts


def _precision(model: nn.Module, x: Tensor) -> str:
    wide = x.dtype == torch.float64 or any(p.dtype == torch.float64 for p in model.parameters())
    return "float64" if wide else "float32"


def _relative(values: Tensor, exact: Tensor) -> float:
    size = exact.abs().max()
    return float((values - exact).abs().max() / size) if size > 0 else 0.0
