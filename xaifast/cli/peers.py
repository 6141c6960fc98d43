"""The same Kernel SHAP by Captum and shap, for `xaifast bench --peers`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..removal import Background
from .shapley_job import ShapleyJob

Forward = Callable[[Tensor], Tensor]


def peers_of(
    job: ShapleyJob, forward: Forward, x: Tensor, n_samples: int, batch: int
) -> dict[str, Callable[[], object]]:
    """Packages that are installed and can do a job, by name, as calls that do all of it.

    Feature selection is off and models run in batches: each at its best.

    Args:
        job: What is explained, with replacement as its removal.
        forward: The model, ``[b, ...]`` to ``[b]`` or ``[b, K]``.
        x: Inputs ``[B, ...]``.
        n_samples: Evaluations an input, the empty and the full one included.
        batch: Rows a call.
    """
    if job.compute.options["removal"] is not None:
        return {}
    baseline = job.compute.options["baselines"]
    with torch.inference_mode():
        outputs = forward(x)
    targets = None if outputs.dim() == 1 else outputs.argmax(1).tolist()
    calls = {}
    if importlib.util.find_spec("captum") and not isinstance(baseline, Background):
        mask, at = job.compute.feature_mask.to(x.device), torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
        calls["captum"] = _captum(forward, x, mask, at, targets, n_samples, batch)
    if importlib.util.find_spec("shap"):
        if isinstance(baseline, Background):
            calls["shap"] = _shap_table(forward, x, baseline.rows, n_samples)
        else:
            mask, at = job.compute.feature_mask.to(x.device), torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
            calls["shap"] = _shap_players(forward, x, mask, at, targets, n_samples, batch)
    return {name: _without_warnings(work) for name, work in calls.items()}


def _without_warnings(work: Callable[[], object]) -> Callable[[], object]:
    def quiet() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()

    return quiet


def _captum(
    forward: Forward, x: Tensor, mask: Tensor, baseline: Tensor, targets: list[int] | None, n: int, batch: int
) -> Callable[[], object]:
    from captum.attr import KernelShap

    explainer = KernelShap(forward)
    mask = mask.expand(1, *x.shape[1:])
    baseline = baseline.expand(1, *x.shape[1:])

    def work() -> None:
        with torch.inference_mode():
            for b in range(len(x)):
                explainer.attribute(
                    x[b : b + 1], baselines=baseline, target=None if targets is None else targets[b],
                    feature_mask=mask, n_samples=n, perturbations_per_eval=batch,
                )  # fmt: skip

    return work


def _shap_players(
    forward: Forward, x: Tensor, mask: Tensor, baseline: Tensor, targets: list[int] | None, n: int, batch: int
) -> Callable[[], object]:
    import shap

    n_players = int(mask.max()) + 1
    nothing, everything = np.zeros((1, n_players)), np.ones((1, n_players))

    def explain(row: Tensor, target: int | None) -> None:
        def values(players: np.ndarray) -> np.ndarray:
            answers = []
            with torch.inference_mode():
                for part in torch.from_numpy(players.astype(bool)).to(x.device).split(batch):
                    kept = part[:, mask].view(len(part), *(1,) * (row.dim() - mask.dim()), *mask.shape)
                    outputs = forward(torch.where(kept, row, baseline))
                    answers.append(outputs if target is None else outputs[:, target])
            return torch.cat(answers).double().cpu().numpy()

        shap.KernelExplainer(values, nothing).shap_values(everything, nsamples=n - 2, l1_reg=False, silent=True)

    def work() -> None:
        for b, row in enumerate(x):
            explain(row, None if targets is None else targets[b])

    return work


def _shap_table(forward: Forward, x: Tensor, background: Tensor, n: int) -> Callable[[], object]:
    import shap

    def values(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return forward(torch.from_numpy(rows).to(x)).double().cpu().numpy()

    explainer = shap.KernelExplainer(values, background.cpu().numpy())
    return lambda: explainer.shap_values(x.cpu().numpy(), nsamples=n - 2, l1_reg=False, silent=True)
