"""What a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess


def pin_threads(n: int) -> None:
    """Torch on ``n`` threads, NumPy's BLAS on one: two pools on the same cores fight."""
    import numpy  # noqa: F401  (loaded first, so that its pool is found)
    import torch
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    torch.set_num_threads(n)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """Device, threads, versions and commit."""
    import torch

    import xaifast
    from xaifast import _native

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(__file__)
        ).stdout.strip()
    except OSError:
        commit = ""
    native = _native.cpu()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "isa": native.build_info()["isa"] if native else "reference",
        "xaifast": xaifast.__version__,
        "commit": commit or "-",
        "torch": torch.__version__,
        "captum": _version("captum"),
        "shap": _version("shap"),
        "python": platform.python_version(),
    }
