"""Max-sensitivity: how far an explanation moves when its input moves a little."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from ..evaluate import as_inputs
from ..model_state import check_deterministic
from ..noise import SENSITIVITY, check_seed, uniform_units
from ..stream import Stream, auto_rows

_CALLER = "xaifast.metrics.max_sensitivity"
_Tensors = tuple[Tensor, ...]


def max_sensitivity(
    explain: Callable,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    radius: float = 0.02,
    n_samples: int = 10,
    norm: str | float = "fro",
    perturb: Callable | None = None,
    seed: int = 0,
    first_index: int = 0,
    additional_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    allow_training_mode: bool = False,
) -> Tensor:
    """Largest relative change of an explanation within a small box around the input, over random samples.

    sensitivity[b] = max_n ||E(x_b + d_bn) - E(x_b)|| / ||E(x_b)||, d uniform in [-radius, radius] in every element. For
    an explanation of zeros the change itself, not its ratio, is given.

    Args:
        explain: ``explain(*inputs_rows, *additional_args) -> [b, ...]`` or a tuple of such, floating; rows are
            explained together, each by itself. It may use gradients.
        inputs: Floating tensor ``[B, ...]``, or a tuple of such.
        radius: Half side of the box, in the inputs' units.
        n_samples: Perturbations of each input.
        norm: ``"fro"`` (Euclidean, over all elements of an explanation), or p >= 1 of a p-norm, ``math.inf`` included.
        perturb: Instead of the box, a function of the inputs repeated ``[u, ...]`` (a tuple for tuples), where samples
            of an input follow each other, to perturbed inputs of the same shapes; it is called once a chunk, and
            ``radius`` is not used.
        seed: Of the perturbations, 0..2**63-1.
        first_index: Data-set index of the first input: perturbation n of an input depends on seed, its index and n.
        additional_args: Passed on after the inputs; tensors with leading B go with their input (targets, for example).
        batch_size: Inputs explained in one call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        allow_training_mode: Allow active dropout and batch statistics in what ``explain`` holds.

    Returns:
        ``[B]`` in the explanation's floating dtype, at least float32, from norms in float64; 0 is best.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; explanations that are not finite are named
            by input.

    Cost: ``n_samples + 1`` explanations an input.

    Source: Yeh, Hsieh, Suggala, Inouye and Ravikumar, "On the (in)fidelity and sensitivity of explanations", NeurIPS
    2019, Definition 3.1, divided by the explanation's norm as in Captum's ``sensitivity_max``.

    Example:
        >>> x = torch.rand(3, 5)
        >>> max_sensitivity(lambda rows: torch.ones_like(rows), x)
        tensor([0., 0., 0.])
    """
    inputs = as_inputs(inputs, _CALLER)
    order = _check(explain, inputs, radius, n_samples, norm, perturb, batch_size)
    check_seed(seed, first_index, _CALLER)
    if not allow_training_mode:
        check_deterministic(explain, _CALLER)
    inputs = tuple(x.detach() for x in inputs)
    args = additional_args if isinstance(additional_args, tuple) else (additional_args,)
    args = () if additional_args is None else args
    batch, device, n_samples = inputs[0].shape[0], inputs[0].device, int(n_samples)
    if batch_size == "auto":
        row_bytes = sum(x[0].numel() * x.element_size() for x in inputs)
        batch_size = auto_rows(row_bytes, device, flat=all(x.dim() == 2 for x in inputs))

    clean: _Tensors | None = None
    changes = torch.zeros(batch * n_samples, dtype=torch.float64, device=device)

    def explain_clean(start: int, stop: int) -> None:
        nonlocal clean
        rows = tuple(x[start:stop].clone() for x in inputs)  # explain may write to its rows
        part = _explained(explain, rows, args, torch.arange(start, stop, device="cpu"), batch)
        if clean is None:
            clean = tuple(e.new_empty((batch, *e.shape[1:])) for e in part)
        for whole, e in zip(clean, part, strict=True):
            whole[start:stop] = e

    def explain_samples(start: int, stop: int) -> None:
        owner = torch.arange(start, stop, device="cpu") // n_samples
        rows = tuple(x[owner.to(device)] for x in inputs)
        if perturb is None:
            rows = _in_box(rows, radius, start, stop, n_samples, seed, first_index)
        else:
            rows = _by_user(perturb, rows)
        part = _explained(explain, rows, args, owner, batch)
        shapes = [tuple(e.shape[1:]) for e in part]
        if shapes != [tuple(e.shape[1:]) for e in clean]:
            raise ValueError(
                f"{_CALLER}: explain must return the same shapes for perturbed inputs as for clean ones "
                f"{[tuple(e.shape[1:]) for e in clean]}, got {shapes}"
            )
        moved = (e.double() - whole[owner.to(e.device)].double() for e, whole in zip(part, clean, strict=True))
        changes[start:stop] = _norms(moved, order).to(device)

    with Stream(
        batch * (n_samples + 1), batch_size, show_progress=show_progress, description="max_sensitivity",
        unit="explanation",
    ) as stream:  # fmt: skip
        stream.run(batch, explain_clean)
        stream.run(batch * n_samples, explain_samples)
    size = _norms((e.double() for e in clean), order).to(device)
    dtype = torch.float32
    for e in clean:
        dtype = torch.promote_types(dtype, e.dtype)
    return (changes.view(batch, n_samples).amax(1) / torch.where(size > 0, size, 1)).to(dtype)


def _check(
    explain: object,
    inputs: _Tensors,
    radius: object,
    n_samples: object,
    norm: object,
    perturb: object,
    batch_size: object,
) -> float:
    """Check arguments; return the order of the norm."""
    for name, given in (("explain", explain), ("perturb", perturb)):
        if not callable(given) and not (name == "perturb" and given is None):
            raise TypeError(f"{_CALLER}: {name} must be callable, got {type(given).__name__}")
    for x in inputs:
        if not x.is_floating_point():
            raise TypeError(f"{_CALLER}: inputs must be floating to be perturbed, got {x.dtype}; convert them")
    if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 < radius < math.inf:
        raise ValueError(f"{_CALLER}: radius must be a positive number, got {radius!r}")
    if isinstance(n_samples, bool) or not isinstance(n_samples, Integral) or n_samples < 1:
        raise ValueError(f"{_CALLER}: n_samples must be a positive int, got {n_samples!r}")
    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'{_CALLER}: batch_size must be "auto" or a positive int, got {batch_size!r}')
    order = 2.0 if norm == "fro" else norm
    if isinstance(order, bool) or not isinstance(order, Real) or not order >= 1:
        raise ValueError(f'{_CALLER}: norm must be "fro" or a number of at least 1, got {norm!r}')
    return float(order)


def _explained(explain: Callable, rows: _Tensors, args: tuple, owner: Tensor, batch: int) -> _Tensors:
    """Explanations of rows, checked; tensors of ``args`` with leading B follow the rows' inputs."""
    mine = tuple(
        arg[owner.to(arg.device)] if isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch else arg
        for arg in args
    )
    made = explain(*rows, *mine)
    made = made if isinstance(made, tuple) else (made,)
    for e in made:
        if not isinstance(e, Tensor) or not e.is_floating_point() or e.dim() == 0 or e.shape[0] != len(owner):
            given = f"{e.dtype} {list(e.shape)}" if isinstance(e, Tensor) else type(e).__name__
            raise ValueError(
                f"{_CALLER}: explain must return floating tensors [b, ...] for the b = {len(owner)} rows it was given, "
                f"got {given}"
            )
        bad = ~e.isfinite().reshape(len(owner), -1).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"{_CALLER}: explanations must be finite, got NaN or infinity for input "
                f"{int(owner[int(bad.nonzero()[0])])} or a perturbation of it; check the model and the explanation"
            )
    return tuple(e.detach() for e in made)


