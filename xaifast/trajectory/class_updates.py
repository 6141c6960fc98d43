"""The part that each class had in an update: loss disentanglement, exact for plain gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import State


class ClassUpdates(NamedTuple):
    """The update of one parameter from a checkpoint to the next, split by class.

    Attributes:
        parts: ``[K, *shape]``: part of class c.
        residual: ||sum_c parts - update|| / ||update||, what the parts leave unexplained; 1 where only the update is 0.
        exact: Whether that is rounding, as under plain gradient descent. Momentum, Adam, weight decay and clipping make
            the split approximate.
    """

    parts: Tensor
    residual: float
    exact: bool


def class_gradients(losses: Tensor, labels: Tensor, weight: Tensor, n_classes: int | None = None) -> Tensor:
    """Gradient of a batch's mean loss, split by the class of the samples: g_c = d/dW (1/B) sum_{b: y_b = c} loss_b.

    Call it between the forward pass and the backward pass of a training step; the graph is kept. The sum over c is the
    gradient that ``losses.mean().backward()`` gives, so that with plain gradient descent the update of W is the sum of
    the parts ``-lr * g_c``: pass these, summed over the steps since the last checkpoint, to `Trajectory.record`.

    Args:
        losses: ``[B]``, a loss a sample (``reduction="none"``), with a graph.
        labels: LongTensor ``[B]``, 0..K-1.
        weight: The parameter W, of the first layer for XtrAIn+.
        n_classes: K; None for the largest label + 1.

    Returns:
        ``[K, *W.shape]`` in W's dtype, on its device; 0 for classes that the batch does not hold.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do.

    Cost: a backward pass, without gradients of other weights, for every class in the batch.

    Source: loss disentanglement of XtrAIn (arXiv 2606.10877, appendix A.2); the formula is derived, not quoted.

    Example:
        >>> layer, x, y = torch.nn.Linear(3, 2), torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
        >>> losses = torch.nn.functional.cross_entropy(layer(x), y, reduction="none")
        >>> parts = class_gradients(losses, y, layer.weight)
        >>> losses.mean().backward()
        >>> parts.shape, torch.allclose(parts.sum(0), layer.weight.grad, atol=1e-6)
        (torch.Size([2, 2, 3]), True)
    """
    caller = "xaifast.trajectory.class_gradients"
    for name, value in (("losses", losses), ("labels", labels), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(value).__name__}")
    if losses.dim() != 1 or losses.numel() == 0 or labels.shape != losses.shape:
        raise ValueError(
            f"{caller}: losses and labels must be [B], a value a sample, got {list(losses.shape)} and "
            f'{list(labels.shape)}; use reduction="none"'
        )
    if not losses.requires_grad or not weight.requires_grad:
        raise ValueError(f"{caller}: losses must come from weight with gradients on; call it before backward()")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{caller}: labels must be integers, got {labels.dtype}; use .long()")
    low, high = int(labels.min()), int(labels.max())
    n_classes = high + 1 if n_classes is None else n_classes
    if low < 0 or high >= n_classes:
        raise ValueError(f"{caller}: labels must lie in 0..{n_classes - 1}, got {low if low < 0 else high}")
    parts = weight.new_zeros((n_classes, *weight.shape), requires_grad=False)
    for c in labels.unique().tolist():
        loss = losses[labels == c].sum() / len(losses)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{caller}: losses must depend on weight, got one that took no part in them")
        parts[c] = gradient
    return parts


def check_parts(
    class_updates: Mapping[str, Tensor], state: State, last: State | None, caller: str, lost: Callable[[str], float]
) -> tuple[State, dict[str, list]]:
    """Parts to store, on the CPU, and by parameter [residual, exact] as of `ClassUpdates`.

    Args:
        class_updates: ``[K, *shape]`` by parameter.
        state: As the model has it.
        last: As it is replayed for the checkpoint before; None at the first.
        caller: Prefix of messages.
        lost: By parameter, how far ``last`` may be from what the model had.
    """
    if not isinstance(class_updates, Mapping):
        given = type(class_updates).__name__
        raise TypeError(f"{caller}: class_updates must map parameter names to [K, *shape] tensors, got {given}")
    if last is None and class_updates:
        raise ValueError(f"{caller}: class_updates are of an update, and the first checkpoint has none; leave them out")
    parts, notes = {}, {}
    for name, value in class_updates.items():
        if name not in state or not state[name].is_floating_point():
            known = ", ".join(list(state)[:6])
            raise ValueError(f"{caller}: class_updates must name parameters of the model ({known}, ...), got {name!r}")
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[1:] != state[name].shape or not len(value):
            given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wanted = ", ".join(map(str, ("K", *state[name].shape)))
            raise ValueError(f"{caller}: class_updates of {name} must be a tensor [{wanted}], got {given}")
        value = value.detach().to("cpu", state[name].dtype, copy=True, memory_format=torch.contiguous_format)
        weight = state[name].double()
        update = weight - last[name].double()
        size, left = float(update.norm()), float((value.sum(0, dtype=torch.float64) - update).norm())
        if not math.isfinite(left) and not bool(value.isfinite().all()):
            raise ValueError(f"{caller}: class_updates of {name} must be finite, got NaN or infinity; check the losses")
        # A weight is rounded after every step; the parts are not.
        slack = 1e-4 * size + 8 * torch.finfo(state[name].dtype).eps * float(weight.norm()) + lost(name)
        parts[f"class_updates/{name}"] = value
        notes[name] = [left / size if size else float(left > 0), left <= slack]
    return parts, notes
