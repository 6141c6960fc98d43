"""Recorded training: states come back as they were, and nothing wrong on disk is taken for a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import xaifast
from xaifast.trajectory import Trajectory, TrajectoryError, folder


class Odd(nn.Module):
    """Everything a state dict may hold: batch norm, ties, a frozen layer, scalars, integers, infinity, other dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Linear(5, 4).requires_grad_(False)
        self.out, self.again = nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.again.weight = self.out.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(4).half())
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("ids", torch.arange(4))
        self.register_buffer("flags", torch.tensor([True, False]))


def odd_step(model):
    """A change of every kind: small, of sign, by many powers of ten, of statistics and counters; some tensors rest."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name != "wide":
                p.add_(torch.randn(p.shape).to(p.dtype) * 10.0 ** float(torch.randint(-6, 1, ())))
        model.out.weight[0, 0] = 1e-8
        model.out.weight[0, 1] = -1e20 if model.out.weight[0, 1] > 0 else 1e20
        model.wide.mul_(1 + 1e-14)
        model.ids += 1
        model.norm(torch.randn(4, 3, 2, 2))


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3)).to(dtype)


def train(model, n, lr=1e-2, seed=1):
    """Adam on a made task; yields after every step."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(64, 20, generator=g).to(dtype), torch.randint(3, (64,), generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(n):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield


def copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(state, wanted):
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


def recorded(directory, n=4, **settings):
    """A trajectory of a small training, and the states it should hold."""
    model, traj = mlp(), Trajectory(directory, **settings)
    traj.record(model, step=0)
    states = [copy(model)]
    for step in range(1, n + 1):
        for _ in train(model, 1, seed=step):
            pass
        assert traj.record(model, step=step) == step
        states.append(copy(model))
    return traj, states, model


