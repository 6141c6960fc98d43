"""What the quick start tells people to type works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(language=""):
    text = (ROOT / "docs" / "quickstart.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.mark.slow
def test_quick_start(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line.partition("#")[0].strip() for block in blocks() for line in block.splitlines()]
    commands = [line for line in commands if line and not line.startswith("make ") and "path/to" not in line]
    assert [line.split()[0] for line in commands] == ["python", "xaifast"]
    for line in commands:
        program, *arguments = shlex.split(line)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    python, imports = blocks("python")
    names = {}
    exec(python, names)
    said, _, _ = re.search(r"print\(result\)  # (.*)", python)[1].rpartition(" ")
    assert repr(names["result"]).startswith(said)
    assert (tmp_path / "digits.png").stat().st_size > 5000
    stored = names["run"][3]["values"]
    assert torch.allclose(stored, names["result"].values[3], rtol=1e-3, atol=1e-3)
    exec(imports, {})


def test_make_targets_of_the_quick_start_exist():
    targets = {line.split()[1] for block in blocks() for line in block.splitlines() if line.startswith("make ")}
    assert targets == {"demo", "test"} and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
