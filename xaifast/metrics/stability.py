"""How much importance a model spends, and how much of it another seed would change.

Source: the IA/EA/PA architectures (OpenReview qr8leFAPrd). The functions named `*_rows` give float64 numbers an input,
which the classes sum.
"""

from __future__ import annotations

from torch import Tensor

from ._checks import check_finite, check_maps, result_dtype


def importance_rows(importance: Tensor) -> Tensor:
    """Mean importance of each input, float64 [B]."""
    check_maps("xaifast.metrics.sparsity", "B, M", importance=importance)
    check_finite("xaifast.metrics.sparsity", "importance", importance)
    return importance.double().mean(1)


def spread_rows(importance_runs: Tensor) -> Tensor:
    """Mean standard deviation across runs of each input, float64 [B]."""
    caller = "xaifast.metrics.reproducibility"
    check_maps(caller, "R, B, M", importance_runs=importance_runs)
    if importance_runs.shape[0] < 2:
        raise ValueError(f"{caller}: importance_runs must hold at least 2 runs, got {list(importance_runs.shape)}")
    check_finite(caller, "importance_runs", importance_runs)
    return importance_runs.double().std(0, correction=0).mean(1)


def sparsity(importance: Tensor) -> Tensor:
    """Mean importance: s[b] = mean_m importance[b, m]. Lower is sparser.

    Args:
        importance: `[B, M]`, meant to be in 0..1, any real dtype, finite.

    Returns:
        `[B]` in the input's floating dtype, at least float32; summed in float64.

    Raises:
        TypeError: no dense real tensor.
        ValueError: a wrong shape, nothing in the batch, values that are not finite.

    Cost: one pass. Source: OpenReview qr8leFAPrd, Eq. 2.

    Example:
        >>> sparsity(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
        tensor([0.2500, 0.7500])
    """
    return importance_rows(importance).to(result_dtype(importance))


def reproducibility(importance_runs: Tensor) -> Tensor:
    """How much importance changes from run to run: r[b] = mean_m SD_r(importance_runs[r, b, m]). Lower is better.

    SD is the population's standard deviation, sqrt(mean_r (a_r - mean a)^2).

    Args:
        importance_runs: `[R, B, M]`, R >= 2 trainings of one model with different seeds; any real dtype, finite.

    Returns:
        `[B]`, 0 is best, at most 0.5 for importance in 0..1; in the input's floating dtype, at least float32.

    Raises:
        TypeError: no dense real tensor.
        ValueError: a wrong shape, fewer than two runs, nothing in the batch, values that are not finite.

    Cost: one pass in float64 by Welford's recurrence (`torch.std`), which large offsets do not harm. Source:
    reproducibility of OpenReview qr8leFAPrd; that the deviation is the population's is this package's choice.

    Example:
        >>> reproducibility(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]))
        tensor([0.2500])
    """
    return spread_rows(importance_runs).to(result_dtype(importance_runs))
