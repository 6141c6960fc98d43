"""Other tools' conventions: their published formulas written out again, and Quantus itself where it is installed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from games import IntegerNet, integers
from torch import nn

from xaifast import insertion_deletion
from xaifast.metrics.curve_conventions import CONVENTIONS, OURS

CURVE = [0.9, 0.7, 0.4, 0.2, 0.1, 0.05]
PARTIAL = [0.9, 0.4, 0.1, 0.05]


def test_areas_by_hand():
    curve, fractions = torch.tensor([CURVE]), torch.linspace(0, 1, 6)
    for name in ("rise", "torchcam", "xplique"):
        assert CONVENTIONS[name].area(curve, fractions).item() == pytest.approx(0.375, abs=1e-7)
    assert OURS.area(curve, fractions).item() == pytest.approx(0.375, abs=1e-7)
    assert CONVENTIONS["quantus"].area(curve[:, 1:], fractions[1:]).item() == pytest.approx(1.075, abs=1e-7)
    curve, fractions = torch.tensor([PARTIAL]), torch.tensor([0, 0.4, 0.8, 1.0])
    assert CONVENTIONS["rise"].area(curve, fractions).item() == pytest.approx(0.325, abs=1e-7)
    for convention in (OURS, CONVENTIONS["torchcam"]):
        assert convention.area(curve, fractions).item() == pytest.approx(0.375, abs=1e-7)


def test_partial_last_step_through_a_model():
    x = torch.tensor([[0.5, 0.0, 0.3, 0.0, 0.05]])

    def forward(rows):
        return rows.sum(1) + 0.05 * (rows.abs().sum(1) >= 0)  # 0.9, 0.4, 0.1, 0.05

    settings = dict(target=None, score="logit", steps=3)
    maps = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    for name, area in (("rise", 0.325), ("torchcam", 0.375)):
        curves = insertion_deletion(forward, x, maps, compat=name, insertion_baseline=0.0, **settings)
        torch.testing.assert_close(curves.fractions, torch.tensor([0, 0.4, 0.8, 1.0]))
        torch.testing.assert_close(curves.deletion, torch.tensor([PARTIAL]))
        assert curves.deletion_auc.item() == pytest.approx(area, abs=1e-6)


def ordered(tool, values):
    """Indices in the order of perturbation, ties as the tool has them where its sort is stable."""
    if tool in ("rise", "xplique"):
        return np.flip(np.argsort(values, kind="stable"))
    return np.argsort(-values, kind="stable")


def points(tool, n, steps):
    step = math.ceil(n / steps)
    if tool == "xplique":
        return [int(k) for k in np.linspace(0, n, steps + 1)]
    return [min(i * step, n) for i in range(math.ceil(n / step) + 1)]


def area(tool, scores, counts):
    if tool == "torchcam":
        return np.trapezoid(scores, np.array(counts) / counts[-1])
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


@pytest.mark.parametrize("tool", ["rise", "torchcam", "xplique"])
@pytest.mark.parametrize("steps", [1, 4, 7, 30])
def test_formulas_of_pixel_tools(tool, steps):
    x, maps, net = integers(3, 2, 5, 6), integers(3, 5, 6, seed=1), IntegerNet(60)
    bases = integers(3, 2, 5, 6, seed=2), integers(2, 5, 6, seed=3)
    curves = insertion_deletion(
        net, x, maps, target=1, score="logit", steps=steps, compat=tool, insertion_baseline=bases[0],
        deletion_baseline=bases[1],
    )  # fmt: skip
    counts = points(tool, 30, steps)
    assert curves.fractions.tolist() == [k / 30 for k in counts] and curves.compat == tool
    for b in range(3):
        order = torch.from_numpy(ordered(tool, maps[b].flatten().numpy()).copy())
        for got, whole, start, end in (
            (curves.insertion, curves.insertion_auc, bases[0][b], x[b]),
            (curves.deletion, curves.deletion_auc, x[b], bases[1]),
        ):
            scores = []
            for k in counts:
                row = start.clone().flatten(1)
                row[:, order[:k]] = end.flatten(1)[:, order[:k]]
                scores.append(net(row[None])[0, 1].item())
            assert got[b].tolist() == scores
            assert whole[b].item() == pytest.approx(area(tool, scores, counts), rel=1e-12)


def test_default_baselines_and_steps():
    x = torch.rand(2, 1, 8, 6) + 1
    rows = []

    def forward(images):
        rows.append(images.clone())
        return images.sum((1, 2, 3))

    for tool, n_points in ((None, 49), ("rise", 9), ("torchcam", 17), ("xplique", 11), ("quantus", 48)):
        rows.clear()
        curves = insertion_deletion(forward, x, x, target=None, score="logit", compat=tool)
        assert curves.deletion.shape == (2, n_points)
        seen = torch.cat(rows)[2:].view(2, -1, 1, 8, 6)
        blurred = tool in (None, "rise")
        assert curves.one_baseline == (tool in ("torchcam", "xplique"))
        if blurred:
            assert float(seen[:, 0].min()) > 0.9 and float(seen[:, 0].std()) < 0.5 * float(x.std())
        expected = x.amin((1, 2, 3), keepdim=True) if tool == "quantus" else torch.zeros(2, 1, 1, 1)
        assert torch.equal(seen[:, -1], expected.expand_as(x))
        assert (curves.insertion is None) == (tool == "quantus")


def test_nan_goes_where_the_tool_has_it():
    x, maps = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, torch.nan, 2.0]])
    for tool, expected in (("rise", [7, 5, 1, 0]), ("torchcam", [7, 5, 1, 0]), ("quantus", [3, 2, 0])):
        settings = dict(target=None, score="logit", compat=tool, nan="last", steps=3, deletion_baseline=0.0)
        curves = insertion_deletion(lambda rows: rows.sum(1), x, maps, **settings)
        assert curves.deletion[0].tolist() == expected
    with pytest.raises(ValueError, match="must not be NaN"):
        insertion_deletion(lambda rows: rows.sum(1), x, maps, target=None, compat="rise")


def plain_pixel_flipping(net, x, maps, target, per_step):
    """Bach et al. 2015 over channel values, smallest value of the image as replacement, the start left out."""
    curves = []
    for image, values in zip(x, maps, strict=True):
        values = values.expand_as(image).flatten().numpy()
        order, row, scores = ordered("quantus", values), image.clone().flatten(), []
        for k in range(0, len(order), per_step):
            row[torch.from_numpy(order[k : k + per_step].copy())] = image.min()
            scores.append(net(row.view(1, *image.shape))[0, target].item())
        curves.append(scores)
    return np.array(curves)


@pytest.mark.parametrize("steps", [48, 6, 5])
def test_quantus_formula(steps):
    x, maps, net = integers(3, 3, 4, 4), integers(3, 4, 4, seed=1), IntegerNet(48)
    expected = plain_pixel_flipping(net, x, maps, 2, math.ceil(48 / steps))
    curves = insertion_deletion(net, x, maps, target=2, score="logit", compat="quantus", steps=steps)
    assert curves.deletion.tolist() == expected.tolist() and curves.insertion is None and curves.insertion_auc is None
    areas = expected.sum(1) - expected[:, 0] / 2 - expected[:, -1] / 2
    assert curves.deletion_auc.tolist() == pytest.approx(areas.tolist(), rel=1e-12)
    assert curves.srg is None and curves.mean().insertion is None
    by_channel = integers(3, 3, 4, 4, seed=4)  # a map of its own for every channel
    curves = insertion_deletion(net, x, by_channel, target=2, score="logit", compat="quantus", steps=steps)
    expected = plain_pixel_flipping(net, x, by_channel, 2, math.ceil(48 / steps))
    assert curves.deletion.tolist() == expected.tolist()


@pytest.mark.parametrize("per_step", [1, 4])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_against_quantus_itself(per_step, softmax):
    quantus = pytest.importorskip("quantus")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x, maps = torch.rand(4, 2, 8, 8), torch.rand(4, 1, 8, 8)
    # Its sort is unstable: values without ties, for every channel its own.
    maps = (maps + torch.rand(4, 2, 8, 8)).contiguous()
    target = torch.tensor([0, 2, 1, 1])
    metric = quantus.PixelFlipping(features_in_step=per_step, disable_warnings=True)
    theirs = metric(model, x.numpy(), target.numpy(), maps.numpy(), softmax=softmax, device="cpu", channel_first=True)
    ours = insertion_deletion(
        model, x, maps, target=target, compat="quantus", steps=128 // per_step, score="softmax" if softmax else "logit"
    )
    torch.testing.assert_close(ours.deletion, torch.tensor(np.array(theirs)).float(), atol=2e-6, rtol=1e-5)


def test_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "curves.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
