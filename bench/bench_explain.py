"""What `xaifast explain` adds to `kernel_shap` on the same inputs, and how soon it shows progress.

LeNet-5 on made images, 64 patches, 512 evaluations each: the command in this process (every import done), beside one
call of `kernel_shap` with the command's own model rows a call, interleaved; medians of rounds.

    python bench/bench_explain.py [--images 1024] [--rounds 5] [--threads 2] [--csv FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import describe, pin_threads
from jobs import LeNet5
from results import write

import xaifast
from xaifast import cli, jobs
from xaifast.run import open_run

N_SAMPLES = 512


def model() -> LeNet5:
    """What the command loads as py:bench_explain:model."""
    torch.manual_seed(0)
    return LeNet5().eval()


class FirstProgress(jobs._Bar):
    """Remembers when the first bar first moved."""

    moved: float | None = None

    def advance(self, units: int) -> None:
        """Count on."""
        FirstProgress.moved = FirstProgress.moved or time.perf_counter()
        super().advance(units)


def measure(images: int, rounds: int, threads: int) -> dict[str, float]:
    """Medians over rounds, after one that warms up."""
    x = np.random.default_rng(0).random((images, 1, 32, 32), dtype=np.float32)
    np.savez("x.npz", x=x)
    arguments = ["explain", "--model", "py:bench_explain:model", "--data", "npz:x.npz", "--patch", "4", "--target", "3"]
    arguments += ["--n-samples", str(N_SAMPLES), "--threads", str(threads), "--quiet"]
    jobs._Bar = FirstProgress
    inputs, mask = torch.from_numpy(x), xaifast.grid_mask((32, 32), 4)
    times: dict[str, list[float]] = {name: [] for name in ("call", "command", "report", "first progress")}
    for number in range(rounds + 1):
        out = f"out{number}"
        FirstProgress.moved = None
        start = time.perf_counter()
        assert cli.main([*arguments, "--out", out, "--no-report"]) == 0
        command, moved = time.perf_counter() - start, FirstProgress.moved - start
        start = time.perf_counter()
        assert cli.main([*arguments, "--out", out]) == 0  # only the report is left to do
        report = time.perf_counter() - start
        network, rows = model(), open_run(out).manifest["rows"]
        start = time.perf_counter()
        xaifast.kernel_shap(network, inputs, target=3, feature_mask=mask, n_samples=N_SAMPLES, batch_size=rows)
        call = time.perf_counter() - start
        if number:
            for name, value in zip(times, (call, command, report, moved), strict=True):
                times[name].append(value)
    ratios = [b / a for a, b in zip(times["call"], times["command"], strict=True)]
    return {
        "images": images,
        "call_seconds": statistics.median(times["call"]),
        "command_over_call": statistics.median(ratios),
        "command_over_call_min": min(ratios),
        "command_over_call_max": max(ratios),
        "report_seconds": statistics.median(times["report"]),
        "first_progress_seconds": statistics.median(times["first progress"]),
        "rounds": rounds,
    }


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    pin_threads(given.threads)
    environment, csv_path = describe(), given.csv and given.csv.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = {name: round(value, 4) for name, value in measure(given.images, given.rounds, given.threads).items()}
        os.chdir("/")
    for name, value in {**result, **environment}.items():
        print(f"{name:24s}{value}")
    if csv_path:
        write(csv_path, [{**result, **environment}])


if __name__ == "__main__":
    main()
