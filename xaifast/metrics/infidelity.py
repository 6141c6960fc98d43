"""Infidelity: how well an attribution predicts what perturbing the input does to the output."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from ..evaluate import Evaluator, as_inputs
from ..noise import check_seed
from ..removal.perturbed import Perturbation, Perturbed, Samples, make_sampler, sum_rows
from ..scores import check_one_score, resolve_score

_CALLER = "xaifast.metrics.infidelity"


def infidelity(
    forward: Callable,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor, ...],
    *,
    perturb: str | Perturbation = "gaussian",
    n_samples: int = 50,
    normalise: bool = False,
    std: float = 0.1,
    side: int | None = None,
    baselines: object = 0.0,
    target: int | str | Tensor | None = "predicted",
    score: str | Callable[[Tensor], Tensor] = "logit",
    seed: int = 0,
    first_index: int = 0,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Tensor:
    """Mean squared error of an attribution as a linear model of perturbations.

    infidelity[b] = mean_I (beta <I, a_b> - (f(x_b) - f(x_b - I)))^2 over random perturbations I, beta = 1; or, with
    ``normalise``, beta = mean_I <I, a_b> (f(x_b) - f(x_b - I)) / mean_I <I, a_b>^2, the best scale (0 where the
    attribution is blind to all perturbations).

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``.
        inputs: Floating tensor ``[B, ...]``, or a tuple of such.
        attributions: Of the inputs' shape and kind.
        perturb: ``"gaussian"``: I = std * N(0, 1) in every element. ``"noisy_baseline"``: I = x - (baseline + std *
            N(0, 1)). ``"square"``: I = x - baseline in a random square of every channel of images ``[B, C, H, W]``, 0
            elsewhere. Or a callable as Captum's: it takes the inputs repeated ``[u, ...]`` (a tuple for tuples), where
            samples of an input follow each other, and returns the pair (I, x - I); it is called once a chunk, and what
            is random in it may depend on the chunk size. I of the others is what the inputs' dtype makes of it: the
            difference, in float64, between x and the row that the model gets.
        n_samples: Perturbations of each input.
        normalise: Compare up to a factor, as Captum's ``normalize``.
        std: Standard deviation of noise, in the inputs' units.
        side: Of the squares in pixels; None for an eighth of the shorter side, at least 1.
        baselines: Number, tensor or tuple of these.
        target: int, LongTensor ``[B]``, ``"predicted"`` (of the clean input), or None for a model with one output.
        score: ``"logit"``, ``"softmax"``, ``"accuracy"`` or a callable on outputs ``[rows, K]``.
        seed: Of the perturbations, 0..2**63-1.
        first_index: Data-set index of the first input: perturbation n of an input depends on seed, its index and n.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        ``[B]`` in the inputs' dtype, at least float32, from sums in float64; 0 is best.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: ``n_samples + 1`` model rows and as many dot products an input.

    Source: Yeh, Hsieh, Suggala, Inouye and Ravikumar, "On the (in)fidelity and sensitivity of explanations", NeurIPS
    2019, Definition 2.1; the scale is that of the paper's code. The default width and side are this package's choice.

    Example:
        >>> model = torch.nn.Linear(6, 2).double().eval()
        >>> x = torch.rand(3, 6, dtype=torch.float64)
        >>> bool((infidelity(model, x, model.weight[0].expand(3, 6), target=0) < 1e-20).all())
        True
    """
    inputs = as_inputs(inputs, _CALLER)
    phi = _check_attributions(attributions, inputs)
    check_seed(seed, first_index, _CALLER)
    if isinstance(n_samples, bool) or not isinstance(n_samples, Integral) or n_samples < 1:
        raise ValueError(f"{_CALLER}: n_samples must be a positive int, got {n_samples!r}")
    n_samples = int(n_samples)
    score_fn = resolve_score(score, _CALLER)
    sampler = make_sampler(
        perturb, inputs, baselines, n_samples, std=std, side=side, seed=seed, first_index=first_index, caller=_CALLER
    )
    dots = torch.zeros(inputs[0].shape[0] * n_samples, dtype=torch.float64, device=inputs[0].device)
    evaluator = Evaluator(
        forward,
        inputs,
        target=target,
        removal=Perturbed(sampler, phi, dots),
        score=score_fn,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
        show_progress=show_progress,
        caller=_CALLER,
    )
    check_one_score(evaluator)
    lost = evaluator.full - evaluator(Samples(torch.arange(n_samples, device="cpu")[:, None]))[..., 0]  # [B, N]
    predicted = dots.view_as(lost)
    if not bool(predicted.isfinite().all()):
        b, n = (~predicted.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{_CALLER}: perturbations must be finite, got NaN or infinity for input {b}, perturbation {n}; check "
            "inputs, baselines and perturb"
        )
    if normalise:
        square = sum_rows(predicted * predicted)
        scale = sum_rows(predicted * lost) / torch.where(square > 0, square, 1)
        predicted = scale[:, None] * predicted
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return (sum_rows((predicted - lost) ** 2) / n_samples).to(dtype)


def _check_attributions(attributions: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    given = attributions if isinstance(attributions, tuple) else (attributions,)
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in given]
    if shapes != [tuple(x.shape) for x in inputs]:
        raise ValueError(
            f"{_CALLER}: attributions must have the inputs' shapes {[tuple(x.shape) for x in inputs]}, got {shapes}; "
            "spread those of players or pixels over their elements"
        )
    for i, (a, x) in enumerate(zip(given, inputs, strict=True)):
        if not x.is_floating_point():
            raise TypeError(f"{_CALLER}: inputs must be floating to be perturbed, got {x.dtype}; convert them")
        if a.device != x.device:
            raise ValueError(f"{_CALLER}: attributions must be on the inputs' device {x.device}, got {a.device}")
        if a.layout != torch.strided or a.is_complex():
            raise TypeError(
                f"{_CALLER}: attributions must be dense and real, got {a.layout} of {a.dtype}; convert them"
            )
        if not bool(a.isfinite().all()):
            b = int((~a.isfinite()).flatten(1).any(1).nonzero()[0])
            where = "attributions" if len(given) == 1 else f"attributions[{i}]"
            raise ValueError(f"{_CALLER}: {where} must be finite, got NaN or infinity for input {b}; repair them")
    return tuple(a.detach() for a in given)
