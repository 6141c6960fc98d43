"""Makes the development environment and prints the path of its Python; does nothing when it is up to date.

    python tools/setup_env.py [extra ...]

Uses .venv if it exists; else the running virtual environment if it has a torch that will do; else makes .venv, which
sees the running interpreter's torch if that will do. Installs the tested torch only where there is none: a plain
`torch>=2.10` would resolve to the newest CUDA build, several gigabytes, on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TESTED_TORCH = "torch==2.13.0"
MINIMUM_TORCH = (2, 10)
SWITCHES = (
    "XAIFAST_CUDA",
    "XAIFAST_CUDA_ARCHS",
    "XAIFAST_CU130",
    "XAIFAST_WERROR",
    "TORCH_CUDA_ARCH_LIST",
    "CUDACXX",
    "CUDA_HOME",
)


def say(text: str) -> None:
    """Write progress to stderr: stdout carries the result."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """Run a command, its output on stderr; stop with its status if it fails."""
    status = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=sys.stderr).returncode
    if status:
        sys.exit(f"setup: failed ({status}): {' '.join(map(str, command))}")


def has_torch(python: Path) -> bool:
    """Whether an interpreter has a torch of at least MINIMUM_TORCH, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    probe = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    if probe.returncode:
        return False
    return tuple(int(part) for part in probe.stdout.split(".")[:2]) >= MINIMUM_TORCH


def environment() -> Path:
    """Return the interpreter to install into, making .venv if needed."""
    python = VENV / "bin" / "python"
    if python.exists():
        return python
    here = Path(sys.executable)
    seen = has_torch(here)
    if seen and sys.prefix != sys.base_prefix:
        say(f"using the running virtual environment {sys.prefix} and its torch")
        return here
    say(f"making {VENV}" + (" on top of the torch of " + str(here) if seen else ""))
    run(here, "-m", "venv", *(["--system-site-packages"] if seen else []), VENV)
    return python


def build_tools(python: Path) -> list[str]:
    """Return what the build backend wants beside itself: cmake and ninja, where the system's are missing or too old."""
    code = "import scikit_build_core.build as backend; print(*backend.get_requires_for_build_editable())"
    return subprocess.run([python, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def fingerprint() -> str:
    """Hash everything an editable install is built from; Python files are live and do not count."""
    digest = hashlib.sha256()
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    for folder in ("cmake", "csrc"):
        files += sorted(path for path in (ROOT / folder).rglob("*") if path.is_file())
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps([os.environ.get(name, "") for name in SWITCHES]).encode())
    return digest.hexdigest()


def main() -> None:
    """Bring the environment up to date and print its interpreter."""
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"setup: Python 3.10 or newer is needed, got {sys.version.split()[0]}; try make PYTHON=python3.12")
    python = environment()
    stamp = python.parent.parent / "xaifast-setup.json"  # in the environment: goes when that goes
    done = json.loads(stamp.read_text()) if stamp.exists() else {}
    extras = sorted({*sys.argv[1:], *done.get("extras", [])})
    wanted = {"root": str(ROOT), "fingerprint": fingerprint(), "extras": extras}
    if done != wanted:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if not has_torch(python):
            say(f"installing {TESTED_TORCH}")
            run(*pip, TESTED_TORCH)
        say("installing the build requirements")
        run(*pip, "scikit-build-core>=0.11", "pybind11>=2.13")
        if tools := build_tools(python):
            run(*pip, *tools)
        say("building and installing xaifast" + (f" with [{','.join(extras)}]" if extras else ""))
        run(*pip, "--no-build-isolation", "--editable", f".[{','.join(extras)}]" if extras else ".")
        stamp.write_text(json.dumps(wanted))
    print(python)


if __name__ == "__main__":
    main()
