"""Errors of the drop-ins and of the packages they stand in for, against all coalitions.

Games of M players: random ones, a new one a seed, and networks trained on scikit-learn's digits, a new image a seed.
The error is |values - exact| / |exact|, averaged over seeds. Peer and drop-in explain the same games, so their
difference has a paired interval: mean difference +- 1.96 standard errors, shown as one of the ratio. A case is *larger*
where the whole interval is above 1 (and the difference above 0.001, what Captum's float32 regression leaves of a sum).

    python bench/bench_dropin_error.py [--players 4 5 6 8 10 12] [--peers shap captum] [--seeds 40] [--csv FILE]
"""

from __future__ import annotations

import argparse
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import captum.attr
import numpy as np
import shap
import torch
from environment import describe
from results import Row, show, write
from torch import nn

from xaifast.compat.captum import KernelShap
from xaifast.compat.shap import KernelExplainer

GAMES = ("linear", "pairs", "tanh", "tanh-saturated", "relu", "products", "parity", "mlp", "cnn")
PLAYERS = (4, 5, 6, 8, 10, 12)
GRIDS = {4: (2, 2), 5: (5, 1), 6: (3, 2), 8: (4, 2), 10: (5, 2), 12: (4, 3)}
NEGLIGIBLE = 1e-3


def budgets(n_players: int) -> list[int]:
    """Arguments ``nsamples`` and ``n_samples`` short of all coalitions; 25 is Captum's default."""
    m = n_players
    return sorted(n for n in {m + 2, 2 * m - 2, 2 * m, 2 * m + 2, 3 * m, 4 * m, 25, 64, 128} if n < 2**m - 2)


def present(n_players: int) -> np.ndarray:
    """All coalitions, float64 ``[2^M, M]``; the row's number has bit i for player i."""
    return ((np.arange(2**n_players)[:, None] >> np.arange(n_players)) & 1).astype(float)


@functools.cache
def networks() -> tuple[list[nn.Module], torch.Tensor]:
    """A perceptron and a small LeNet, trained, and the digits ``[n, 8, 8]``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    convolutions = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(),
    ]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    cnn = nn.Sequential(nn.Unflatten(1, (1, 8)), *convolutions, *head)
    for net in (mlp, cnn):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return [mlp.eval(), cnn.eval()], images


@functools.cache
def values(n_players: int, seed: int, games: tuple[str, ...]) -> np.ndarray:
    """Values of all coalitions, float64 ``[2^M, games]``."""
    rng, z, m = np.random.default_rng(1000 + seed), present(n_players), n_players
    w, pair = rng.normal(size=m), rng.normal(size=(m, m))
    hidden, out, bias = rng.normal(size=(m, 16)), rng.normal(size=16), rng.normal(size=16) / 2
    triples = [rng.choice(m, 3, replace=False) for _ in range(m)]
    signs = [rng.normal() for _ in triples]
    additive = z @ w
    of = {
        "linear": additive,
        "pairs": additive + np.einsum("ni,ij,nj->n", z, pair, z) / m,
        "tanh": np.tanh(1.5 / math.sqrt(m) * (z @ hidden)) @ out,
        "tanh-saturated": np.tanh(z @ hidden) @ out,
        "relu": np.maximum(z @ hidden + bias, 0) @ out,
        "products": sum(sign * z[:, triple].prod(1) for sign, triple in zip(signs, triples, strict=True)),
        "parity": 0.3 * additive
        + sum(sign * (1 - 2 * z[:, triple]).prod(1) for sign, triple in zip(signs[:3], triples[:3], strict=True)),
    }
    if "mlp" in games or "cnn" in games:
        nets, images = networks()
        n_rows, n_columns = GRIDS[m]
        pixel = np.arange(8)
        player = (pixel * n_rows // 8)[:, None] * n_columns + pixel * n_columns // 8
        with torch.inference_mode():
            rows = images[seed] * torch.tensor(z, dtype=torch.float32)[:, torch.tensor(player)]
            for name, net in zip(("mlp", "cnn"), nets, strict=True):
                outputs = net(rows)
                of[name] = outputs[:, outputs[-1].argmax()].double().numpy()
    return np.stack([of[game] for game in games], 1)


def shapley(table: np.ndarray) -> np.ndarray:
    """Shapley values ``[M, games]`` by their definition."""
    m = int(math.log2(len(table)))
    z = present(m)
    sizes = z.sum(1).astype(int)
    joins = np.array([0, *(1 / (m * math.comb(m - 1, s)) for s in range(m)), 0])
    return np.where(z > 0, joins[sizes][:, None], -joins[sizes + 1][:, None]).T @ (table - table[0])


def errors(estimate: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative errors ``[games]``."""
    return np.linalg.norm(estimate - exact, axis=0) / np.linalg.norm(exact, axis=0)


