"""What becomes of curves: means with bands, batches joined, figures, one bar."""

from __future__ import annotations

import pytest
import torch
from games import IntegerNet
from torch import nn

import xaifast
from xaifast import insertion_deletion


def test_mean_bands_and_cat():
    x = torch.rand(9, 10)
    model = nn.Linear(10, 3).eval()
    curves = insertion_deletion(model, x, torch.rand(9, 10), steps=5)
    mean = curves.mean()
    torch.testing.assert_close(mean.insertion, curves.insertion.mean(0))
    torch.testing.assert_close(mean.deletion_band, 1.96 * curves.deletion.std(0) / 3)
    torch.testing.assert_close(mean.insertion_auc, curves.insertion_auc.mean())
    torch.testing.assert_close(mean.deletion_auc_band, 1.96 * curves.deletion_auc.std() / 3)
    one = insertion_deletion(model, x[:1], torch.rand(1, 10), steps=5)
    assert one.mean().n_inputs == 1 and bool(one.mean().deletion_band.isnan().all())
    both = xaifast.Curves.cat([curves, one])
    assert both.deletion.shape == (10, 6) and torch.equal(both.deletion[9:], one.deletion)
    with pytest.raises(ValueError, match="same points"):
        xaifast.Curves.cat([curves, insertion_deletion(model, x, torch.rand(9, 10), steps=4)])
    with pytest.raises(ValueError, match="agree in order"):
        xaifast.Curves.cat([curves, insertion_deletion(model, x, torch.rand(9, 10), steps=5, order="least")])
    assert torch.equal(xaifast.Curves.cat(part for part in (curves, one)).deletion, both.deletion)
    # What baselines show may agree by chance: a black image is its own blur.
    other = insertion_deletion(model, x, torch.rand(9, 10), steps=5, insertion_baseline=1.0)
    both = xaifast.Curves.cat([curves, other])
    assert curves.one_baseline and not both.one_baseline and both.n_evaluations == 11
    with pytest.raises(ValueError, match="at least one"):
        xaifast.Curves.cat([])


def test_plot_and_repr():
    pytest.importorskip("matplotlib")
    x = torch.rand(4, 1, 4, 4)
    curves = insertion_deletion(IntegerNet(16), x, x, steps=4, target=0, score="logit")
    assert repr(curves).startswith("Curves(4 inputs, 5 points, most first; insertion area")
    figure = curves.plot()
    (axis,) = figure.axes
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert [text.split(",")[0] for text in texts] == ["insertion", "deletion"]
    assert f"{float(curves.insertion_auc.mean()):.3g}" in texts[0] and "\N{PLUS-MINUS SIGN}" in texts[0]
    torch.testing.assert_close(torch.tensor(axis.lines[1].get_ydata()).float(), curves.deletion.mean(0))
    assert "input 2" in str([text.get_text() for text in curves.plot(-2).texts])
    (axis,) = curves.plot(-2).axes
    torch.testing.assert_close(torch.tensor(axis.lines[0].get_ydata()).float(), curves.insertion[2])
    with pytest.raises(IndexError, match="0..3"):
        curves.plot(4)


def test_progress_is_one_bar(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **kwargs):
            self.total, self.n = kwargs["total"], 0
            bars.append(self)

        def update(self, n):
            self.n += n

        def close(self): ...

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    x = torch.rand(3, 1, 4, 4)
    insertion_deletion(IntegerNet(16), x, x, steps=4, show_progress=True, target=0, score="logit")
    assert [(bar.total, bar.n) for bar in bars] == [(24, 24)]
