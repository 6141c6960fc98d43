"""Noisy linear imputation of ROAD: the batched multigrid solve beside a sparse direct solve of every image.

Seconds an image at 224 px, three channels, for shares of removed pixels in two orders: scattered (a random map) and
smooth (a coarse map enlarged). SciPy's matrices are assembled without loops and solved by `spsolve`, as ROAD's public
code does it, but faster than its assembly. Contenders are interleaved in every round; medians are reported. Results are
compared before anything is timed.

    python bench/bench_road.py [--size 224] [--images 4] [--shares 10 50 90] [--rounds 5] [--csv FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_jobs import seconds
from environment import describe, pin_threads
from results import write
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from xaifast.removal.imputed import linear_impute


def scipy_impute(images: Tensor, removed: Tensor) -> Tensor:
    """Image by image, a direct solve of all channels."""
    return torch.stack([_scipy_one(image, gone) for image, gone in zip(images, removed.numpy(), strict=True)])


def _scipy_one(image: Tensor, removed: np.ndarray) -> Tensor:
    height, width = removed.shape
    rows, columns = np.nonzero(removed)
    number = np.full(removed.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    pixels = image.numpy().astype(np.float64)
    right, diagonal, entries = np.zeros((len(rows), len(pixels))), np.zeros(len(rows)), []
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            weight = {0: 0, 1: 1 / 6, 2: 1 / 12}[abs(i) + abs(j)]
            p, q = rows + i, columns + j
            (inside,) = np.nonzero((p >= 0) & (p < height) & (q >= 0) & (q < width) & (weight > 0))
            p, q = p[inside], q[inside]
            diagonal[inside] += weight
            gone = removed[p, q]
            entries.append((inside[gone], number[p[gone], q[gone]], np.full(gone.sum(), -weight)))
            right[inside[~gone]] += weight * pixels[:, p[~gone], q[~gone]].T
    entries.append((np.arange(len(rows)), np.arange(len(rows)), diagonal))
    i, j, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    matrix = coo_matrix((values, (i, j)), shape=(len(rows), len(rows))).tocsc()
    pixels[:, removed] = spsolve(matrix, right).reshape(len(rows), -1).T
    return torch.from_numpy(pixels)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"xaifast": linear_impute, "SciPy": scipy_impute}


def photographs(n: int, size: int) -> Tensor:
    """``[n, 3, size, size]`` float32 in 0..1."""
    from skimage import data, transform

    shown = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    pictures = [transform.resize(shown[i % len(shown)], (size, size)) for i in range(n)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().contiguous()


def maps(order: str, n: int, size: int) -> Tensor:
    """What decides the order of removal: ``[n, size * size]``."""
    if order == "scattered":
        return torch.rand(n, size * size)
    return F.interpolate(torch.rand(n, 1, 7, 7), size=size, mode="bicubic").flatten(1)


def measure(size: int, n: int, share: int, order: str, rounds: int) -> list[dict[str, object]]:
    """A row for each contender."""
    images, k = photographs(n, size), round(share * size * size / 100)
    ranked = maps(order, n, size).argsort(1, descending=True)
    removed = torch.zeros(n, size * size, dtype=torch.bool).scatter(1, ranked[:, :k], True).view(n, size, size)
    difference = float((linear_impute(images, removed) - scipy_impute(images, removed)).abs().max())
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, impute in CONTENDERS.items():
            times[name].append(seconds(lambda impute=impute: impute(images, removed)) / n)
    return [
        {
            "size": size, "order": order, "share": share, "contender": name, "images": n,
            "seconds_median": round(statistics.median(taken), 5), "seconds_min": round(min(taken), 5),
            "seconds_max": round(max(taken), 5),
            "scipy_over": round(statistics.median(b / a for a, b in zip(taken, times["SciPy"], strict=True)), 2),
            "largest_difference": f"{difference:.1e}", "rounds": rounds,
        }
        for name, taken in times.items()
    ]  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--shares", nargs="+", type=int, default=[10, 50, 90])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    torch.manual_seed(0)
    rows = []
    for order in ("scattered", "smooth"):
        for share in arguments.shares:
            for row in measure(arguments.size, arguments.images, share, order, arguments.rounds):
                print(
                    f"{row['size']} px, {share:2d} % {order:9s} {row['contender']:7s} {row['seconds_median']:.4f} s "
                    f"an image [{row['seconds_min']:.4f}, {row['seconds_max']:.4f}], SciPy / it {row['scipy_over']}, "
                    f"largest difference {row['largest_difference']}",
                    flush=True,
                )
                rows.append({**row, **conditions})
    if arguments.csv:
        write(arguments.csv, rows)


if __name__ == "__main__":
    main()
