import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a fresh interpreter, away from the sources' folder, and returns what it printed."""

    def run(code, *, fails=False, **environment):
        finished = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (finished.returncode != 0) == fails, finished.stdout + finished.stderr
        return finished.stderr if fails else finished.stdout

    return run


@pytest.fixture
def run_on_every_isa(run_python, request):
    """Runs code, which may import from the tests' folder, with each build of the CPU kernels that this processor can
    run; returns the set of what was printed.
    """
    from xaifast import _native

    if _native.cpu() is None:
        pytest.skip("the native CPU module is not built")

    def run(code):
        # Loading the module by itself says at once whether the processor lacks the instruction set.
        code = f"import sys, torch, xaifast._cpu\nsys.path.insert(0, {str(request.path.parent)!r})\n{code}"
        printed = set()
        for isa in _native.cpu().build_info()["isas"]:
            try:
                printed.add(run_python(code, XAIFAST_CPU_ISA=isa))
            except AssertionError as error:
                if "this processor lacks" not in str(error):
                    raise
        assert printed
        return printed

    return run
