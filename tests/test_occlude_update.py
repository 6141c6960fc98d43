"""occlude_update against literal substitution, in float64, of columns and of copies of weights that are shared."""

import copy
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import xaifast
from xaifast import occlude_update
from xaifast.attribution.occlude import Occluder
from xaifast.attribution.occlude.chain_end import ChainEnd
from xaifast.attribution.occlude.layer_end import LayerEnd

ACTIVATIONS = [
    nn.ReLU(),
    nn.LeakyReLU(0.1),
    nn.ELU(1.5),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
]
DIRECTIONS = ["forward", "reverse", "symmetric"]


def update(model, size=0.3, seed=0):
    """Two random states of a model, in float64."""
    generator = torch.Generator().manual_seed(seed)
    old, new = {}, {}
    for name, t in model.state_dict().items():
        moved = t.double() + 0.2 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        old[name] = moved.abs() + 0.1 if "running_var" in name else moved
        step = size * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        new[name] = old[name] + (step.abs() if "running_var" in name else step)
        if not t.is_floating_point():
            old[name], new[name] = t, t.clone()
    return old, new


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(model, old, new, x, weight, mask=None):
    """F and R, each [B, M, K], with columns of a dense first layer exchanged."""
    ids = torch.arange(x[0].numel()) if mask is None else mask.flatten()
    forward, reverse = [], []
    for m in range(int(ids.max()) + 1):
        undone, applied = new[weight].clone(), old[weight].clone()
        undone[:, ids == m], applied[:, ids == m] = old[weight][:, ids == m], new[weight][:, ids == m]
        forward.append(functional_call(model, new, (x,)) - functional_call(model, {**new, weight: undone}, (x,)))
        reverse.append(functional_call(model, {**old, weight: applied}, (x,)) - functional_call(model, old, (x,)))
    return dict(zip(("forward", "reverse"), (torch.stack(forward, 1), torch.stack(reverse, 1)), strict=True))


def halves(parts, direction):
    return sum(parts.values()) / 2 if direction == "symmetric" else parts[direction]


def mlp(activation=None, bias=True):
    activation = activation or nn.ReLU()
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, 11, bias=bias), activation)
    return nn.Sequential(first, nn.Dropout(0.5), nn.Linear(11, 7, bias=bias), activation, nn.Linear(7, 4)).eval()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 9), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.dropout(x.view(x.size(0), -1), training=self.training)
        x = F.leaky_relu(F.gelu(self.one(x)) if False else self.one(x), 0.2)
        return self.three(torch.tanh(self.two(x)))


def normed(before, behind):
    layers = [nn.BatchNorm1d(12)] if before else []
    layers += [nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU()]
    layers += [nn.BatchNorm1d(9, affine=False)] if behind else []
    return nn.Sequential(*layers, nn.Linear(9, 5), nn.BatchNorm1d(5)).eval()


CHAINS = {
    "one layer": lambda: nn.Linear(12, 3),
    "one hidden layer": lambda: nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)),
    "no activation": lambda: nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3)),
    "activation at the end": lambda: nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid()),
    "four layers": lambda: nn.Sequential(
        nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)
    ),
    "functional": Functional,
    "norms": lambda: normed(False, False),
    "norm before": lambda: normed(True, False),
    "norm behind an activation": lambda: normed(False, True),
    "norms everywhere": lambda: normed(True, True),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [0.5, 1e-4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, bias, size, direction):
    model, x = mlp(activation, bias), draw(5, 3, 4)
    x[1, 0, 2] = 0
    old, new = update(model, size)
    expected = halves(literal(model, old, new, x, "0.1.weight"), direction)
    got = occlude_update(model, old, new, x, direction=direction)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert (got[1, 2] == 0).all()


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("name", list(CHAINS))
def test_chains(name, certified):
    model, x = CHAINS[name]().eval(), draw(5, 12)
    old, new = update(model, 0.02)
    weight = next(key for key, t in old.items() if t.dim() == 2)
    occluder = Occluder(model, x)
    assert occluder.weight_name == weight
    assert isinstance(occluder.at(new), ChainEnd)
    torch.testing.assert_close(occluder.at(new).logits, functional_call(model, new, (x,)), rtol=0, atol=1e-12)
    parts = literal(model, old, new, x, weight)
    for direction in DIRECTIONS:
        got = occlude_update(model, old, new, x, direction=direction, certified=certified)
        torch.testing.assert_close(got, halves(parts, direction), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "linear"])
