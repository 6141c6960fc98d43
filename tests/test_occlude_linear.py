"""The operator occlude_linear: every activation against literal differences, rows, groups, precisions, transforms."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from xaifast import _native
from xaifast.ops import occlude as ops
from xaifast.ops import occlude_linear
from xaifast.reference import occlude as reference

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
FUNCTIONS = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu:0.1": lambda z: F.leaky_relu(z, 0.1),
    "elu:1.5": lambda z: F.elu(z, 1.5),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
NAMES = list(FUNCTIONS)
BACKENDS = ["native", "reference"]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "native" and _native.cpu() is None:
        pytest.skip("no native module")
    monkeypatch.setenv("XAIFAST_BACKEND", request.param)


def network(widths=(37, 21, 4), name="relu", n_inputs=3, n_elements=7, size=1.0, seed=0):
    """x [B, N] with zeros, delta [H, N], base pre-activations, weights and a function of z_1, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, delta, z = draw(n_inputs, n_elements), size * draw(widths[0], n_elements), 2 * draw(n_inputs, widths[0])
    x[0, n_elements // 2] = 0
    weights = [draw(b, a) / a**0.5 for a, b in zip(widths, widths[1:], strict=False)]
    biases = [draw(w) for w in widths[1:]]
    phi = FUNCTIONS[name]

    def rest(z):
        for weight, bias in zip(weights, biases, strict=True):
            z = phi(z) @ weight.t() + bias
        return z

    base = [z]
    for weight, bias in zip(weights[:-1], biases, strict=False):
        base.append(phi(base[-1]) @ weight.t() + bias)
    return x, delta, base, weights, rest


def literal(x, delta, z, rest, groups=None):
    """[B, M, K] by one evaluation a player."""
    ids = torch.arange(x.shape[1]) if groups is None else groups
    ids = ids.expand(x.shape)
    changes = [torch.where(ids == m, x, 0) @ delta.t() for m in range(int(ids.max()) + 1)]
    return torch.stack([rest(z) - rest(z - d) for d in changes], 1)


def relative(actual, expected):
    return float((actual.double().cpu() - expected).norm() / expected.norm())


def on(device, dtype, *tensors):
    return [t.to(device, dtype) for t in tensors]


@pytest.mark.parametrize("widths", [(37, 4), (37, 21, 4), (8, 5, 6, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_float64_is_literal(name, widths, device):
    x, delta, base, weights, rest = network(widths, name)
    got = occlude_linear(
        *on(device, torch.float64, x, delta), on(device, torch.float64, *base), on(device, torch.float64, *weights),
        activations=name,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), literal(x, delta, base[0], rest), rtol=0, atol=1e-12)
    assert (got[0, 3] == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_float32_error_is_relative_to_the_change(name, size, device):
    x, delta, base, weights, rest = network(name=name, size=size)
    args = on(device, torch.float32, x, delta), on(device, torch.float32, *base), on(device, torch.float32, *weights)
    got = occlude_linear(*args[0], *args[1:], activations=name)
    assert relative(got, literal(x, delta, base[0], rest)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_saturated_units_and_large_changes(name, dtype):
    z = torch.tensor([[-40.0, -8.0, -1e-3, 0.0, 1e-3, 8.0, 40.0]], dtype=torch.float64).expand(1, 7)
    delta = torch.tensor([[1e-3, 3.0, 30.0, 300.0, -1e-3, -3.0, -300.0]], dtype=torch.float64).expand(7, 7)
    got = occlude_linear(
        torch.ones(1, 7, dtype=dtype), delta.to(dtype), [z.to(dtype)], [torch.eye(7, dtype=dtype)], activations=name
    )
    phi = FUNCTIONS[name]
    expected = phi(z[0]) - phi(z[0] - delta.t())  # [7 changes, 7 units]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got[0].double(), expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("per_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("backend")
def test_groups(dtype, per_input):
    x, delta, base, weights, rest = network(n_elements=11)
    groups = torch.tensor([0, 3, 0, 2, 2, 2, 1, 3, 3, 3, 3])
    if per_input:
        groups = torch.stack((groups, groups.flip(0), torch.zeros(11, dtype=torch.int64)))
    x[0, groups.expand(3, -1)[0] == 2] = 0
    args = (x.to(dtype), delta.to(dtype), [z.to(dtype) for z in base], [w.to(dtype) for w in weights])
    got = occlude_linear(*args, groups=groups)
    assert relative(got, literal(x, delta, base[0], rest, groups)) < (1e-6 if dtype == torch.float32 else 1e-14)
    assert (got[0, 2] == 0).all()


@pytest.mark.usefixtures("backend")
def test_nan_behind_a_zero_does_not_leak():
    x, delta, base, weights, rest = network()
    x[:, 3] = 0
    expected = literal(x, delta, base[0], rest)
    delta[:, 3] = torch.nan
    torch.testing.assert_close(occlude_linear(x, delta, base, weights), expected, rtol=0, atol=1e-12)


def operator_arguments(dtype=torch.float64, readout=False, grouped=False, name="relu"):
    x, delta, base, weights, _ = network(name=name)
    rows = torch.tensor([20, 0, 3, 9, 9])
    order, offsets, n_players = None, None, 7
    if grouped:
        n_players, order, offsets = ops.group_elements(torch.tensor([0, 1, 1, 2, 2, 2, 0]), x)
        rows = torch.tensor([8, 0, 4, 4])
    last = torch.randn(3, 21, generator=torch.Generator().manual_seed(3)).to(dtype) if readout else None
    weights = weights[:1] if readout else weights
    cast = lambda tensors: [t.to(dtype) for t in tensors]  # noqa: E731
    return [
        x.to(dtype), delta.t().to(dtype), rows, n_players, cast(base), cast(weights), [name] * 2, order, offsets, last,
        "full",
    ]  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("readout", [False, True])
def test_rows_in_any_order_and_twice(readout, grouped):
    arguments = operator_arguments(readout=readout, grouped=grouped)
    got = torch.ops.xaifast.occlude_linear(*arguments)
    torch.testing.assert_close(got, reference.occlude_linear(*arguments), rtol=1e-13, atol=1e-13)
    if readout:
        every = operator_arguments(grouped=grouped)
        every[5] = [every[5][0], torch.eye(21, dtype=torch.float64)]
        full, sample = torch.ops.xaifast.occlude_linear(*every), arguments[2] // arguments[3]
        torch.testing.assert_close(got[:, 0], (full * arguments[9][sample]).sum(1))


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("rows_a_tile", [64, 100, 10**6])
def test_tiles_do_not_show(rows_a_tile, name, monkeypatch):
    x, delta, base, weights, rest = network(name=name, n_inputs=40)
    monkeypatch.setitem(ops._TILE_BYTES, "cpu", rows_a_tile * 8 * (37 + 21))
    got = occlude_linear(x, delta, base, weights, activations=name)
    torch.testing.assert_close(got, literal(x, delta, base[0], rest), rtol=0, atol=1e-12)


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    made = []
    x, delta, base, weights, _ = network((256, 128, 10), n_inputs=100, n_elements=300)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *s: made.append(new_empty(t, *s)) or made[-1])
    occlude_linear(x, delta, base, weights)
    tiles = [t for t in made if t.shape[-1] != 10]
    assert len(tiles) == 2
    assert sum(t.nbytes for t in tiles) <= 2**23


def test_non_contiguous_arguments():
    x, delta, base, weights, rest = network()
    expected = literal(x, delta, base[0], rest)
    wide = torch.full((3, 14), torch.nan, dtype=torch.float64)
    wide[:, ::2] = x
    got = occlude_linear(
        wide[:, ::2], delta.t().contiguous().t(), [z.t().contiguous().t() for z in base],
        [w.t().contiguous().t() for w in weights],
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_last_activation():
    x, delta, base, weights, rest = network((6, 5, 4), "tanh")
    z_last = rest(base[0])
    got = occlude_linear(x, delta, [*base, z_last], weights, activations=["tanh", "tanh", "sigmoid"])
    expected = literal(x, delta, base[0], lambda z: rest(z).sigmoid())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-5, 1e-3), ("bf16", 1e-4, 5e-3)])
@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_low_precision_error_is_relative_to_the_change(size, precision, least, most):
    x, delta, base, weights, rest = network((64, 48, 10), size=size, n_elements=30)
    args = [t.float() for t in (x, delta)] + [[t.float() for t in ts] for ts in (base, weights)]
    error = relative(occlude_linear(*args, precision=precision), literal(x, delta, base[0], rest))
    assert least < error < most


def test_tf32_rounds_to_nearest_even():
    one = torch.tensor([1.0])
    ulp = 2.0**-10
    given = torch.cat((one + ulp / 2, one + 1.5 * ulp, one + 0.51 * ulp, -(one + 0.51 * ulp), one + 0.49 * ulp))
    expected = torch.cat((one, one + 2 * ulp, one + ulp, -(one + ulp), one))
    assert torch.equal(reference.round_operand(given, "tf32"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    x, delta, base, weights, _ = network((4, 3, 2), name, n_elements=3)
    leaves = [t.requires_grad_() for t in (x[1:], delta, base[0][1:], base[1][1:], *weights)]
    call = lambda x, d, z, z2, w, w2: occlude_linear(x, d, [z, z2], [w, w2], activations=name)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, readout, grouped):
    arguments = operator_arguments(readout=readout, grouped=grouped)
    arguments[1] = arguments[1].clone().requires_grad_(grad)
    torch.library.opcheck(torch.ops.xaifast.occlude_linear.default, arguments)


def test_compile():
    arguments = operator_arguments()
    compiled = torch.compile(lambda x, d: torch.ops.xaifast.occlude_linear(x, d, *arguments[2:]) * 2, fullgraph=True)
    torch.testing.assert_close(
        compiled(*arguments[:2]), 2 * reference.occlude_linear(*arguments), rtol=1e-13, atol=1e-13
    )


def test_vmap_over_updates():
    arguments = operator_arguments()
    columns = torch.stack((arguments[1], -2 * arguments[1]))
    call = lambda d: torch.ops.xaifast.occlude_linear(arguments[0], d, *arguments[2:])  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(columns), torch.stack([call(d) for d in columns]))


def test_no_rows():
    arguments = operator_arguments()
    arguments[2] = torch.zeros(0, dtype=torch.int64)
    assert torch.ops.xaifast.occlude_linear(*arguments).shape == (0, 4)
    x, delta, base, weights, _ = network()
    assert (occlude_linear(0 * x, delta, base, weights) == 0).all()


SCRIPT = """
import hashlib, torch
from xaifast import _native
from xaifast.ops import occlude
for dtype in (torch.float32, torch.float64):
    g = torch.Generator().manual_seed(0)
    x, d, z = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((3, 7), (7, 77), (3, 77)))
    n_players, order, offsets = occlude.group_elements(torch.tensor([0, 1, 1, 2, 2, 2, 0]), x)
    for name in occlude._NATIVE_STEPS:
        name += ":0.1" if name == "leaky_relu" else ""
        for players in ((7, None, None), (n_players, order, offsets)):
            rows = torch.arange(3 * players[0])
            out = torch.empty(len(rows), 77, dtype=dtype)
            steps = occlude.NativeSteps(_native.cpu(), x, d, rows, players[0], [z], [name], *players[1:])
            steps(0, out, 0, len(rows))
            print(dtype, name, players[0], hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(_native.cpu() is None, reason="no native module")
def test_instruction_sets_agree():
    printed = set()
    for isa in _native.cpu().build_info()["supported"]:
        environment = {**os.environ, "XAIFAST_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "default"}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.splitlines()) == 24
        printed.add(run.stdout)
    assert len(printed) == 1


def broken(change):
    x, delta, base, weights, _ = network()
    given = dict(x=x, delta=delta, base=base, weights=weights)
    given.update(change)
    return given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "must be given x"),
        ({"delta": torch.zeros(36, 7, dtype=torch.float64)}, "must be given x"),
        ({"x": torch.zeros(7)}, "x must be a tensor"),
        ({"delta": torch.zeros(37, 7)}, "float32 or float64 alike"),
        ({"base": [torch.zeros(2, 37, dtype=torch.float64)]}, "must be given x"),
        ({"activations": "softmax"}, "must be among"),
        ({"activations": "leaky_relu"}, "with their parameter"),
        ({"activations": ["relu"]}, "must be given x"),
        ({"precision": "fp8"}, "must be one of"),
        ({"groups": torch.zeros(6, dtype=torch.int64)}, "groups must be int64"),
        ({"groups": torch.zeros(7)}, "groups must be int64"),
        ({"groups": torch.tensor([0, 1, -1, 0, 0, 0, 0])}, "negative"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    given = broken(change)
    with pytest.raises(ValueError, match=r"xaifast\.occlude_linear") as error:
        occlude_linear(given.pop("x"), given.pop("delta"), given.pop("base"), given.pop("weights"), **given)
    assert message in str(error.value)
