"""Builds the sdist and, for every CPython 3.10 to 3.13 of this machine, a CPU and a CUDA wheel, and checks them all.

    python tools/build_wheels.py [--out dist] [--python 3.11 ...] [--torch SPEC_OR_PYTHON ...] [--offline]

Needs a C++ compiler, no torch and no GPU. CUDA wheels (+cu130) need the nvcc of CUDA 13 and are left out, with a line,
where there is none. Exit status 1 where a check fails.
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
import zipfile
from collections.abc import Sequence
from pathlib import Path

import check_wheel
from check_wheel import Finding, Settings
from cuda_resources import find_nvcc
from interpreters import ROOT, VERSIONS, Interpreter, find_interpreters, install, make_environment, output

# What a caller's environment may not change about a release.
SWITCHES = (
    "XAIFAST_CUDA",
    "XAIFAST_CUDA_ARCHS",
    "XAIFAST_CU130",
    "XAIFAST_WERROR",
    "TORCH_CUDA_ARCH_LIST",
    "CUDAARCHS",
)
KINDS = {"cpu": {"XAIFAST_CUDA": "OFF"}, "cu130": {"XAIFAST_CU130": "1"}}  # pyproject.toml says what the latter means


def say(text: str) -> None:
    """Write progress to stderr: stdout carries the table."""
    print(f"wheels: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path, **switches: str) -> None:
    """Run a build command with these switches and no others; stop with its output if it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    done = subprocess.run(
        [str(part) for part in command], env={**kept, **switches}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"wheels: failed ({done.returncode}): {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def cuda_release(nvcc: str | None) -> str | None:
    """Return the CUDA release of an nvcc, such as "13.0"; None where it does not run."""
    if nvcc is None or shutil.which(nvcc) is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else None


def possible_kinds() -> dict[str, dict[str, str]]:
    """Return those of KINDS that this machine can build."""
    release = cuda_release(find_nvcc())
    if release is not None and release.startswith("13."):
        return KINDS
    found = "no working nvcc" if release is None else f"the nvcc of CUDA {release}"
    say(f"no +cu130 wheels: they need the nvcc of CUDA 13, found {found}; name one in CUDACXX or CUDA_HOME")
    return {"cpu": KINDS["cpu"]}


def has_backend(interpreter: Interpreter) -> bool:
    """Whether an interpreter can build without downloading anything."""
    try:
        output(interpreter.path, "-c", "import scikit_build_core, pybind11")
    except RuntimeError:
        return False
    return True


def build_wheel(source: Path, interpreter: Interpreter, switches: dict[str, str], offline: bool, folder: Path) -> Path:
    """Build a wheel of a source tree or sdist under `folder`; nothing is left in the tree."""
    raw = folder / "raw"
    isolation = ["--no-build-isolation", "--no-index"] if offline else []
    command = [interpreter.path, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", *isolation]
    run(*command, f"--config-settings=build-dir={folder / 'build'}", "--wheel-dir", raw, source, **switches)
    (wheel,) = raw.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path, auditwheel: Sequence[str] | None) -> Path:
    """Write the wheel into `out` under its manylinux tag; as it is where there is no auditwheel.

    libgomp stays outside: torch brings one, and a second would be a second pool of threads.
    """
    if auditwheel is None:
        return Path(shutil.copy2(wheel, out))
    fixed = wheel.parent / "fixed"
    run(*auditwheel, "repair", "--exclude", "libgomp.so.1", "--wheel-dir", fixed, wheel)
    (result,) = fixed.glob("*.whl")
    return Path(shutil.copy2(result, out))


def build_sdist(interpreter: Interpreter, offline: bool, folder: Path) -> Path:
    """Build the sdist under `folder`, with the build backend in an environment of its own."""
    folder.mkdir()
    python = interpreter.path
    if not offline:
        python = make_environment(interpreter, folder / "backend")
        install(interpreter, python, ["scikit-build-core>=0.11", "pybind11>=2.13"])
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(python, "-c", code, folder)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def sdist_row(interpreter: Interpreter, offline: bool, folder: Path) -> tuple[Path, list[list[Finding]]]:
    """Build the sdist; return it and its row: a wheel made of it must hold the files of one made of the tree."""
    sdist = build_sdist(interpreter, offline, folder)
    files, wanted = (
        set(zipfile.ZipFile(build_wheel(source, interpreter, KINDS["cpu"], offline, folder / name)).namelist())
        for source, name in ((sdist, "from-sdist"), (ROOT, "from-tree"))
    )
    differing = sorted(files ^ wanted)
    text = f"builds the same {len(files)} files" if not differing else f"builds other files: {' '.join(differing)}"
    nothing = Finding("-")
    row = [Finding(sdist.name), Finding(f"{sdist.stat().st_size / 1e6:.2f} MB"), nothing, nothing, nothing]
    return sdist, [[*row, Finding(text, not differing), nothing]]


def main() -> int:
    """Build, check, print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheels and sdist go (default: dist)")
    parser.add_argument("--python", nargs="+", choices=VERSIONS, default=VERSIONS, help="for these versions only")
    check_wheel.add_options(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    interpreters = {version: found for version, found in find_interpreters().items() if version in args.python}
    if args.offline:
        interpreters = {version: found for version, found in interpreters.items() if has_backend(found)}
    if not interpreters:
        also = ", scikit-build-core and pybind11" if args.offline else ""
        sys.exit(f"wheels: found no CPython of {', '.join(args.python)} with pip, venv{also}")
    kinds = possible_kinds()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        auditwheel = check_wheel.find_auditwheel(folder, args.offline)
        settings = Settings(args.torch, None, args.offline, auditwheel, check_wheel.find_cuobjdump())
        sdist, rows = sdist_row(next(iter(interpreters.values())), args.offline, folder / "sdist")
        shutil.copy2(sdist, args.out)
        for interpreter in interpreters.values():
            for kind, switches in kinds.items():
                started = time.perf_counter()
                raw = build_wheel(ROOT, interpreter, switches, args.offline, folder / f"{interpreter.version}-{kind}")
                wheel = repair(raw, args.out, auditwheel)
                say(f"{wheel.name} in {time.perf_counter() - started:.0f} s")
                rows.append(check_wheel.check(wheel, interpreters, settings))
    print(check_wheel.as_table(rows))
    return 0 if check_wheel.passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