@pytest.mark.parametrize("name", [*CHAINS, "general"])
def test_targets_are_slices_of_all_outputs(name, mode):
    model = nn.Sequential(nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 3)) if name == "general" else CHAINS[name]()
    model, x = model.eval(), draw(5, 12)
    old, new = update(model)
    every = occlude_update(model, old, new, x, mode=mode)
    chosen = torch.tensor([2, 0, 1, 1, 2])
    predicted = functional_call(model, new, (x,)).argmax(1)
    for target, index in ((1, torch.ones(5).long()), (chosen, chosen), ("predicted", predicted)):
        got = occlude_update(model, old, new, x, target=target, mode=mode)
        torch.testing.assert_close(got, every[torch.arange(5), :, index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("certified", [True, False])
def test_feature_masks(certified):
    model, x = mlp(), draw(5, 3, 4)
    old, new = update(model, 0.02)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 3]])
    for direction in DIRECTIONS:
        got = occlude_update(model, old, new, x, feature_mask=mask, direction=direction, certified=certified)
        expected = halves(literal(model, old, new, x, "0.1.weight", mask), direction)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    own = torch.stack([mask, mask.flip(0), mask.flip(1), (mask + 1) % 4, mask])
    got = occlude_update(model, old, new, x, feature_mask=own, certified=certified)
    for b in range(5):
        one = occlude_update(model, old, new, x[b : b + 1], feature_mask=own[b], certified=certified)
        torch.testing.assert_close(got[b], one[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["exact", "linear"])
def test_an_absent_player_has_nothing(mode):
    mask = torch.tensor([[0, 0, 1] * 4, [0, 0, 2] * 4])
    model, x = CHAINS["one hidden layer"](), draw(2, 12)
    got = occlude_update(model, *update(model), x, feature_mask=mask, mode=mode)
    assert (got[0, 2] == 0).all()
    assert (got[1, 1] == 0).all()
    assert (got[0, :2] != 0).any(1).all()


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("size", [1e-1, 1e-4])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()], ids=str)
def test_inverse_property_is_exact(activation, size, precision):
    model, x = mlp(activation), draw(9, 3, 4)
    old, new = update(model, size)
    there = occlude_update(model, old, new, x, precision=precision)
    back = occlude_update(model, new, old, x, precision=precision)
    assert torch.equal(there, -back)
    one_sided = occlude_update(model, old, new, x, precision=precision, direction="forward")
    assert not torch.equal(one_sided, -occlude_update(model, new, old, x, precision=precision, direction="forward"))


def test_features_without_an_update_are_exactly_zero():
    model, x = mlp(), draw(5, 3, 4)
    old, new = update(model)
    new["0.1.weight"][:, 5] = old["0.1.weight"][:, 5]
    x[:, 0, 1] = 0
    for precision in ("float32", "float64", "tf32"):
        got = occlude_update(model, old, new, x, precision=precision)
        assert (got[:, [1, 5]] == 0).all()
        assert (got[:, 0] != 0).any()


def test_halving_the_step_divides_the_linear_gap_by_eight():
    model, x = mlp(nn.Tanh()), draw(5, 3, 4)
    old, new = update(model, 0.05)
    gaps = []
    for k in range(4):
        near = {name: old[name] + (new[name] - old[name]) / 2**k for name in old}
        exact, linear = (occlude_update(model, old, near, x, mode=mode) for mode in ("exact", "linear"))
        gaps.append(float((exact - linear).norm()))
    ratios = [a / b for a, b in itertools.pairwise(gaps)]
    assert all(7 < ratio < 9 for ratio in ratios[1:]), ratios


