"""The benchmarks' own machinery: what counts, what is shown, and that nothing is measured that is wrong."""

import argparse
import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xaifast import cli
from xaifast.cli import bench as command
from xaifast.cli import peers
from xaifast.cli.options import JobSettings

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")
sys.path.insert(0, str(ROOT / "bench"))

import bench_operators  # noqa: E402
import operators  # noqa: E402
import plots  # noqa: E402
import results  # noqa: E402
import run as driver  # noqa: E402


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small_case():
    plan = operators.plan_selection(torch.randn(2, 3, 4, 4), operators.patches(4, 2))
    return operators._select("small", plan, operators.sample_coalitions(4, 6)[0])


def test_a_case_counts_its_bytes():
    case = small_case()
    written, read = 2 * 6 * 48 * 4, 2 * 48 * 4 + 48 * 4 + 6 * 8 + 8 * 4  # rows; inputs, baseline, words, runs of two
    assert case.n_bytes == written + read
    assert case.name == "small, 6 coalitions"


def test_patches_are_numbered_by_row():
    assert operators.patches(5, 2).tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]] * 2 + [[6, 6, 7, 7, 8]]


@pytest.mark.parametrize("wrong", [lambda: None, lambda: torch.zeros(12, 1, 48)], ids=["unwritten", "other values"])
def test_nothing_is_measured_that_is_wrong(wrong):
    case = small_case()
    operators.check(case)
    case.providers["xaifast"] = (lambda: case.out) if wrong() is None else wrong
    with pytest.raises(AssertionError):
        operators.check(case)


@pytest.mark.parametrize("name", ["compact-tokens", "pack", "unpack", "sample", "regression"])
def test_cases_agree_with_their_reference(name):
    if name in operators.ON_THE_HOST and operators._native.cpu() is None:
        pytest.skip("the native CPU module is not built")
    make = operators.ON_THE_HOST.get(name) or (lambda: operators.CASES[name]("cpu"))
    case = make()
    operators.check(case)
    assert set(case.providers) <= set(operators.PROVIDERS) and (case.n_bytes or case.flop)


def test_a_row_of_the_operators_table():
    kernel = {"kind": "kernel", "operator": "o", "case": "c", "provider": "xaifast", "n_bytes": 4000, "flop": 0}
    stats = {"median": 2e-6, "min": 1e-6, "rounds": 25}
    row = bench_operators.row({"extra_info": {**kernel, "ceiling": "memcpy", "share": 0.81234}, "stats": stats}, {})
    assert (row["microseconds"], row["gb_per_s"], row["gflop_per_s"], row["share"]) == (2.0, 2.0, "", 0.812)
    call = {"kind": "call", "operator": "o", "case": "tiny tensors", "provider": "xaifast"}
    row = bench_operators.row({"extra_info": call, "stats": stats}, {"commit": "abc"})
    assert (row["microseconds"], row["share"], row["commit"]) == (1.0, "", "abc")


