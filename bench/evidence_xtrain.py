"""What parameter-space occlusion is worth on data whose signal is known; tables of docs/results/xtrain.md.

Every seed trains new networks (digits 784-256-128-10, table 50-64-32-5, ReLU, Adam 1e-3, a checkpoint at the start and
one an epoch) on three quarters of the data, draws new backgrounds, and explains the predicted class of held-out
inputs, every pixel or column a player. What is absent, in methods and in curves, is 0 in the model's input scale.

    python bench/evidence_xtrain.py [--seeds 5] [--inputs 48] [--csv FILE] [--parts methods shift xstep collapse]

Intervals are 95 %, Student's t over seeds; a seed's figure is the mean over its inputs.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from environment import describe, pin_threads
from evidence_tables import gains_table, interval, table
from results import read, write
from torch import Tensor, nn

import xaifast
from xaifast.data import controlled
from xaifast.evaluation.clean import integrated_gradients
from xaifast.evaluation.methods import gradient_x_input
from xaifast.metrics import attribution_shift, clean_score, rank_correlation
from xaifast.training import recording

DATA = (
    "zero, raw",
    "zero, normalised",
    "noise, raw",
    "noise, normalised",
    "textured, raw",
    "textured, normalised",
    "table",
)
OURS = ("XtrAIn", "Xstep, 8", "Xstep, 1", "XtrAIn+")  # Xstep: coarse steps
OTHERS = ("gradient x input", "integrated gradients", "occlusion", "Kernel SHAP", "|x|")
METRICS = {"CleanScore": 1, "SRG": 1, "deletion area": -1}  # and which end is better
_SHIFTED = ("zero, raw", "noise, raw", "textured, normalised", "table")
_SHIFT_INPUTS, _SHIFT_SHARE = 16, 0.2
_EPOCHS, _KERNEL_SHAP_SAMPLES = 15, 2048

Row = dict[str, object]


def load(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[N, M]``, labels ``[N]`` and signal ``[N, M]``."""
    if name == "table":
        made = controlled.made_table(seed=seed)
        return made.inputs, made.labels, made.signal.expand(made.inputs.shape)
    background, scale = name.split(", ")
    x, labels, signal = (
        part.flatten(1) if part.dim() > 1 else part for part in controlled.digits(background, seed=seed)
    )
    return (x - x.mean()) / x.std(correction=0) if scale == "normalised" else x, labels, signal


def network(n_inputs: int, n_classes: int) -> nn.Sequential:
    """The digits' or the table's network."""
    a, b = (256, 128) if n_inputs > 100 else (64, 32)
    return nn.Sequential(
        nn.Linear(n_inputs, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, n_classes)
    ).eval()  # fmt: skip


def fit(
    x: Tensor, y: Tensor, n_classes: int, seed: int, *, epochs: int = _EPOCHS, every: str | int = "epoch",
    sgd: float | None = None,
) -> tuple[nn.Sequential, xaifast.Trajectory]:  # fmt: skip
    """A recorded training."""
    torch.manual_seed(seed)
    net, traj = network(x.shape[1], n_classes), xaifast.Trajectory()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3) if sgd is None else torch.optim.SGD(net.parameters(), sgd)
    with recording(net, traj, every=every) as loop:
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            loop.end_epoch()
    return net, traj