def test_linear_is_exact_where_no_unit_flips():
    model, x = mlp(), draw(5, 3, 4)
    old, new = update(model, 1e-7)
    exact, linear = (occlude_update(model, old, new, x, mode=mode) for mode in ("exact", "linear"))
    torch.testing.assert_close(exact, linear, rtol=1e-9, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("general", [False, True])
def test_linear_is_gradient_times_update(direction, general):
    model, x = mlp(nn.Tanh()), draw(5, 3, 4)
    model = nn.Sequential(model, nn.LayerNorm(4)) if general else model
    name = "0.0.1.weight" if general else "0.1.weight"
    old, new = update(model)
    parts = {}
    for key, state in (("forward", new), ("reverse", old)):
        weight = state[name].clone().requires_grad_()
        delta = new[name] - old[name]
        for b, k in itertools.product(range(5), range(4)):
            out = functional_call(model, {**state, name: weight}, (x[b : b + 1],))[0, k]
            grad = torch.autograd.grad(out, weight)[0]
            parts.setdefault(key, torch.zeros(5, 12, 4, dtype=torch.float64))[b, :, k] = (grad * delta).sum(0)
    got = occlude_update(model, old, new, x, direction=direction, mode="linear")
    torch.testing.assert_close(got, halves(parts, direction), rtol=0, atol=1e-12)


def test_corrections_add_up_to_the_change_of_the_first_layer():
    model, x = nn.Linear(12, 5), draw(3, 12)
    old, new = update(model)
    change = F.linear(x, new["weight"] - old["weight"])
    torch.testing.assert_close(occlude_update(model, old, new, x).sum(1), change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("tf32", 1e-3), ("bf16", 5e-3)])
def test_error_of_a_small_update(precision, bound, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 128), activation, nn.Linear(128, 64), activation, nn.Linear(64, 10)).eval()
    old = {name: t.double() for name, t in model.state_dict().items()}
    new = {
        name: t + 1e-4 * t.norm() * F.normalize(draw(*t.shape).flatten(), dim=0).view_as(t) for name, t in old.items()
    }
    x = draw(8, 60)
    expected = halves(literal(model, old, new, x, "0.weight"), "symmetric")
    got = occlude_update(model, old, new, x, precision=precision)
    assert got.dtype == torch.float32
    assert float((got - expected).norm() / expected.norm()) <= bound


