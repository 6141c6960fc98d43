"""Leave-one-out importance beside brute force and Captum."""

from __future__ import annotations

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


def by_loop(forward, x, mask, baseline):
    """``[B, ..., K]``, a model call an input and a player."""
    mask = mask.expand(x.shape)
    out = torch.zeros(*x.shape, forward(x[:1]).shape[1], dtype=torch.float64)
    for b in range(len(x)):
        for player in mask[b].unique():
            hidden = torch.where(mask[b] == player, torch.as_tensor(baseline, dtype=x.dtype), x[b])
            out[b][mask[b] == player] = (forward(x[b : b + 1]) - forward(hidden[None]))[0].double()
    return out


def test_conformance():
    one, mask = torch.tensor([[20.0, 50, 30]]), torch.tensor([0, 0, 1])
    assert xaifast.feature_ablation(MLP3(), one, feature_mask=mask, target=0).tolist() == [[280, 280, 120]]
    two = torch.tensor([[2.0, 10, 3], [20, 50, 30]])
    masks = torch.tensor([[0, 0, 1], [1, 1, 0]])
    shown = xaifast.feature_ablation(MLP3(), two, feature_mask=masks, target=0)
    assert shown.tolist() == [[41, 41, 12], [280, 280, 120]]


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("per_input", [False, True])
def test_equals_the_loop(batch_size, per_input):
    net, x = IntegerNet(2 * 5 * 3), integers(3, 2, 5, 3)
    mask = torch.arange(15).reshape(5, 3) % 7
    if per_input:
        mask = torch.stack([mask.roll(b, 0) for b in range(3)])[:, None]
    base = integers(2, 5, 3, seed=1)
    shown = xaifast.feature_ablation(net, x, feature_mask=mask, baselines=base, batch_size=batch_size)
    assert torch.equal(shown, by_loop(net, x, mask, base))


def test_every_element_is_a_player_without_a_mask():
    net, x = IntegerNet(30), integers(2, 2, 5, 3)
    ids = torch.arange(30).reshape(2, 5, 3)
    shown = xaifast.feature_ablation(net, x)
    assert torch.equal(shown, by_loop(net, x, ids, 0.0))
    assert torch.equal(shown, xaifast.feature_ablation(net, x, feature_mask=ids))


def test_more_elements_than_players_may_be():
    weights = torch.arange(5000.0)
    shown = xaifast.feature_ablation(lambda rows: rows @ weights, torch.ones(1, 5000), batch_size=512)
    torch.testing.assert_close(shown[0], weights, rtol=0, atol=2.0)  # f(x) is 1.2e7 in float32
    with pytest.raises(ValueError, match="grid_mask"):
        xaifast.feature_ablation(lambda rows: rows @ weights, torch.ones(1, 5000), feature_mask=torch.arange(5000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("mask", [None, "shared", "each"])
def test_equals_captum(dtype, mask):
    captum = pytest.importorskip("captum.attr")
    net, x = IntegerNet(12), integers(3, 4, 3, dtype=dtype)
    given = {
        None: None,
        "shared": torch.tensor([[[0, 0, 1], [2, 2, 1], [3, 1, 0], [4, 4, 4]]]),
        "each": torch.randint(0, 4, (3, 4, 3), generator=torch.Generator().manual_seed(1)),
    }[mask]
    target, baseline = torch.tensor([0, 2, 1]), integers(1, 4, 3, seed=2, dtype=dtype)
    theirs = captum.FeatureAblation(net).attribute(x, baseline, target, feature_mask=given)
    ours = xaifast.feature_ablation(net, x, baselines=baseline, target=target, feature_mask=given)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-4)


def test_tuples_share_players_as_in_captum():
    captum = pytest.importorskip("captum.attr")
    a, b = integers(2, 3), integers(2, 2, 2, seed=1)
    masks = (torch.tensor([[0, 1, 1]]), torch.tensor([[[1, 2], [2, 0]]]))

    def forward(u, v):
        return u.prod(1) * v.sum((1, 2)) + u.sum(1)

    ours = xaifast.feature_ablation(forward, (a, b), feature_mask=masks, baselines=(1.0, 2.0))
    theirs = captum.FeatureAblation(forward).attribute((a, b), feature_mask=masks, baselines=(1.0, 2.0))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    ours = xaifast.feature_ablation(forward, (a, b), baselines=(1.0, 2.0))
    theirs = captum.FeatureAblation(forward).attribute((a, b), baselines=(1.0, 2.0))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_neither_chunks_nor_neighbours_matter():
    net, x, mask = IntegerNet(24), integers(5, 24), torch.arange(24) % 5
    for given in (mask, None):
        whole = xaifast.feature_ablation(net, x, feature_mask=given)
        assert torch.equal(xaifast.feature_ablation(net, x, feature_mask=given, batch_size=7), whole)
        assert torch.equal(xaifast.feature_ablation(net, x[4:], feature_mask=given), whole[4:])


def test_removals():
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    net, mask = small_cnn(), xaifast.grid_mask((8, 8), 4)
    blurred = xaifast.removal.gaussian_blur(x)
    expected = torch.cat([by_loop(net, x[b : b + 1], mask, blurred[b]) for b in range(2)])
    shown = xaifast.feature_ablation(net, x, feature_mask=mask, removal="blur")
    torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-12)
    rows = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = torch.stack([by_loop(net, x, mask, row) for row in rows]).mean(0)
    shown = xaifast.feature_ablation(net, x, feature_mask=mask, baselines=xaifast.Background(rows))
    torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-12)


def test_tokens():
    model = VisionTransformer(16, 4, 3, channels=1, dim=16, depth=2, heads=2).eval()
    x, mask = torch.rand(2, 1, 16, 16), xaifast.grid_mask((16, 16), 4)
    pixels = xaifast.feature_ablation(model, x, feature_mask=mask, target=1)
    tokens = xaifast.feature_ablation(model, x, feature_mask=mask, target=1, removal=TokenSelect())
    torch.testing.assert_close(tokens, pixels, rtol=1e-4, atol=1e-5)
    dropped = xaifast.feature_ablation(model, x, feature_mask=mask, target=1, removal=TokenDrop())
    assert dropped.shape == x.shape and not torch.allclose(dropped, pixels, atol=1e-3)
    with pytest.raises(ValueError, match="constant within the model's patches"):
        xaifast.feature_ablation(model, x, target=1, removal=TokenDrop())


def test_nothing_leaks_from_behind_a_removed_player():
    x = torch.ones(1, 4)
    x[0, 1] = torch.nan
    shown = xaifast.feature_ablation(
        lambda rows: rows.nan_to_num().sum(1), x, feature_mask=torch.tensor([0, 1, 1, 0]), baselines=0.0
    )
    assert shown.tolist() == [[2, 1, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (dict(feature_mask=torch.tensor([0, 2, 2])), ValueError, "id 1 of 0..2 occurs nowhere"),
        (dict(feature_mask=torch.zeros(3)), TypeError, "integer player ids"),
        (dict(feature_mask=torch.zeros(4, dtype=torch.int64)), ValueError, "broadcastable to one input"),
        (dict(baselines=torch.zeros(4)), ValueError, "baselines must be a number or broadcastable"),
        (dict(target=2), ValueError, "target must lie in 0..1"),
        (dict(removal="ink"), ValueError, "removal must be None"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words) as caught:
        xaifast.feature_ablation(MLP3(), torch.ones(2, 3), **{"target": 0, **arguments})
    assert str(caught.value).startswith("xaifast.feature_ablation: ")