def test_tables_are_stored_and_shown(tmp_path, capsys):
    rows = [{"name": "a, b", "value": 1.5}, {"name": "long name", "value": 12}]
    results.write(tmp_path / "new" / "x.csv", rows)
    assert results.read(tmp_path / "new" / "x.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    results.show(rows, ("name", "value"))
    assert capsys.readouterr().out == "name       value\na, b         1.5\nlong name     12\n"


class Runner:
    """Stands in for subprocesses: remembers commands, writes a CSV where one is asked for."""

    def __init__(self, failing=()):
        self.commands, self.failing = [], failing

    def __call__(self, command, *_):
        self.commands.append(list(command))
        name = next((part for part in command if part.endswith(".py")), "")
        if any(word in " ".join(command) for word in self.failing):
            return 1
        if "--csv" in command:
            bench = next(b for b in driver.BENCHES.values() if name.endswith(b.script))
            columns = [*bench.label, bench.figure[0]]
            results.write(Path(command[command.index("--csv") + 1]), [{c: f"{c} {bench.script}" for c in columns}])
        return 0


def test_no_figure_while_a_test_is_red(tmp_path, capsys):
    runner = Runner(failing=["pytest"])
    assert driver.run(["operators", "jobs"], tmp_path, full=False, runner=runner) == 1
    assert len(runner.commands) == 1 and not list(tmp_path.iterdir())
    assert "nothing is measured" in capsys.readouterr().err


def test_the_driver_runs_every_benchmark_and_goes_on_after_a_failure(tmp_path, capsys):
    runner = Runner(failing=["bench_captum"])
    assert driver.run(list(driver.BENCHES), tmp_path, full=False, runner=runner) == 1
    assert "pytest" in runner.commands[0] and all((ROOT / test).exists() for test in driver.GATE)
    assert len(runner.commands) == 1 + len(driver.BENCHES)
    said = capsys.readouterr()
    assert "failed: captum" in said.err and "ratio_median bench_jobs.py" in said.out
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}-cpu.csv" for n in driver.BENCHES if n != "captum"}


def test_the_full_form_has_no_short_arguments(tmp_path):
    runner = Runner()
    assert driver.run(["jobs"], tmp_path, full=True, gate=False, runner=runner) == 0
    assert runner.commands[0][2:] == ["--csv", str(tmp_path / "jobs-cpu.csv")]


@pytest.mark.parametrize("name", list(driver.BENCHES))
def test_the_driver_knows_the_committed_columns(name):
    rows = results.read(driver.RESULTS / f"{name}-cpu.csv")
    assert len(driver.figures(driver.BENCHES[name], rows)) == len(rows)
    assert {"device", "threads", "commit", "torch", "python"} <= set(rows[0])


def test_calls_without_a_ceiling_show_microseconds():
    bench = driver.BENCHES["operators"]
    row = {"operator": "o", "case": "c", "provider": "p", "share": "", "microseconds": "7.2"}
    assert driver.figures(bench, [row]) == [{"what": "o, c, p", "figure": "7.2", "": "us a call"}]


def test_readme_says_what_the_csv_says():
    text = (ROOT / "README.md").read_text()
    assert plots.with_tables(text) == text, "run python bench/plots.py"


def test_readme_must_have_its_markers():
    with pytest.raises(ValueError, match="<!-- bench:jobs -->"):
        plots.with_tables("<!-- bench:estimators -->\n<!-- /bench:estimators -->")


def condition(**row):
    same = {"device": "CPU", "threads": "2", "commit": "abc", "torch": "2", "captum": "-", "shap": "0.5", "python": "3"}
    return {**row, **same}


def test_jobs_table():
    given = [("a", "wls", 1.041, 5), ("a", "Captum default", 37.77, 3), ("a", "Captum 50 per call", 2, 3)]
    given += [("a", "shap", 0.5, 3), ("b", "TokenDrop, wls", 0.4, 5)]
    rows = [condition(job=j, contender=c, ratio_median=str(r), rounds=str(n)) for j, c, r, n in given]
    lines = plots.jobs_table(rows).splitlines()
    assert lines[2:4] == ["| a | wls **1.04** | 37.8 / 2.00 | 0.50 |", "| b | TokenDrop **0.40** | - | - |"]
    assert lines[-1] == "(CPU, 2 threads, commit abc, torch 2, shap 0.5, python 3; medians of 3 to 5 rounds.)"


def test_time_to_an_error():
    def point(error, seconds):
        return {"error_median": str(error), "seconds_median": str(seconds)}

    points = {("shap", 2000): point(0.02, 10), ("adjusted", 200): point(0.03, 1), ("adjusted", 1000): point(0.01, 5)}
    points |= {("adjusted", 300): point(0.02, 2), ("wls", 200): point(0.001, 1)}
    assert plots.time_to_error(points) == "0.20"
    points["shap", 2000] = point(0.001, 10)
    assert plots.time_to_error(points) == "more than all"


