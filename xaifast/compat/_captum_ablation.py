"""Captum's FeatureAblation and Occlusion, with their arguments and the shapes of their results, on xaifast's engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attribution.ablation import ablate
from ..attribution.occlusion import slide
from ..removal import Replace
from ..removal.windows import Grid
from ._captum_forward import Call
from ._captum_inputs import (
    Answer,
    Attribution,
    as_baselines,
    as_inputs,
    as_masks,
    check_per_eval,
    find_answer,
    promoted,
)


class FeatureAblation(Attribution):
    """Leave-one-out importance as ``captum.attr.FeatureAblation`` offers it.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> attributions = FeatureAblation(model).attribute(torch.ones(3, 4), target=1)
        >>> torch.allclose(attributions, model.weight[1].expand(3, 4), atol=1e-6)
        True
    """

    _name = "Feature Ablation"

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: object = None,
        target: object = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, ...]:
        """``f(x) - f(x without feature)`` for every element's feature.

        Args:
            inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
            baselines: What removed features show: a number, a tensor broadcastable to the input, a tuple of these; None
                is zero.
            target: As of ``KernelShap``; None keeps all outputs.
            additional_forward_args: One argument or a tuple; tensors and lists of length B go with their input.
            feature_mask: Feature ids of any values, one mask an input; None makes every element a feature.
            perturbations_per_eval: Largest number of rows a call; 1 leaves the number to xaifast.
            show_progress: Draw a progress bar.
            kwargs: Taken and not used, as by Captum.

        Returns:
            ``[n, ...]`` with the inputs' shape after the first axis, in the dtype of the outputs; n is the number of
            outputs for the batch: B, ``B K`` for K outputs an input, 1 for one number for the whole batch.

        Raises:
            AssertionError: a kind of argument or a target that Captum asserts against.
            IndexError, RuntimeError: a target out of range.
            TypeError, ValueError: as `xaifast.feature_ablation`.
        """
        caller = self._caller()
        check_per_eval(perturbations_per_eval, caller)
        given = as_inputs(inputs, caller)
        baselines = as_baselines(baselines, given, caller)
        masks = as_masks(feature_mask, given, caller)
        call = Call(self.forward_func, promoted(given, baselines), additional_forward_args, target, caller)
        answer = find_answer(call, perturbations_per_eval)
        rows, engine = answer.rows, _engine(answer, baselines, perturbations_per_eval, show_progress)
        if masks is None and answer.whole_batch:
            ones = [(1,) * (x.dim() - 1) for x in call.whole]
            elements = (Grid(tuple(x.shape[1:]), one, one) for x, one in zip(call.whole, ones, strict=True))
            grids = _whole_batch(tuple(elements), call.n_inputs)
            maps, _ = slide(rows, rows.inputs, grids, Replace(), engine, caller)
        else:
            lifted = None if masks is None else rows.lift(masks)
            maps, _ = ablate(rows, rows.inputs, lifted, Replace(), engine, caller)
        placed = [_place(part, answer, mask) for part, mask in zip(maps, _of_whole(masks, given), strict=True)]
        if not answer.dtype.is_floating_point:
            placed = [part.round() for part in placed]
        return _as_given(placed, given, answer, answer.dtype, isinstance(inputs, tuple))


class Occlusion(Attribution):
    """Sliding windows as ``captum.attr.Occlusion`` offers them.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> attributions = Occlusion(model).attribute(torch.ones(3, 4), sliding_window_shapes=(1,), target=1)
        >>> torch.allclose(attributions, model.weight[1].expand(3, 4), atol=1e-6)
        True
    """

    _name = "Occlusion"

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        sliding_window_shapes: tuple,
        strides: int | tuple | None = None,
        baselines: object = None,
        target: object = None,
        additional_forward_args: object = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Mean of ``f(x) - f(x without window)`` over the windows that cover an element.

        Args:
            inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
            sliding_window_shapes: Size along every dimension after the batch axis; a tuple of such for a tuple.
            strides: A step for all dimensions, or a tuple with one each; for a tuple of inputs a tuple of these; None
                is 1.
            baselines: What windows show: a number, a tensor broadcastable to the input, a tuple of these; None is zero.
            target: As of ``KernelShap``; None keeps all outputs.
            additional_forward_args: One argument or a tuple; tensors and lists of length B go with their input.
            perturbations_per_eval: Largest number of rows a call; 1 leaves the number to xaifast.
            show_progress: Draw a progress bar.

        Returns:
            float32 ``[n, ...]``, n as of ``FeatureAblation``.

        Raises:
            AssertionError: windows, strides, a kind of argument or a target that Captum asserts against.
            IndexError, RuntimeError: a target out of range.
            TypeError, ValueError: as `xaifast.occlusion`.
        """
        caller = self._caller()
        check_per_eval(perturbations_per_eval, caller)
        given = as_inputs(inputs, caller)
        grids = _grids(sliding_window_shapes, strides, given, isinstance(inputs, tuple), caller)
        baselines = as_baselines(baselines, given, caller)
        call = Call(self.forward_func, promoted(given, baselines), additional_forward_args, target, caller)
        answer = find_answer(call, perturbations_per_eval)
        kept = tuple(grid for grid, x in zip(grids, given, strict=True) if x.numel())
        if answer.whole_batch:
            kept = _whole_batch(kept, call.n_inputs)
        else:
            kept = tuple(grid if grid.shape else Grid((1,), (1,), (1,)) for grid in kept)  # inputs [B]
        engine = _engine(answer, baselines, perturbations_per_eval, show_progress)
        maps, _ = slide(answer.rows, answer.rows.inputs, kept, Replace(), engine, caller)
        placed = [_place(part, answer, None) for part in maps]
        return _as_given(placed, given, answer, torch.float32, isinstance(inputs, tuple))


