"""Compile every CUDA source for its GPU targets, without a GPU, and report what each kernel uses.

Prints registers, spilled bytes, shared memory and stack as `ptxas -v` gives them; exits with 1 where a kernel spills.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90, 100, 120)
ROOT = Path(__file__).resolve().parent.parent

_KERNEL = re.compile(r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<arch>\d+)a?'")
_SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one target."""

    kernel: str
    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    stack: int

    @property
    def ok(self) -> bool:
        """Nothing spilled."""
        return self.spill_stores == 0 and self.spill_loads == 0


def find_nvcc() -> str | None:
    """Return the nvcc that the build uses: CUDACXX, or the one under CUDA_HOME, on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(folders))


def parse(report: str) -> list[Usage]:
    """Read the usages from the output of `ptxas -v`."""
    usages, kernel, spills = [], None, None
    for line in report.splitlines():
        if match := _KERNEL.search(line):
            kernel = match
        elif match := _SPILLS.search(line):
            spills = match
        elif kernel and spills and (match := _USED.search(line)):
            usages.append(
                Usage(
                    kernel["name"],
                    int(kernel["arch"]),
                    int(match["registers"]),
                    int(spills["stores"]),
                    int(spills["loads"]),
                    int(match["shared"] or 0),
                    int(spills["stack"]),
                )
            )
            kernel = spills = None
    return usages


def measure(source: Path, arch: int, nvcc: str) -> list[Usage]:
    """Compile one source for one target."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas", "-v"]
        command += ["-I", str(ROOT / "csrc" / "include"), str(source), "-o", str(Path(folder) / "out.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return parse(result.stdout + result.stderr)


def measure_all(nvcc: str) -> list[Usage]:
    """Measure every kernel of csrc/cuda for every target."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [usage for source in sources for arch in ARCHS for usage in measure(source, arch, nvcc)]


def readable(names: list[str]) -> list[str]:
    """Demangle names where c++filt is at hand."""
    if not names or shutil.which("c++filt") is None:
        return names
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\(.*$", "", name.replace("(anonymous namespace)::", "")) for name in plain]


def main() -> int:
    """Print the table; return the exit status."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_resources: nvcc was not found; name it in CUDACXX", file=sys.stderr)
        return 2
    usages = measure_all(nvcc)
    print(f"{'kernel':60} {'sm':>4} {'registers':>9} {'spill st':>8} {'spill ld':>8} {'shared':>7} {'stack':>6}")
    for name, u in zip(readable([u.kernel for u in usages]), usages, strict=True):
        verdict = "" if u.ok else "  <- spills"
        spills = f"{u.spill_stores:8} {u.spill_loads:8}"
        print(f"{name:60} {u.arch:4} {u.registers:9} {spills} {u.shared:7} {u.stack:6}{verdict}")
    return 0 if all(u.ok for u in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
