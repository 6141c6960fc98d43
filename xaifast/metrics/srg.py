"""Symmetric relevance gain: how far apart the two ends of an attribution's order are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .curves import insertion_deletion


def srg(
    forward: Callable,
    inputs: Tensor,
    attributions: Tensor,
    *,
    baseline: object = None,
    removal: object = None,
    **settings: object,
) -> Tensor:
    """Symmetric relevance gain ``[B]``, higher is better: area of the LeRF minus area of the MoRF curve.

    SRG = integral of score(x without its least important share q) - score(x without its most important share q) over q
    in 0..1. The LeRF curve is the insertion curve read backwards, so one call of `xaifast.insertion_deletion` with one
    baseline holds both. What all orders have in common, such as how hard a baseline hits the model, cancels: a random
    order has gain 0 in expectation.

    Args:
        forward, inputs, attributions: As `xaifast.insertion_deletion` takes them.
        baseline: What removed features show; None for 0, or what `removal` makes.
        removal: The same.
        **settings: Others of `xaifast.insertion_deletion`, such as target, steps, feature_mask and score; no
            ``compat="quantus"``, which has no insertion.

    Raises:
        TypeError, ValueError: as `xaifast.insertion_deletion`.

    Cost: 2 S model rows an input.

    Source: Bluecher, Vielhaben and Strodthoff, "Decoupling pixel flipping and occlusion strategy for consistent XAI
    benchmarks", TMLR 2024.

    Example:
        >>> model, x = torch.nn.Linear(3, 2).eval(), torch.ones(4, 3)
        >>> good = srg(model, x, x * model.weight[0], target=0, score="logit", steps=3)
        >>> bool((good >= 0).all())
        True
    """
    if settings.get("compat") == "quantus":
        raise ValueError('xaifast.metrics.srg: compat must not be "quantus", which has no insertion; leave it out')
    if baseline is None and removal is None:
        baseline = 0.0
    return insertion_deletion(
        forward,
        inputs,
        attributions,
        insertion_baseline=baseline,
        deletion_baseline=baseline,
        removal=removal,
        **settings,
    ).srg
