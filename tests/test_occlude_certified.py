"""Certified rows: no unit of theirs changes sign, the linear way equals the ordinary one, and the share is counted."""

import itertools

import pytest
import torch
from torch import nn

from xaifast import _native
from xaifast.attribution.occlude import Occluder
from xaifast.attribution.occlude.certified import Certifier, radii
from xaifast.ops.occlude import group_elements

BACKENDS = ["native", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "native" and _native.cpu() is None:
        pytest.skip("no native module")
    monkeypatch.setenv("XAIFAST_BACKEND", request.param)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*widths, activation=None):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation or nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


def step(model, size):
    old = {name: t.clone() for name, t in model.state_dict().items()}
    new = {name: t + size * t.norm() * draw(*t.shape) / t.numel() ** 0.5 for name, t in old.items()}
    return old, new


def signs(model, state, x, weight):
    """Signs of every unit's pre-activation with one sample and a first layer's output moved by it."""
    z, seen = x @ weight.t() + state["0.bias"], []
    for i in itertools.count(0, 2):
        seen.append(z > 0)
        if f"{i + 4}.weight" not in state:
            return torch.cat(seen)
        h = torch.where(z > 0, z, model[i + 1](z))
        z = h @ state[f"{i + 2}.weight"].t() + state[f"{i + 2}.bias"]


def keeps(model, state, x, delta, groups=None):
    """bool [B, M], by looking at each unit of each row."""
    ids = torch.arange(x.shape[1]) if groups is None else groups
    kept = torch.zeros(len(x), int(ids.max()) + 1, dtype=torch.bool)
    for b, m in itertools.product(range(len(x)), range(kept.shape[1])):
        undone = torch.where(ids == m, state["0.weight"] - delta, state["0.weight"])
        clean = signs(model, state, x[b], state["0.weight"])
        kept[b, m] = torch.equal(clean, signs(model, state, x[b], undone))
    return kept


def flags(model, state, x, delta, groups=None, dtype=torch.float64):
    end = Occluder(model, x, precision="float64").at(state)
    certifier = Certifier(end._base64, end._weights64, end._names, dtype)
    n_players, order, offsets = x.shape[1], None, None
    if groups is not None:
        n_players, order, offsets = group_elements(groups, x)
    rows = torch.arange(len(x) * n_players)
    columns = delta.t().to(dtype).contiguous()
    return certifier(x.to(dtype), columns, rows, n_players, order, offsets, 0).view(len(x), n_players)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("widths", [(9, 70, 3), (9, 16, 8, 3), (9, 16, 12, 8, 3)], ids=str)
@pytest.mark.usefixtures("backend")
def test_certified_rows_keep_every_sign(widths, size, dtype, grouped):
    model, x = network(*widths), draw(6, 9)
    groups = torch.tensor([0, 1, 0, 2, 3, 3, 1, 3, 4]) if grouped else None
    old, new = step(model, size)
    delta = new["0.weight"] - old["0.weight"]
    certified, kept = flags(model, new, x, delta, groups, dtype), keeps(model, new, x, delta, groups)
    assert not (certified & ~kept).any()
    if len(widths) == 3:
        assert torch.equal(certified, kept)  # one hidden layer is looked at exactly
    if size == 1e-3:
        assert certified.float().mean() > 0.5


@pytest.mark.usefixtures("backend")
def test_a_unit_at_the_kink_counts_on_its_side():
    model = network(2, 3, 1)
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    state["0.bias"] = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    x = torch.ones(1, 2, dtype=torch.float64)
    cases = [  # change of the three units, whether all signs are kept
        ([0.0, 0.0, 0.0], True),
        ([1e-9, 0.0, 0.0], True),  # falls below 0, where it is
        ([-1e-9, 0.0, 0.0], False),  # rises above 0
        ([0.0, 1.1, 0.0], False),
        ([0.0, -9.0, 9.0], True),
        ([0.0, 0.0, -1.1], False),
    ]
    for change, expected in cases:
        delta = torch.tensor([change, [0.0] * 3], dtype=torch.float64).t()
        assert flags(model, state, x, delta)[0].tolist() == [expected, True], change


