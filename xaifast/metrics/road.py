"""ROAD: remove pixels by imputing them, so that the mask itself tells the model nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..evaluate import Evaluator
from ..noise import check_seed
from ..removal.imputed import Imputed, RankRanges, check_images
from ..scores import check_one_score, resolve_score
from ._checks import one_tensor
from ._features import resolve_features

_CALLER = "xaifast.metrics.road"


@dataclass(frozen=True)
class Road:
    """Scores of images with shares of their pixels imputed; made by `xaifast.metrics.road`.

    Attributes:
        percentages: Share of pixels imputed, in percent, float64 ``[S]``.
        most: ``[B, S]``, score with the most relevant pixels imputed (MoRF); None with ``order="least"``.
        least: ``[B, S]``, score with the least relevant pixels imputed (LeRF); None with ``order="most"``.
        full: ``[B]``, score of the clean images.
        targets: LongTensor ``[B]``, the output scored; None where the model has one.
        n_evaluations: Model rows spent on each image.
    """

    percentages: Tensor
    most: Tensor | None
    least: Tensor | None
    full: Tensor
    targets: Tensor | None
    n_evaluations: int

    @property
    def scores(self) -> Tensor:
        """``[B, S]``: MoRF (lower is better), LeRF (higher is better), or of both (LeRF - MoRF) / 2 (higher)."""
        if self.most is None or self.least is None:
            return self.least if self.most is None else self.most
        return (self.least - self.most) / 2

    @property
    def mean(self) -> Tensor:
        """``[B]``: mean of `scores` over the percentages."""
        return self.scores.mean(1)

    def __repr__(self) -> str:
        batch, n = self.scores.shape
        order = "least" if self.most is None else "most" if self.least is None else "combined"
        return f"Road(order={order!r}, {batch} images, {n} percentages, mean {float(self.mean.mean()):.4f})"


def road(
    forward: Callable,
    inputs: Tensor,
    attributions: Tensor,
    *,
    target: int | str | Tensor | None = "predicted",
    percentages: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    order: str = "most",
    noise: float = 0.01,
    score: str | Callable[[Tensor], Tensor] = "softmax",
    seed: int = 0,
    first_index: int = 0,
    nan: str = "raise",
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Road:
    """Remove and debias: scores after imputing shares of the pixels in the order of an attribution.

    score[b, s] = score(x_b with its first k_s pixels imputed), k_s = floor(p_s P / 100 + 1/2) of P = H W. An imputed
    pixel is the weighted mean of its neighbours (`xaifast.removal.linear_impute`: a linear system over all removed
    pixels, solved on the device for many images and percentages at once), plus noise * N(0, 1) in every channel.

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``.
        inputs: ``[B, C, H, W]``, floating and finite.
        attributions: ``[B, H, W]``, ``[B, 1, H, W]`` or ``[B, C, H, W]`` (summed over C). Ties go by ascending flat
            index.
        target: int, LongTensor ``[B]``, ``"predicted"`` (of the clean image), or None for a model with one output.
        percentages: In percent: each between 0 and 100, removing at least one pixel and leaving one.
        order: ``"most"`` (most relevant pixels are imputed, MoRF), ``"least"`` (the exact reverse, LeRF) or
            ``"combined"``: both, scored (LeRF - MoRF) / 2.
        noise: Standard deviation in the inputs' units; the paper's 0.01 is for images in 0..1 before normalisation, so
            divide by the normalisation's deviation.
        score: ``"softmax"``, ``"logit"``, ``"accuracy"`` (1 where the target is the argmax), or a callable on outputs
            ``[rows, K]``.
        seed: Of the noise, 0..2**63-1; a pixel's noise is the same at every percentage.
        first_index: Data-set index of the first image, so that batches of a data set differ in their noise.
        nan: ``"raise"``, or ``"last"``: pixels with NaN attributions count as the least relevant.
        additional_forward_args: Passed on after the images; tensors with leading B go with their image.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        `Road` in the inputs' dtype, at least float32.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.
        RuntimeError: the interpolation does not converge.

    Cost: S model rows and solves an image, plus the clean one; ``"combined"`` 2 S. Results depend on neither chunk size
    nor neighbours (as far as the model's own rows do not).

    Source: Rong, Leemann, Borisov, Kasneci and Kasneci, "A consistent and efficient evaluation strategy for attribution
    methods", ICML 2022. Combined: ``ROADCombined`` of pytorch-grad-cam, whose percentiles name the share that is kept.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).eval()
        >>> x = torch.rand(2, 3, 8, 8)
        >>> result = road(model, x, torch.rand(2, 8, 8), percentages=(20, 50, 80), order="combined")
        >>> result.scores.shape, result.mean.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    x = one_tensor(inputs, _CALLER)
    check_images(x, _CALLER)
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{_CALLER}: inputs must be finite, got NaN or infinite pixels; pixels are imputed from others"
        )
    if order not in ("most", "least", "combined"):
        raise ValueError(f'{_CALLER}: order must be "most", "least" or "combined", got {order!r}')
    if isinstance(noise, bool) or not isinstance(noise, Real) or not 0 <= noise < math.inf:
        raise ValueError(f"{_CALLER}: noise must be a finite number of at least 0, got {noise!r}")
    check_seed(seed, first_index, _CALLER)
    score_fn = resolve_score(score, _CALLER)
    n_pixels = x.shape[2] * x.shape[3]
    shares, counts = _counts(percentages, n_pixels)
    features = resolve_features(attributions, x, None, _CALLER, nan=nan)
    ranks = features.as_map(features.ranks())[:, 0]  # [B, H, W]

    zeros = torch.zeros_like(counts)
    ranges = {
        "most": torch.stack((zeros, counts), 1),
        "least": torch.stack((n_pixels - counts, zeros + n_pixels), 1),
    }
    wanted = list(ranges) if order == "combined" else [order]
    evaluator = Evaluator(
        forward,
        (x,),
        target=target,
        removal=Imputed(ranks, float(noise), seed, first_index),
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
    values = evaluator(RankRanges(torch.cat([ranges[name] for name in wanted]), n_pixels))[..., 0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = dict(zip(wanted, values.to(dtype).split(len(counts), 1), strict=True))
    return Road(
        percentages=shares.to(x.device),
        most=parts.get("most"),
        least=parts.get("least"),
        full=evaluator.full[:, 0].to(dtype),
        targets=evaluator.targets,
        n_evaluations=values.shape[1] + 1,
    )


def _counts(percentages: Sequence[float], n_pixels: int) -> tuple[Tensor, Tensor]:
    """Percentages float64 and numbers of pixels int64, ``[S]`` on the CPU."""
    try:
        shares = torch.as_tensor(percentages, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        shares = torch.empty(0)
    if shares.dim() != 1 or shares.numel() == 0 or not bool(((shares > 0) & (shares < 100)).all()):
        raise ValueError(
            f"{_CALLER}: percentages must be numbers between 0 and 100, both excluded, got {percentages!r}; the clean "
            "score is result.full, and of an image without any pixel nothing can be imputed"
        )
    counts = torch.floor(shares * n_pixels / 100 + 0.5).long()
    wrong = (counts < 1) | (counts >= n_pixels)
    if bool(wrong.any()):
        raise ValueError(
            f"{_CALLER}: percentages must remove at least one of the {n_pixels} pixels and leave one, got "
            f"{float(shares[wrong][0]):g} %; shares of 1 are 100 %"
        )
    return shares, counts