@pytest.fixture(params=["memory", "disk"])
def where(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "run"


def test_states_come_back_bit_for_bit(where):
    torch.manual_seed(0)
    model, traj = Odd(), Trajectory(where)
    states = []
    for _ in range(6):
        traj.record(model)
        states.append(copy(model))
        odd_step(model)
    if where is not None:
        traj = Trajectory(where)
    assert len(traj) == 6
    for state, wanted in zip(traj, states, strict=True):
        equal(state, wanted)
    for t in (5, 0, 3, -1, -6):
        equal(traj[t], states[t])
    for state, t in zip(traj.states([1, 2, 5]), (1, 2, 5), strict=True):
        equal(state, states[t])
    model.load_state_dict(traj[2])
    equal(copy(model), states[2])


def test_tied_and_resting_tensors_are_stored_once(tmp_path):
    model, traj = Odd(), Trajectory(tmp_path / "run")
    traj.record(model)
    start = load_file(tmp_path / "run" / "records" / "000000.safetensors")
    assert set(start) == {f"state/{name}" for name in model.state_dict() if name != "again.weight"}
    with torch.no_grad():
        model.again.weight[3, 3] += 1
    traj.record(model)
    assert set(load_file(tmp_path / "run" / "records" / "000001.safetensors")) == {"state/out.weight"}
    state = traj[1]
    assert state["again.weight"] is state["out.weight"] and torch.equal(state["out.weight"], model.out.weight)
    assert traj.parameters == [name for name, _ in model.named_parameters()]
    traj.record(model)
    assert load_file(tmp_path / "run" / "records" / "000002.safetensors") == {}
    equal(traj[2], copy(model))


def test_memory_in_use():
    model, traj = nn.Linear(100, 10, bias=False), Trajectory()
    for _ in range(3):
        traj.record(model)
        with torch.no_grad():
            model.weight.add_(1)
    assert traj.nbytes == 3 * 4000


def test_nothing_is_shared(where):
    model, traj = nn.Linear(2, 2), Trajectory(where)
    traj.record(model)
    wanted = copy(model)
    with torch.no_grad():
        model.weight.add_(1)  # the bias rests
    traj.record(model)
    first, second = traj.states()
    for value in (*first.values(), *second.values()):
        value.fill_(7)
    equal(traj[0], wanted)
    iterator = traj.states()
    next(iterator)["bias"].fill_(7)
    assert torch.equal(next(iterator)["bias"], model.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bf16_keeps_its_bound_for_200_steps(where, dtype):
    model, traj = mlp(dtype=dtype), Trajectory(where, deltas="bf16")
    traj.record(model)
    states = [copy(model)]
    for _ in train(model, 200, lr=1e-3):
        traj.record(model)
        states.append(copy(model))
    exact = 4 * sum(p.numel() for p in model.parameters()) * 201 * (2 if dtype == torch.float64 else 1)
    parameters = dict(model.named_parameters())
    replays = [list(traj)]
    if where is not None:
        traj = Trajectory(where)
        replays.append([traj[t] for t in range(201)])
        for a, b in zip(*replays, strict=True):
            equal(a, b)
    rounded = 0
    for state, wanted in zip(replays[-1], states, strict=True):
        for name, value in wanted.items():
            error = (state[name].double() - value.double()).norm()
            if name in parameters:
                assert error <= 1e-5 * (value.double() - states[0][name].double()).norm(), name
                rounded += error > 0
            else:
                assert error == 0, name
            assert state[name].dtype == value.dtype
    assert rounded > 100
    if where is None:
        assert traj.nbytes < exact


def test_bf16_errors_do_not_add_up():
    """Steps that bfloat16 cannot hold: without feedback every one would lose the same share."""
    layer, traj = nn.Linear(1, 1, bias=False), Trajectory(deltas="bf16", tolerance=1e-2)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        traj.record(layer)
        for _ in range(200):
            layer.weight.add_(1.0 + 2.0**-9)
            traj.record(layer)
    keys = [set(traj._store.keys(t)) for t in range(1, 201)]
    assert all(found == {"delta/weight"} for found in keys)
    total = float(layer.weight.detach())
    assert abs(float(traj[200]["weight"]) - total) <= 2.0**-8
    weights = torch.stack([state["weight"] for state in traj]).flatten().double()
    assert torch.equal(traj.update_norms(), weights.diff().abs())


def test_each_file_is_read_once_and_unneeded_ones_never(tmp_path, monkeypatch):
    recorded(tmp_path / "run", n=6)
    traj, reads = Trajectory(tmp_path / "run"), []
    read = folder.Folder.read
    monkeypatch.setattr(folder.Folder, "read", lambda self, t: reads.append(t) or read(self, t))
    list(traj)
    assert reads == list(range(7))
    reads.clear()
    traj[5]
    assert reads == [5]
    reads.clear()
    list(traj.states([2, 6]))
    assert reads == [2, 6]


def test_bf16_reads_what_a_state_needs_once(tmp_path, monkeypatch):
    recorded(tmp_path / "run", n=30, deltas="bf16", tolerance=1e-2)
    traj, reads = Trajectory(tmp_path / "run"), []
    read = folder.Folder.read
    monkeypatch.setattr(folder.Folder, "read", lambda self, t: reads.append(t) or read(self, t))
    wanted = traj[25]
    assert reads == sorted(set(reads)) and reads[-1] == 25
    reads.clear()
    _, state = traj.states([3, 25])
    equal(state, wanted)
    assert reads == sorted(set(reads))


def test_update_norms_and_selection():
    traj, states, model = recorded(None, n=12)
    names = [name for name, _ in model.named_parameters()]
    for layer, chosen in ((None, names), ("0", ["0.weight", "0.bias"]), ("0.weight", ["0.weight"])):
        norms = [
            sum(float((b[n].double() - a[n].double()).square().sum()) for n in chosen) ** 0.5
            for a, b in zip(states, states[1:], strict=False)
        ]
        torch.testing.assert_close(traj.update_norms(layer), torch.tensor(norms, dtype=torch.float64))
        along = [sum(norms[:t]) for t in range(13)]
        goals = [along[-1] * k / 5 for k in range(6)]
        nearest = sorted({min(range(13), key=lambda t: abs(along[t] - goal)) for goal in goals})
        assert traj.select("update_norm", n_steps=5, layer=layer) == nearest
    assert traj.select("endpoints") == [0, 12] and traj.select("all") == list(range(13))
    assert traj.select("uniform", n_steps=4) == [0, 3, 6, 9, 12]
    assert traj.select("uniform", n_steps=40) == list(range(13))
    assert traj.select([0, 4, -1]) == [0, 4, 12]
    assert traj.steps == list(range(13))


def test_arc_length_counts_only_the_layer_asked_for():
    model, traj = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), Trajectory()
    traj.record(model)
    for first, second in ((10.0, 0.0), (0.1, 5.0), (0.1, 5.0), (10.0, 0.0)):
        with torch.no_grad():
            model[0].weight[0, 0] += first
            model[1].weight[0, 0] += second
        traj.record(model)
    assert traj.select("update_norm", n_steps=2, layer="0") == [0, 2, 4]
    assert traj.select("update_norm", n_steps=3, layer="0") == [0, 1, 3, 4]
    assert traj.select("update_norm", n_steps=2, layer="1.weight") == [0, 2, 4]


def test_weights_that_are_not_finite(where):
    traj, states, model = recorded(where, n=2)
    for value in (torch.nan, torch.inf):
        broken = mlp()
        broken.load_state_dict(model.state_dict())
        with torch.no_grad():
            broken[3].weight[2, 15] = value
        with pytest.raises(ValueError, match=rf"{value} in 3\.weight at \[2, 15\] \(1 such"):
            traj.record(broken)
        with pytest.raises(ValueError, match=r"in 3\.weight"):
            Trajectory().record(broken)
    broken.load_state_dict(model.state_dict())
    broken[2].running_var[3] = torch.nan
    with pytest.raises(ValueError, match=r"2\.running_var at \[3\]"):
        traj.record(broken)
    assert len(traj) == 3
    traj.record(model)
    equal(traj[3], states[2])


@pytest.mark.parametrize("other, said", [
    (lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4)), "3.weight"),
    (lambda: nn.Linear(20, 3), "became nothing"),
    (lambda: mlp(dtype=torch.float64), r"float32 \[16, 20\]\) became 0.weight \(parameter float64"),
])  # fmt: skip
def test_another_architecture(where, other, said):
    traj, states, model = recorded(where, n=1)
    for opened in (traj, Trajectory(where)) if where else (traj,):
        with pytest.raises(ValueError, match=rf"architecture and dtypes recorded before, but .*{said}"):
            opened.record(other())
    traj.record(model)
    equal(traj[2], states[1])