def test_pictures_are_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    first, again = (plots.draw(driver.RESULTS, tmp_path / name) for name in ("first", "again"))
    assert len(first) >= 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))


def test_every_kernel_case_is_right_and_a_wrong_one_is_noticed(monkeypatch, capsys):
    cases = tool("sanitizer_cases")
    assert cases.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "242 cases on cpu, 0 wrong"
    monkeypatch.setattr(cases, "compact_rows", lambda x, *rest: torch.zeros_like(x))
    assert cases.main(["--device", "cpu"]) == 1
    assert "48 wrong" in capsys.readouterr().out


class Steps:
    """A runner for `gpu_check`: a status by step name, and a log."""

    def __init__(self, **status):
        self.status, self.ran = status, []

    def __call__(self, command, environment, seconds, log):
        self.ran.append((command, environment))
        with log.open("a") as file:
            file.write(f"first\n=== {log.stem}: the last line ===\n\n")
        return self.status.get(command[0], 0)


def step(check, name, **given):
    return check.Step(name, [name], **given)


def test_gpu_check_without_a_device(tmp_path, capsys):
    check, runner = tool("gpu_check"), Steps()
    todo = [step(check, "build", needs_gpu=False), step(check, "tests")]
    assert check.run(todo, None, tmp_path / "out", runner) == 2
    assert [command for command, _ in runner.ran] == [["build"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["build", "ok"] and lines[-2].endswith("build: the last line")
    assert lines[-1].split()[:4] == ["tests", "needs", "a", "GPU"]


def test_gpu_check_leaves_out_what_depends_on_a_failure(tmp_path, capsys):
    check, runner = tool("gpu_check"), Steps(tests=1)
    todo = [step(check, "tests"), step(check, "bench", after=("tests", "never run")), step(check, "other")]
    assert check.run(todo, "a GPU", tmp_path, runner) == 1
    assert [command for command, _ in runner.ran] == [["tests"], ["other"]]
    assert "left out" in capsys.readouterr().out


def test_gpu_check_falls_back_on_what_is_installed(tmp_path):
    check = tool("gpu_check")
    build = check.Step("build", ["pip"], instead=["import"])
    assert check.run([build], "a GPU", tmp_path, Steps(pip=1)) == 0
    assert check.run([build], "a GPU", tmp_path, Steps(**{"pip": 1, "import": 1})) == 1


def test_gpu_check_says_which_tool_is_absent(tmp_path, capsys):
    check = tool("gpu_check")
    assert check.run([check.Step("memcheck", None, missing="no such tool")], "a GPU", tmp_path, Steps()) == 0
    assert capsys.readouterr().out.splitlines()[-1].split(None, 3)[:2] == ["memcheck", "absent"]


def test_the_steps_of_gpu_check(tmp_path, monkeypatch):
    check = tool("gpu_check")
    monkeypatch.setattr(check, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    todo = {one.name: one for one in check.steps(tmp_path)}
    assert list(todo)[0] == "build" and "--no-index" in todo["build"].command
    assert todo["memcheck"].command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    assert set(check.KERNEL_TESTS) <= set(todo) and todo["bench jobs"].after == ("build", *check.KERNEL_TESTS)
    files = [Path(part) for one in todo.values() for part in one.command if part.endswith(".py")]
    assert files and all((ROOT / file).exists() for file in files)


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    check = tool("gpu_check")
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert check.run_command([sys.executable, "-c", code], {}, 2, tmp_path / "log") == 124
    assert (tmp_path / "log").read_text().startswith("begun")
    assert check.last_line(tmp_path / "log") == "stopped after 2 s"
    environment = {"XAIFAST_TEST": "7"}
    code = "import os, sys; sys.exit(int(os.environ['XAIFAST_TEST']))"
    assert check.run_command([sys.executable, "-c", code], environment, 60, tmp_path / "log") == 7


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


MODELS = """
import torch, xaifast
def images():
    torch.manual_seed(0)
    return xaifast.models.VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=2).eval()
def table():
    return torch.nn.Linear(5, 2).eval()
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.random((6, 1, 8, 8), dtype=np.float32))
    np.savez(tmp_path / "table.npz", x=rng.random((9, 5), dtype=np.float32))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda kind: ["--model", f"py:users_models:{kind}", "--data", f"npz:{kind}.npz", "--device", "cpu"]


def test_bench_of_a_vision_transformer(user, capsys):
    given = ["--patch", "4", "--n-samples", "6", "16", "--rounds", "2", "--batch-sizes", "4", "1", "--csv", "out.csv"]
    args = parsed(*user("images"), *given)
    assert args.run(args) == 0
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["batch"]) for row in rows[:2]] == [("bare forward", "1"), ("bare forward", "4")]
    measured = [(row["contender"], row["n_samples"]) for row in rows[2:]]
    assert measured == [(name, n) for n in ("6", "16") for name in ("baseline", "token-select", "token-drop")]
    for row in rows[2:]:
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"]) and row["rounds"] == "2"
    said = capsys.readouterr().out
    assert "bare forward" in said and "token-drop" in said


def test_bench_says_which_removal_does_not_apply(user, capsys):
    small = ["--n-samples", "6", "--rounds", "1", "--batch-sizes", "4"]
    args = parsed(*user("images"), "--patch", "2", *small)  # smaller than the model's patches
    assert args.run(args) == 0
    said = capsys.readouterr().out
    assert "note: token-drop is left out: feature_mask must be constant" in said
    args = parsed(*user("images"), "--patch", "2", "--removal", "token-drop", *small)
    with pytest.raises(ValueError, match="constant within the model's patches"):
        args.run(args)


@pytest.mark.parametrize("option", ["--inputs", "--rounds", "--n-samples", "--batch-sizes"])
def test_bench_refuses_numbers_below_one(user, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        command.run(parsed(*user("table"), option, "0"))


def test_bench_keeps_the_defaults_of_explain(user):
    parser = argparse.ArgumentParser()
    cli.explain.add_parser(parser.add_subparsers())
    explained = JobSettings.from_args(parser.parse_args(["explain", *user("table"), "--out", "x"]))
    ours = JobSettings.from_args(parsed(*user("table")))
    assert dataclasses.replace(ours, n_samples=512, removal="baseline") == explained == JobSettings(explained.data)


def test_the_floor_counts_rows():
    seen = []
    command.floor_seconds(lambda rows: seen.append(len(rows)), torch.zeros(4, 2), 10)
    assert seen == [4, 4, 2]


def test_rates_stop_where_memory_ends(capsys):
    def forward(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no")

    assert list(command.forward_rates(forward, torch.zeros(1, 2), [8, 1, 2])) == [1, 2]
    assert "batch of 8 does not fit" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        command.forward_rates(forward, torch.zeros(1, 2), [8])


@pytest.mark.parametrize(("kind", "n_background"), [("images", 1), ("table", 9)])
def test_peers_evaluate_as_often(user, kind, n_background):
    pytest.importorskip("shap")
    pytest.importorskip("captum")
    args = parsed(*user(kind), *(["--patch", "4"] if kind == "images" else []))
    job = command._jobs(args, command.load_model(args.model), "cpu")["baseline"]
    assert job.n_background == n_background
    seen = []

    def forward(rows):
        seen.append(len(rows))
        return job.compute.forward(rows)

    counts, n = {}, 12
    for name, work in peers.peers_of(job, forward, job.loader.first(2), n, 4).items():
        seen.clear()
        work()
        counts[name] = sum(seen)
    if kind == "images":
        assert counts == {"captum": 2 * n, "shap": 2 * n}
    else:  # shap knows the empty coalition from before
        assert counts == {"shap": 2 * (1 + (n - 2) * n_background)}
