"""`shap.KernelExplainer` and the drop-in for it: the same script with two import lines.

Both explain the same rows with the same number of coalitions a row; the floor is the model on as many preassembled
rows, at the fastest batch. Floor and explainers are interleaved in every round, ratios are taken within a round, and
medians are reported.

    python bench/bench_shap.py [--jobs mlp forest] [--rounds 5] [--rows 32] [--csv FILE]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import shap
import torch
from environment import describe
from results import write
from threadpoolctl import ThreadpoolController

from xaifast.compat.shap import KernelExplainer

EXPLAINERS = {"shap": shap.KernelExplainer, "xaifast": KernelExplainer}
BATCHES = (2048, 4096, 8192, 16384, 32768, 65536)
SETTINGS = ((510, False), (510, "num_features(10)"), ("auto", False), ("auto", "num_features(10)"))
N_FEATURES, N_BACKGROUND = 30, 100


def mlp() -> Callable[[np.ndarray], np.ndarray]:
    """A NumPy perceptron 30-64-64-2, float64."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=size) / np.sqrt(size[0]) for size in ((N_FEATURES, 64), (64, 64), (64, 2))]

    def forward(rows: np.ndarray) -> np.ndarray:
        for weight in weights[:-1]:
            rows = np.maximum(rows @ weight, 0)
        return rows @ weights[-1]

    return forward


def forest() -> Callable[[np.ndarray], np.ndarray]:
    """scikit-learn's random forest, 100 trees in all threads, two classes."""
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, N_FEATURES))
    return RandomForestClassifier(100, n_jobs=-1, random_state=0).fit(x, x[:, 0] + x[:, 1] * x[:, 2] > 0).predict_proba


MODELS = {"mlp": mlp, "forest": forest}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_in_batches(model: Callable, rows: np.ndarray, n_rows: int, batch: int) -> None:
    """The floor's work: ``n_rows`` rows, over and over those of ``rows``."""
    for start in range(0, n_rows, batch):
        offset = start % (len(rows) - batch + 1)
        model(rows[offset : offset + min(batch, n_rows - start)])


def measure(name: str, n_explained: int, rounds: int) -> Iterator[dict[str, object]]:
    """One model: a row for each setting and explainer."""
    rng = np.random.default_rng(1)
    x, background = rng.normal(size=(n_explained, N_FEATURES)), rng.normal(size=(N_BACKGROUND, N_FEATURES))
    rows, model = rng.normal(size=(1 << 18, N_FEATURES)), MODELS[name]()
    trials = {batch: [] for batch in BATCHES}
    for _ in range(3):
        for batch, times in trials.items():
            times.append(seconds(lambda b=batch: run_in_batches(model, rows, 1 << 17, b)))
    best = min(BATCHES, key=lambda batch: statistics.median(trials[batch]))
    explainers = {key: kind(model, background) for key, kind in EXPLAINERS.items()}
    for nsamples, l1_reg in SETTINGS:
        n = 2 * N_FEATURES + 2048 if nsamples == "auto" else nsamples
        n_rows = n_explained * n * N_BACKGROUND
        floors, spent = [], {key: [] for key in explainers}
        for round_number in range(rounds + 1):
            floor = seconds(lambda n_rows=n_rows: run_in_batches(model, rows, n_rows, best))
            times = {
                key: seconds(lambda e=e, n=nsamples, r=l1_reg: e.shap_values(x, nsamples=n, l1_reg=r, silent=True))
                for key, e in explainers.items()
            }
            if round_number:  # the first is a warm-up
                floors.append(floor)
                for key, value in times.items():
                    spent[key].append(value)
        for key, times in spent.items():
            over = [t / f for t, f in zip(times, floors, strict=True)]
            faster = [t / s for t, s in zip(times, spent["shap"], strict=True)]
            yield {
                "job": name, "nsamples": n, "l1_reg": l1_reg, "rows": n_explained, "contender": key,
                "seconds_median": round(statistics.median(times), 4),
                "over_floor_median": round(statistics.median(over), 3),
                "over_shap_median": round(statistics.median(faster), 3),
                "over_shap_min": round(min(faster), 3), "over_shap_max": round(max(faster), 3),
                "floor_seconds_median": round(statistics.median(floors), 4), "floor_batch": best, "rounds": rounds,
            }  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=sorted(MODELS), default=["mlp"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="of torch and of NumPy's BLAS")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("shap").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    ThreadpoolController().select(internal_api="openblas").limit(limits=arguments.threads)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    table = []
    for name in arguments.jobs:
        for row in measure(name, arguments.rows, arguments.rounds):
            table.append({**row, **conditions})
            print(
                f"{row['job']:7s} n = {row['nsamples']:<5} l1_reg = {str(row['l1_reg']):17s} {row['contender']:8s} "
                f"{row['seconds_median']:7.3f} s  {row['over_floor_median']:6.2f} x floor  "
                f"{row['over_shap_median']:6.3f} x shap [{row['over_shap_min']:.3f}, {row['over_shap_max']:.3f}]",
                flush=True,
            )
    if arguments.csv:
        write(arguments.csv, table)


if __name__ == "__main__":
    main()
