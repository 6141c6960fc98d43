"""Finds the CPython interpreters of a machine and makes environments of them, for building and checking wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
ROOT = Path(__file__).resolve().parent.parent

_PROBE = """
import importlib.metadata, json, pip, sys, sysconfig, venv
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("no CPython of the usual kind")
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = None
print(json.dumps(["%d.%d" % sys.version_info[:2], torch, sysconfig.get_path("platlib")]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A CPython that runs, with pip and venv."""

    path: Path
    version: str  # "3.11"
    torch: str | None  # the version of its torch
    packages: Path  # its site-packages


def output(*command: str | Path, tolerate: Sequence[int] = ()) -> str:
    """Run a command away from the source tree and without its variables; return its stdout.

    Args:
        command: Program and arguments.
        tolerate: Exit statuses beside 0 that are no failure where something was written.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("XAIFAST_", "PYTHON"))}
    done = subprocess.run([str(part) for part in command], env=clean, cwd="/", capture_output=True, text=True)
    if done.returncode and not (done.returncode in tolerate and done.stdout):
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{Path(command[0]).name} failed ({done.returncode}): {' | '.join(lines[-3:])}")
    return done.stdout


def probe(path: Path) -> Interpreter | None:
    """Run an interpreter and ask it what it is; None where it does not run (as pyenv's shims may), or is no CPython."""
    path = path.absolute()  # not resolved: an environment's Python is a link
    try:
        version, torch, packages = json.loads(output(path, "-c", _PROBE))
    except (OSError, RuntimeError, ValueError):
        return None
    return Interpreter(path, version, torch, Path(packages))


def find_interpreters() -> dict[str, Interpreter]:
    """Return one interpreter for each of VERSIONS that is found, if possible one with a torch.

    Looks at the repository's .venv, the running interpreter, PATH, and pyenv's versions.
    """
    found: dict[str, Interpreter] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    places = [ROOT / ".venv" / "bin" / "python", Path(sys.executable)]
    for version in VERSIONS:
        places += [Path(folder) / f"python{version}" for folder in os.get_exec_path()]
        places += sorted(pyenv.glob(f"{version}*/bin/python{version}"), reverse=True)
    for place in dict.fromkeys(place for place in places if place.exists()):
        known = probe(place)
        if known and known.version in VERSIONS:
            best = found.get(known.version)
            if best is None or (best.torch is None and known.torch is not None):
                found[known.version] = known
    return {version: found[version] for version in VERSIONS if version in found}


def make_environment(interpreter: Interpreter, folder: Path) -> Path:
    """Make an empty virtual environment, without pip, and return its Python."""
    output(interpreter.path, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


def install(interpreter: Interpreter, python: Path, arguments: Sequence[str | Path]) -> None:
    """Install into an environment with the pip of the interpreter that it was made of."""
    pip = [interpreter.path, "-m", "pip", "--disable-pip-version-check", "--python", python]
    output(*pip, "install", "--quiet", *arguments)