class Case:
    """A trained network and the held-out inputs that are explained."""

    def __init__(self, name: str, seed: int, n_inputs: int) -> None:
        x, labels, signal = load(name, seed)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[: len(x) // 4], order[len(x) // 4 :]
        self.net, self.traj = fit(x[kept], labels[kept], int(labels.max()) + 1, seed)
        with torch.no_grad():
            predicted = self.net(x[held_out]).argmax(1)
        self.accuracy = float((predicted == labels[held_out]).float().mean())
        shown = held_out[:n_inputs]
        self.x, self.signal, self.target = x[shown], signal[shown], predicted[:n_inputs]

    def xtrain(self, x: Tensor, target: Tensor, variant: str, **options: object) -> Tensor:
        """Values of one of ours."""
        return xaifast.xtrain(self.net, self.traj, x, target=target, variant=variant, **options).values

    def explainers(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Every method as ``explain(x, target)``, ``[b, M]``."""
        net = self.net
        return {
            "XtrAIn": lambda x, c: self.xtrain(x, c, "xtrain"),
            "Xstep, 8": lambda x, c: self.xtrain(x, c, "xstep"),
            "Xstep, 1": lambda x, c: self.xtrain(x, c, "xstep", checkpoints="endpoints"),
            "XtrAIn+": lambda x, c: self.xtrain(x, c, "xtrain+"),
            "gradient x input": lambda x, c: gradient_x_input(net, x, target=c),
            "integrated gradients": lambda x, c: integrated_gradients(net, x, target=c, steps=32),
            "occlusion": lambda x, c: xaifast.feature_ablation(net, x, target=c),
            "Kernel SHAP": lambda x, c: (
                xaifast.kernel_shap(
                    net, x, target=c, n_samples=_KERNEL_SHAP_SAMPLES if x.shape[1] > 100 else 512
                ).values
            ),
            "|x|": lambda x, c: x.abs(),
        }


def methods(case: Case, where: Row) -> list[Row]:
    """CleanScore, SRG and deletion area of all methods."""
    rows = [{**where, "method": "network", "metric": "accuracy", "value": case.accuracy}]
    rows.append({**where, "method": "uniform", "metric": "CleanScore", "value": float(case.signal.double().mean())})
    for name, explain in case.explainers().items():
        a = explain(case.x, case.target)
        curves = xaifast.insertion_deletion(
            case.net, case.x, a, target=case.target, insertion_baseline=0.0, deletion_baseline=0.0
        )
        found = {
            "CleanScore": clean_score(a, case.signal).nanmean(),
            "SRG": curves.srg.mean(),
            "deletion area": curves.deletion_auc.mean(),
        }
        rows += [{**where, "method": name, "metric": metric, "value": float(v)} for metric, v in found.items()]
    return rows


def shift(case: Case, where: Row, seed: int) -> list[Row]:
    """How far the other features' values move when a fifth of the features is occluded."""
    x, target = case.x[:_SHIFT_INPUTS], case.target[:_SHIFT_INPUTS]
    occluded = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < _SHIFT_SHARE
    rows = []
    for name, explain in case.explainers().items():
        if name not in ("Kernel SHAP", "|x|"):
            moved = attribution_shift(explain, x, occluded, additional_args=target)
            rows.append({**where, "method": name, "metric": "shift", "value": float(moved.mean())})
    return rows


def xstep(case: Case, where: Row) -> list[Row]:
    """Xstep's distance from XtrAIn and its time, over the number of coarse steps."""
    x, target, rows = case.x[:32], case.target[:32], []
    start = time.perf_counter()
    exact = case.xtrain(x, target, "xtrain")
    whole = time.perf_counter() - start
    for rule in ("update_norm", "uniform"):
        for k in (1, 2, 4, 8):
            chosen = case.traj.select(rule, n_steps=k, layer="0")
            start = time.perf_counter()
            values = case.xtrain(x, target, "xstep", checkpoints=chosen)
            found = {
                "time": (time.perf_counter() - start) / whole,
                "relative error": float(((values - exact).norm(dim=1) / exact.norm(dim=1)).mean()),
                "rank correlation": float(rank_correlation(values, exact).mean()),
                "CleanScore": float(clean_score(values, case.signal[:32]).nanmean()),
            }
            at = {**where, "method": f"{rule}, {k}"}
            rows += [{**at, "metric": metric, "value": v} for metric, v in found.items()]
    return rows


def collapse(seed: int) -> list[Row]:
    """Mass of XtrAIn+ by class on networks that learned one class alone, or all but one."""
    x, labels, _ = load("table", seed)
    rows = []
    for kind in ("one class learned", "one class missing"):
        if kind == "one class learned":
            rare = (labels != 0) & (torch.arange(len(labels)) % 100 >= 5)  # others: a twentieth of class 0 each
            y, kept, unlearned = labels, ~rare, range(1, 5)
        else:
            y, kept, unlearned = labels, labels != 4, [4]
        for every in (1, "epoch"):
            settings = dict(epochs=5, sgd=0.02) if kind == "one class learned" else dict(epochs=_EPOCHS)
            net, traj = fit(x[kept], y[kept], 5, seed, every=every, **settings)
            shown = x[:100]
            with torch.no_grad():
                predicted = net(shown).argmax(1).bincount(minlength=5)
            mass = torch.stack([
                xaifast.xtrain(net, traj, shown, target=c, variant="xtrain+").values.abs().sum(1) for c in range(5)
            ])  # [5, 100]  # fmt: skip
            learned = [c for c in range(5) if c not in unlearned]
            found = {
                "predicted as unlearned": float(predicted[list(unlearned)].sum() / 100),
                "mass left, mean": float(mass[list(unlearned)].mean() / mass[learned].mean()),
                "mass left, largest class": float(mass[list(unlearned)].mean(1).max() / mass[learned].mean()),
                "inputs of exactly 0": float((mass[list(unlearned)] == 0).double().mean()),
                "classes of exactly 0": float((mass[list(unlearned)] == 0).all(1).double().mean()),
                "inputs of exactly 0, learned": float((mass[learned] == 0).double().mean()),
            }
            at = {"part": "collapse", "data": "table", "method": f"{kind}, {'step' if every == 1 else 'epoch'}"}
            rows += [{**at, "seed": seed, "metric": metric, "value": v} for metric, v in found.items()]
    return rows


def report(rows: list[Row]) -> None:
    """Tables in Markdown."""
    cells: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        cells[row["part"], row["data"], row["method"], row["metric"]].append(row["value"])
    parts = {row["part"] for row in rows}
    if "methods" in parts:
        print("\nAccuracy on held-out inputs, share of features that are signal\n")
        heads = [("network", "accuracy"), ("uniform", "CleanScore")]
        table(["data", "accuracy", "share"], [
            [name, *(interval(cells["methods", name, method, metric]) for method, metric in heads)] for name in DATA
        ])  # fmt: skip
        for metric in METRICS:
            print(f"\n{metric}\n")
            table(["data", *OURS, *OTHERS], [
                [name, *(interval(cells["methods", name, method, metric]) for method in (*OURS, *OTHERS))]
                for name in DATA
            ])  # fmt: skip
        print(f"\nPaired over seeds: data sets of {len(DATA)} where the first is better / worse / not told apart\n")
        gains_table(cells, "methods", OURS, OTHERS, METRICS, DATA)
    if "shift" in parts:
        print(f"\nAttribution shift, a share of {_SHIFT_SHARE} of the features occluded\n")
        names = [name for name in (*OURS, *OTHERS) if ("shift", _SHIFTED[0], name, "shift") in cells]
        table(["data", *names], [
            [data, *(interval(cells["shift", data, name, "shift"]) for name in names)] for data in _SHIFTED
        ])  # fmt: skip
        print(f"\nPaired over seeds: data sets of {len(_SHIFTED)} where the first is better / worse / not told apart\n")
        gains_table(cells, "shift", OURS, [name for name in names if name not in OURS], {"shift": -1}, _SHIFTED)
    for part, first in (("xstep", "coarse steps"), ("collapse", "network, checkpoint")):
        if part not in parts:
            continue
        print(f"\n{part}\n")
        mine = {key: values for key, values in cells.items() if key[0] == part}
        metrics = list(dict.fromkeys(key[3] for key in mine))
        for data in dict.fromkeys(key[1] for key in mine):
            names = dict.fromkeys(key[2] for key in mine if key[1] == data)
            table([f"{first} ({data})", *metrics], [
                [name, *(interval(mine[part, data, name, metric]) for metric in metrics)] for name in names
            ])  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=48, help="explained a seed and data set")
    parser.add_argument("--parts", nargs="+", default=["methods", "shift", "xstep", "collapse"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--read", type=Path, help="the tables of a CSV file, nothing is run")
    arguments = parser.parse_args()
    if arguments.read:
        report([{**row, "value": float(row["value"])} for row in read(arguments.read)])
        return
    pin_threads(arguments.threads)
    conditions = describe()
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    start, rows = time.perf_counter(), []
    for seed in range(arguments.seeds):
        for name in DATA:
            case = Case(name, seed, arguments.inputs)
            at = {"data": name, "seed": seed}
            if "methods" in arguments.parts:
                rows += methods(case, {"part": "methods", **at})
            if "shift" in arguments.parts and name in _SHIFTED:
                rows += shift(case, {"part": "shift", **at}, seed)
            if "xstep" in arguments.parts and name in ("noise, raw", "table"):
                rows += xstep(case, {"part": "xstep", **at})
        if "collapse" in arguments.parts:
            rows += collapse(seed)
    report(rows)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if arguments.csv:
        columns = ("part", "data", "method", "metric", "seed", "value")
        where = {name: conditions[name] for name in ("device", "threads", "commit", "torch")}
        write(arguments.csv, [
            {**{name: row[name] for name in columns}, "value": f"{row['value']:.7g}", **where} for row in rows
        ])  # fmt: skip


if __name__ == "__main__":
    main()
