"""Builds `xaifast._cpu` of a source tree by CMake alone, in a folder of its own: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def build(
    source: Path, folder: Path, *, flags: str = "", build_type: str = "Release", cache: Mapping[str, str] | None = None
) -> Path:
    """Configure and compile; a second call compiles what has changed.

    Args:
        source: Root of the sources, with CMakeLists.txt.
        folder: Where CMake works.
        flags: For the C++ compiler, besides those of the build type and of the project.
        build_type: As in CMAKE_BUILD_TYPE.
        cache: Further CMake variables.

    Returns:
        Path of the module.

    Raises:
        RuntimeError: CMake or the compiler failed; with what they said.
    """
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
    variables = {
        "CMAKE_BUILD_TYPE": build_type,
        "CMAKE_CXX_FLAGS": flags,
        "XAIFAST_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": _output(pybind11, tools).strip(),
        **(cache or {}),
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools["PATH"]) else []
    define = [f"-D{name}={value}" for name, value in variables.items()]
    _output(["cmake", "-S", str(source), "-B", str(folder), *generator, *define], tools)
    _output(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], tools)
    (module,) = folder.glob("_cpu.*.so")
    return module


def _output(command: list[str], environment: dict[str, str]) -> str:
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"build_cpu: {command[0]} must be installed, and was not found on PATH") from None
    if result.returncode:
        raise RuntimeError(f"build_cpu: failed: {' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout
