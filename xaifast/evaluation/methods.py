"""Attributions that cost little or nothing, made on the fly to stand beside those of a stored run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model_state import check_deterministic
from ..ops import rank_features
from ..stream import Stream

_CALLER = "xaifast.gradient_x_input"
GRADIENT_ROWS = 64  # inputs a call: a backward pass keeps what a forward pass throws away
GRADIENT_COST = 3  # forward passes that a gradient takes, roughly


def random_map(shape: tuple[int, ...], *, seed: int, first_index: int) -> Tensor:
    """A random order of features for each input: float32 ``[B, *feat]``, the numbers 0..P-1 shuffled.

    An input's depends on the seed and its data-set index ``first_index + b`` alone.

    Example:
        >>> sorted(random_map((1, 2, 2), seed=0, first_index=7).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0]
    """
    ranks = rank_features(torch.empty(shape), order="random", seed=seed, first_index=first_index)
    return (ranks[0].numel() - 1 - ranks).float()


def gradient_x_input(
    forward: Callable, inputs: Tensor, *, target: Tensor | None, rows: int = GRADIENT_ROWS, autocast: object = None
) -> Tensor:
    """Gradient of the target's output, times the input, elementwise: ``x * d f_target(x) / d x``.

    Args:
        forward: ``[b, ...] -> [b]`` or ``[b, K]``, or an object with ``.logits``; differentiable.
        inputs: Floating ``[B, ...]``.
        target: LongTensor ``[B]``; None for a model with one output.
        rows: Inputs a call.
        autocast: dtype for ``torch.autocast``, or None.

    Returns:
        Like the inputs.

    Raises:
        ValueError: the model cannot be differentiated, or is random.

    Source: Shrikumar et al., "Not just a black box", 2016.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> torch.equal(gradient_x_input(model, x, target=None), x * model.weight)
        True
    """
    check_deterministic(forward, _CALLER)
    result = torch.empty_like(inputs)

    def step(start: int, stop: int) -> None:
        x = inputs[start:stop].detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            output = forward(x)
            output = getattr(output, "logits", output)
            if target is not None:
                output = output.gather(1, target[start:stop, None])
            try:
                (gradient,) = torch.autograd.grad(output.sum(), x)
            except RuntimeError as error:
                raise ValueError(f"{_CALLER}: the model must be differentiable, got: {error}") from error
        result[start:stop] = gradient * x.detach()

    with Stream(len(inputs), rows, show_progress=False, description="gradient") as stream:
        stream.run(len(inputs), step)
    return result


def is_differentiable(forward: Callable, example: Tensor, target: Tensor | None) -> bool:
    """Whether `gradient_x_input` works on the first input of an example.

    Raises:
        ValueError: the model is random.
    """
    check_deterministic(forward, _CALLER)
    if not example.is_floating_point():
        return False
    try:
        gradient_x_input(forward, example[:1], target=None if target is None else target[:1])
    except (ValueError, RuntimeError):  # NumPy refuses tensors that require gradients with a RuntimeError
        return False
    return True
