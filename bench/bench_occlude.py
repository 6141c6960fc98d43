"""One update of a first layer, all features, both directions, all outputs, in multiples of its bare matrix products.

The floor is the products of the layers behind the first on preassembled operands, two threads. Every round runs the
floor, then each contender; ratios are medians over rounds of neighbours. A loop over features is run for some of them
and scaled. `--digits` trains the network on 28 px digits and says which share of rows certifies, and in what time, for
random updates of a relative size and for real steps of SGD and Adam.

    python bench/bench_occlude.py [--digits] [--rounds 15] [--csv FILE]
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
from torch.func import functional_call, vmap

from xaifast import occlude_update
from xaifast.attribution.occlude import Occluder

WIDTHS, BATCH = (784, 256, 128, 10), 32
SIZES = (1e-4, 1e-3, 1e-2)
STEPS = (1, 10, 40, 100, 160)
LOOPED = 16  # features of the loop
State = dict[str, Tensor]


def network() -> nn.Sequential:
    """784-256-128-10."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits at 28 px."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear")
    return images.flatten(1), torch.as_tensor(data.target)


def random_update(state: State, size: float) -> State:
    """Every tensor moved by `size` of its norm."""
    moved = {}
    for name, t in state.items():
        step = torch.randn_like(t)
        moved[name] = t + step * (size * t.norm() / step.norm())
    return moved


def training(optimizer: str, x: Tensor, y: Tensor) -> dict[int, tuple[State, State]]:
    """States before and after some steps of a run, by step from 1."""
    torch.manual_seed(0)
    model = network()
    made = torch.optim.Adam(model.parameters(), lr=1e-3) if optimizer == "adam" else None
    made = made or torch.optim.SGD(model.parameters(), lr=0.1)
    steps, copy = {}, lambda: {name: t.clone() for name, t in model.state_dict().items()}
    for step in range(1, max(STEPS) + 1):
        old = copy()
        chosen = torch.randint(len(x), (64,))
        with torch.enable_grad():
            made.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        made.step()
        if step in STEPS:
            steps[step] = old, copy()
    return steps


def bare() -> Callable[[], None]:
    """The products of both directions, on operands that are there."""
    rows = BATCH * WIDTHS[0]
    operands = [
        (torch.randn(rows, a), torch.randn(a, b), torch.empty(rows, b))
        for a, b in zip(WIDTHS[1:], WIDTHS[2:], strict=False)
    ]

    def run() -> None:
        for _ in range(2):
            for a, w, out in operands:
                torch.mm(a, w, out=out)

    return run


def one_step(model: nn.Module, old: State, new: State, x: Tensor, **options: object) -> Callable[[], tuple]:
    """A step of a trajectory: both ends' base activations, both directions."""
    occluder = Occluder(model, x, **options)
    delta = occluder.delta(old, new)

    def run() -> tuple:
        after, before = occluder.at(new), occluder.at(old)
        return after.undo(delta), before.apply(delta), after.certified_share, before.certified_share

    return run


def eager(old: State, new: State, x: Tensor) -> Callable[[], Tensor]:
    """Rank-one differences by broadcasting, propagated through the layers."""
    delta = (new["0.weight"] - old["0.weight"]).t()

    def half(state: State, sign: int) -> Tensor:
        d, h = sign * x[:, :, None] * delta, x
        for name in ("0", "2", "4"):
            w = state[f"{name}.weight"]
            z = torch.addmm(state[f"{name}.bias"], h, w.t())
            if name != "0":
                d = d @ w.t()
            if name != "4":
                d, h = torch.minimum(d, z[:, None]) - z[:, None].clamp(max=0), z.relu()
        return sign * d

    return lambda: (half(new, 1) + half(old, -1)) / 2