class Untied(nn.Module):
    """The rest of a network behind a convolution whose every place has weights of its own."""

    @staticmethod
    def output(conv, weight, other, x, chosen):
        """conv(x) in plain loops with `weight`, but `other` for the chosen input elements [C, H, W]."""
        (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
        x, chosen = F.pad(x, (pw, pw, ph, ph)), F.pad(chosen, (pw, pw, ph, ph))
        n_out, n_in, kh, kw = weight.shape
        height, width = ((x.shape[i] - d * (k - 1) - 1) // s + 1 for i, d, k, s in ((2, dh, kh, sh), (3, dw, kw, sw)))
        out = torch.zeros(len(x), n_out, height, width, dtype=torch.float64)
        group = conv.in_channels // conv.groups
        for o, i, j, c, a, b in itertools.product(*map(range, (n_out, height, width, n_in, kh, kw))):
            channel = c + (o // (n_out // conv.groups)) * group
            at = channel, i * sh + a * dh, j * sw + b * dw
            used = other if chosen[at] else weight
            out[:, o, i, j] += used[o, c, a, b] * x[:, at[0], at[1], at[2]]
        return out if conv.bias is None else out


class Conv(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = None
        self.conv = nn.Conv2d(2, 4, **options)
        self.rest = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        return self.behind(self.conv(x))

    def behind(self, z):
        return self.rest(z)


def behind(model, state, z):
    """The rest of a Conv from its first layer's output."""
    rest = {name.removeprefix("rest."): t for name, t in state.items() if name.startswith("rest.")}
    bias = state.get("conv.bias")
    return functional_call(model.rest, rest, (z if bias is None else z + bias[:, None, None],))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (2, 3), "padding": (0, 2), "dilation": (2, 1), "stride": (1, 2)},
        {"kernel_size": 3, "groups": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2},
    ],
    ids=str,
)
def test_convolutions_are_untied(options, bias, direction):
    model, x = Conv(bias=bias, **options).eval(), draw(2, 2, 6, 7)
    old, new = update(model)
    mask = torch.arange(42).reshape(6, 7) // 5
    got = occlude_update(model, old, new, x, feature_mask=mask, direction=direction)
    old_w, new_w, parts = old["conv.weight"], new["conv.weight"], {"forward": [], "reverse": []}
    assert isinstance(Occluder(model, x).at(new), LayerEnd)
    for m in range(int(mask.max()) + 1):
        chosen = (mask == m).expand(2, 6, 7)
        undone = Untied.output(model.conv, new_w, old_w, x, chosen)
        applied = Untied.output(model.conv, old_w, new_w, x, chosen)
        parts["forward"].append(functional_call(model, new, (x,)) - behind(model, new, undone))
        parts["reverse"].append(behind(model, old, applied) - functional_call(model, old, (x,)))
    expected = halves({key: torch.stack(part, 1) for key, part in parts.items()}, direction)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_elements_of_a_convolution_are_players_by_default():
    model, x = Conv(kernel_size=3, padding=1).eval(), draw(2, 2, 3, 3)
    x[0, 1, 2, 0] = 0
    old, new = update(model)
    got = occlude_update(model, old, new, x)
    assert got.shape == (2, 18, 3)
    assert (got[0, 15] == 0).all()
    for m in (0, 10, 17):
        z = F.conv2d(x, new["conv.weight"], new["conv.bias"], padding=1)
        alone = torch.where(torch.arange(18).reshape(2, 3, 3) == m, x, 0)
        z = z - F.conv2d(alone, new["conv.weight"] - old["conv.weight"], padding=1)
        change = functional_call(model, new, (x,)) - behind(model, {**new, "conv.bias": 0 * new["conv.bias"]}, z)
        half = occlude_update(model, old, new, x, direction="forward")[:, m]
        torch.testing.assert_close(half, change, rtol=0, atol=1e-12)


def test_patch_embedding():
    model = xaifast.models.VisionTransformer(16, 8, 3, dim=16, depth=1, heads=2).eval()
    x = draw(2, 3, 16, 16)
    old, new = update(model, 0.05)
    occluder = Occluder(model, x, feature_mask=xaifast.grid_mask((16, 16), 8))
    delta = occluder.delta(old, new)
    end = occluder.at(new)
    got = end.undo(delta)
    name = occluder.weight_name
    seen = {}
    layer = model.get_submodule(name.removesuffix(".weight"))
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, 192)
    corrections = patches @ delta.reshape(16, 192).t()  # [2, 4, 16]: one token each

    def hook(module, args, out):
        rows = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out  # [2, 4, 16]
        rows = rows.clone()
        rows[:, seen["m"]] -= corrections[:, seen["m"]]
        return rows.transpose(1, 2).reshape(out.shape) if out.dim() == 4 else rows

    for m in range(4):
        seen["m"] = m
        handle = layer.register_forward_hook(hook)
        occluded = functional_call(model, new, (x,))
        handle.remove()
        torch.testing.assert_close(got[:, m], functional_call(model, new, (x,)) - occluded, rtol=0, atol=1e-12)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(9, 6), nn.Parameter(torch.zeros(5, 6))
        self.rest = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.rest(self.table(ids) + self.places).mean(1))

    def from_vectors(self, vectors):
        return self.head(self.rest(vectors + self.places).mean(1))


@pytest.mark.parametrize("mask", [None, torch.tensor([0, 0, 1, 2, 1])])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_embedding_tables(direction, mask):
    model, ids = Tokens().eval(), torch.tensor([[1, 4, 4, 0, 8], [2, 3, 7, 7, 1]])
    old, new = update(model)
    new["table.weight"][7] = old["table.weight"][7]
    got = occlude_update(model, old, new, ids, direction=direction, feature_mask=mask, precision="float64")
    here, there = (new, old) if direction == "forward" else (old, new)
    rest = copy.deepcopy(model).double()
    rest.load_state_dict(here)
    rest.eval()
    players = torch.arange(5) if mask is None else mask
    for m in range(int(players.max()) + 1):
        vectors = torch.where((players == m)[:, None], there["table.weight"][ids], here["table.weight"][ids])
        with torch.no_grad():
            change = rest.from_vectors(here["table.weight"][ids]) - rest.from_vectors(vectors)
        change = change if direction == "forward" else -change
        torch.testing.assert_close(got[:, m], change, rtol=0, atol=1e-12)
    if mask is None:
        assert (got[1, 2:4] == 0).all()


def test_a_network_behind_a_dense_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3), nn.Softmax(1))
    x = draw(4, 3, 4)
    old, new = update(model.eval())
    assert isinstance(Occluder(model, x).at(new), LayerEnd)
    parts = literal(model, old, new, x, "1.weight")
    for direction in DIRECTIONS:
        got = occlude_update(model, old, new, x, direction=direction, batch_size=5)
        torch.testing.assert_close(got, halves(parts, direction), rtol=0, atol=1e-12)


