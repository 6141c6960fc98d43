"""Loads the compiled modules on first use and keeps the reason when one is missing."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

_reasons: dict[str, str] = {}


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"xaifast.{name}")
    except ImportError as error:
        # The commonest case deserves a better hint than "No module named".
        if isinstance(error, ModuleNotFoundError) and error.name == f"xaifast.{name}":
            hint = "build with XAIFAST_CUDA=ON to see why" if name == "_cuda" else "run: pip install -e ."
            _reasons[name] = f"xaifast.{name} was not built; {hint}"
        else:
            _reasons[name] = str(error)
        return None


def cpu() -> ModuleType | None:
    """Return `xaifast._cpu`, or None if it cannot be loaded."""
    return _load("_cpu")


def cuda() -> ModuleType | None:
    """Return `xaifast._cuda`, or None if it was not built or cannot be loaded. Needs no driver."""
    return _load("_cuda")


def why_missing() -> dict[str, str]:
    """Return the reason for each module that cannot be loaded: keys "_cpu", "_cuda"; empty when both are there."""
    cpu(), cuda()
    return dict(_reasons)
