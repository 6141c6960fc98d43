"""What one update of a network's first layer did to its outputs, feature by feature."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from .occluder import Occluder, resolve_target

logger = logging.getLogger("xaifast")

_CALLER = "xaifast.occlude_update"
_DIRECTIONS = ("symmetric", "forward", "reverse")
_BOUNDS = {"float32": 1e-4, "float64": 1e-9, "tf32": 5e-3, "bf16": 2e-2}  # of the largest change in a sample of rows
_SAMPLE = 32


def occlude_update(
    model: nn.Module,
    old_state: Mapping[str, Tensor],
    new_state: Mapping[str, Tensor],
    inputs: Tensor,
    *,
    target: int | str | Tensor | None = None,
    feature_mask: Tensor | None = None,
    direction: str = "symmetric",
    first_layer: str | None = None,
    mode: str = "exact",
    precision: str | None = None,
    certified: bool = True,
    verify: bool = False,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    allow_training_mode: bool = False,
) -> Tensor:
    """What each feature's share of one parameter update did to a network's outputs.

    With W1 the first layer's weight, and theta, theta' the old and the new state::

        forward  F_i = f(x; theta') - f(x; theta' with i's columns of W1 as in theta)       undone at arrival
        reverse  R_i = f(x; theta with i's columns of W1 as in theta') - f(x; theta)        applied at departure
        symmetric    = (F_i + R_i) / 2

    In convolutions, patch embeddings and embedding tables, each place has a copy of the weight of its own (virtual
    untying): i's share is what its elements alone make of the update. Swapping the states negates symmetric results
    exactly (Inverse Property); a feature that is 0, or whose columns did not change, gets exactly 0. Values do not add
    up to ``f(x; theta') - f(x; theta)``: biases, later layers and interactions have no feature.

    Args:
        model: In evaluation mode; its own weights are not read or changed. Chains of Linear, BatchNorm1d, dropout and
            ReLU, LeakyReLU, ELU, Tanh, Sigmoid, SiLU or GELU are evaluated by propagating differences; other networks
            by running what follows a first Linear, Conv1d..3d or Embedding that reads the inputs.
        old_state, new_state: State dicts of the model.
        inputs: ``[B, ...]``; token ids ``[B, T]`` for embeddings.
        target: int, LongTensor ``[B]``, ``"predicted"`` (the new state's largest output), or None: all K outputs.
        feature_mask: Player ids, see `xaifast.grid_mask`; None makes every element a player.
        direction: ``"symmetric"``, ``"forward"`` or ``"reverse"``.
        first_layer: Path of the first layer, where it is not found.
        mode: ``"exact"``, or ``"linear"``: first order at the states that the direction reads, by gradients.
        precision: ``"float32"`` (activations of clean inputs in float64); ``"float64"``; ``"tf32"`` or ``"bf16"``:
            operands of a chain's products rounded so, on a CPU for checking alone. None: float64 where the model or the
            inputs are, else float32.
        certified: Where no unit of a ReLU chain changes its sign, use the Jacobian; results stay exact.
        verify: Evaluate up to 32 rows of each half a second time, in float64 by running the network, and log the error.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Rows a model call for networks that are no chain, or ``"auto"``.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        ``[B, M]``, or ``[B, M, K]`` for target None; float32, float64 for that precision. Errors relative to the
        largest values: for chains about 1e-6, tf32 5e-4, bf16 5e-3, whatever the size of the update. Other networks
        subtract outputs in float64, with an error of about 1e-6 of the outputs; use ``precision="float64"`` for small
        updates.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do.
        RuntimeError: ``verify`` found a larger error than the precision allows.

    Cost: for each state, clean inputs once in float64; then ``2 B M`` rows of the layers behind the first, of which
    zero inputs and certified rows are spared, in tiles of 8 MiB.

    Source: XtrAIn, arXiv 2606.10877; its equations were not available, these are derived from its properties.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> old = {name: t.clone() for name, t in model.state_dict().items()}
        >>> new = {**old, "weight": old["weight"] + torch.tensor([1.0, -2.0, 0.0])}
        >>> occlude_update(model, old, new, torch.ones(1, 3), target=1)
        tensor([[ 1., -2.,  0.]])
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"{_CALLER}: direction must be one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    if mode not in ("exact", "linear"):
        raise ValueError(f'{_CALLER}: mode must be "exact" or "linear", got {mode!r}')
    occluder = Occluder(
        model,
        inputs,
        feature_mask=feature_mask,
        first_layer=first_layer,
        precision=precision,
        certified=certified,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        allow_training_mode=allow_training_mode,
        caller=_CALLER,
    )
    occluder.check(old_state, "old_state")
    occluder.check(new_state, "new_state")
    delta = occluder.delta(old_state, new_state)
    new = occluder.at(new_state) if direction != "reverse" or target == "predicted" else None
    old = occluder.at(old_state) if direction != "forward" else None
    target = resolve_target(target, (old if new is None else new).logits, _CALLER)
    if mode == "linear":
        ends = [end for end in (new, old) if end is not None and (end is old or direction != "reverse")]
        return sum(end.linear(delta, target) for end in ends) / len(ends)
    halves = []
    if direction != "reverse":
        halves.append(new.undo(delta, target))
        if verify:
            _verify(occluder, new_state, delta, target, halves[-1], 1)
    if old is not None:
        halves.append(old.apply(delta, target))
        if verify:
            _verify(occluder, old_state, -delta, target, halves[-1], -1)
    return halves[0] if len(halves) == 1 else (halves[0] + halves[1]) / 2


def _verify(
    occluder: Occluder, state: Mapping[str, Tensor], delta: Tensor, target: Tensor | None, changes: Tensor, sign: int
) -> None:
    """Compare some rows with the network run in float64.

    Raises:
        RuntimeError: their error is too large.
    """
    exact = occluder.run_at(state, "float64")
    rows = exact.moving(delta)
    rows = rows[:: max(1, -(-len(rows) // _SAMPLE))]
    if len(rows) == 0:
        return
    expected = sign * exact.rows(delta, target, rows).flatten(0, 1)[rows]
    size = expected.abs().max()
    error = (changes.flatten(0, 1)[rows].double() - expected).abs().max()
    relative = float(error / size) if size > 0 else float(error)
    logger.info("%s: relative error %.1e in %d rows against float64", _CALLER, relative, len(rows))
    if not relative <= _BOUNDS[occluder.precision]:
        raise RuntimeError(
            f"{_CALLER}: the error in {len(rows)} rows against float64 must be at most "
            f'{_BOUNDS[occluder.precision]:.0e} of the largest change, got {relative:.1e}; use precision="float64"'
        )
