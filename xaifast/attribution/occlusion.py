"""Occlusion: what a model's output loses when a sliding window hides a part of the input."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator, as_inputs
from ..players import Players, resolve_players
from ..removal import Removal, Replace, resolve_removal
from ..removal.windows import Grid, SlidingWindow, Windows
from ._patched_graph import FieldError
from ._receptive_field import FieldWindow

logger = logging.getLogger("xaifast")

_CALLER = "xaifast.occlusion"


def occlusion(
    forward: Callable,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    window: int | Sequence,
    stride: int | Sequence | None = None,
    baselines: object = 0.0,
    target: int | str | Tensor | None = None,
    removal: object = None,
    receptive_field: bool | str = False,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Sliding-window occlusion: the drop of the output, averaged over the windows that cover an element.

    ``attribution[b, e] = mean over windows W with e in W of f(x[b]) - f(x[b] without W)``. The first window lies at
    index 0 of every dimension; others follow a stride apart until all elements are covered, and the last of a
    dimension is cut off at the border.

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``; ``x`` has b rows.
        inputs: Tensor ``[B, ...]`` or tuple of tensors with common B; windows hide one tensor at a time.
        window: Size in elements. An int holds for all dimensions but the channels ``[B, C, ...]`` (for ``[B, F]``: for
            F). A tuple names either these dimensions, ``(h, w)`` of images, or all of one input, ``(c, h, w)``;
            dimensions that are not named are covered whole. For a tuple of inputs: an int, or a tuple with one such
            entry an input.
        stride: Steps in the same form, at most the window's size where it does not cover the dimension; None is 1.
        baselines: What a window shows: a number, a tensor ``[...]`` or ``[B, ...]``, a tuple of these, or
            ``xaifast.Background(rows)``.
        target: int, LongTensor ``[B]``, ``"predicted"``, or None for all K outputs.
        removal: None (show ``baselines``), ``"blur"``, a callable ``inputs -> baseline of the same shape``, or a
            removal of players such as ``xaifast.removal.TokenDrop()``; the players are then the cells that the windows'
            edges cut the input into.
        receptive_field: Compute only the part of convolutional maps that a window changes: True (an error says why
            where it cannot), ``"auto"`` (goes on without, and logs why) or False. Needs an ``nn.Module`` that
            ``torch.fx`` can trace and images ``[B, C, H, W]``. See docs/perturbation.md.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        Tensor of the inputs' shape, a K axis appended where all K outputs were asked for; a tuple for a tuple. In the
        inputs' floating dtype, at least float32; sums and means in float64.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: a model row for each window, ``prod over dimensions of ceil((size - window) / stride) + 1``.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, section 4.2. Receptive
    fields: Nair et al., "fastISM", Bioinformatics 2022.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(occlusion(model, x, window=1, target=1), model.weight[1:], atol=1e-6)
        True
    """
    given = as_inputs(inputs, _CALLER)
    grids = _grids(window, stride, given, isinstance(inputs, tuple))
    engine = dict(
        baselines=baselines,
        target=target,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        show_progress=show_progress,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
    )
    if not isinstance(receptive_field, bool) and not (isinstance(receptive_field, str) and receptive_field == "auto"):
        raise ValueError(f'{_CALLER}: receptive_field must be True, False or "auto", got {receptive_field!r}')
    maps, evaluator = slide(forward, given, grids, removal, engine, _CALLER, receptive_field=receptive_field)
    return as_given(maps, inputs, evaluator)


def slide(
    forward: Callable,
    inputs: tuple[Tensor, ...],
    grids: tuple[Grid, ...],
    removal: object,
    engine: dict,
    caller: str,
    *,
    receptive_field: bool | str = False,
) -> tuple[tuple[Tensor, ...], Evaluator]:
    """Occlusion maps of each input tensor, float64 ``[B, ..., K]``; ``engine`` holds arguments of `Evaluator`."""
    removal, evaluator = resolve_removal(removal, caller), None
    players, perturbations = None, Windows.of(grids)
    if receptive_field:
        evaluator = _by_fields(forward, inputs, grids, removal, engine, caller, receptive_field)
    if evaluator is None:
        if isinstance(removal, Replace):
            removal = SlidingWindow(grids, removal)
        else:
            players, perturbations = _as_players(grids, inputs, caller)
        evaluator = Evaluator(forward, inputs, players=players, removal=removal, caller=caller, **engine)
    values = evaluator(perturbations)
    drops = evaluator.full[:, None] - values  # [B, N, K]
    parts = drops.split([math.prod(grid.counts) for grid in grids], dim=1)
    return tuple(grid.average(part) for grid, part in zip(grids, parts, strict=True)), evaluator


