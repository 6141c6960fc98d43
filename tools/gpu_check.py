"""Everything a machine with a CUDA device is needed for, in one command and without a network: `make gpu-check`.

Builds, runs all tests with CUDA and Triton kernels, looks for bad memory accesses and races with compute-sanitizer,
captures CUDA graphs, uses two streams, and then measures operators and jobs. Logs and CSV go to a folder; a table of
what was done comes last. No figure is made when a test of the kernels fails.

    python tools/gpu_check.py [--out DIR] [--only STEP ...]

Exit status: 0 all is well, 1 a step failed, 2 there is no CUDA device (what needs none has run).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, ABSENT, NEEDS_GPU, LEFT_OUT = "ok", "FAILED", "absent", "needs a GPU", "left out"
KERNEL_TESTS = ("tests", "gpu tests", "kernel cases", "memcheck", "racecheck", "graphs and streams")


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: In the table.
        command: What is run; None where a tool is missing, which `missing` names.
        environment: Added to this process's.
        seconds: Its limit.
        needs_gpu: Whether it is left out without a CUDA device.
        instead: Command that makes a failure good: what is there already will do.
        after: Steps that must not have failed.
    """

    name: str
    command: Sequence[str] | None
    environment: dict[str, str] = field(default_factory=dict)
    seconds: int = 120
    needs_gpu: bool = True
    instead: Sequence[str] | None = None
    missing: str = ""
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""


Runner = Callable[[Sequence[str], dict[str, str], int, Path], int]


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, under CUDA_HOME, in /usr/local/cuda or beside Nsight's tools."""
    if found := shutil.which("compute-sanitizer"):
        return found
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *sorted(Path("/usr/local").glob("cuda-*"))]
    places = [home / sub / "compute-sanitizer" for home in homes for sub in ("bin", "compute-sanitizer")]
    return next((str(place) for place in places if place.is_file()), None)


def cuda_device() -> str | None:
    """Name of the CUDA device torch sees, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def steps(out: Path) -> list[Step]:
    """What is to be done, in order."""
    python, sanitizer = sys.executable, find_sanitizer()
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    parallel = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    cases = [python, str(ROOT / "tools" / "sanitizer_cases.py")]
    loads = "import torch, sys; from xaifast import _native; sys.exit(_native.cuda() is None or _native.cpu() is None)"

    def checked(tool: str, **environment: str) -> Step:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *cases] if sanitizer else None
        missing = "compute-sanitizer was not found; it comes with the CUDA toolkit"
        return Step(tool, command, environment, missing=missing)

    def measured(name: str, script: str) -> Step:
        command = [python, str(ROOT / "bench" / script), "--csv", str(out / f"{name}-cuda.csv")]
        return Step(f"bench {name}", command, after=("build", *KERNEL_TESTS))

    return [
        Step(
            "build",
            [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", str(ROOT)],
            seconds=180,
            needs_gpu=False,
            instead=[python, "-c", loads],
        ),
        Step("self-test", [python, "-m", "xaifast", "info"], needs_gpu=False, after=("build",)),
        Step("kernel cases", cases, needs_gpu=False, after=("build",)),
        Step("tests", [*pytest, *parallel], {"OMP_NUM_THREADS": "2"} if parallel else {}, 300, after=("build",)),
        Step("gpu tests", [*pytest, "-m", "gpu"], seconds=180, after=("build",)),
        Step("interpreter", [*pytest, "tests/kernels"], {"TRITON_INTERPRET": "1"}, needs_gpu=False, after=("build",)),
        checked("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),  # every tensor an allocation: its ends are seen
        checked("racecheck"),
        Step("graphs and streams", [*pytest, "-m", "gpu", "tests/test_gpu_graphs.py"], after=("build",)),
        measured("operators", "bench_operators_cuda.py"),
        measured("jobs", "bench_jobs_cuda.py"),
    ]


def run_command(command: Sequence[str], environment: dict[str, str], seconds: int, log: Path) -> int:
    """Run with output to a file; 124 where it took too long."""
    with log.open("ab") as file:
        try:
            return subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds} s".encode())
            return 124


def last_line(log: Path) -> str:
    """The last line that says something."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return next((line.strip(" =") for line in reversed(text.splitlines()) if line.strip()), "")


def check(step: Step, done: dict[str, Outcome], device: str | None, out: Path, runner: Runner) -> Outcome:
    """Run one step, unless something it needs is not there."""
    if step.needs_gpu and device is None:
        return Outcome(step.name, NEEDS_GPU)
    if step.command is None:
        return Outcome(step.name, ABSENT, detail=step.missing)
    if broken := [name for name in step.after if name in done and done[name].state == FAILED]:
        return Outcome(step.name, LEFT_OUT, detail=f"failed before: {', '.join(broken)}")
    log = out / f"{step.name.replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    start = time.perf_counter()
    status = runner(step.command, step.environment, step.seconds, log)
    detail = last_line(log)
    if status and step.instead and not runner(step.instead, step.environment, step.seconds, log):
        status, detail = 0, f"failed ({log}), but what is installed works: {detail}"
    return Outcome(step.name, FAILED if status else PASSED, time.perf_counter() - start, detail)


def table(outcomes: Sequence[Outcome]) -> str:
    """Step, state, seconds, detail: a line each."""
    lines = [f"{'step':<20}{'state':<13}{'seconds':>8}  detail"]
    for one in outcomes:
        lines.append(f"{one.name:<20}{one.state:<13}{one.seconds:>8.1f}  {one.detail[:100]}".rstrip())
    return "\n".join(lines)


def run(todo: Sequence[Step], device: str | None, out: Path, runner: Runner = run_command) -> int:
    """Run the steps, print the table.

    Returns:
        1 where a step failed, else 2 without a CUDA device, else 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    print(device or "no CUDA device: what needs one is left out", flush=True)
    done: dict[str, Outcome] = {}
    for step in todo:
        print(f"{step.name} ...", flush=True)
        done[step.name] = check(step, done, device, out, runner)
    print(f"\nlogs and CSV: {out}\n{table(list(done.values()))}")
    if any(one.state in (FAILED, LEFT_OUT) for one in done.values()):
        return 1
    return 0 if device else 2


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="for logs and CSV")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="some steps")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    todo = steps(out)
    if unknown := set(arguments.only or ()) - {step.name for step in todo}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in todo)}")
    return run([step for step in todo if not arguments.only or step.name in arguments.only], cuda_device(), out)


if __name__ == "__main__":
    sys.exit(main())
