"""Error and time of Shapley estimators on trained networks, beside Captum and shap.

A CNN and a small vision transformer are trained on scikit-learn's digits at 28 x 28 pixels; M = 49 patches of 4 x 4,
baseline the mean training image, value the logit of the predicted class. Errors are relative L2 errors over players
against a long run (median over images and seeds). Everything counts evaluations the same way: n includes the empty and
the full coalition.

    python bench/bench_estimators.py [--images 6] [--seeds 5] [--csv FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from environment import describe, pin_threads
from results import write
from torch import Tensor, nn

import xaifast
from xaifast.removal import Replace

N_REFERENCE = 60_000
N_CURVE = (200, 300, 400, 500, 600, 700, 850, 1000, 2000)


def digits28() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images ``[N, 1, 28, 28]`` with labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=28, mode="bilinear")
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def cnn() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def vit() -> nn.Module:
    """A small vision transformer."""
    return xaifast.models.VisionTransformer(28, 4, 10, channels=1, dim=64, depth=4, heads=4, mlp_ratio=2)


def train(build: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Real training; seconds to a minute."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def by_shap(model: nn.Module, x: Tensor, mask: Tensor, baseline: Tensor, target: Tensor, n: int, seed: int) -> Tensor:
    """shap's KernelExplainer on players (l1_reg off, batched forward), ``[B, M]``."""
    import shap

    np.random.seed(seed)
    values = []
    for row, label in zip(x, target.tolist(), strict=True):

        def forward(z: np.ndarray, row: Tensor = row, label: int = label) -> np.ndarray:
            present = torch.from_numpy(z.astype(bool))
            with torch.inference_mode():
                outputs = [
                    model(torch.where(part[:, mask][:, None], row, baseline))[:, label] for part in present.split(256)
                ]
            return torch.cat(outputs).double().numpy()

        explainer = shap.KernelExplainer(forward, np.zeros((1, 49)))
        values.append(explainer.shap_values(np.ones((1, 49)), nsamples=n - 2, l1_reg=False, silent=True)[0])
    return torch.tensor(np.stack(values))


def by_captum(model: nn.Module, x: Tensor, mask: Tensor, baseline: Tensor, target: Tensor, n: int, seed: int) -> Tensor:
    """Captum's KernelShap, 100 perturbations a call, ``[B, M]``."""
    from captum.attr import KernelShap

    torch.manual_seed(seed)
    explainer, values = KernelShap(model), []
    with torch.inference_mode():
        for row, label in zip(x, target.tolist(), strict=True):
            values.append(
                explainer.attribute(
                    row[None], baselines=baseline[None], target=label, feature_mask=mask[None, None], n_samples=n,
                    perturbations_per_eval=100, return_input_shape=False,
                )[0]
            )  # fmt: skip
    return torch.stack(values)


class Grouped(Replace):
    """Pixel replacement on the design that TokenDrop uses."""

    design = "grouped"


def ours(estimator: str, removal: Replace | None = None) -> Callable[..., Tensor]:
    """xaifast with one estimator."""

    def run(model: nn.Module, x: Tensor, mask: Tensor, baseline: Tensor, target: Tensor, n: int, seed: int) -> Tensor:
        return xaifast.kernel_shap(
            model, x, baselines=baseline, feature_mask=mask, target=target, n_samples=n, seed=seed,
            estimator=estimator, removal=removal,
        ).values  # fmt: skip

    return run


def measure(
    method: Callable[..., Tensor], setting: tuple, reference: Tensor, n: int, seeds: int
) -> tuple[float, float]:
    """Median error over images and seeds, median seconds a call."""
    errors, times = [], []
    for seed in range(seeds):
        start = time.perf_counter()
        values = method(*setting, n, seed)
        times.append(time.perf_counter() - start)
        errors += ((values.double() - reference).norm(dim=1) / reference.norm(dim=1)).tolist()
    return statistics.median(errors), statistics.median(times)


def main() -> None:
    """Train, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    train_x, train_y, test_x, test_y = digits28()
    baseline, mask = train_x.mean(0), xaifast.grid_mask((28, 28), 4)
    rows, at_500 = [], {}
    for name, build, epochs in (("CNN", cnn, 10), ("ViT", vit, 30)):
        model = train(build, train_x, train_y, epochs)
        with torch.inference_mode():
            accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
            x = test_x[: arguments.images]
            target = model(x).argmax(1)
        setting = (model, x, mask, baseline, target)
        reference = xaifast.kernel_shap(
            model,
            x,
            baselines=baseline,
            feature_mask=mask,
            target=target,
            n_samples=N_REFERENCE,
            estimator="wls",
            seed=99,
        )
        own_error = float((reference.std_errors.norm(dim=1) / reference.values.norm(dim=1)).median())
        reference = reference.values.double()
        print(f"\n{name}: test accuracy {accuracy:.3f}, reference of {N_REFERENCE} evaluations (error {own_error:.5f})")
        methods = {"shap": by_shap, "captum": by_captum, **{e: ours(e) for e in ("wls", "adjusted", "permutation")}}
        methods |= {"adjusted, grouped sizes": ours("adjusted", Grouped())}
        curve: dict[str, list[tuple[int, float, float]]] = {}
        for method, function in methods.items():
            budgets = (500, 2000) if method in ("shap", "captum", "adjusted, grouped sizes") else N_CURVE
            function(*setting, 200, 0)  # warm-up
            for n in budgets:
                error, spent = measure(function, setting, reference, n, arguments.seeds)
                curve.setdefault(method, []).append((n, error, spent))
                point = {"network": name, "method": method, "n": n, "error_median": round(error, 5)}
                point |= {"seconds_median": round(spent, 4), "images": arguments.images, "seeds": arguments.seeds}
                rows.append(point | conditions)
                print(f"  {method:23s} n {n:5d}  error {error:.4f}  {spent:.3f} s", flush=True)
        at_500[name] = {method: next(e for n, e, _ in points if n == 500) for method, points in curve.items()}
        _, goal, shap_seconds = curve["shap"][-1]
        reached = [(s, m, n, e) for m in ("wls", "adjusted", "permutation") for n, e, s in curve[m] if e <= goal]
        if reached:
            spent, method, n, error = min(reached)
            print(
                f"  to shap's n = 2000 error ({goal:.4f}, {shap_seconds:.3f} s): {method} n = {n} ({error:.4f}) in "
                f"{spent:.3f} s, {spent / shap_seconds:.3f} of shap's time"
            )
    print("\nerror at n = 500 relative to peers")
    for method, peer in (
        ("wls", "shap"),
        ("adjusted", "shap"),
        ("adjusted", "captum"),
        ("adjusted, grouped sizes", "adjusted"),
    ):
        ratios = {name: errors[method] / errors[peer] for name, errors in at_500.items()}
        mean = math.exp(statistics.mean(math.log(r) for r in ratios.values()))
        each = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"  {method} / {peer}: geometric mean {mean:.3f} ({each})")
    if arguments.csv:
        write(arguments.csv, rows)


if __name__ == "__main__":
    main()
