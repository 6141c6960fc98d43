"""What a method makes of a model's outputs: one score an evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .evaluate import Evaluator


def resolve_score(score: object, caller: str) -> Callable[[Tensor], Tensor] | None:
    """What the evaluator applies to outputs ``[rows, K]``; None leaves them."""
    if score == "logit":
        return None
    if callable(score):
        return score
    if score not in ("softmax", "accuracy"):
        raise ValueError(f'{caller}: score must be "softmax", "logit", "accuracy" or a callable, got {score!r}')

    def apply(outputs: Tensor) -> Tensor:
        if outputs.shape[1] == 1:
            raise ValueError(
                f'{caller}: score="{score}" needs a model with at least two outputs, got one; use score="logit" or a '
                "callable"
            )
        if score == "accuracy":
            return F.one_hot(outputs.argmax(1), outputs.shape[1]).float()
        return outputs.softmax(1, dtype=torch.promote_types(outputs.dtype, torch.float32))

    return apply


def check_one_score(evaluator: Evaluator) -> None:
    """Evaluations give one number each."""
    n_outputs = evaluator.full.shape[1]
    if n_outputs != 1:
        raise ValueError(
            f"{evaluator.caller}: target must name an output of a model with {n_outputs} outputs, got None; give an "
            'int, a LongTensor [B] or "predicted"'
        )
