"""Kernel SHAP jobs as multiples of the forward floor, beside Captum and shap.

The floor is the job's number of model evaluations on preassembled inputs at the fastest batch of 16 to 256. Floor,
contenders and peers are interleaved in every round; ratios are taken within a round; medians are reported.

    python bench/bench_jobs.py [--jobs vit lenet tabular] [--rounds 7] [--no-peers] [--csv FILE]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from environment import describe, pin_threads
from jobs import JOBS, Job
from results import write
from torch import Tensor

BATCHES = (16, 32, 64, 128, 256)


def forward_all(model: Callable[[Tensor], Tensor], rows: Tensor, batch: int) -> None:
    """The floor's work."""
    with torch.inference_mode():
        for part in rows.split(batch):
            model(part)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest_batch(job: Job) -> int:
    """The floor's batch size, by the median of five short interleaved runs."""
    rows = job.rows[: max(512, min(len(job.rows), 8192))]
    times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(5):
        for batch in BATCHES:
            part = rows[: len(rows) // batch * batch]
            times[batch].append(seconds(lambda p=part, b=batch: forward_all(job.model, p, b)) / len(part))
    return min(BATCHES, key=lambda batch: statistics.median(times[batch]))


def run(job: Job, rounds: int, peers: bool) -> list[dict[str, object]]:
    """Measure one job; a row a contender."""
    contenders = {**job.contenders, **(job.peers if peers else {})}
    for work in job.contenders.values():
        work()  # warm-up
    for package in ("captum.attr", "shap") if peers else ():
        importlib.import_module(package)  # not on the first round's clock
    batch = fastest_batch(job)
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds):
        floors.append(seconds(lambda: forward_all(job.model, job.rows, batch)))
        for name, work in contenders.items():
            slow = name in job.peers and round_number >= 5
            times[name].append(float("nan") if slow else seconds(work))
    rows = []
    for name in contenders:
        ratios = [t / f for t, f in zip(times[name], floors, strict=True) if t == t]
        rows.append({
            "job": job.name, "contender": name, "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3), "rounds": len(ratios),
            "seconds_median": round(statistics.median(t for t in times[name] if t == t), 4),
            "floor_seconds_median": round(statistics.median(floors), 4), "floor_batch": batch,
        })  # fmt: skip
    return rows


def main(doc: str, jobs: Mapping[str, Callable[[], Job]]) -> None:
    """Parse, measure, print, store: the command of every benchmark of jobs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=sorted(jobs), default=list(jobs))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    rows = []
    for name in arguments.jobs:
        for row in run(jobs[name](), arguments.rounds, not arguments.no_peers):
            rows.append({**row, **conditions})
            print(
                f"{row['job']:55s} {row['contender']:28s} {row['ratio_median']:7.3f}  "
                f"[{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]  {row['seconds_median']:.3f} s "
                f"(floor {row['floor_seconds_median']:.3f} s at batch {row['floor_batch']})",
                flush=True,
            )
    if arguments.csv:
        write(arguments.csv, rows)


if __name__ == "__main__":
    main(__doc__, JOBS)
