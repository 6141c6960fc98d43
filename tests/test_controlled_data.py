"""Controlled data: the signal is where the mask says, nothing else is, and the seed decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xaifast.data import controlled

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def images():
    return datasets.load_digits().images / 16


def test_digits_lie_where_they_should(images):
    inputs, labels, signal = controlled.digits()
    assert inputs.dtype == torch.float32 and inputs.shape == signal.shape == (1797, 1, 28, 28)
    wanted = np.zeros((1797, 28, 28))
    for r in range(16):
        for c in range(16):
            wanted[:, 6 + r, 6 + c] = images[:, r // 2, c // 2]
    assert np.array_equal(inputs[:, 0].numpy(), wanted.astype(np.float32))
    assert np.array_equal(signal[:, 0].numpy(), wanted > 0) and signal.dtype == torch.bool
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), datasets.load_digits().target)


def test_odd_sizes_and_the_box():
    inputs, _, signal = controlled.digits(size=9, scale=1, signal="box")
    assert inputs.shape == (1797, 1, 9, 9)
    assert signal.all(0)[0, :8, :8].all() and not signal.any(0)[0, 8].any() and not signal.any(0)[0, :, 8].any()
    inputs, _, signal = controlled.digits(size=24, scale=3)
    assert torch.equal(inputs[:, :, ::3, ::3], controlled.digits(size=8, scale=1).inputs)


def test_jitter_moves_every_digit_by_whole_pixels():
    centred, moved = controlled.digits(), controlled.digits(jitter=2, signal="box", seed=3)
    tops = moved.signal[:, 0].any(2).int().argmax(1) - 6
    lefts = moved.signal[:, 0].any(1).int().argmax(1) - 6
    pairs = torch.stack((tops, lefts), 1)
    assert {tuple(pair) for pair in pairs.tolist()} == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}
    back = torch.stack(
        [torch.roll(x, (-int(t), -int(le)), (1, 2)) for x, t, le in zip(moved.inputs, tops, lefts, strict=True)]
    )
    assert torch.equal(back, centred.inputs)


def test_normalised_is_the_same_picture_on_another_scale():
    zero, normalised = controlled.digits(), controlled.digits("normalised")
    x, mean, std = zero.inputs.double(), zero.inputs.double().mean(), zero.inputs.double().std(correction=0)
    torch.testing.assert_close(normalised.inputs.double(), (x - mean) / std, rtol=1e-6, atol=1e-7)
    assert torch.equal(normalised.signal, zero.signal)
    background = normalised.inputs[~normalised.signal]
    assert (background == background[0]).all() and background[0] < -0.3


@pytest.mark.parametrize("background", ["noise", "textured"])
def test_backgrounds_fill_what_is_not_ink_and_nothing_else(background):
    zero, shown = controlled.digits(), controlled.digits(background)
    assert torch.equal(shown.signal, zero.signal) and torch.equal(shown.labels, zero.labels)
    assert torch.equal(shown.inputs[zero.signal], zero.inputs[zero.signal])
    behind = shown.inputs[~zero.signal]
    assert behind.min() >= 0 and behind.max() <= 0.5 and abs(float(behind.mean()) - 0.25) < 0.01
    assert (behind == 0).float().mean() < 0.01
    assert shown.inputs[:, 0, 0, 0].unique().numel() > 1700  # another one for each input
    assert torch.equal(controlled.digits(background).inputs, shown.inputs)
    assert not torch.equal(controlled.digits(background, seed=1).inputs, shown.inputs)


def test_noise_is_rough_and_texture_smooth():
    rough, smooth = (controlled.digits(b).inputs[:, 0, :5] for b in ("noise", "textured"))  # above the digits
    change = [float(x.diff(dim=2).abs().mean() / x.std()) for x in (rough, smooth)]
    assert change[0] > 1 > 0.8 > change[1]
    corner = rough[:, 0, :2].double()
    assert abs(float(torch.corrcoef(corner.T)[0, 1])) < 0.1  # neighbours know nothing of each other
    assert abs(float(rough.std()) - 0.5 / 12**0.5) < 2e-3  # uniform


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    first, state = controlled.digits("noise", jitter=1).inputs, torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(controlled.digits("noise", jitter=1).inputs, first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_breast_cancer():
    inputs, labels, signal = controlled.breast_cancer()
    raw = datasets.load_breast_cancer()
    wanted = (raw.data - raw.data.mean(0)) / raw.data.std(0)
    np.testing.assert_allclose(inputs.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert inputs.dtype == torch.float32 and labels.tolist() == raw.target.tolist() and signal is None


def test_made_table():
    inputs, labels, signal = controlled.made_table(4000, seed=5)
    assert inputs.shape == (4000, 50) and labels.bincount().tolist() == [800] * 5 and int(signal.sum()) == 10
    assert inputs.mean(0).abs().max() < 1e-5 and (inputs.std(0, correction=0) - 1).abs().max() < 1e-5
    between = torch.stack([inputs[labels == c].mean(0) for c in range(5)]).std(0)
    assert between[signal].min() > 0.15 > between[~signal].max()  # 1 / sqrt(800) = 0.035 by chance
    assert torch.equal(between.topk(10).indices.sort().values, signal.nonzero().flatten())


def test_made_tables_by_seed():
    one, two = controlled.made_table(40, seed=1), controlled.made_table(40, seed=2)
    assert torch.equal(one.inputs, controlled.made_table(40, seed=1).inputs)
    assert not torch.equal(one.inputs, two.inputs) and not torch.equal(one.signal, two.signal)
    small = controlled.made_table(12, n_columns=7, n_classes=3, n_informative=7, seed=1)
    assert small.inputs.shape == (12, 7) and small.signal.all() and small.labels.max() == 2
    silent = controlled.made_table(3000, separation=0.0)
    means = torch.stack([silent.inputs[silent.labels == c].mean(0) for c in range(5)])
    assert means.abs().max() < 5 / 600**0.5


def test_a_network_learns_each_of_them():
    for data, least in [*((controlled.digits(b), 0.88) for b in controlled.BACKGROUNDS), (controlled.made_table(), 0.9),
                        (controlled.breast_cancer(), 0.93)]:  # fmt: skip
        torch.manual_seed(0)
        x, y = data.inputs.flatten(1), data.labels
        shuffled = torch.randperm(len(x))
        train, test = shuffled[: int(0.8 * len(x))], shuffled[int(0.8 * len(x)) :]
        model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-3)
        for _ in range(25):
            for rows in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        assert float((model(x[test]).argmax(1) == y[test]).float().mean()) > least


@pytest.mark.parametrize("call, said", [
    (lambda: controlled.digits("black"), "background must be one of"),
    (lambda: controlled.digits(signal="edge"), 'signal "ink" or "box"'),
    (lambda: controlled.digits(size=15), "must fit on the canvas, got size=15"),
    (lambda: controlled.digits(size=18, jitter=2), "moved by 2 must fit"),
    (lambda: controlled.digits(scale=0), "scale must be an int of at least 1"),
    (lambda: controlled.digits(seed=-1), "seed must be an integer"),
    (lambda: controlled.made_table(0), "n must be a positive int"),
    (lambda: controlled.made_table(4), "n at least n_classes"),
    (lambda: controlled.made_table(n_informative=51), "n_informative must be at most n_columns"),
    (lambda: controlled.made_table(separation=float("nan")), "separation finite"),
])  # fmt: skip
def test_bad_input(call, said):
    with pytest.raises(ValueError, match="xaifast.data.controlled.*" + said):
        call()


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"controlled.digits needs sklearn; pip install 'xaifast\[data\]'"):
        controlled.digits()