def as_given(
    maps: tuple[Tensor, ...], inputs: Tensor | tuple[Tensor, ...], evaluator: Evaluator
) -> Tensor | tuple[Tensor, ...]:
    """Maps ``[B, ..., K]`` as results: in their dtype, the K axis where all outputs were asked for, a tuple for one."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in evaluator.inputs), torch.float32)
    kept = ((part if evaluator.has_output_axis else part[..., 0]).to(dtype).contiguous() for part in maps)
    return tuple(kept) if isinstance(inputs, tuple) else next(kept)


def _by_fields(
    forward: Callable,
    inputs: tuple[Tensor, ...],
    grids: tuple[Grid, ...],
    removal: Removal,
    engine: dict,
    caller: str,
    receptive_field: bool | str,
) -> Evaluator | None:
    """None where receptive fields do not serve and need not."""
    try:
        if not isinstance(removal, Replace) or engine["autocast"] is not None or engine["cuda_graph"]:
            raise FieldError(
                f"{caller}: receptive_field needs pixel replacement without autocast and cuda_graph, got removal "
                f"{type(removal).__name__}, autocast={engine['autocast']} and cuda_graph={engine['cuda_graph']}; "
                "leave one out"
            )
        return Evaluator(forward, inputs, removal=FieldWindow(grids, removal), caller=caller, **engine)
    except FieldError as error:
        if receptive_field is True:
            raise
        logger.warning("%s; whole images are run", error)
        return None


def _as_players(grids: tuple[Grid, ...], inputs: tuple[Tensor, ...], caller: str) -> tuple[Players, Coalitions]:
    """The cells between the windows' edges as players; a window is the coalition of those that it does not cover."""
    masks, covers, n_players = [], [], 0
    for grid in grids:
        ids, covered = grid.cells()
        masks.append(ids + n_players)
        covers.append(covered)
        n_players += covered.shape[1]
    return resolve_players(tuple(masks), inputs, caller), Coalitions.from_present(~torch.block_diag(*covers).bool())


def _grids(window: object, stride: object, inputs: tuple[Tensor, ...], several: bool) -> tuple[Grid, ...]:
    """Windows and strides as the user gave them, for each input tensor."""
    windows = _one_each("window", window, len(inputs), several)
    strides = _one_each("stride", 1 if stride is None else stride, len(inputs), several)
    grids = []
    for x, size, step in zip(inputs, windows, strides, strict=True):
        shape = tuple(x.shape[1:])
        grid = Grid(shape, _along("window", size, shape, shape), _along("stride", step, shape, (1,) * len(shape)))
        for full, wide, far in zip(grid.shape, grid.window, grid.stride, strict=True):
            if wide > full:
                raise ValueError(
                    f"{_CALLER}: window must fit into the input {shape}, got {grid.window}; make it smaller"
                )
            if far > wide < full:
                raise ValueError(
                    f"{_CALLER}: stride must not be larger than the window, or elements are left out, got stride "
                    f"{grid.stride} and window {grid.window}"
                )
        grids.append(grid)
    return tuple(grids)


def _one_each(name: str, given: object, n_inputs: int, several: bool) -> Sequence:
    if not several:
        return [given]
    if isinstance(given, Integral):
        return [given] * n_inputs
    if not isinstance(given, Sequence) or len(given) != n_inputs:
        raise ValueError(
            f"{_CALLER}: {name} must be an int or hold one entry an input ({n_inputs}) for a tuple of inputs, got "
            f"{given!r}"
        )
    return given


def _along(name: str, given: object, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """A size for each dimension of one input; ``whole`` for those that are not named."""
    n_named = max(1, len(shape) - 1)
    sizes = (given,) * n_named if isinstance(given, Integral) else given
    if not isinstance(sizes, Sequence) or not all(isinstance(size, Integral) for size in sizes):
        raise TypeError(f"{_CALLER}: {name} must be an int or a tuple of ints, got {given!r}")
    if len(sizes) not in (n_named, len(shape)) or min(sizes) < 1:
        raise ValueError(
            f"{_CALLER}: {name} must hold {n_named} sizes (all dimensions but the channels) or {len(shape)} for an "
            f"input of shape {shape}, at least 1 each, got {given!r}"
        )
    return (*whole[: len(shape) - len(sizes)], *(int(size) for size in sizes))
