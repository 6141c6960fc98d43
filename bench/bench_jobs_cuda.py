"""Kernel SHAP jobs on a GPU as multiples of the forward floor, with peak memory.

As `bench_jobs.py`: the floor is the same number of model evaluations on preassembled inputs at the fastest batch; floor
and contenders are interleaved, ratios are taken within a round. Captum runs beside where it is installed.

    python bench/bench_jobs_cuda.py [--jobs vit lenet tabular] [--rounds 5] [--csv FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import describe
from jobs import Job, LeNet5, captum_kernel_shap, masked_rows
from results import Row, show, write
from torch import nn

import xaifast
from xaifast.removal import TokenDrop, TokenSelect

BATCHES = (64, 256, 1024, 4096, 16384)
N = 500


def vit() -> Job:
    """ViT-base, 224 px, patch 16, bfloat16: M = 196, 8 images."""
    model = xaifast.models.VisionTransformer(224, 16, 1000, dim=768, depth=12, heads=12).eval().bfloat16().cuda()
    x, mask = torch.rand(8, 3, 224, 224).bfloat16(), xaifast.grid_mask((224, 224), 16)
    return _job("ViT-base 224 px bfloat16, M = 196, 8 images", model, x, mask, {
        "pixels, wls": {}, "pixels, wls, CUDA graph": {"cuda_graph": True},
        "TokenSelect, wls": {"removal": TokenSelect()}, "TokenDrop, wls": {"removal": TokenDrop()},
    })  # fmt: skip


def lenet() -> Job:
    """LeNet-5, 32 px: M = 64, 256 images."""
    given = {"wls": {}, "wls, CUDA graph": {"cuda_graph": True}, "auto": {"estimator": "auto"}}
    x, mask = torch.rand(256, 1, 32, 32), xaifast.grid_mask((32, 32), 4)
    return _job("LeNet-5 32 px, M = 64, 256 images", LeNet5().eval().cuda(), x, mask, given)


def tabular() -> Job:
    """MLP 30-64-64-2 with 100 background rows, 256 rows."""
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval().cuda()
    x, background = torch.randn(256, 30).cuda(), xaifast.Background(torch.randn(100, 30).cuda())

    def ours(estimator: str) -> Callable[[], object]:
        return lambda: xaifast.kernel_shap(model, x, baselines=background, n_samples=N, estimator=estimator)

    rows = torch.randn(1 << 20, 30, device="cuda").repeat(13, 1)[: 256 * N * 100]
    return Job("MLP 30-64-64-2, 100 background rows, 256 rows", model, rows, {"wls": ours("wls"), "auto": ours("auto")})


JOBS = {"vit": vit, "lenet": lenet, "tabular": tabular}


def _job(name: str, model: nn.Module, x: torch.Tensor, mask: torch.Tensor, given: dict[str, dict]) -> Job:
    rows, x = masked_rows(x, mask, N).cuda(), x.cuda()

    def ours(options: dict) -> Callable[[], object]:
        options = {"estimator": "wls", **options}
        return lambda: xaifast.kernel_shap(model, x, feature_mask=mask, n_samples=N, target=3, **options)

    peers = {}
    if importlib.util.find_spec("captum"):
        peers["Captum 100 per call"] = captum_kernel_shap(model, x, mask.cuda(), N, 100, 3)
    return Job(name, model, rows, {key: ours(options) for key, options in given.items()}, peers)


def seconds(work: Callable[[], object]) -> float:
    """Wall time until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_all(job: Job, batch: int) -> None:
    """The floor's work."""
    with torch.inference_mode():
        for part in job.rows.split(batch):
            job.model(part)


def measure(job: Job, rounds: int) -> list[Row]:
    """A row a contender."""
    contenders = {**job.contenders, **job.peers}
    for work in contenders.values():
        work()
    floor_of = {batch: lambda b=batch: forward_all(job, b) for batch in BATCHES if batch <= len(job.rows)}
    for work in floor_of.values():
        work()
    batch = min(floor_of, key=lambda b: min(seconds(floor_of[b]) for _ in range(2)))
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for _ in range(rounds):
        floors.append(seconds(floor_of[batch]))
        for name, work in contenders.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times[name].append(seconds(work))
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
    rows = []
    for name, taken in times.items():
        ratios = [t / f for t, f in zip(taken, floors, strict=True)]
        rows.append({
            "job": f"{job.name}, n = {N}", "contender": name, "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3), "rounds": rounds,
            "seconds_median": round(statistics.median(taken), 4),
            "floor_seconds_median": round(statistics.median(floors), 4), "floor_batch": batch,
            "peak_mib": round(peaks[name] / 2**20, 1),
        })  # fmt: skip
    return rows


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=sorted(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a CUDA device is needed; bench_jobs.py measures on the CPU", file=sys.stderr)
        return 2
    conditions, rows = describe(), []
    for name in arguments.jobs:
        torch.manual_seed(0)
        rows += [{**row, **conditions} for row in measure(JOBS[name](), arguments.rounds)]
        torch.cuda.empty_cache()
    show(rows, ("job", "contender", "ratio_median", "ratio_min", "ratio_max", "seconds_median", "peak_mib"))
    if arguments.csv:
        write(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
