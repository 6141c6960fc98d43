"""Which attribution does the digit classifier follow? Insertion and deletion curves of five methods, side by side.

Run by ``make demo``, or alone: ``python examples/faithfulness.py [OUTPUT.png]``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from train_digits import digits, train

import xaifast

N_IMAGES, N_STEPS, N_EVALUATIONS = 200, 32, 500
# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {
    "Kernel SHAP": "#0072B2",
    "occlusion": "#D55E00",
    "RISE": "#009E73",
    "gradient × input": "#CC79A7",
    "random": "#777777",
}


def gradient_times_input(model: nn.Module, x: Tensor) -> Tensor:
    """Gradient of the predicted class's logit, times the input."""
    x = x.clone().requires_grad_()
    model(x).max(1).values.sum().backward()
    return (x.grad * x).detach()


def attributions(model: nn.Module, x: Tensor, baseline: Tensor) -> dict[str, Tensor]:
    """Maps ``[B, 1, 8, 8]`` for the predicted class; "random" draws its order when curves are made."""
    mask = xaifast.grid_mask((8, 8), 2)
    common = {"baselines": baseline, "target": "predicted"}
    return {
        "Kernel SHAP": xaifast.kernel_shap(model, x, feature_mask=mask, n_samples=N_EVALUATIONS, **common).expand(),
        "occlusion": xaifast.occlusion(model, x, window=3, **common),
        "RISE": xaifast.rise(model, x, n_masks=N_EVALUATIONS, cells=4, **common)[:, None],
        "gradient × input": gradient_times_input(model, x),
        "random": torch.zeros_like(x),
    }


def curves(model: nn.Module, x: Tensor, maps: dict[str, Tensor], baseline: Tensor) -> dict[str, xaifast.Curves]:
    """Both curves of every method, all from and to the mean image."""
    return {
        name: xaifast.insertion_deletion(
            model,
            x,
            values,
            steps=N_STEPS,
            insertion_baseline=baseline,
            deletion_baseline=baseline,
            order="random" if name == "random" else "most",
        )
        for name, values in maps.items()
    }


def _draw_curve(axis: Axes, results: dict[str, xaifast.Curves], kind: str, title: str) -> None:
    for name, result in results.items():
        mean = result.mean()
        y, band = getattr(mean, kind), getattr(mean, f"{kind}_band")
        area = float(getattr(mean, f"{kind}_auc"))
        style = "--" if name == "random" else "-"
        axis.plot(mean.fractions, y, style, color=COLOURS[name], label=f"{name} ({area:.3f})")
        axis.fill_between(mean.fractions, y - band, y + band, color=COLOURS[name], alpha=0.18, linewidth=0)
    axis.set(title=title, xlabel="share of pixels", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    axis.legend(title="mean area", frameon=False, fontsize=9)


def draw(results: dict[str, xaifast.Curves], path: Path) -> None:
    """Mean curves with 95 % bands."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    _draw_curve(left, results, "insertion", "insertion: pixels shown, best first (higher is better)")
    _draw_curve(right, results, "deletion", "deletion: pixels removed, best first (lower is better)")
    left.set_ylabel("probability of the predicted digit")
    figure.suptitle(f"Five attributions of a digit classifier, {N_IMAGES} test images", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def compare(model: nn.Module, x: Tensor, baseline: Tensor, path: Path) -> None:
    """Explain, score and draw."""
    start = time.perf_counter()
    maps = attributions(model, x, baseline)
    explained = time.perf_counter()
    results = curves(model, x, maps, baseline)
    n_rows = sum(result.n_evaluations for result in results.values()) * len(x)
    print(
        f"five attributions of {len(x)} digits in {explained - start:.1f} s, their curves ({n_rows:,} evaluations) in "
        f"{time.perf_counter() - explained:.1f} s"
    )
    for name, result in results.items():
        mean = result.mean()
        print(
            f"  {name:17s} insertion {float(mean.insertion_auc):.3f} ± {float(mean.insertion_auc_band):.3f}   "
            f"deletion {float(mean.deletion_auc):.3f} ± {float(mean.deletion_auc_band):.3f}"
        )
    draw(results, path)
    print(f"figure: {path}")


def main(path: Path) -> None:
    """Train and compare."""
    train_x, test_x, train_y, _ = digits()
    compare(train(train_x, train_y), test_x[:N_IMAGES], train_x.mean(0), path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output/curves.png"))
