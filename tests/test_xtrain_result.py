"""`xaifast.xtrain` as a user meets it: other architectures, precision, messages, the result and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import xaifast
from xaifast.models import VisionTransformer


def recorded(net, n=3, scale=0.05, **options):
    """A run of random steps."""
    net, traj = net.eval(), xaifast.Trajectory(**options)
    traj.record(net)
    for _ in range(n):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += scale * torch.randn_like(parameter)
        traj.record(net)
    return traj


def mlp(n_inputs=6):
    return nn.Sequential(nn.Linear(n_inputs, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    layers = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    return nn.Sequential(*layers), torch.randn(3, 2, 6, 6), xaifast.grid_mask((6, 6), 2)


def vit():
    return VisionTransformer(8, 4, 4, dim=16, depth=1, heads=2), torch.randn(3, 3, 8, 8), xaifast.grid_mask((8, 8), 4)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 5), nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(20, 4))

    def forward(self, tokens):
        return self.head(self.table(tokens))


def bag():
    return Bag(), torch.randint(9, (3, 4)), None


@pytest.mark.parametrize("made", [cnn, vit, bag])
def test_other_architectures_add_up_their_updates(made):
    net, x, mask = made()
    net = net.double()
    x = x.double() if x.is_floating_point() else x
    traj, y = recorded(net), torch.tensor([0, 3, 1])
    result = xaifast.xtrain(net, traj, x, target=y, feature_mask=mask, per_step=True)
    for t in range(3):
        step = xaifast.occlude_update(net, traj[t], traj[t + 1], x, target=y, feature_mask=mask, precision="float64")
        assert step.abs().max() > 1e-4
        assert (result.per_step[t] - step).abs().max() <= 1e-12
    assert (result.values - result.per_step.sum(0)).abs().max() <= 1e-12
    assert result.values.dtype == torch.float64 and result.expand().shape == x.shape


def test_dtypes_and_precision():
    net, x = mlp(), torch.randn(5, 6)
    traj = recorded(net)
    single, double = (xaifast.xtrain(net, traj, x, target=1, precision=p) for p in (None, "float64"))
    assert single.values.dtype == single.residual.dtype == torch.float32 and double.values.dtype == torch.float64
    assert (single.values - double.values).abs().max() <= 1e-6 * double.values.abs().max()
    assert xaifast.xtrain(net, traj, x.double(), target=1).values.dtype == torch.float64
    assert xaifast.xtrain(net.double(), recorded(net), x, target=1, per_step=True).per_step.dtype == torch.float64


def test_verify_reports_the_error_of_a_sample():
    net, x = mlp(), torch.randn(9, 6)
    traj, y = recorded(net), torch.tensor([0, 2, 1] * 3)
    exact = xaifast.xtrain(net, traj, x, target=y, precision="float64").values
    rows = torch.tensor([0, 3, 6])
    for precision, low, high in (("float32", 0, 1e-6), ("bf16", 1e-5, 2e-2)):
        result = xaifast.xtrain(net, traj, x, target=y, precision=precision, verify=True)
        expected = (result.values[rows] - exact[rows]).abs().max() / exact[rows].abs().max()
        assert low < result.error <= high
        assert result.error == pytest.approx(float(expected), rel=0.05, abs=1e-7)
        assert "relative error" in repr(result)


def test_target_is_predicted_by_the_last_checkpoint_used():
    net, x = mlp(), torch.randn(20, 6)
    traj = recorded(net, scale=0.3)
    found = {}
    for last in (1, 3):
        net.load_state_dict(traj[last])
        with torch.no_grad():
            found[last] = net(x).argmax(1)
    assert not torch.equal(found[1], found[3])
    assert torch.equal(xaifast.xtrain(net, traj, x, target="predicted").target, found[3])
    coarse = dict(variant="xstep", checkpoints=[0, 1])
    result = xaifast.xtrain(net, traj, x, target="predicted", **coarse)
    assert torch.equal(result.target, found[1])
    assert torch.equal(result.values, xaifast.xtrain(net, traj, x, target=found[1], **coarse).values)


def test_the_model_is_left_alone():
    net, x = mlp(), torch.randn(2, 6, requires_grad=True)
    traj = recorded(net)
    with torch.no_grad():
        net[0].weight.zero_()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ready = [parameter.requires_grad for parameter in net.parameters()]
    result = xaifast.xtrain(net, traj, x, target=0, mode="linear")
    assert not result.values.requires_grad and (result.values != 0).any()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [parameter.requires_grad for parameter in net.parameters()] == ready


def test_rounded_trajectories_explain_the_replayed_run():
    net, x = mlp(), torch.randn(2, 6)
    torch.manual_seed(3)
    traj = recorded(net, 5, deltas="bf16")
    copy = xaifast.Trajectory()
    for state in traj:
        net.load_state_dict(state)
        copy.record(net)
    assert torch.equal(*(xaifast.xtrain(net, run, x, target=0).values for run in (traj, copy)))


BAD = {
    "variant": (dict(variant="xtrain*"), ValueError, "variant must be one of"),
    "direction": (dict(direction="both"), ValueError, "direction must be one of"),
    "context": (dict(context="middle"), ValueError, "context must be one of"),
    "gate": (dict(variant="xtrain+", gate="all"), ValueError, "gate must be one of"),
    "a gate without xtrain+": (dict(gate="step_feature"), ValueError, "gate belongs to"),
    "mode": (dict(mode="quick"), ValueError, "mode must be one of"),
    "no target": (dict(target=None), ValueError, "target must be an int"),
    "target out of range": (dict(target=3), ValueError, "target"),
    "negative target": (dict(target=-1), ValueError, "target"),
    "targets of another batch": (dict(target=torch.zeros(3, dtype=torch.long)), ValueError, "target"),
    "target by another name": (dict(target="likely"), ValueError, "target"),
    "checkpoints of xtrain": (dict(checkpoints="endpoints"), ValueError, "adds up all steps"),
    "unknown checkpoints": (dict(variant="xstep", checkpoints="some"), ValueError, "checkpoints must be"),
    "checkpoints out of order": (dict(variant="xstep", checkpoints=[2, 1]), ValueError, "ascending"),
    "checkpoints that are not there": (dict(variant="xstep", checkpoints=[0, 9]), IndexError, "0..3"),
    "no class updates": (dict(variant="xtrain+", gate="class_update"), ValueError, "got none for step 0"),
    "mask of another size": (dict(feature_mask=torch.arange(5)), ValueError, "feature_mask must be broadcastable"),
    "mask with a gap": (dict(feature_mask=torch.tensor([0, 0, 2, 2, 3, 3])), ValueError, "id 1"),
    "batch size": (dict(batch_size=0), ValueError, "batch_size"),
    "precision": (dict(precision="float16"), ValueError, "precision"),
    "no such layer": (dict(first_layer="embedding"), ValueError, "first_layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    net, x = mlp(), torch.randn(2, 6)
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        xaifast.xtrain(net, recorded(net), x, **{"target": 0, **options})


def test_bad_runs_and_inputs():
    net, x = mlp(), torch.randn(2, 6)
    traj, other = recorded(net), recorded(mlp(7))
    with pytest.raises(TypeError, match=r"xtrain: traj must be an xaifast\.Trajectory, got list"):
        xaifast.xtrain(net, list(traj), x, target=0)
    with pytest.raises(TypeError, match=r"xtrain: model must be an nn\.Module"):
        xaifast.xtrain(lambda rows: net(rows), traj, x, target=0)
    for n in (0, 1):
        short = xaifast.Trajectory() if n == 0 else recorded(net, 0)
        with pytest.raises(ValueError, match=f"traj must hold two checkpoints or more, got {n}"):
            xaifast.xtrain(net, short, x, target=0)
    with pytest.raises(ValueError, match=r"0\.weight.*\(16, 7\)"):
        xaifast.xtrain(net, other, x, target=0)
    deeper = nn.Sequential(*mlp(), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"6\.(weight|bias)"):
        xaifast.xtrain(net, recorded(deeper), x, target=0)
    x[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"xtrain: inputs must be finite"):
        xaifast.xtrain(net, traj, x, target=0)


def test_formed_and_repr():
    net, x = mlp(), torch.randn(4, 6)
    traj = recorded(net, 4, scale=0.2)
    result = xaifast.xtrain(net, traj, x, target=0, variant="xtrain+", gate="step_feature", per_step=True)
    formed = result.formed()
    assert formed.shape == (4, 4, 6) and (formed.diff(dim=0) >= 0).all()
    assert torch.allclose(formed[-1], result.values, rtol=1e-6, atol=0)
    assert (result.per_step < 0).any() and not result.gates.all()
    share = f"{float(result.gates.double().mean()):.0%}"
    assert repr(result).startswith("XtrainResult(xtrain+: 4 inputs, 6 players; 4 steps, gates open " + share)
    with pytest.raises(ValueError, match="per_step=True"):
        xaifast.xtrain(net, traj, x, target=0).formed()


def axes_of(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def test_plot_of_images():
    pytest.importorskip("matplotlib")
    net, x, mask = cnn()
    traj = recorded(net, 9)
    result = xaifast.xtrain(net, traj, x, target=0, feature_mask=mask, per_step=True)
    figure = result.plot([2, 0], max_checkpoints=3)
    panels = axes_of(figure)
    assert len(panels) == 6
    assert [axis.get_title() for axis in panels[:3]] == ["checkpoint 1", "checkpoint 5", "checkpoint 9"]
    assert [panels[i].get_ylabel() for i in (0, 3)] == ["input 2, output 0", "input 0, output 0"]
    from xaifast import figures

    maps = torch.stack([result.formed()[s, b][mask] for b in (2, 0) for s in (0, 4, 8)])
    limit = figures.signed_limit(maps)
    for axis, expected in zip(panels, maps, strict=True):
        assert (axis.images[0].get_array() == figures.signed_rgba(expected, limit)).all()
    assert len(axes_of(xaifast.xtrain(net, traj, x, target=0, feature_mask=mask).plot(1))) == 1


def test_plot_of_tables():
    pytest.importorskip("matplotlib")
    net, x = mlp(8), torch.randn(3, 8)
    result = xaifast.xtrain(net, recorded(net, 4), x, target=0, per_step=True, variant="xstep", checkpoints=[1, 2, 4])
    figure = result.plot(names=[f"column {c}" for c in "abcdefgh"])
    panels = [axis for axis in figure.axes if axis.axison]
    assert len(panels) == 3
    for b, axis in enumerate(panels):
        lines = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert len(lines) == 8 and all(list(line.get_xdata()) == [1, 2, 4] for line in lines)
        paths = torch.cat((torch.zeros(1, 8), result.formed()[:, b]))
        drawn = torch.tensor([line.get_ydata().tolist() for line in lines], dtype=paths.dtype)
        order = paths.abs().amax(0).argsort(descending=True)
        assert torch.allclose(drawn[2:], paths.T[order[:6]])
        named = [text.get_text().partition(" =")[0] for text in axis.texts]
        assert named == [f"column {'abcdefgh'[i]}" for i in order[:6].tolist()]
    with pytest.raises(ValueError, match="one name a player"):
        result.plot(names=["a"])
    with pytest.raises(IndexError, match=r"inputs 0\.\.2"):
        result.plot(3)


def test_progress_counts_inputs_at_checkpoints(capsys):
    net, x = mlp(), torch.randn(3, 6)
    xaifast.xtrain(net, recorded(net), x, target=0, show_progress=True)
    assert "12.0/12.0" in capsys.readouterr().err
    xaifast.xtrain(net, recorded(net), x, target=0)
    assert capsys.readouterr().err == ""


def test_the_example_of_the_documentation_runs():
    pytest.importorskip("sklearn")
    text = (Path(__file__).parents[1] / "docs" / "xtrain.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    names = {}
    exec(code, names)
    result = names["result"]
    (said,) = re.findall(r"^result +# (.*?)\.\.\.\)", code, flags=re.M)
    assert repr(result).startswith(said)
    assert list(result.values.shape) == [16, 784] and list(result.formed().shape)[1:] == [16, 784]
    learned = result.logits[-1] - result.logits[0]
    assert (learned > 0).float().mean() > 0.8
    score = xaifast.metrics.clean_score(result.expand(), names["signal"][:16])
    assert score.shape == (16,) and (score > 0).all()
