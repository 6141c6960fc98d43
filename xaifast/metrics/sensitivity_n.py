"""Sensitivity-n: do sums of attributions follow what removing those features does?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator
from ..noise import check_seed
from ..ops.ranking import rank_features
from ..players import Players
from ..reference.ranking import places
from ..removal.perturbed import sum_rows
from ..scores import check_one_score, resolve_score
from ..stream import shared_progress
from ._checks import one_tensor
from ._features import Features, resolve_features

_CALLER = "xaifast.metrics.sensitivity_n"
_DRAWS = 1 << 62  # permutations are numbered from here on, apart from the random orders of curves
_PER_INPUT = 1 << 20  # numbers of an input


@dataclass(frozen=True)
class SensitivityN:
    """Correlations for subsets of several sizes; made by `xaifast.metrics.sensitivity_n`.

    Attributes:
        values: Pearson's correlation ``[B, S]``; NaN where either side is constant.
        sizes: LongTensor ``[S]``: features removed together.
        targets: LongTensor ``[B]``, the output scored; None where the model has one.
        n_evaluations: Model rows spent on each input.
    """

    values: Tensor
    sizes: Tensor
    targets: Tensor | None
    n_evaluations: int

    @property
    def mean(self) -> Tensor:
        """``[B]``: mean over the sizes that have a correlation; NaN where none has."""
        return self.values.nanmean(1)

    def __repr__(self) -> str:
        batch, n = self.values.shape
        return f"SensitivityN({batch} inputs, {n} sizes, mean {float(self.mean.nanmean()):.4f})"


def sensitivity_n(
    forward: Callable,
    inputs: Tensor,
    attributions: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    n_subsets: int = 100,
    baselines: object = 0.0,
    feature_mask: Tensor | None = None,
    removal: object = None,
    target: int | str | Tensor | None = "predicted",
    score: str | Callable[[Tensor], Tensor] = "logit",
    design: str = "shared",
    seed: int = 0,
    first_index: int = 0,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> SensitivityN:
    """Correlation between the sum of attributions of removed features and what their removal takes from the score.

    values[b, s] = corr_T(sum_{i in T} a_bi, f(x_b) - f(x_b without T)) over random sets T of n_s features. The sets are
    the first n_s features of ``n_subsets`` random permutations: of every size all sets are equally likely, and the sets
    of one permutation are nested.

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``.
        inputs: ``[B, ...]``, one tensor.
        attributions: ``[B, H, W]``, ``[B, 1, H, W]`` or ``[B, C, H, W]`` (summed over C) for images ``[B, C, H, W]``: a
            feature is a pixel with all its channels. The inputs' shape for other inputs. With a feature mask
            ``[B, M]``; a map is averaged over each player, not summed.
        sizes: Each 1..M-1, M features; None for up to twelve sizes from 1 to 0.8 M, evenly spaced on a log scale.
        n_subsets: Sets of each size, at least 3.
        baselines: What removed features show: a number, a tensor ``[...]`` or ``[B, ...]``, or
            ``xaifast.Background(rows)``.
        feature_mask: Player ids, see `xaifast.grid_mask`; also one an input. Players that do not occur in an input
            leave its sets smaller.
        removal: None (replace by ``baselines``), ``"blur"``, a callable, ``xaifast.removal.TokenDrop()`` or
            ``TokenSelect()``.
        target: int, LongTensor ``[B]``, ``"predicted"`` (of the clean input), or None for a model with one output.
        score: ``"logit"``, ``"softmax"``, ``"accuracy"`` or a callable on outputs ``[rows, K]``.
        design: ``"shared"``: the same sets for all inputs; ``"per_input"``: sets by data-set index, for averages over a
            data set.
        seed: Of the sets, 0..2**63-1.
        first_index: Data-set index of the first input, below 2**40, for ``design="per_input"``.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        `SensitivityN`; values in the inputs' floating dtype, at least float32, from sums in float64. Range -1..1,
        higher is better; 1 for every size means that attributions add up to what removal does. NaN where the sums or
        the differences are constant (spread below 1e-12 of their size), such as for an attribution of zeros.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: S n_subsets model rows an input (times R with a background); ``n_subsets`` sorts of M words and 4 n_subsets M
    bytes (an input, with ``"per_input"``).

    Source: Ancona, Ceolini, Öztireli and Gross, "Towards better understanding of gradient-based attribution methods for
    deep neural networks", ICLR 2018, Section 4.

    Example:
        >>> model = torch.nn.Linear(8, 3).eval()
        >>> x = torch.rand(4, 8)
        >>> result = sensitivity_n(model, x, x * model.weight[1], target=1, sizes=(1, 4), n_subsets=20)
        >>> torch.allclose(result.values, torch.ones(4, 2), atol=1e-5)
        True
    """
    x = one_tensor(inputs, _CALLER)
    check_seed(seed, first_index, _CALLER)
    if design not in ("shared", "per_input"):
        raise ValueError(f'{_CALLER}: design must be "shared" or "per_input", got {design!r}')
    if design == "per_input" and first_index + len(x) > 1 << 40:
        raise ValueError(f"{_CALLER}: first_index must be below 2^40 with design='per_input', got {first_index}")
    _check_subsets(n_subsets)
    score_fn = resolve_score(score, _CALLER)
    features = resolve_features(attributions, x, feature_mask, _CALLER)
    if not bool(features.scores.isfinite().all()):
        b = int((~features.scores.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"{_CALLER}: attributions must be finite to be summed, got infinity for input {b}; repair them"
        )
    n_features = features.n_features
    sizes = _resolve_sizes(sizes, n_features)
    first = [_DRAWS + (first_index + b + 1) * _PER_INPUT for b in range(len(x))] if design == "per_input" else [_DRAWS]
    drawn = torch.empty(1, 1, device="cpu").expand(n_subsets, n_features)  # only the shape is read
    ranks = torch.stack([rank_features(drawn, order="random", seed=seed, first_index=i) for i in first])

    evaluator = Evaluator(
        forward,
        (x,),
        players=_players(features),
        baselines=baselines,
        target=target,
        removal=removal,
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
    sums = _sums(features.scores, ranks, sizes)  # [B, N, S]
    values = []
    total = len(x) * n_subsets * len(sizes)
    with shared_progress(total, show_progress=show_progress, description="sensitivity_n", unit="evaluation"):
        for s, size in enumerate(sizes):
            kept = [Coalitions.from_present(one >= size) for one in ranks]
            bits = torch.stack([one.bits for one in kept]) if design == "per_input" else kept[0].bits
            lost = evaluator.full - evaluator(Coalitions(bits, kept[0].weights, n_features))[..., 0]  # [B, N]
            values.append(_correlation(sums[..., s], lost))
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    return SensitivityN(
        values=torch.stack(values, 1).to(dtype),
        sizes=torch.tensor(sizes, device=x.device),
        targets=evaluator.targets,
        n_evaluations=(n_subsets * len(sizes) + 1) * evaluator.n_background,
    )


def _check_subsets(n_subsets: object) -> None:
    if isinstance(n_subsets, bool) or not isinstance(n_subsets, Integral) or not 3 <= n_subsets <= _PER_INPUT:
        raise ValueError(f"{_CALLER}: n_subsets must be an int from 3 to 2^20, got {n_subsets!r}")


def _resolve_sizes(sizes: Sequence[int] | None, n_features: int) -> list[int]:
    if n_features < 2:
        raise ValueError(f"{_CALLER}: attributions must have at least 2 features to compare sets of, got {n_features}")
    if sizes is None:
        largest = max(1, int(0.8 * n_features))
        return np.unique(np.geomspace(1, largest, 12).round().astype(int)).tolist()
    given = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    given = [*given] if isinstance(given, Iterable) else [None]
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in given)
    if not given or not whole or not all(1 <= n < n_features for n in given):
        raise ValueError(
            f"{_CALLER}: sizes must be ints from 1 to {n_features - 1} (all {n_features} features are one set), got "
            f"{sizes!r}"
        )
    return [int(n) for n in given]


def _players(features: Features) -> Players:
    """Features as players; positions are too, however many there are."""
    if features.players is not None:
        return features.players
    ids = torch.arange(features.n_features, device=features.scores.device)
    return Players((ids.view(features.shape),), (False,), features.n_features, None)


def _sums(scores: Tensor, ranks: Tensor, sizes: list[int]) -> Tensor:
    """Sums of scores ``[B, M]`` over the first features of permutations ``[B|1, N, M]``: float64 ``[B, N, S]``."""
    ends = torch.tensor(sizes, device=scores.device) - 1
    sums = []
    for b, row in enumerate(scores.double()):
        if b < len(ranks):
            order = places(ranks[b].to(scores.device).long()).long()  # [N, M]
        sums.append(row[order].cumsum(1)[:, ends])
    return torch.stack(sums)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of rows ``[B, N]``; NaN where a row is constant up to rounding."""
    centred, constant = [], torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for rows in (a, b):
        scale = rows.abs().amax(1, keepdim=True)
        rows = rows / torch.where(scale > 0, scale, 1)
        rows = rows - sum_rows(rows)[:, None] / rows.shape[1]
        constant |= rows.abs().amax(1) <= 1e-12
        centred.append(rows)
    one, other = centred
    product = sum_rows(one * other) / (sum_rows(one * one) * sum_rows(other * other)).sqrt()
    return torch.where(constant, torch.nan, product.clamp(-1, 1))