def explain_shap(explainer: type, table: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Values ``[M, games]`` of ones against zeros; all games are outputs of one model."""
    m = int(math.log2(len(table)))
    made = explainer(lambda rows: table[(rows @ 2 ** np.arange(m)).astype(int)], np.zeros((1, m)))
    np.random.seed(seed)
    return made.shap_values(np.ones((1, m)), nsamples=n, l1_reg=0, silent=True)[0]


def explain_captum(explainer: type, table: np.ndarray, n: int, seed: int) -> np.ndarray:
    """As `explain_shap`, an explanation a game; the same seed draws the same coalitions for each."""
    m = int(math.log2(len(table)))
    code, games = 2 ** torch.arange(m), torch.from_numpy(table).float()
    columns = []
    for k in range(games.shape[1]):
        torch.manual_seed(seed)
        made = explainer(lambda rows, k=k: games[(rows.long() * code).sum(1), k])
        columns.append(made.attribute(torch.ones(1, m), n_samples=n, perturbations_per_eval=n)[0])
    return torch.stack(columns, 1).double().numpy()


Explain = Callable[[type, np.ndarray, int, int], np.ndarray]
PAIRS: dict[str, tuple[Explain, type, type]] = {
    "shap": (explain_shap, shap.KernelExplainer, KernelExplainer),
    "captum": (explain_captum, captum.attr.KernelShap, KernelShap),
}


def compare(peer: str, n_players: int, n: int, n_seeds: int, games: tuple[str, ...] = GAMES) -> Iterator[Row]:
    """A row for each game."""
    explain, theirs, ours = PAIRS[peer]
    both = []
    for seed in range(n_seeds):
        table = values(n_players, seed, games)
        exact = shapley(table)
        both.append([errors(explain(explainer, table, n, seed), exact) for explainer in (theirs, ours)])
    measured = np.array(both)  # [seeds, 2, games]
    for game, (a, b) in zip(games, measured.transpose(2, 1, 0), strict=True):
        margin = 1.96 * (b - a).std(ddof=1) / math.sqrt(n_seeds)
        low, ratio, high = (1 + ((b - a).mean() + shift) / max(a.mean(), NEGLIGIBLE) for shift in (-margin, 0, margin))
        larger = b.mean() - a.mean() > NEGLIGIBLE
        verdict = "no larger" if not larger else "larger" if low > 1 else "larger, within the interval"
        case = {"peer": peer, "players": n_players, "n": n, "game": game, "seeds": n_seeds}
        figures = {"peer_error": a.mean(), "error": b.mean(), "ratio": ratio, "ratio_low": low, "ratio_high": high}
        yield {**case, **{key: f"{value:.4g}" for key, value in figures.items()}, "verdict": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--players", nargs="+", type=int, choices=PLAYERS, default=list(PLAYERS))
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for peer in args.peers:
        for n_players in args.players:
            for n in budgets(n_players):
                rows += compare(peer, n_players, n, args.seeds)
    show(rows, ("peer", "players", "n", "game", "peer_error", "error", "ratio", "ratio_low", "ratio_high", "verdict"))
    for peer in args.peers:
        verdicts = [row["verdict"] for row in rows if row["peer"] == peer]
        counts = ", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in sorted(set(verdicts)))
        print(f"{peer}: {len(verdicts)} cases; {counts}")
    if args.csv:
        machine = describe()
        write(args.csv, [{**row, **machine} for row in rows])


if __name__ == "__main__":
    main()
