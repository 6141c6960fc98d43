"""Runs that are killed at any moment end, resumed, with the bytes of one that was not."""

import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from xaifast.cli import main
from xaifast.run import open_run

N_KILLS = 20
MODEL = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    ).eval()
"""
ARGUMENTS = ["explain", "--model", "py:mine:model", "--data", "npz:data.npz", "--n-samples", "200"]
ARGUMENTS += ["--patch", "2", "--chunk-size", "4", "--threads", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    images = np.random.default_rng(0).random((90, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def work(arguments, rank, world):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    sys.exit(main(arguments))


def start(out, world):
    """The command in processes of its own, forked from a server that has imported everything but run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xaifast.cli"])
    arguments = [*ARGUMENTS, "--out", out, "--quiet", "--no-report"]
    processes = [context.Process(target=work, args=(arguments, rank, world)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.002)


def finish(processes):
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def files(out):
    """Everything but what tells the time."""
    paths = (p for p in out.rglob("*") if p.is_file() and "log" not in p.parts and not p.name.endswith(".lock"))
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if p.name != "manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments(folder, world):
    processes = start("reference", world)
    wait_for(folder / "reference" / "manifest.json")
    began = time.perf_counter()
    finish(processes)
    work = time.perf_counter() - began
    reference = files(folder / "reference")
    assert len(open_run("reference").finished) == 23
    moments = random.Random(0)
    interrupted = 0
    for kill in range(N_KILLS):
        out = f"killed{kill}"
        processes = start(out, world)
        if kill % 5:  # one in five is killed while it starts
            wait_for(folder / out / "manifest.json")
        time.sleep(moments.uniform(0, work))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        kept = {}
        if (folder / out / "manifest.json").exists():
            run = open_run(out)
            kept = {run.chunk_path(chunk): os.stat(run.chunk_path(chunk)) for chunk in run.finished}
            interrupted += 0 < len(kept) < 23
        finish(start(out, world))
        assert files(folder / out) == reference
        for path, before in kept.items():  # what was finished was not written again
            after = os.stat(path)
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        written = [event["chunk"] for event in open_run(out).log if event["event"] == "chunk"]
        assert len(written) == len(set(written))
    assert interrupted >= N_KILLS // 4, "the kills must hit the middle of the work to say anything"


def command_line(*arguments):
    return [sys.executable, "-m", "xaifast", *ARGUMENTS, "--no-report", *arguments]


@pytest.mark.parametrize(("number", "quiet"), [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGINT, ["--quiet"])])
def test_interrupt_prints_the_command_that_goes_on(folder, number, quiet):
    command = command_line("--out", "my run", "--chunk-size", "1", *quiet)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "my run" / "chunks" / "000000.safetensors")
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = int(re.search(r"(\d+) of 90 chunks are finished and kept in my run", said)[1])
    assert 0 < kept < 90 and open_run("my run").finished == list(range(kept))
    program, *arguments = shlex.split(said.splitlines()[-1])
    assert program == "xaifast"
    again = subprocess.run([sys.executable, "-m", "xaifast", *arguments], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert quiet or f"{kept} finished" in again.stdout
    assert open_run("my run").complete


def test_torchrun_gives_what_one_process_gives(folder):
    alone = subprocess.run(command_line("--out", "alone", "--quiet"), capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "xaifast"]
    both = subprocess.run(
        [*torchrun, *command_line("--out", "both")[3:]], capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    assert files(folder / "alone") == files(folder / "both")
    assert {event["rank"] for event in open_run("both").log if event["event"] == "chunk"} == {0, 1}
    assert both.stdout.count("model:") == 1  # one of the two speaks
    assert "finished 23 of 23 chunks" in both.stdout  # and whichever was last
