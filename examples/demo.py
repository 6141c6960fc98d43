"""Kernel SHAP on handwritten digits: train a network, explain 64 test images, check the answers, draw them; then
compare five attributions by insertion and deletion.

Run with ``make demo`` or ``python examples/demo.py [OUTPUT.png]``.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from faithfulness import N_IMAGES as N_COMPARED
from faithfulness import compare
from torch import Tensor, nn
from train_digits import accuracy, digits, train

import xaifast

N_IMAGES, N_SAMPLES, N_EXACT = 64, 500, 6


def forward_floor(model: nn.Module, x: Tensor, n_rows: int) -> float:
    """Seconds for ``n_rows`` bare model evaluations at the fastest of three batch sizes."""
    times = []
    with torch.inference_mode():
        for batch in (64, 128, 256):
            rows = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].contiguous()
            start = time.perf_counter()
            for _ in range(n_rows // batch):
                model(rows)
            times.append((time.perf_counter() - start) * n_rows / (n_rows // batch * batch))
    return min(times)


def relative_error(values: Tensor, exact: Tensor) -> list[float]:
    """Relative L2 error of each input."""
    return ((values - exact).norm(dim=1) / exact.norm(dim=1)).tolist()


def draw(x: Tensor, labels: Tensor, result: xaifast.ShapleyResult, predicted: Tensor, path: Path) -> None:
    """Inputs, Shapley values over them and standard errors, for sixteen digits."""
    rows, columns = 2, 8
    values = result.expand()[:, 0].numpy()
    mask = xaifast.grid_mask((8, 8), 2)
    errors = result.std_errors[:, mask.flatten()].reshape(-1, 8, 8).numpy()
    top = float(abs(values[: rows * columns]).max())
    top_error = float(errors[: rows * columns].max())
    figure, axes = plt.subplots(3 * rows, columns, figsize=(11.5, 9.2), layout="constrained")
    for i in range(rows * columns):
        r, c = divmod(i, columns)
        input_axis, value_axis, error_axis = axes[3 * r : 3 * r + 3, c]
        digit = x[i, 0].numpy()
        input_axis.imshow(digit, cmap="gray_r", vmin=0, vmax=1)
        truth = "" if labels[i] == predicted[i] else f" (is {labels[i]})"
        input_axis.set_title(f"“{predicted[i]}”{truth}", fontsize=11)
        shown = value_axis.imshow(values[i], cmap="PuOr_r", vmin=-top, vmax=top)
        # Interpolated and padded, so that the outline is smooth and closed at the border.
        fine = F.interpolate(F.pad(x[i : i + 1], (1, 1, 1, 1)), scale_factor=4, mode="bicubic")[0, 0].numpy()
        at = (torch.arange(40) + 0.5).numpy() / 4 - 1.5
        value_axis.contour(at, at, fine, levels=[0.45], colors="black", linewidths=1.1)
        value_axis.set(xlim=(-0.5, 7.5), ylim=(7.5, -0.5))
        doubt = error_axis.imshow(errors[i], cmap="Greys", vmin=0, vmax=top_error)
    for r in range(rows):
        for k, name in enumerate(("input", "Shapley value", "standard error")):
            axes[3 * r + k, 0].set_ylabel(name, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.colorbar(shown, ax=axes[:3], shrink=0.8, label="Shapley value (logit)")
    figure.colorbar(doubt, ax=axes[3:], shrink=0.8, label="standard error (logit)")
    figure.suptitle(
        f"Kernel SHAP of a digit classifier: what speaks for (orange) and against (purple) the predicted digit\n"
        f"{result.n_evaluations} evaluations an image, 16 players of 2 × 2 pixels, estimator “{result.estimator}”",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def main(path: Path) -> None:
    """The whole demonstration."""
    train_x, test_x, train_y, test_y = digits()
    start = time.perf_counter()
    model = train(train_x, train_y)
    print(f"trained in {time.perf_counter() - start:.1f} s, test accuracy {accuracy(model, test_x, test_y):.1%}")
    x, labels, baseline = test_x[:N_IMAGES], test_y[:N_IMAGES], train_x.mean(0)
    mask = xaifast.grid_mask((8, 8), 2)
    explain = {"baselines": baseline, "feature_mask": mask, "target": "predicted"}

    xaifast.kernel_shap(model, x[:2], n_samples=50, **explain)  # warm-up
    forward_floor(model, x, 2048)
    seconds, floors = [], []
    for _ in range(5):
        floors.append(forward_floor(model, x, N_IMAGES * N_SAMPLES))
        start = time.perf_counter()
        result = xaifast.kernel_shap(model, x, n_samples=N_SAMPLES, **explain)
        seconds.append(time.perf_counter() - start)
    ratio = statistics.median(s / f for s, f in zip(seconds, floors, strict=True))
    print(f"\n{result}")
    print(
        f"explained {N_IMAGES} digits with {N_SAMPLES} evaluations each: {N_IMAGES / statistics.median(seconds):.0f} "
        f"images per second, {ratio:.2f} times the bare forward time ({torch.get_num_threads()} threads)"
    )

    exact = xaifast.kernel_shap(model, x[:N_EXACT], n_samples=2**16, show_progress=True, **explain)
    wls = xaifast.kernel_shap(model, x[:N_EXACT], n_samples=N_SAMPLES, estimator="wls", **explain)
    print(f"\nrelative error against all 65,536 coalitions, {N_EXACT} digits:")
    for name, values in ((result.estimator, result.values[:N_EXACT]), ("wls", wls.values)):
        errors = relative_error(values, exact.values)
        print(f"  {name:9s} median {statistics.median(errors):.4f}   worst {max(errors):.4f}")
    claimed = (result.std_errors[:N_EXACT].norm(dim=1) / result.values[:N_EXACT].norm(dim=1)).tolist()
    print(f"  its own standard errors said   {statistics.median(claimed):.4f}")
    gap = (exact.values.sum(1) - (exact.full_values - exact.base_values)).abs().max()
    print(f"  exact values add up to the change of the output within {float(gap):.1e}")

    with torch.inference_mode():
        predicted = model(x).argmax(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(x, labels, result, predicted, path)
    print(f"\nfigure: {path}\n")
    compare(model, test_x[:N_COMPARED], baseline, path.with_name("curves.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output/digits.png"))
