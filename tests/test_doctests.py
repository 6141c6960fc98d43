"""The examples in docstrings run and show what is written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import xaifast

ROOT = Path(xaifast.__file__).parent
FILES = sorted(path.relative_to(ROOT.parent) for path in ROOT.rglob("*.py"))
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch, "xaifast": xaifast}
    assert doctest.testmod(module, globs=names).failed == 0


def test_examples_are_found():
    assert {"xaifast.players", "xaifast.attribution.kernel_shap"} <= set(MODULES)
