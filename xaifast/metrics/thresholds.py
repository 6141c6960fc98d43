"""Threshold curves: what is left of a model when patches below, or above, an importance are removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator
from ..removal import Background
from ._checks import one_tensor
from ._features import resolve_features

_CALLER = "xaifast.metrics.threshold_curves"
_STEPS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class ThresholdCurves:
    """Curves over thresholds t of inputs with importances a; made by `threshold_curves`.

    Insertion removes the players with a < t, deletion those with a > t. Means over inputs are those of the data set:
    ``curves.insertion_correct.mean(0)`` is the step-wise accuracy.

    Attributes:
        thresholds: ``[T]``.
        insertion_correct, deletion_correct: ``[B, T]``, 1 where the target is the model's argmax, else 0.
        insertion_probability, deletion_probability: ``[B, T]``, softmax probability of the target.
        insertion_masked, deletion_masked: ``[B, T]``, share of the input's players that is removed.
        targets: LongTensor ``[B]``.
        n_evaluations: Model rows spent on each input.
    """

    thresholds: Tensor
    insertion_correct: Tensor
    deletion_correct: Tensor
    insertion_probability: Tensor
    deletion_probability: Tensor
    insertion_masked: Tensor
    deletion_masked: Tensor
    targets: Tensor
    n_evaluations: int

    def __repr__(self) -> str:
        batch, steps = self.insertion_correct.shape
        areas = (self.insertion_correct.double().mean(), self.deletion_correct.double().mean())
        return (
            f"ThresholdCurves({batch} inputs, {steps} thresholds; mean accuracy {areas[0]:.3g} by insertion, "
            f"{areas[1]:.3g} by deletion; {self.n_evaluations} evaluations an input)"
        )


def threshold_curves(
    forward: Callable,
    inputs: Tensor,
    importance: Tensor,
    target: int | str | Tensor,
    thresholds: Sequence[float] | Tensor = _STEPS,
    *,
    feature_mask: Tensor | None = None,
    removal: object = None,
    baselines: object = 0.0,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> ThresholdCurves:
    """Accuracy and target probability as players are removed by thresholds of their importance.

    At threshold t insertion shows the players with a_i >= t, deletion those with a_i <= t; the others are replaced (or
    their tokens dropped). Comparisons are exact, in the importance's dtype, to which thresholds are rounded.

    Args:
        forward: ``forward(x) -> [b, K]``, K >= 2, or an object with ``.logits``.
        inputs: ``[B, ...]``, one tensor.
        importance: ``[B, M]`` of the players of the feature mask, or a map as `xaifast.insertion_deletion` takes it;
            NaN is an error.
        target: int, LongTensor ``[B]`` (labels), or ``"predicted"`` of the clean input.
        thresholds: T numbers; default 0, 0.1, ..., 1.
        feature_mask: Player ids, see `xaifast.grid_mask`; None makes every element of an importance of the inputs'
            shape a player, else every pixel (at most 4096).
        removal, baselines, additional_forward_args, batch_size, show_progress, autocast, cuda_graph,
            allow_training_mode: As in `xaifast.kernel_shap`, without a background.

    Returns:
        `ThresholdCurves`, in the inputs' floating dtype, at least float32.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do.

    Cost: 2 T + 1 model rows an input.

    Source: the causality curves of patch-importance networks, which zero patches below (insertion) or above (deletion)
    a threshold and report step-wise accuracy beside the masked share.

    Example:
        >>> model, x = torch.nn.Linear(3, 2).eval(), torch.ones(4, 3)
        >>> curves = threshold_curves(model, x, torch.rand(4, 3), "predicted", [0.0, 0.5])
        >>> curves.insertion_masked[:, 0].tolist()  # nothing lies below 0
        [0.0, 0.0, 0.0, 0.0]
    """
    x = one_tensor(inputs, _CALLER)
    if isinstance(baselines, Background):
        raise ValueError(
            f"{_CALLER}: baselines must be a number or a tensor, got a Background, over whose rows there is no one "
            "argmax; give its mean, or one row"
        )
    if target is None:
        raise ValueError(f'{_CALLER}: target must be an int, a LongTensor [B] or "predicted", got None')
    if feature_mask is None:
        feature_mask = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
        if isinstance(importance, Tensor) and x.dim() == 4 and importance.shape != x.shape:
            feature_mask = torch.arange(x[0, 0].numel(), device=x.device).view(x.shape[2:])
    features = resolve_features(importance, x, feature_mask, _CALLER)
    at = _thresholds(thresholds, features.scores)
    scores = features.scores[:, None]  # [B, 1, M]
    present = torch.cat((scores >= at[:, None], scores <= at[:, None]), 1)  # [B, 2 T, M]
    masked = ~present
    if features.absent is not None:
        masked &= ~features.absent[:, None]
    masked = masked.sum(2) / features.n_present.to(x.device)[:, None]

    evaluator = Evaluator(
        forward,
        (x,),
        players=features.players,
        baselines=baselines,
        target=target,
        removal=removal,
        score=_probability_and_rank,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
        show_progress=show_progress,
        caller=_CALLER,
    )
    values = evaluator(Coalitions.from_present(present.cpu()))[..., 0]  # [B, 2 T]
    correct = values > 1.5
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    halves = [part.to(dtype).chunk(2, 1) for part in (correct, values - 2 * correct, masked)]
    return ThresholdCurves(
        at.to(dtype), *(half for pair in halves for half in pair), evaluator.targets, present.shape[1] + 1
    )


def _probability_and_rank(outputs: Tensor) -> Tensor:
    """Softmax probability, 2 more for the argmax: both in one number of the target's column."""
    if outputs.shape[1] == 1:
        raise ValueError(f"{_CALLER}: forward must return at least two outputs a row, got one")
    top = F.one_hot(outputs.argmax(1), outputs.shape[1])
    return outputs.softmax(1, dtype=torch.float64) + 2 * top


def _thresholds(thresholds: object, scores: Tensor) -> Tensor:
    """``[T]`` in the dtype of the scores, floating at least."""
    dtype = scores.dtype if scores.is_floating_point() else torch.float64
    at = torch.as_tensor(thresholds, dtype=dtype, device=scores.device)
    if at.dim() != 1 or at.numel() == 0 or not bool(torch.isfinite(at).all()):
        raise ValueError(f"{_CALLER}: thresholds must be finite numbers [T], at least one, got {thresholds!r}")
    return at