def test_radii_bound_the_changes_of_later_layers():
    model, x = network(5, 12, 10, 8, 6, 3), draw(4, 5)
    end = Occluder(model, x, precision="float64").at(dict(model.state_dict()))
    radius = radii(end._base64, end._weights64, end._names)
    assert (radius > 0).all()
    slopes = [(z > 0).double() for z in end._base64]
    for b in range(4):
        product = torch.diag(slopes[0][b])
        for weight, z, m in zip(end._weights64, end._base64[1:], slopes[1:], strict=False):
            product = weight @ product
            room = (z[b].abs() / product.norm(dim=1)).min()
            assert radius[b] <= room + 1e-15
            product = m[b][:, None] * product
    two = radii(end._base64[:2], end._weights64[:1], end._names[:2])
    first = [z.abs() / (end._weights64[0] * m).norm(dim=1) for z, m in zip(end._base64[1], slopes[0], strict=True)]
    torch.testing.assert_close(two, torch.stack([r.min() for r in first]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
@pytest.mark.usefixtures("backend")
def test_results_equal_the_ordinary_path(size, activation, target, masked):
    model, x = network(20, 32, 24, 3, activation=activation), draw(7, 20)
    x[2, :11] = 0
    old, new = step(model, size)
    mask = torch.arange(20) // 3 if masked else None
    chosen = torch.arange(7) % 3 if target else None
    ends = [Occluder(model, x, feature_mask=mask, certified=on).at(new) for on in (True, False)]
    delta = new["0.weight"] - old["0.weight"]
    for name in ("undo", "apply"):
        got, expected = (getattr(end, name)(delta, chosen) for end in ends)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert ends[1].certified_share is None
    assert 0 <= ends[0].certified_share <= 1
    if size == 1e-4:
        assert ends[0].certified_share > 0.9


def test_share_counts_rows_that_are_not_zero():
    model, x = network(20, 64, 48, 3), draw(7, 20)
    x[:, ::2] = 0
    old, new = step(model, 3e-3)
    delta = new["0.weight"] - old["0.weight"]
    end = Occluder(model, x).at(new)
    end.undo(delta)
    certified = flags(model, new, x, delta)[:, 1::2]
    assert 0.1 < certified.double().mean() < 1
    assert end.certified_share == pytest.approx(float(certified.double().mean()))


def test_blocks_of_samples_do_not_show(monkeypatch):
    from xaifast.attribution.occlude import chain_end

    model, x = network(20, 32, 24, 3), draw(7, 20)
    old, new = step(model, 1e-2)
    mask = torch.arange(20).expand(7, 20) // 4
    delta = new["0.weight"] - old["0.weight"]
    expected = Occluder(model, x, feature_mask=mask).at(new).undo(delta)
    monkeypatch.setattr(chain_end, "_BLOCK_ELEMENTS", 150)
    got = Occluder(model, x, feature_mask=mask).at(new).undo(delta)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    linear = Occluder(model, x, feature_mask=mask).at(new)
    whole = linear.linear(delta)
    monkeypatch.undo()
    torch.testing.assert_close(linear.linear(delta), whole, rtol=0, atol=1e-15)


def test_smooth_networks_have_no_share():
    model, x = network(5, 4, 3, activation=nn.Tanh()), draw(2, 5)
    end = Occluder(model, x).at(dict(model.state_dict()))
    end.undo(torch.ones(4, 5))
    assert end.certified_share is None


def test_a_linear_network_is_certified_whole():
    model, x = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 30), nn.Linear(30, 2)).double().eval(), draw(3, 6)
    end = Occluder(model, x).at(dict(model.state_dict()))
    got = end.undo(draw(40, 6))
    assert end.certified_share == 1
    expected = x[:, :, None] * (model[2].weight @ model[1].weight @ draw(40, 6)).t()
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-12)
