"""How much of an attribution lies on the known signal, beside what other methods and the input alone put there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attribution import feature_ablation, kernel_shap
from ..metrics import clean_score
from ..stream import Stream
from .methods import gradient_x_input

BESIDE = ("gradient x input", "integrated gradients", "occlusion", "Kernel SHAP", "|x|")
_STEPS = 32
_ROWS = 256


def integrated_gradients(
    forward: Callable, inputs: Tensor, *, target: Tensor, baseline: float = 0.0, steps: int = _STEPS
) -> Tensor:
    """Integrated gradients by the midpoint rule: ``(x - b) mean_k d f_target / d x (b + (k - 1/2) / S (x - b))``.

    Args:
        forward: ``[b, ...] -> [b, K]``, differentiable.
        inputs: ``[B, ...]``.
        target: LongTensor ``[B]``.
        baseline: b.
        steps: S.

    Source: Sundararajan, Taly and Yan, "Axiomatic attribution for deep networks", ICML 2017.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> torch.allclose(integrated_gradients(model, x, target=torch.tensor([0])), x * model.weight)
        True
    """
    total = torch.zeros_like(inputs)
    with Stream(len(inputs), _ROWS, show_progress=False, description="gradients") as stream, torch.enable_grad():

        def step(start: int, stop: int) -> None:
            away, gradients = inputs[start:stop] - baseline, torch.zeros_like(inputs[start:stop])
            for k in range(steps):
                x = (baseline + (k + 0.5) / steps * away).detach().requires_grad_()
                output = forward(x)
                output = getattr(output, "logits", output).gather(1, target[start:stop, None])
                gradients += torch.autograd.grad(output.sum(), x)[0]
            total[start:stop] = away * gradients / steps

        stream.run(len(inputs), step)
    return total


def clean_scores(
    forward: Callable,
    inputs: Tensor,
    signal: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    target: Tensor,
    n_samples: int = 512,
    seed: int = 0,
    first_index: int = 0,
    rows: int = _ROWS,
) -> Tensor:
    """CleanScore (energy) of players' values and of the methods of `BESIDE` on the same players, float32 ``[B, 6]``.

    Every method explains the logit of the target with 0 for what is absent; maps finer than the players are averaged
    over each. A player counts as signal by the share of its elements that are.

    Args:
        forward: ``[b, ...] -> [b, K]``.
        inputs: ``[B, ...]``.
        signal: bool, of the inputs' shape.
        values: ``[B, M]``, scored first.
        mask: Player ids of one input.
        target: LongTensor ``[B]``.
        n_samples, seed, first_index: Of Kernel SHAP.
        rows: Model rows a call.
    """
    ids = mask.to(inputs.device).expand(inputs.shape[1:]).reshape(-1)

    def spread(players: Tensor) -> Tensor:
        return players[:, ids].view(inputs.shape)

    def averaged(elements: Tensor) -> Tensor:
        sums = elements.new_zeros(len(elements), int(ids.max()) + 1).index_add(1, ids, elements.flatten(1))
        return spread(sums / ids.bincount())

    given = dict(target=target, feature_mask=mask, batch_size=rows)
    shap = kernel_shap(forward, inputs, n_samples=n_samples, seed=seed, block=first_index // 256, **given)
    maps = [
        spread(values),
        averaged(gradient_x_input(forward, inputs, target=target)),
        averaged(integrated_gradients(forward, inputs, target=target)),
        feature_ablation(forward, inputs, **given),
        spread(shap.values),
        averaged(inputs.abs()),
    ]
    return torch.stack([clean_score(a, signal).float() for a in maps], 1)