def test_untying_is_another_architecture():
    model, traj = Odd(), Trajectory()
    traj.record(model)
    model.again.weight = nn.Parameter(model.out.weight.detach().clone())
    with pytest.raises(ValueError, match="tied to out.weight.* became again.weight"):
        traj.record(model)


def test_going_on(tmp_path):
    _, states, model = recorded(tmp_path / "run", n=3)
    traj = Trajectory(tmp_path / "run")
    assert traj.steps == [0, 1, 2, 3]
    model.load_state_dict(traj[-1])
    assert traj.record(model) == 3 and len(traj) == 4  # it is there already
    for _ in train(model, 1):
        assert traj.record(model) == 4
    states.append(copy(model))
    again = Trajectory(tmp_path / "run")  # and without a record of where it stood
    for _ in train(model, 1):
        assert again.record(model) == 5
    for state, wanted in zip(Trajectory(tmp_path / "run"), [*states, copy(model)], strict=True):
        equal(state, wanted)


def test_bf16_goes_on_from_the_replayed_state(tmp_path):
    settings = dict(deltas="bf16", tolerance=1e-2)
    for name in ("whole", "parts"):
        model, traj = mlp(), Trajectory(tmp_path / name, **settings)
        traj.record(model)
        for i, _ in enumerate(train(model, 60)):
            if i == 40 and name == "parts":
                traj = Trajectory(tmp_path / name)
            traj.record(model)
    for a, b in zip(Trajectory(tmp_path / "whole"), Trajectory(tmp_path / "parts"), strict=True):
        equal(a, b)


def test_another_run_in_the_directory(tmp_path):
    recorded(tmp_path / "run", n=5)
    for seed in (0, 1, 2, 3):  # the same start again, and other starts
        with pytest.raises(TrajectoryError, match="does not seem to continue"):
            Trajectory(tmp_path / "run").record(mlp(seed))
    assert len(Trajectory(tmp_path / "run")) == 6
    only_start = Trajectory(tmp_path / "start")
    only_start.record(mlp(0))
    assert Trajectory(tmp_path / "start").record(mlp(0)) == 0
    with pytest.raises(TrajectoryError, match="does not seem to continue"):
        Trajectory(tmp_path / "start").record(mlp(1))
    assert Trajectory(tmp_path / "start", check_run=False).record(mlp(1)) == 1


def test_the_run_is_told_apart_by_what_it_is_said_to_be(tmp_path):
    recorded(tmp_path / "run", n=1, run={"seed": 0, "lr": (1, 2)}, deltas="bf16")
    assert len(Trajectory(tmp_path / "run", run={"lr": [1, 2], "seed": 0})) == 2
    with pytest.raises(TrajectoryError, match=r"holds another run, \{'seed': 0.*got \{'seed': 1"):
        Trajectory(tmp_path / "run", run={"seed": 1})
    with pytest.raises(TrajectoryError, match="begun with deltas='bf16', got 'exact'"):
        Trajectory(tmp_path / "run", deltas="exact")


