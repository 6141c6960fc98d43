"""The command `xaifast train`, called as a function: what is trained, recorded, saved and refused."""

import re
import shlex
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F

import xaifast
from xaifast.cli import main
from xaifast.cli.train_job import Settings, accuracy, split, train_recorded
from xaifast.data import open_data
from xaifast.models import MLP, load_model


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own; returns exit status, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, data="digits"):
        status = main(["train", "mlp", "--data", data, "--hidden", "16", *map(str, arguments)])
        said = capsys.readouterr()
        return namedtuple("Said", "status out err")(status, said.out, said.err)

    return run


def test_a_network_is_trained_recorded_and_saved(train):
    said = train("--record", "run", "--epochs", 12, "--lr", "0.01")
    assert said.status == 0, said.err
    traj, loaded = xaifast.Trajectory("run"), load_model("xaifast:run/model")
    assert len(traj) == 13 and traj.steps == [22 * epoch for epoch in range(13)]
    last = loaded.forward.state_dict()
    assert all(torch.equal(traj[-1][name], value) for name, value in last.items())
    assert not torch.equal(traj[0]["layers.0.weight"], traj[1]["layers.0.weight"])
    assert loaded.class_names == list("0123456789") and loaded.forward.config["hidden"] == [16]
    data = open_data("digits")
    x = torch.stack(data.load(range(len(data))).items)
    kept, held_out = split(data.labels, 0.25, 0, "test")
    right = (loaded.forward(x).argmax(1) == data.labels).float()
    assert f"accuracy: {right[kept].mean():.1%}, held out {right[held_out].mean():.1%}" in said.out
    assert right[held_out].mean() > 0.85
    for fact in ("1,352 inputs to learn from, 445 held out", "64 - 16 - 10", "13 checkpoints", "--trajectory run"):
        assert fact in said.out


def test_the_seed_decides(train):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train("--record", name, "--epochs", 1, "--seed", seed, "--quiet").status == 0
    first, same, other = (xaifast.Trajectory(name)[-1]["layers.0.weight"] for name in "abc")
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_checkpoints_after_steps(train):
    assert train("--record", "run", "--epochs", 1, "--every", 5, "--out", "model", "--optimizer", "sgd").status == 0
    assert xaifast.Trajectory("run").steps == [0, 5, 10, 15, 20, 22]
    assert load_model("xaifast:model").forward.config["in_features"] == 64


def test_what_is_there_is_never_written_over(train, tmp_path):
    assert train("--record", "run", "--epochs", 1).status == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    same = train("--record", "run", "--epochs", 1)
    assert same.status == 2 and "holds a model already" in same.err
    again = train("--record", "run", "--epochs", 1, "--out", "other")
    assert again.status == 2 and "2 checkpoints of an earlier training" in again.err
    elsewhere = train("--record", "run", "--epochs", 1, "--seed", 1, "--out", "other")
    assert elsewhere.status == 2 and "another run" in elsewhere.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_table(train, tmp_path):
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(200, 3)), columns=["a", "b", "c"])
    frame["kind"] = np.where(frame.b > 0, "up", "down")
    frame.to_csv("t.csv", index=False)
    said = train("--record", "run", "--label", "kind", "--epochs", 40, "--lr", "0.02", data="csv:t.csv")
    assert said.status == 0, said.err
    loaded = load_model("xaifast:run/model")
    assert loaded.class_names == ["down", "up"]
    assert loaded.forward(torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0]])).argmax(1).tolist() == [1, 0]
    frame.assign(a=1e4 * frame.a).to_csv("wide.csv", index=False)
    assert "differ in size" in train("--record", "r2", "--label", "kind", "--epochs", 1, data="csv:wide.csv").err


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("csv:t.csv", [], "--label"),
        ("npz:pictures.npz", [], "got images"),
        ("digits", ["--test-share", "1"], "at least 0 and less than 1"),
        ("digits", ["--lr", "1e30", "--optimizer", "sgd"], "finite"),
    ],
)
def test_what_cannot_be_trained(train, data, arguments, message):
    pandas.DataFrame({"a": [1.0, 2.0], "b": [0, 1]}).to_csv("t.csv", index=False)
    np.savez("pictures.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4))
    said = train("--record", "run", "--epochs", 2, *arguments, data=data)
    assert said.status == 2 and message in said.err


@pytest.mark.slow
def test_the_commands_of_the_document(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "train.md").read_text()
    commands = re.search(r"^```\n(.*?)^```", text, flags=re.M | re.S)[1].splitlines()
    assert [line.split()[1] for line in commands] == ["train", "explain", "evaluate"]
    monkeypatch.chdir(tmp_path)
    for line in commands:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0
    assert (tmp_path / "runs" / "noise-xtrain" / "report.html").exists()


def test_split_holds_out_a_share_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 21 + [2] * 3)
    kept, held_out = split(labels, 0.25, 7, "test")
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(64))
    assert labels[held_out].bincount(minlength=3).tolist() == [10, 5, 0]
    assert not torch.equal(split(labels, 0.25, 8, "test")[1], held_out)
    assert len(split(labels, 0.0, 7, "test")[1]) == 0


def test_steps_are_those_of_gradient_descent_on_shuffled_batches():
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    model = MLP(4, 3, (5,))
    by_hand = MLP(4, 3, (5,))
    by_hand.load_state_dict(model.state_dict())
    settings = Settings(epochs=2, optimizer="sgd", lr=0.3, batch_size=4, test_share=0.0, seed=5, every=1)
    traj = xaifast.Trajectory()
    train_recorded(model, traj, x, y, settings)
    draw, states = torch.Generator().manual_seed(5), [traj[0]]
    for _ in range(2):
        for rows in torch.randperm(10, generator=draw).split(4):
            gradients = torch.autograd.grad(F.cross_entropy(by_hand(x[rows]), y[rows]), list(by_hand.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                    parameter -= 0.3 * gradient
            states.append({name: value.clone() for name, value in by_hand.state_dict().items()})
    assert len(traj) == 7 and not model.training
    for ours, expected in zip(traj, states, strict=True):
        for name in expected:
            assert torch.allclose(ours[name], expected[name], atol=1e-6), name
    assert accuracy(model, x, y) == (by_hand(x).argmax(1) == y).float().mean()