def loop(model: nn.Module, old: State, new: State, x: Tensor) -> Callable[[], Tensor]:
    """Literal columns, a functional call each, for LOOPED features."""

    def run() -> Tensor:
        out = []
        ends = functional_call(model, old, (x,)), functional_call(model, new, (x,))
        for i in range(0, WIDTHS[0], WIDTHS[0] // LOOPED):
            undone, applied = new["0.weight"].clone(), old["0.weight"].clone()
            undone[:, i], applied[:, i] = old["0.weight"][:, i], new["0.weight"][:, i]
            f = ends[1] - functional_call(model, {**new, "0.weight": undone}, (x,))
            out.append(f + functional_call(model, {**old, "0.weight": applied}, (x,)) - ends[0])
        return torch.stack(out, 1) / 2

    return run


def mapped(model: nn.Module, old: State, new: State, x: Tensor) -> Callable[[], Tensor]:
    """The same features by vmap over columns."""
    features = torch.arange(0, WIDTHS[0], WIDTHS[0] // LOOPED)

    def one(i: Tensor, here: State, there: State) -> Tensor:
        chosen = torch.arange(WIDTHS[0]) == i
        weight = torch.where(chosen, there["0.weight"], here["0.weight"])
        return functional_call(model, {**here, "0.weight": weight}, (x,))

    return lambda: [vmap(one, in_dims=(0, None, None))(features, *ends) for ends in ((new, old), (old, new))]


def interleaved(floor: Callable, contenders: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians over rounds of seconds and of the ratio to the floor's of the same round."""
    times: dict[str, list[float]] = {name: [] for name in ("floor", *contenders)}
    for round_ in range(rounds + 1):
        for name, run in (("floor", floor), *contenders.items()):
            start = time.perf_counter()
            run()
            if round_ > 0:
                times[name].append(time.perf_counter() - start)
    pairs = {name: [a / b for a, b in zip(taken, times["floor"], strict=True)] for name, taken in times.items()}
    return {name: (statistics.median(times[name]), statistics.median(pairs[name])) for name in times}


def check(model: nn.Module, old: State, new: State, x: Tensor) -> float:
    """Relative error of float32 against literal columns in float64."""
    wide = [{name: t.double() for name, t in state.items()} for state in (old, new)]
    expected = loop(model, *wide, x.double())()
    got = occlude_update(model, old, new, x)[:, :: WIDTHS[0] // LOOPED][:, : expected.shape[1]].double()
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", action="store_true", help="shares and times of certified rows on digits")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    pin_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model, x = network(), torch.rand(BATCH, WIDTHS[0]) + 0.01  # no zeros: every row counts
    state = {name: t.clone() for name, t in model.state_dict().items()}
    rows = []

    def measure(case: str, contenders: dict[str, Callable], scale: dict[str, float]) -> None:
        figures = interleaved(bare(), contenders, args.rounds)
        for name, (seconds, ratio) in figures.items():
            factor = scale.get(name, 1)
            result = contenders[name]() if name in contenders else None
            shares = [s for s in result[2:] if s is not None] if isinstance(result, tuple) else []
            rows.append(
                {
                    "case": case,
                    "contender": name,
                    "ms": round(1e3 * seconds * factor, 2),
                    "ratio": round(ratio * factor, 3),
                    "certified": round(statistics.mean(shares), 3) if shares else "",
                }
            )

    new = random_update(state, 1e-4)
    print(f"relative error against float64, update of relative size 1e-4: {check(model, state, new, x):.1e}")
    contenders = {
        "xaifast, ordinary": one_step(model, state, new, x, certified=False),
        "xaifast, certified": one_step(model, state, new, x),
        "xaifast, whole call": lambda: occlude_update(model, state, new, x),
        "eager rank-one": eager(state, new, x),
        "functional-call loop (scaled)": loop(model, state, new, x),
        "vmap (scaled)": mapped(model, state, new, x),
    }
    features = len(range(0, WIDTHS[0], WIDTHS[0] // LOOPED))
    scale = {name: WIDTHS[0] / features for name in contenders if "scaled" in name}
    measure("random 1e-4, no zeros", contenders, scale)
    if args.digits:
        images, labels = digits()
        torch.manual_seed(1)
        batch = images[torch.randperm(len(images))[:BATCH]]
        cases = {f"random {size:.0e}": (state, random_update(state, size)) for size in SIZES}
        for optimizer in ("sgd", "adam"):
            made = training(optimizer, images, labels)
            cases |= {f"{optimizer} step {step}": ends for step, ends in made.items()}
        for case, (before, after) in cases.items():
            ways = {
                "xaifast, ordinary": one_step(model, before, after, batch, certified=False),
                "xaifast, certified": one_step(model, before, after, batch),
            }
            measure(f"digits, {case}", ways, {})
    show(rows, list(rows[0]))
    if args.csv:
        write(args.csv, [row | describe() for row in rows])


if __name__ == "__main__":
    main()