def _in_box(
    rows: _Tensors, radius: float, start: int, stop: int, n_samples: int, seed: int, first_index: int
) -> _Tensors:
    sizes = [x[0].numel() for x in rows]
    drawn = uniform_units(start, stop, n_samples, sum(sizes), domain=SENSITIVITY, seed=seed, first_index=first_index)
    moves = (radius * (2 * drawn - 1)).split(sizes, 1)
    return tuple(x + move.reshape(x.shape).to(x) for x, move in zip(rows, moves, strict=True))


def _by_user(perturb: Callable, rows: _Tensors) -> _Tensors:
    made = perturb(rows if len(rows) > 1 else rows[0])
    made = made if isinstance(made, tuple) else (made,)
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in made]
    if shapes != [tuple(x.shape) for x in rows]:
        raise ValueError(
            f"{_CALLER}: perturb must return tensors of the shapes it was given {[tuple(x.shape) for x in rows]}, got "
            f"{shapes}"
        )
    return made


def _norms(parts: object, order: float) -> Tensor:
    """Norms ``[b]`` of rows over all their parts, as norms of norms: a long row alone would be shared by threads."""
    pieces = [piece for part in parts for piece in part.flatten(1).split(16384, 1)]
    norms = [torch.linalg.vector_norm(piece, order, dim=1) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms, 1), order, dim=1)