def test_truncate(where):
    traj, states, model = recorded(where, n=5)
    traj.truncate(3)
    if where is not None:
        traj = Trajectory(where)
    model.load_state_dict(traj[-1])
    assert traj.record(model) == 2 and len(traj) == 3
    for _ in train(model, 1):
        traj.record(model)
    assert len(traj) == 4
    for state, wanted in zip(traj, [*states[:3], copy(model)], strict=True):
        equal(state, wanted)
    for length in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match="length must lie in 1..4"):
            traj.truncate(length)


def name(t):
    return f"records/{t:06d}.safetensors"


def swap(run, a, b):
    os.rename(run / name(a), run / "aside")
    os.rename(run / name(b), run / name(a))
    os.rename(run / "aside", run / name(b))


def shift(run):
    """The second checkpoint is lost, and those after it moved down."""
    for t in (2, 3, 4):
        os.rename(run / name(t), run / name(t - 1))
    (run / "head.json").unlink()


def foreign(run):
    other = run.parent / "other"
    model, traj = mlp(5), Trajectory(other)
    traj.record(model)
    for _ in train(model, 4):
        traj.record(model)
    shutil.copy(other / name(2), run / name(2))


def cut(run, t):
    (run / name(t)).write_bytes((run / name(t)).read_bytes()[:-7])


