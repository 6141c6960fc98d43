"""XtrAIn over a whole recorded run, end to end, beside the eager rank-one form.

A 784-256-128-10 ReLU network learns real digits on a 28 x 28 canvas with Adam; checkpoints are recorded in memory. The
eager form is what one writes in plain torch: for each step and each end, the pre-activations of all players at once
(``z - x * d``), differences propagated through the layers, 32 inputs at a time. Contenders are interleaved in every
round, and everyone's maps are compared with the float64 maps before anything is timed.

    python bench/bench_xtrain.py [--inputs 256] [--checkpoints 60] [--every 29] [--rounds 3] [--no-eager] [--csv FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import describe, pin_threads
from results import show, write
from torch import Tensor, nn

import xaifast
from xaifast.data import controlled

_EAGER_INPUTS = 32


def record(n_checkpoints: int, every: int, background: str) -> tuple[nn.Module, xaifast.Trajectory, Tensor, Tensor]:
    """A training run on digits, a checkpoint each ``every`` steps of Adam."""
    torch.manual_seed(0)
    inputs, labels, _ = controlled.digits(background)
    x = inputs.flatten(1)
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    optimizer, traj = torch.optim.Adam(net.parameters(), 1e-3), xaifast.Trajectory()
    traj.record(net)
    for _ in range(n_checkpoints - 1):
        for _ in range(every):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
        traj.record(net)
    return net, traj, x, labels


@torch.no_grad()
def eager(traj: xaifast.Trajectory, x: Tensor, target: Tensor) -> Tensor:
    """Both ends of every step by broadcasting, in float32."""
    values = torch.zeros_like(x)
    before = None
    for state in traj.states():
        if before is not None:
            delta = state["0.weight"] - before["0.weight"]
            for weights, sign in ((state, 1.0), (before, -1.0)):
                for start in range(0, len(x), _EAGER_INPUTS):
                    rows = slice(start, start + _EAGER_INPUTS)
                    values[rows] += sign / 2 * _undone(weights, sign * delta, x[rows], target[rows])
        before = state
    return values


def _undone(state: dict[str, Tensor], delta: Tensor, x: Tensor, target: Tensor) -> Tensor:
    z1 = x @ state["0.weight"].T + state["0.bias"]
    z2 = z1.relu() @ state["2.weight"].T + state["2.bias"]
    d1 = x[:, :, None] * delta.T  # [b, M, H]
    d1 = torch.minimum(d1, z1[:, None]) - z1[:, None].clamp(max=0)
    d2 = d1 @ state["2.weight"].T
    d2 = torch.minimum(d2, z2[:, None]) - z2[:, None].clamp(max=0)
    return torch.einsum("bmh,bh->bm", d2, state["4.weight"][target])


def relative(values: Tensor, exact: Tensor) -> float:
    """Largest difference by the largest value."""
    return float((values.double() - exact).abs().max() / exact.abs().max())


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--checkpoints", type=int, default=60)
    parser.add_argument("--every", type=int, default=29, help="optimizer steps between checkpoints (29: an epoch)")
    parser.add_argument("--background", choices=controlled.BACKGROUNDS, default="normalised")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))

    net, traj, x, labels = record(arguments.checkpoints, arguments.every, arguments.background)
    x, target = x[: arguments.inputs], labels[: arguments.inputs]
    exact = xaifast.xtrain(net, traj, x, target=target, precision="float64").values
    certified = xaifast.xtrain(net, traj, x, target=target).certified
    print(f"certified rows {certified:.1%}, inputs other than 0 {float((x != 0).double().mean()):.1%}")

    def ours(**options: object) -> Callable[[], Tensor]:
        return lambda: xaifast.xtrain(net, traj, x, target=target, **options).values

    contenders = {"xtrain": ours(), "xtrain+": ours(variant="xtrain+"), "linear": ours(mode="linear")}
    for k in (1, 2, 4, 8, 16, 32):
        chosen = traj.select("update_norm", n_steps=k, layer="0.weight")
        contenders[f"xstep, {len(chosen) - 1} steps"] = ours(variant="xstep", checkpoints=chosen)
    if not arguments.no_eager:
        contenders = {"eager": lambda: eager(traj, x, target), **contenders}
    errors = {name: relative(explain(), exact) for name, explain in contenders.items()}
    for name in ("eager", "xtrain"):
        if errors.get(name, 0) > 1e-3:
            raise AssertionError(f"{name} has other maps than float64, by {errors[name]:g}")

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, explain in contenders.items():
            start = time.perf_counter()
            explain()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(contenders))
    rows = [
        {
            "contender": name,
            "seconds_median": round(statistics.median(times), 3),
            "times_" + first: round(statistics.median(t / f for t, f in zip(times, seconds[first], strict=True)), 4),
            "difference": f"{errors[name]:.1e}",
            "inputs": arguments.inputs,
            "checkpoints": arguments.checkpoints,
            "background": arguments.background,
            "certified": round(certified, 4),
            "rounds": arguments.rounds,
            **conditions,
        }
        for name, times in seconds.items()
    ]
    show(rows, ["contender", "seconds_median", "times_" + first, "difference"])
    if arguments.csv:
        write(arguments.csv, rows)


if __name__ == "__main__":
    main()
