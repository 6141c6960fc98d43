"""CPU operators and the cost of a call, by pytest-benchmark, at one thread.

Kernels: before every timed call the ceiling (a memcpy of the bytes written, or what `operators.py` says) is timed too,
so a share is the median over pairs of neighbours and survives a busy machine. Nothing is timed whose result differs
from the reference's. Calls: tiny tensors under `no_grad`; the smallest of many short bursts, since whatever else the
machine does only adds.

    python bench/bench_operators.py [--only NAME] [--csv FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from curve_operators import CURVE_CASES
from environment import describe
from operators import CASES, ON_THE_HOST, PROVIDERS, check
from results import show, write

from xaifast.ops import mask_inputs, pack_coalitions, plan_selection, unpack_coalitions
from xaifast.ops.select import select_rows, select_rows_out
from xaifast.ops.tokens import compact_rows, compact_rows_out

ROUNDS = 25
BUILDERS = {name: lambda build=build: build("cpu") for name, build in (CASES | CURVE_CASES).items()} | ON_THE_HOST
pytestmark = pytest.mark.filterwarnings("ignore")


def calls() -> dict[str, Callable[[], object]]:
    """Operators on tensors so small that only the call costs."""
    x, bits, index = torch.randn(1, 16), torch.tensor([[3]]), torch.arange(4, dtype=torch.int32)
    tokens, plan, present = torch.randn(1, 4, 4), plan_selection(torch.randn(1, 16)), torch.ones(1, 16).bool()
    arguments = (plan.x, bits, plan.index, plan.baseline, plan.rep, plan.unit, 0, 1)
    out, kept = torch.empty(1, 16), torch.empty(1, 4, 4)
    flat = out.view(1, 1, 16)
    return {
        "torch.add": lambda: torch.add(x, x),
        "select_rows": lambda: select_rows(*arguments),
        "select_rows_out": lambda: select_rows_out(*arguments, flat),
        "compact_rows": lambda: compact_rows(tokens, bits, index, 4, 0, 1),
        "compact_rows_out": lambda: compact_rows_out(tokens, bits, index, 4, 0, 1, kept),
        "pack_coalitions": lambda: pack_coalitions(present),
        "unpack_coalitions": lambda: unpack_coalitions(bits, 16),
        "sample_coalitions": lambda: torch.ops.xaifast.sample_coalitions(4, 8, "leverage", 0, 0),
        "SelectPlan.rows": lambda: plan.rows(bits, 0, 1, out=out),
        "mask_inputs (plan and call)": lambda: mask_inputs(x, bits),
    }


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request):
    torch.set_num_threads(1)
    with torch.no_grad():
        built = BUILDERS[request.param]()
        check(built)
    return built


@pytest.mark.parametrize("provider", PROVIDERS)
def test_kernel(benchmark, case, provider):
    if provider not in case.providers:
        pytest.skip(f"{case.operator} has no {provider}")
    ceilings = []

    def time_the_ceiling():
        start = time.perf_counter()
        case.ceiling()
        ceilings.append(time.perf_counter() - start)

    benchmark.group = case.name
    benchmark.pedantic(case.providers[provider], setup=time_the_ceiling, rounds=ROUNDS, warmup_rounds=3)
    times = benchmark.stats.stats.data
    shares = [case.scale * c / t for c, t in zip(ceilings[-len(times) :], times, strict=True)]
    benchmark.extra_info.update(
        kind="kernel", operator=case.operator, case=case.name, provider=provider, n_bytes=case.n_bytes, flop=case.flop,
        ceiling=case.ceiling_name, share=statistics.median(shares),
    )  # fmt: skip


@pytest.mark.parametrize("name", list(calls()))
def test_call(benchmark, name):
    benchmark.group = "call"
    benchmark.pedantic(calls()[name], rounds=200, iterations=100, warmup_rounds=5)
    benchmark.extra_info.update(kind="call", operator=name, case="tiny tensors", provider="xaifast")


def row(measured: dict, conditions: dict[str, object]) -> dict[str, object]:
    """A row of the table from one entry of pytest-benchmark's JSON."""
    info, stats = measured["extra_info"], measured["stats"]
    seconds = stats["min"] if info["kind"] == "call" else stats["median"]
    shares = {"gb_per_s": "", "gflop_per_s": "", "ceiling": "", "share": ""}
    if info["kind"] == "kernel":
        shares = {
            "gb_per_s": round(info["n_bytes"] / seconds / 1e9, 3) if info["n_bytes"] else "",
            "gflop_per_s": round(info["flop"] / seconds / 1e9, 3) if info["flop"] else "",
            "ceiling": info["ceiling"],
            "share": round(info["share"], 3),
        }
    head = {name: info[name] for name in ("kind", "operator", "case", "provider")}
    return {**head, "microseconds": round(seconds * 1e6, 3), **shares, "rounds": stats["rounds"], **conditions}


def main() -> int:
    """Run pytest-benchmark on this file and make the table of what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-disable-gc", "-k", arguments.only]
        status = pytest.main([__file__, *options, f"--benchmark-json={report}"])
        if status:
            return int(status)
        measured = json.loads(report.read_text())["benchmarks"]
    rows = [row(one, {**describe(), "threads": 1}) for one in measured]
    show(rows, ("operator", "case", "provider", "microseconds", "gb_per_s", "gflop_per_s", "ceiling", "share"))
    if arguments.csv:
        write(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
