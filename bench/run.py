"""The benchmarks: tests of what is measured first, then every benchmark in a short form, then one table.

No figure is made while a test is red. The short form takes minutes and is for looking; `--full` is what is committed
and what README and plots are drawn from (`python bench/plots.py`).

    python bench/run.py [--full] [--only operators jobs ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import Row, read, show

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
# Values are what is measured; compilers and derivatives have `make test`.
GATE = ["tests/test_select_rows.py", "tests/test_masking.py", "tests/test_tokens.py", "tests/test_coalitions.py"]
GATE += ["tests/test_cubic.py", "tests/test_evaluate.py", "tests/test_shapley_solvers.py", "tests/test_kernel_shap.py"]
GATE += ["tests/test_ranking.py", "tests/test_perturb.py", "tests/test_curves.py", "tests/test_occlusion.py"]
GATE += ["tests/test_rise.py", "tests/test_road.py", "tests/test_small_budgets.py"]
GATE_OPTIONS = ["-x", "-p", "no:cacheprovider", "-k", "not compile and not gradient", "-m", "not slow"]

Runner = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Bench:
    """One benchmark script.

    Attributes:
        script: In this folder; writes `--csv`.
        short: Its arguments where minutes must do.
        figure: Column and unit of the figure shown in the common table.
        label: Columns that say which figure it is.
    """

    script: str
    short: tuple[str, ...]
    label: tuple[str, ...]
    figure: tuple[str, str]


BENCHES = {
    "operators": Bench(
        "bench_operators.py", ("--only", "call or xaifast"), ("operator", "case", "provider"), ("share", "of ceiling")
    ),
    "jobs": Bench("bench_jobs.py", ("--rounds", "2"), ("job", "contender"), ("ratio_median", "x floor")),
    "estimators": Bench(
        "bench_estimators.py", ("--images", "1", "--seeds", "1"), ("network", "method", "n"), ("error_median", "error")
    ),
    "captum": Bench(
        "bench_captum.py",
        ("--jobs", "lenet", "--per-eval", "1", "100", "--rounds", "2"),
        ("job", "package", "perturbations_per_eval"),
        ("ratio_median", "x floor"),
    ),
    "shap": Bench(
        "bench_shap.py", ("--rounds", "1", "--rows", "4"), ("job", "nsamples", "l1_reg", "contender"),
        ("over_floor_median", "x floor"),
    ),
    "curves": Bench(
        "bench_curves.py", ("--jobs", "lenet", "--rounds", "2"), ("job", "contender"), ("ratio_median", "x floor")
    ),
    "occlusion": Bench(
        "bench_occlusion.py",
        ("--jobs", "occlusion", "lenet", "--rounds", "2", "--no-peers"),
        ("job", "contender"),
        ("ratio_median", "x floor"),
    ),
    "road": Bench(
        "bench_road.py", ("--images", "1", "--rounds", "1"), ("order", "share", "contender"),
        ("seconds_median", "s an image"),
    ),
    "dropin-error": Bench(
        "bench_dropin_error.py",
        ("--peers", "shap", "--players", "5", "--seeds", "10"),
        ("peer", "players", "n", "game"),
        ("ratio", "x peer's error"),
    ),
    "explain": Bench(
        "bench_explain.py", ("--images", "128", "--rounds", "2"), ("images",), ("command_over_call", "x call")
    ),
}  # fmt: skip


def figures(bench: Bench, rows: Sequence[dict[str, str]]) -> list[Row]:
    """Rows of the common table; calls show microseconds, for they have no ceiling."""
    column, unit = bench.figure
    table = []
    for row in rows:
        value, shown = (row[column], unit) if row[column] else (row["microseconds"], "us a call")
        table.append({"what": ", ".join(row[name] for name in bench.label), "figure": value, "": shown})
    return table


def run_command(command: Sequence[str]) -> int:
    """Run a command from the repository's root, its output passed on."""
    return subprocess.run(command, cwd=ROOT).returncode


def run(names: Sequence[str], out: Path, *, full: bool, gate: bool = True, runner: Runner = run_command) -> int:
    """Gate, benchmarks, table.

    Returns:
        0; 1 where a test is red (nothing is measured then) or a benchmark failed.
    """
    if gate and runner([sys.executable, "-m", "pytest", *GATE_OPTIONS, *GATE]):
        print("bench: tests of what is measured fail, so nothing is measured", file=sys.stderr)
        return 1
    failed, table = [], []
    for name in names:
        bench, path = BENCHES[name], out / f"{name}-cpu.csv"
        start = time.perf_counter()
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(BENCH / bench.script), *(() if full else bench.short), "--csv", str(path)]
        if runner(command):
            failed.append(name)
            continue
        print(f"== {name}: {time.perf_counter() - start:.0f} s, {path}", flush=True)
        table += [{"bench": name, **row} for row in figures(bench, read(path))]
    if table:
        print()
        show(table, ("bench", "what", "figure", ""))
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all rounds and sizes (half an hour), for committing")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--out", type=Path, help="default: bench/results, for the short form bench/results/short")
    arguments = parser.parse_args()
    out = arguments.out or (RESULTS if arguments.full else RESULTS / "short")
    return run(arguments.only, out.resolve(), full=arguments.full)


if __name__ == "__main__":
    sys.exit(main())
