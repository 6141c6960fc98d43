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
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = ROOT / "build" / "setup.json"
TESTED_TORCH = "torch==2.13.0"
MINIMUM_TORCH = (2, 10)
SWITCHES = ("XAIFAST_CUDA", "XAIFAST_CUDA_ARCHS", "XAIFAST_WERROR", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME")


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
    extras = set(sys.argv[1:])
    python = environment()
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    wanted = {"python": str(python), "fingerprint": fingerprint()}
    same = {key: done.get(key) for key in wanted} == wanted
    if not (same and extras <= set(done["extras"])):
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if not has_torch(python):
            say(f"installing {TESTED_TORCH}")
            run(*pip, TESTED_TORCH)
        tools = [name for name in ("cmake", "ninja") if not shutil.which(name)]
        say("installing the build requirements")
        run(*pip, "scikit-build-core>=0.11", "pybind11>=2.13", *tools)
        say("building and installing xaifast" + (f" with [{','.join(sorted(extras))}]" if extras else ""))
        run(*pip, "--no-build-isolation", "--editable", f".[{','.join(sorted(extras))}]" if extras else ".")
        STAMP.parent.mkdir(exist_ok=True)
        kept = extras | set(done["extras"]) if done.get("python") == str(python) else extras
        STAMP.write_text(json.dumps({**wanted, "extras": sorted(kept)}))
    print(python)


if __name__ == "__main__":
    main()
