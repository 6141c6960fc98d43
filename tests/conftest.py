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
