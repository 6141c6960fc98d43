"""Runs the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set.

    python tools/sanitize.py            # build/sanitize is made, or brought up to date
    python tools/sanitize.py --prove    # the same set-up must find faults put into a copy of the kernels

Nothing is installed and no file of the environment changes: a `sitecustomize` in front of the path gives the processes
of this run, and them alone, the instrumented `xaifast._cpu`. Status 0: sound; 1: something was found; 2: this machine
lacks what it takes (GCC with libasan).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_cpu import build

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
CALLS = ROOT / "bench" / "kernel_calls.py"
ISAS = ("baseline", "v3", "v4")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
TESTS = ("native", "coalitions", "cubic", "masking", "plan", "select_rows", "tokens", "perturb", "ranking")
# What tests torch and not a kernel, starts processes of its own (an instruction set is forced here), or is long.
LEFT_OUT = "gradient compile opcheck registration registered instruction_set without_native cuda adjusted 250- 257-"
OVERLAY = """
import importlib.util, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "xaifast._cpu":
            return importlib.util.spec_from_file_location(name, os.environ["XAIFAST_SANITIZED"])

sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class Fault:
    """A change that breaks a kernel, and what must be said about it."""

    kernel: str
    file: str
    old: str
    new: str
    report: str


OVERRUN = "ERROR: AddressSanitizer"  # its kind depends on where the access begins
FAULTS = (
    Fault("select_rows", "bytes.h", "store(out + n - kVectorBytes, ", "store(out + n + 1 - kVectorBytes, ", OVERRUN),
    Fault("select_rows", "lane_mask.h", "index[p] != first + p", "index[p] - index[0] != p", "signed integer overflow"),
    Fault("compact_rows", "compact.cpp", "taken * a.row_bytes)", "taken * a.row_bytes + 1)", OVERRUN),
    Fault("cubic_regression", "cubic.cpp", "alpha, solution_, n *", "alpha, solution_, (n + 1) *", OVERRUN),
    Fault("pack_bits", "pack.cpp", "if (end - bytes < 64)", "if (end - bytes < 63)", OVERRUN),
    Fault("unpack_bits", "pack.cpp", "if (end - bytes >= 64)", "if (end - bytes >= 63)", OVERRUN),
    Fault("philox_words", "philox.cpp", "call < n_calls;", "call <= n_calls;", OVERRUN),
    Fault("perturb_rows", "perturb.cpp", "kBlockEntries : a.period - p", "kBlockEntries : kBlockEntries", OVERRUN),
    Fault("rank_features", "rank.cpp", "std::malloc(2 * n *", "std::malloc(n *", OVERRUN),
    Fault("sample_coalitions", "coalitions.cpp", "int64_t w = 0; w < words_;", "int64_t w = 0; w <= words_;", OVERRUN),
)


def runtime() -> list[str]:
    """Libraries that must be loaded before Python, or nothing if the compiler has none."""
    compiler = os.environ.get("CXX", "c++")
    found = []
    # libstdc++ too: the interceptor of exceptions looks for it when the process starts.
    for name in ("libasan.so", "libstdc++.so.6"):
        try:
            said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return []
        if not os.path.isabs(said):
            return []
        found.append(str(Path(said).resolve()))
    return found


def environment(module: Path, overlay: Path, isa: str) -> dict[str, str]:
    """Variables of a process that uses the instrumented module."""
    overlay.mkdir(parents=True, exist_ok=True)
    (overlay / "sitecustomize.py").write_text(OVERLAY)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XAIFAST_SANITIZED": str(module),
        "XAIFAST_CPU_ISA": isa,
        "OMP_NUM_THREADS": "1",  # of torch; tests name the threads of kernels
        "HF_HUB_OFFLINE": "1",
    }


def report(text: str) -> str:
    """The part of a process's output that says what was found: from the sanitizer's line on, else the end."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"ERROR: AddressSanitizer|runtime error:", line):
            return "\n".join(lines[i : i + 12])
    return "\n".join(lines[-30:])


def check(module: Path, isa: str) -> tuple[bool, str]:
    """Run odd-sized calls and the tests on one instruction set; return whether all is sound, and what to print."""
    variables, start = environment(module, FOLDER / "overlay", isa), time.perf_counter()
    ours = f"import torch, xaifast._cpu as c; assert c.__file__ == {str(module)!r}, c.__file__"
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT.split())
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", "-x", "-k", chosen, *tests]
    said = []
    for arguments in (["-c", ours], [str(CALLS), str(module), "edges"], pytest):
        result = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1800
        )
        if result.returncode:
            if "this processor lacks" in result.stderr:
                return True, f"{isa:8}  skipped: this processor lacks these instructions"
            return False, f"{isa:8}  FAILED\n{report(result.stdout + result.stderr)}"
        said += result.stdout.splitlines()[-1:]
    return True, f"{isa:8}  {'; '.join(said)}; {time.perf_counter() - start:.0f} s in all"


def prove(folder: Path) -> bool:
    """Put each fault into a copy, alone, and see it found; the copy without any is sound."""
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "xaifast").mkdir()
    for name in ("CMakeLists.txt", "xaifast/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    baseline = {f"XAIFAST_HAVE_X86_64_{isa}": "OFF" for isa in ISAS[1:]}
    sound = True
    for fault in (None, *FAULTS):
        if fault:
            path = folder / "csrc" / "cpu" / fault.file
            text = path.read_text()
            if text.count(fault.old) != 1:
                raise RuntimeError(f"sanitize: {fault.old!r} must occur once in {fault.file}; bring FAULTS up to date")
            path.write_text(text.replace(fault.old, fault.new))
        module = build(folder, folder / "build", flags=FLAGS, build_type="RelWithDebInfo", cache=baseline)
        command = [sys.executable, str(CALLS), str(module), "edges", *([fault.kernel] if fault else [])]
        variables = environment(module, folder / "overlay", "baseline")
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        if fault:
            path.write_text(text)
            seen = result.returncode != 0 and fault.report in result.stderr
            print(f"{fault.kernel:18} {fault.new!r}: {'found' if seen else 'NOT FOUND'}", flush=True)
        else:
            seen = result.returncode == 0
            print(f"{'without a fault':18} {'sound' if seen else 'FAILED'}", flush=True)
        if not seen:
            print(report(result.stdout + result.stderr))
        sound &= seen
    return sound


def main() -> int:
    """Build, run, print a line an instruction set; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prove", action="store_true", help="check that faults are found")
    arguments = parser.parse_args()
    if not runtime():
        print("sanitize: GCC with libasan must be installed (CXX names the compiler)", file=sys.stderr)
        return 2
    if arguments.prove:
        with tempfile.TemporaryDirectory(prefix="xaifast-sanitize-") as folder:
            return 0 if prove(Path(folder).resolve()) else 1
    start = time.perf_counter()
    module = build(ROOT, FOLDER / "build", flags=FLAGS, build_type="RelWithDebInfo")
    print(f"built     {time.perf_counter() - start:.0f} s", flush=True)
    sound = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for ok, text in pool.map(lambda isa: check(module, isa), ISAS):
            print(text, flush=True)
            sound &= ok
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
