"""How surely one method is better than another on images like these: a paired bootstrap over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK_COUNTS = 2**22  # of resampled images held at a time


@dataclass(frozen=True)
class Ranking:
    """Methods compared by one score; float64 ``[R]`` each.

    Attributes:
        mean: Over the images that all methods have a score of.
        first: Share of resamples in which a method has the best mean; methods that tie share it.
        difference: ``mean`` less the best method's.
        low, high: 2.5 % and 97.5 % quantile of that difference over the resamples.
        best: The method with the best mean.
        n: Images compared.
    """

    mean: np.ndarray
    first: np.ndarray
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    best: int
    n: int


def rank_methods(
    scores: np.ndarray, *, larger_is_better: bool = True, n_resamples: int = 2000, seed: int = 0
) -> Ranking:
    """Compare methods by their mean score, paired: every resample draws images, and takes them for all methods.

    Args:
        scores: ``[n, R]``, images by methods. Images on which a method has no score (NaN) are left out for all.
        larger_is_better: Else the smallest mean is best.
        n_resamples: Of n images each, drawn with replacement.
        seed: Of the drawing.

    Returns:
        `Ranking`; only ``mean`` and ``difference`` where one image is left, of which nothing can be resampled, and NaN
        where none is.

    Raises:
        ValueError: scores are not ``[n, R]`` with at least one method.

    Cost: n_resamples * n draws, in blocks of 32 MiB. Deterministic.

    Source: percentile intervals, Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Example:
        >>> ranking = rank_methods(np.array([[0.9, 0.5], [0.7, 0.6], [0.8, 0.1]]))
        >>> ranking.first.tolist(), ranking.difference.round(6).tolist()
        ([1.0, 0.0], [0.0, -0.4])
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"xaifast.rank_methods: scores must be [n, R] with R >= 1, got {list(scores.shape)}")
    scores = scores[np.isfinite(scores).all(1)]
    n, n_methods = scores.shape
    nan = np.full(n_methods, np.nan)
    mean = scores.mean(0) if n else nan
    best = int(mean.argmax() if larger_is_better else mean.argmin())
    if n < 2:
        return Ranking(mean, nan, mean - mean[best], nan, nan, best, n)
    gaps = scores - scores[:, [best]]  # of one image, so that methods that are equal stay so in every sum
    rng, block = np.random.Generator(np.random.Philox(seed)), max(1, _BLOCK_COUNTS // n)
    parts = []
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        picks = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
        parts.append(counts @ gaps / n)
    resampled = np.concatenate(parts)  # [n_resamples, R]
    top = resampled.max(1, keepdims=True) if larger_is_better else resampled.min(1, keepdims=True)
    wins = resampled == top
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return Ranking(mean, (wins / wins.sum(1, keepdims=True)).mean(0), mean - mean[best], low, high, best, n)