def _engine(answer: Answer, baselines: tuple, perturbations_per_eval: int, show_progress: bool) -> dict:
    return dict(
        baselines=answer.rows.lift(baselines),
        additional_forward_args=answer.rows.owner,
        batch_size=answer.batch_size(perturbations_per_eval),
        show_progress=show_progress,
        allow_training_mode=True,
    )


def _whole_batch(grids: tuple[Grid, ...], n_inputs: int) -> tuple[Grid, ...]:
    """The same windows in all inputs of a batch at once."""
    return tuple(Grid((n_inputs, *g.shape), (n_inputs, *g.window), (n_inputs, *g.stride)) for g in grids)


def _of_whole(masks: tuple[Tensor, ...] | None, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Masks of the inputs that have elements."""
    masks = (None,) * len(inputs) if masks is None else masks
    return [mask for mask, x in zip(masks, inputs, strict=True) if x.numel()]


def _place(maps: Tensor, answer: Answer, mask: Tensor | None) -> Tensor:
    """Engine's maps, ``[B, ..., K]`` or of the whole batch ``[1, B, ..., K]``, as ``[n, ...]``."""
    if not answer.whole_batch:
        return maps.movedim(-1, 1).flatten(0, 1)
    outputs = maps[0].movedim(-1, 0)  # [K, B, ...]
    if mask is None or mask.dim() < outputs.dim() - 1 or len(mask) == 1:
        return outputs[:, 0]
    if len(outputs) == 1 or len(outputs) != len(mask):
        raise ValueError(
            f"{answer.rows.call.caller}: feature_mask must be the same for all inputs where forward_func returns "
            f"{len(outputs)} numbers for a batch of {len(mask)}, got one an input"
        )
    return outputs.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def _as_given(
    maps: list[Tensor], inputs: tuple[Tensor, ...], answer: Answer, dtype: torch.dtype, several: bool
) -> Tensor | tuple[Tensor, ...]:
    """Maps of all inputs, those without elements among them, in the shapes of the inputs."""
    n, waiting = answer.shape.numel(), iter(maps)
    shaped = []
    for x in inputs:
        part = next(waiting) if x.numel() else torch.zeros(0, device=x.device)
        shaped.append(part.reshape(n, *x.shape[1:]).to(dtype).contiguous())
    return tuple(shaped) if several else shaped[0]


def _grids(shapes: object, strides: object, inputs: tuple[Tensor, ...], several: bool, caller: str) -> tuple[Grid, ...]:
    """Captum's windows and strides, checked as it does."""
    if not isinstance(shapes, tuple):
        kind = TypeError if isinstance(shapes, int | float) else AssertionError
        raise kind(f"{caller}: sliding_window_shapes must be a tuple, got {type(shapes).__name__}")
    windows = shapes if several else (shapes,)
    steps = strides if several and isinstance(strides, tuple) else (strides,) * len(inputs)
    if len(windows) != len(inputs) or len(steps) != len(inputs):
        raise AssertionError(
            f"{caller}: sliding_window_shapes and strides must hold one entry an input ({len(inputs)}), got "
            f"{len(windows)} and {len(steps)}"
        )
    grids = []
    for x, window, step in zip(inputs, windows, steps, strict=True):
        shape = tuple(x.shape[1:])
        step = 1 if step is None else step
        step = step if isinstance(step, tuple) else (step,) * len(shape)
        for name, sizes in (("sliding_window_shapes", window), ("strides", step)):
            whole = isinstance(sizes, tuple) and all(isinstance(size, int) and size > 0 for size in sizes)
            if not whole or len(sizes) != len(shape):
                raise AssertionError(
                    f"{caller}: {name} must hold a positive int for each dimension of an input of shape {shape}, got "
                    f"{sizes}"
                )
        for size, wide, far in zip(shape, window, step, strict=True):
            if wide > size or (wide < size and far > wide):
                raise AssertionError(
                    f"{caller}: sliding_window_shapes must fit into the input and strides into the windows, got input "
                    f"{shape}, window {window} and stride {step}"
                )
        grids.append(Grid(shape, window, step))
    return tuple(grids)