BROKEN = {
    "a lost middle": (lambda run: (run / name(2)).unlink(), "000002.safetensors is missing"),
    "a lost start": (lambda run: (run / name(0)).unlink(), "000000.safetensors is missing"),
    "a lost end": (lambda run: (run / name(4)).unlink(), "must hold 5 checkpoints, but the last 1 are missing"),
    "all lost": (lambda run: shutil.rmtree(run / "records"), "the last 5 are missing"),
    "two swapped": (lambda run: swap(run, 2, 3), "000002.safetensors is checkpoint 3"),
    "moved down": (shift, "000001.safetensors is checkpoint 2"),
    "one of another run": (foreign, "000002.safetensors comes from another run"),
    "a cut file": (lambda run: cut(run, 3), r"000003.safetensors is corrupt.*keep the first 3"),
    "no manifest": (lambda run: (run / "manifest.json").unlink(), "without the manifest"),
    "a broken manifest": (lambda run: (run / "manifest.json").write_text("{"), "cannot read"),
    "another manifest": (
        lambda run: (run / "manifest.json").write_text((run / "manifest.json").read_text().replace("1e-05", "1e-04")),
        "000000.safetensors comes from another run",
    ),
    "something else": (lambda run: (run / "manifest.json").write_text('{"format": 1}'), "holds something else"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(tmp_path, case):
    run = tmp_path / "run"
    recorded(run)
    breaks, said = BROKEN[case]
    breaks(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(TrajectoryError, match=said):
        Trajectory(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_flipped_bit_is_noticed_where_it_is_read(tmp_path):
    _, states, _ = recorded(tmp_path / "run")
    path = tmp_path / "run" / name(2)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    traj = Trajectory(tmp_path / "run")
    equal(traj[1], states[1])
    with pytest.raises(TrajectoryError, match="000002.safetensors is corrupt .its checksum differs"):
        traj[2]


def test_what_the_messages_advise_helps(tmp_path):
    _, states, _ = recorded(tmp_path / "run")
    for t in (2, 3, 4):
        (tmp_path / "run" / name(t)).unlink()
    (tmp_path / "run" / "head.json").unlink()
    for state, wanted in zip(Trajectory(tmp_path / "run"), states[:2], strict=True):
        equal(state, wanted)


KILLED = """
import sys, torch, xaifast
layer = torch.nn.Linear(300, 300, bias=False)
traj = xaifast.Trajectory(sys.argv[1])
for t in range(10**6):
    with torch.no_grad():
        layer.weight.fill_(1 + t / 64)
    traj.record(layer, step=t)
    print(t, flush=True)
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_kill(tmp_path, after):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    traj = Trajectory(run)
    assert len(said) <= len(traj) <= len(said) + 1 and traj.steps == list(range(len(traj)))
    for t, state in enumerate(traj):
        assert torch.equal(state["weight"], torch.full((300, 300), 1 + t / 64))
    (run / "records" / ".000099.safetensors.1.tmp").write_bytes(b"half")  # of a kill while writing
    layer, n = nn.Linear(300, 300, bias=False), len(traj)
    layer.load_state_dict(traj[-1])
    with torch.no_grad():
        layer.weight.add_(1 / 64)
    assert traj.record(layer) == n
    assert torch.equal(Trajectory(run)[n]["weight"], layer.weight)
    assert sorted(os.listdir(run / "records")) == [f"{t:06d}.safetensors" for t in range(n + 1)]


def test_a_kill_before_the_first_checkpoint(tmp_path):
    traj = Trajectory(tmp_path / "run")
    traj._store.begin({"tensors": [], "deltas": "exact", "tolerance": 1e-5, "run": None})
    traj = Trajectory(tmp_path / "run")
    assert len(traj) == 0
    traj.record(mlp())
    equal(Trajectory(tmp_path / "run")[0], copy(mlp()))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    traj, states, model = recorded(tmp_path / "run", n=2)
    for _ in train(model, 1):
        pass
    with monkeypatch.context() as patch:

        def full(number):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(TrajectoryError, match="No space left on device; the 3 checkpoints before are kept: free"):
            traj.record(model)
    assert len(traj) == 3 and len(os.listdir(tmp_path / "run" / "records")) == 3
    assert traj.record(model) == 3
    for state, wanted in zip(Trajectory(tmp_path / "run"), [*states, copy(model)], strict=True):
        equal(state, wanted)


def test_two_writers_do_not_mix(tmp_path):
    traj, states, model = recorded(tmp_path / "run", n=2)
    late = Trajectory(tmp_path / "run")
    other = mlp()
    other.load_state_dict(model.state_dict())
    for _ in train(model, 1, seed=7):
        traj.record(model)
    for _ in train(other, 1, seed=8):
        with pytest.raises(TrajectoryError, match="another process or Trajectory has recorded"):
            late.record(other)
    for state, wanted in zip(Trajectory(tmp_path / "run"), [*states, copy(model)], strict=True):
        equal(state, wanted)
    first, second = Trajectory(tmp_path / "new"), Trajectory(tmp_path / "new")
    first.record(mlp())
    with pytest.raises(TrajectoryError, match="another process or Trajectory has recorded"):
        second.record(nn.Linear(2, 2))
    equal(Trajectory(tmp_path / "new")[0], copy(mlp()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_looked_through(wrap):
    model, traj = mlp(), Trajectory()
    traj.record(wrap(model))
    traj.record(model)
    equal(traj[0], copy(model))


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.parametrize("call, kind, said", [
    (lambda: Trajectory().record({"weight": torch.ones(2)}), TypeError, "must be an nn.Module, got dict"),
    (lambda: Trajectory().record(nn.ReLU()), ValueError, "must have parameters or buffers"),
    (lambda: Trajectory().record(Extra(2, 2)), TypeError, "dense tensors, got dict for _extra_state"),
    (lambda: Trajectory().record(nn.Linear(2, 2, device="meta")), TypeError, "on meta for weight"),
    (lambda: Trajectory().record(nn.Linear(2, 2), step=-1), ValueError, "step must be an int of at least 0"),
    (lambda: Trajectory(deltas="fp16"), ValueError, 'deltas must be "exact" or "bf16"'),
    (lambda: Trajectory(tolerance=0), ValueError, "tolerance must lie between 0 and 1"),
    (lambda: Trajectory(run={1, 2}), TypeError, "run must be JSON"),
    (lambda: Trajectory()[0], IndexError, "numbers must lie in 0..-1"),
    (lambda: recorded(None, 1)[0][2], IndexError, "numbers must lie in 0..1, got 2"),
    (lambda: recorded(None, 1)[0].states([1, 0]), ValueError, r"strictly ascending, got \[1, 0\]"),
    (lambda: recorded(None, 1)[0].states([1, -1]), ValueError, "strictly ascending"),
    (lambda: Trajectory().select("uniform"), ValueError, "two checkpoints, got 0"),
    (lambda: recorded(None, 1)[0].select("best"), ValueError, "or a list, got 'best'"),
    (lambda: recorded(None, 1)[0].select([1]), ValueError, "two or more"),
    (lambda: recorded(None, 1)[0].select("uniform", n_steps=0), ValueError, "n_steps must be"),
    (lambda: recorded(None, 1)[0].update_norms("1"), ValueError, "must name a parameter or a module"),
])  # fmt: skip
def test_bad_input(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="must be a directory, got a file"):
        Trajectory(tmp_path / "file")


def test_opening_writes_nothing(tmp_path):
    assert len(xaifast.Trajectory(tmp_path / "run")) == 0 and not (tmp_path / "run").exists()


def test_the_manifest_says_what_the_tensors_are(tmp_path):
    recorded(tmp_path / "run", n=1)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["tensors"][0] == ["0.weight", "float32", [16, 20], True, None]
    assert ["2.num_batches_tracked", "int64", [], False, None] in manifest["tensors"]