def test_chain_and_run_agree():
    model, x = mlp(), draw(5, 3, 4)
    old, new = update(model)
    occluder = Occluder(model, x, feature_mask=xaifast.grid_mask((3, 4), 2))
    delta = occluder.delta(old, new)
    chain, run = occluder.at(new), occluder.run_at(new, "float64")
    for name in ("undo", "apply", "linear"):
        torch.testing.assert_close(getattr(chain, name)(delta), getattr(run, name)(delta), rtol=0, atol=1e-12)


class Normalised(nn.Module):
    """Elementwise before its first layer, or with a shift of places."""

    def __init__(self, shift=0):
        super().__init__()
        self.conv, self.head, self.shift = nn.Conv2d(1, 2, 3), nn.Linear(8, 2), shift

    def forward(self, x):
        return self.head(self.conv(((x - 0.3) / 0.2).roll(self.shift, -1)).relu().flatten(1))


def test_a_weight_that_is_tied_moves_in_the_first_layer_alone():
    class Tied(Tokens):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

    model, ids = Tied().eval(), torch.tensor([[1, 4, 2, 0, 8]])
    old, new = update(model)
    old["head.weight"], new["head.weight"] = old["table.weight"], new["table.weight"]
    got = occlude_update(model, old, new, ids, direction="forward", precision="float64")
    rest = copy.deepcopy(model).double()
    rest.load_state_dict(new)
    vectors = new["table.weight"][ids].clone()
    with torch.no_grad():
        clean = rest.from_vectors(vectors)
        vectors[:, 2] = old["table.weight"][2]
        torch.testing.assert_close(got[:, 2], clean - rest.from_vectors(vectors), rtol=0, atol=1e-12)


def test_what_comes_before_the_first_layer_must_keep_places():
    model, x = Normalised().eval(), draw(2, 1, 4, 4)
    old, new = update(model)
    got = occlude_update(model, old, new, x, direction="forward")
    inner = (x - 0.3) / 0.2
    z = F.conv2d(inner, new["conv.weight"], new["conv.bias"])
    alone = torch.where(torch.arange(16).reshape(4, 4) == 5, inner, 0)
    z = z - F.conv2d(alone, new["conv.weight"] - old["conv.weight"])
    out = F.linear(z.relu().flatten(1), new["head.weight"], new["head.bias"])
    torch.testing.assert_close(got[:, 5], functional_call(model, new, (x,)) - out, rtol=0, atol=1e-12)
    shifted = Normalised(shift=1).eval()
    with pytest.raises(ValueError, match="element by element"):
        occlude_update(shifted, old, new, x)


def test_first_layer_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return (self.a(x).tanh() * self.b(x)).sum(1)

    model, x = Two().eval(), draw(3, 6)
    old, new = update(model)
    for name in ("a", "b", "b.weight"):
        got = occlude_update(model, old, new, x, first_layer=name, direction="forward")
        weight = name.removesuffix(".weight") + ".weight"
        clean = functional_call(model, new, (x,))
        undone = new[weight].clone()
        undone[:, 2] = old[weight][:, 2]
        expected = clean - functional_call(model, {**new, weight: undone}, (x,))
        torch.testing.assert_close(got[:, 2, 0], expected, rtol=0, atol=1e-12)
    for name in ("c", ""):
        with pytest.raises(ValueError, match="first_layer must name"):
            occlude_update(model, old, new, x, first_layer=name)


def test_nothing_of_the_model_changes():
    for model, x in ((mlp(), draw(2, 3, 4).float()), (Conv(kernel_size=3).eval(), draw(2, 2, 6, 6).float())):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        old, new = update(model)
        states = [{name: t.clone() for name, t in state.items()} for state in (old, new)]
        random = torch.get_rng_state()
        occlude_update(model, old, new, x)
        assert torch.equal(torch.get_rng_state(), random)
        for state, kept in zip((model.state_dict(), old, new), (before, *states), strict=True):
            assert all(torch.equal(state[name], kept[name]) for name in kept)
        assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_error_of_the_model_leaves_it_as_it_was():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            if len(x) > 2:
                raise RuntimeError("too many")
            return self.conv(x).flatten(1)

    model = Fails().eval()
    with pytest.raises(RuntimeError, match="too many"):
        occlude_update(model, *update(model), draw(2, 1, 4, 4))
    assert "forward" not in model.conv.__dict__


