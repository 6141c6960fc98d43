"""Sliding windows: which rows the model sees, and what becomes of overlaps; beside Captum and a plain loop."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from games import IntegerNet, integers, small_cnn
from torch import nn

import xaifast
from xaifast.models import VisionTransformer
from xaifast.removal import TokenDrop, TokenSelect


class MLP3(nn.Module):
    def forward(self, x):
        s = x.flatten(1).sum(1)
        h = torch.stack([s - 10, s + 1, s + 1, s + 1], 1).relu().sum(1)
        return torch.stack([h - 1, h + 1], 1)


def boxes(shape, window, stride):
    """Every window as a tuple of slices, the slow way."""
    axes = []
    for size, wide, step in zip(shape, window, stride, strict=True):
        axis, start = [], 0
        while True:
            axis.append(slice(start, min(start + wide, size)))
            if start + wide >= size:
                break
            start += step
        axes.append(axis)
    return list(itertools.product(*axes))


def by_loop(forward, x, window, stride, baseline):
    """Mean drop over the covering windows, one model call a window: ``[B, ..., K]``."""
    total = torch.zeros(*x.shape, forward(x[:1]).shape[1], dtype=torch.float64)
    count = torch.zeros(x.shape[1:])
    for box in boxes(x.shape[1:], window, stride):
        hidden = x.clone()
        shown = torch.as_tensor(baseline, dtype=x.dtype).expand(x.shape)
        hidden[(slice(None), *box)] = shown[(slice(None), *box)]
        drop = (forward(x) - forward(hidden)).double()
        total[(slice(None), *box)] += drop.reshape(len(x), *(1,) * len(box), -1)
        count[box] += 1
    assert bool((count > 0).all())
    return total / count[..., None]


@pytest.mark.parametrize(("window", "stride", "expected"), [(1, None, [80, 200, 120]), (2, 2, [280, 280, 120])])
def test_conformance(window, stride, expected):
    x = torch.tensor([[20.0, 50, 30]])
    assert xaifast.occlusion(MLP3(), x, window=window, stride=stride, target=0).tolist() == [expected]


CASES = [  # shape of an input, window, stride, in full
    ((7,), (3,), (1,)),
    ((7,), (3,), (2,)),
    ((8,), (3,), (3,)),
    ((5,), (5,), (5,)),
    ((5, 7), (2, 3), (1, 3)),
    ((2, 9, 7), (2, 4, 3), (1, 3, 2)),
    ((2, 9, 7), (1, 9, 2), (1, 1, 2)),
    ((3, 5, 4, 3), (2, 3, 3, 1), (2, 1, 2, 1)),
]


@pytest.mark.parametrize(("shape", "window", "stride"), CASES)
def test_equals_the_loop(shape, window, stride):
    net, x = IntegerNet(math.prod(shape)), integers(3, *shape)
    baseline = integers(*shape, seed=1)
    shown = xaifast.occlusion(net, x, window=window, stride=stride, baselines=baseline)
    torch.testing.assert_close(shown, by_loop(net, x, window, stride, baseline), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("shape", "window", "stride"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_equals_captum(shape, window, stride, dtype):
    captum = pytest.importorskip("captum.attr")
    net, x = IntegerNet(math.prod(shape)), integers(2, *shape, dtype=dtype)
    target = torch.tensor([2, 0])
    theirs = captum.Occlusion(net).attribute(x, window, strides=stride, target=target)
    ours = xaifast.occlusion(net, x, window=window, stride=stride, target=target)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-4)


def test_tuples_equal_captum():
    captum = pytest.importorskip("captum.attr")
    a, b = integers(2, 5), integers(2, 4, 3, seed=1)
    base = (integers(1, 5, seed=2), 1.0)

    def forward(u, v, scale):
        return (u.prod(1) + (v.sum((1, 2)) * u[:, 0])) * scale

    scale = torch.tensor([1.0, 3.0]).double()
    windows, strides = ((2,), (3, 2)), ((2,), (1, 2))
    ours = xaifast.occlusion(
        forward, (a, b), window=windows, stride=strides, baselines=base, additional_forward_args=scale
    )
    theirs = captum.Occlusion(forward).attribute(
        (a, b), windows, strides, baselines=base, additional_forward_args=scale, perturbations_per_eval=1
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.double(), rtol=1e-6, atol=1e-4)


def test_an_int_covers_all_channels():
    net, x = small_cnn(channels=3), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    shown = xaifast.occlusion(net, x, window=3, stride=2, target="predicted")
    same = [
        xaifast.occlusion(net, x, window=(3, 3), stride=(2, 2), target="predicted"),
        xaifast.occlusion(net, x, window=(3, 3, 3), stride=(1, 2, 2), target="predicted"),
    ]
    assert all(torch.equal(shown, other) for other in same) and bool((shown[:, :1] == shown).all())
    series = integers(2, 2, 9)
    whole = xaifast.occlusion(IntegerNet(18), series, window=(2, 3), stride=(1, 3))
    assert torch.equal(xaifast.occlusion(IntegerNet(18), series, window=3, stride=3), whole)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_row_is_the_input_with_one_box_hidden(batch_size, layout):
    x = torch.randn(3, 2, 5, 4).contiguous(memory_format=layout)
    base = torch.randn(3, 2, 5, 4)
    seen = []

    def forward(rows):
        assert rows.is_contiguous(memory_format=layout)
        seen.append(rows.clone())
        return rows.flatten(1).sum(1)

    xaifast.occlusion(forward, x, window=(3, 2), stride=2, baselines=base, batch_size=batch_size)
    rows = torch.cat(seen)[3:]  # after the clean inputs
    expected = []
    for b in range(3):
        for box in boxes((2, 5, 4), (2, 3, 2), (1, 2, 2)):
            hidden = x[b].clone()
            hidden[box] = base[b][box]
            expected.append(hidden)
    assert torch.equal(rows, torch.stack(expected))


def test_neither_chunks_nor_neighbours_matter():
    net, x = IntegerNet(24, n_outputs=2), integers(5, 2, 4, 3)
    whole = xaifast.occlusion(net, x, window=2, stride=1)
    for size in (1, 3, 64):
        assert torch.equal(xaifast.occlusion(net, x, window=2, stride=1, batch_size=size), whole)
    assert torch.equal(xaifast.occlusion(net, x[3:4], window=2, stride=1), whole[3:4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_leaks_from_behind_a_window_or_from_the_baseline_elsewhere(bad):
    x, base = torch.ones(1, 6), torch.zeros(6)
    x[0, 0], base[5] = bad, bad
    seen = []

    def forward(rows):
        seen.append(rows.clone())
        return rows.nan_to_num(0, 0, 0).sum(1)

    xaifast.occlusion(forward, x, window=2, stride=2, baselines=base)
    rows = torch.cat(seen)[1:]
    assert torch.isfinite(rows).all(1).tolist() == [True, False, False]
    assert torch.equal(rows[0], torch.tensor([0.0, 0, 1, 1, 1, 1]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_background_is_the_mean_over_its_rows(batch_size):
    net, x, rows = IntegerNet(6), integers(2, 6), integers(4, 6, seed=1)
    shown = xaifast.occlusion(net, x, window=2, stride=2, baselines=xaifast.Background(rows), batch_size=batch_size)
    expected = torch.stack([by_loop(net, x, (2,), (2,), row) for row in rows]).mean(0)
    torch.testing.assert_close(shown, expected, rtol=1e-12, atol=1e-9)


def test_blur_and_callables():
    net, x = small_cnn(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    blurred = xaifast.removal.gaussian_blur(x)
    expected = by_loop(net, x, (1, 3, 3), (1, 2, 2), blurred)
    for removal in ("blur", xaifast.removal.gaussian_blur):
        shown = xaifast.occlusion(net, x, window=3, stride=2, removal=removal)
        torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (8, 4), (8, 8)])
def test_tokens(window, stride):
    model = VisionTransformer(16, 4, 3, channels=1, dim=16, depth=2, heads=2).eval()
    x = torch.rand(2, 1, 16, 16)
    pixels = xaifast.occlusion(model, x, window=window, stride=stride, target=1)
    tokens = xaifast.occlusion(model, x, window=window, stride=stride, target=1, removal=TokenSelect())
    torch.testing.assert_close(tokens, pixels, rtol=1e-4, atol=1e-5)
    dropped = xaifast.occlusion(model, x, window=window, stride=stride, target=1, removal=TokenDrop())
    mask = xaifast.grid_mask((16, 16), window)
    if window == stride:
        expected = xaifast.feature_ablation(model, x, feature_mask=mask, target=1, removal=TokenDrop())
        torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-6)
    assert dropped.shape == pixels.shape and not torch.allclose(dropped, pixels, atol=1e-3)


def test_windows_that_cut_patches_cannot_drop_tokens():
    model = VisionTransformer(16, 4, 3, channels=1, dim=16, depth=1, heads=2).eval()
    with pytest.raises(ValueError, match="patches of 4 x 4"):
        xaifast.occlusion(model, torch.rand(1, 1, 16, 16), window=6, stride=3, target=0, removal=TokenDrop())


def test_shapes_with_and_without_an_output_axis():
    x = integers(2, 1, 4, 4)
    net = IntegerNet(16, n_outputs=3)
    every = xaifast.occlusion(net, x, window=2)
    assert every.shape == (2, 1, 4, 4, 3) and every.dtype == torch.float64
    target = torch.tensor([2, 1])
    one = xaifast.occlusion(net, x, window=2, target=target)
    assert torch.equal(one, torch.stack([every[0, ..., 2], every[1, ..., 1]]))
    assert xaifast.occlusion(lambda rows: rows.sum((1, 2, 3)), x.bfloat16(), window=2).dtype == torch.float32


def test_progress_counts_every_evaluation(capsys):
    xaifast.occlusion(MLP3(), torch.ones(3, 6), window=2, stride=2, target=0, show_progress=True)
    shown = capsys.readouterr().err
    assert "9/9" in shown.replace("9.00", "9") and shown.count("occlusion:") >= 1


BAD = [
    (dict(window=7), ValueError, "window must fit into the input"),
    (dict(window=0), ValueError, "at least 1 each"),
    (dict(window=2.0), TypeError, "window must be an int or a tuple of ints"),
    (dict(window=(1, 2)), ValueError, "window must hold 1 sizes"),
    (dict(window=2, stride=3), ValueError, "stride must not be larger than the window"),
    (dict(window=2, stride=0), ValueError, "at least 1 each"),
    (dict(window=2, receptive_field="yes"), ValueError, "receptive_field must be"),
    (dict(window=2, target=5), ValueError, "target must lie in 0..1"),
    (dict(window=2, batch_size=0), ValueError, "batch_size must be"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words) as caught:
        xaifast.occlusion(MLP3(), torch.ones(2, 6), **{"target": 0, **arguments})
    assert str(caught.value).startswith("xaifast.occlusion: ")


def test_a_stride_may_pass_a_window_that_covers_everything():
    x = torch.tensor([[20.0, 50, 30]])
    assert xaifast.occlusion(MLP3(), x, window=3, stride=9, target=0).tolist() == [[390.0] * 3]


def test_tuples_need_an_entry_an_input():
    pair = (torch.ones(1, 4), torch.ones(1, 5))

    def forward(a, b):
        return a.sum(1) + b.sum(1)

    with pytest.raises(ValueError, match="one entry an input"):
        xaifast.occlusion(forward, pair, window=(2, 2, 2))
    a, b = xaifast.occlusion(forward, pair, window=2)
    assert a.tolist() == [[2.0] * 4] and b.tolist() == [[2.0] * 5]


def test_a_bad_output_is_named_by_its_window():
    def forward(rows):
        return torch.where(rows[:, 3] == 0, torch.nan, rows.sum(1))

    with pytest.raises(ValueError, match=r"input 0, window 1 of input tensor 0 at \[2\]"):
        xaifast.occlusion(forward, torch.ones(1, 6), window=2, stride=2)


def test_the_examples_of_the_documentation_run():
    text = (Path(__file__).parents[1] / "docs" / "perturbation.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
        exec(block, names)
    assert names["windows"].shape == (2, 3, 32, 32) and names["every_class"].shape == (2, 3, 32, 32, 10)
    assert names["saliency"].shape == (2, 32, 32) and names["of_table"].shape == (2, 6)