def test_verify_logs_the_error_and_refuses_a_large_one(caplog, monkeypatch):
    model, x = mlp(nn.Tanh()), draw(5, 3, 4)
    old, new = update(model, 1e-3)
    with caplog.at_level(logging.INFO, logger="xaifast"):
        occlude_update(model, old, new, x, precision="float32", verify=True)
        occlude_update(model, old, new, x, precision="bf16", verify=True, target=1)
    assert len([r for r in caplog.records if "relative error" in r.message]) == 4
    undo = ChainEnd.undo
    monkeypatch.setattr(ChainEnd, "undo", lambda *args: undo(*args) * 1.01)
    with pytest.raises(RuntimeError, match="against float64 must be at most"):
        occlude_update(model, old, new, x, precision="float32", verify=True)


def test_dtypes_of_results():
    model, x = mlp(), draw(2, 3, 4)
    old, new = update(model)
    narrow = [{name: t.float() for name, t in state.items()} for state in (old, new)]
    assert occlude_update(model, *narrow, x.float()).dtype == torch.float32
    assert occlude_update(model, *narrow, x).dtype == torch.float64
    assert occlude_update(copy.deepcopy(model).double(), old, new, x.float()).dtype == torch.float64
    half = [{name: t.bfloat16() for name, t in state.items()} for state in (old, new)]
    got = occlude_update(copy.deepcopy(model).bfloat16(), *half, x.bfloat16())
    wide = [{name: t.double() for name, t in state.items()} for state in half]
    expected = halves(literal(model, *wide, x.bfloat16().double(), "0.1.weight"), "symmetric")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def changed(state, name, change):
    return {**state, name: change(state[name])}


def test_bad_states():
    model, x = mlp(), draw(2, 3, 4)
    old, new = update(model)
    short = {name: t for name, t in new.items() if name != "2.bias"}
    cases = [
        ((old, short), r"new_state must be a state dict of the model, but it lacks '2\.bias'"),
        (({**old, "extra": x}, new), "old_state must be a state dict of the model, but it has 'extra'"),
        ((changed(old, "2.weight", lambda t: t[:, 1:]), new), r"old_state\['2\.weight'\] must have shape \(7, 11\)"),
        ((old, changed(new, "4.bias", lambda t: t * torch.nan)), r"finite, but new_state\['4\.bias'\] is not"),
    ]
    for states, message in cases:
        with pytest.raises(ValueError, match=message):
            occlude_update(model, *states, x, direction="forward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both"}, "direction must be"),
        ({"mode": "taylor"}, "mode must be"),
        ({"precision": "fp16"}, "precision must be"),
        ({"target": 4}, r"target must be in 0\.\.3"),
        ({"target": torch.tensor([0, 1, 2])}, "target must be an int"),
        ({"target": "best"}, "target must be an int"),
        ({"target": 1.5}, "target must be an int"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"feature_mask": torch.zeros(3, 5, dtype=torch.int64)}, "feature_mask must be broadcastable"),
        ({"feature_mask": torch.tensor([0, 2, 2, 2])}, "occurs nowhere"),
        ({"inputs": torch.full((2, 3, 4), torch.nan)}, r"inputs must be finite, got nan at \(0, 0, 0\)"),
        ({"inputs": torch.zeros(0, 3, 4)}, "B >= 1"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    model = mlp()
    options = {"inputs": draw(2, 3, 4), **options}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        occlude_update(model, *update(model), options.pop("inputs"), **options)
    assert str(error.value).startswith("xaifast.occlude_update")


def test_models_that_are_not_supported():
    x = draw(2, 4).float()
    for model, message in (
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), "first layer with parameters must be"),
        (nn.Sequential(nn.Tanh()), "no layer with parameters"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), "must not be random"),
    ):
        with pytest.raises(ValueError, match=message):
            occlude_update(model, *update(model), x)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        occlude_update(lambda x: x, {}, {}, x)
    shared = nn.Linear(4, 4)  # a state dict names it twice
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    with pytest.raises(ValueError, match="used once"):
        occlude_update(model, *update(model), x)
    model = Conv(kernel_size=3).eval()
    with pytest.raises(ValueError, match="needs a chain"):
        occlude_update(model, *update(model), draw(2, 2, 6, 6), precision="bf16")
