"""The Triton kernel of occlude_linear, interpreted on the CPU: TRITON_INTERPRET=1 pytest tests/kernels."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 and run tests/kernels in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from xaifast.kernels import occlude

from xaifast.reference import occlude as reference

NAMES = ["identity", "relu", "leaky_relu:0.1", "sigmoid", "tanh", "silu"]


def case(hidden, names, n_outputs=3, width=37, size=1.0, readout=False, n_inputs=3, n_elements=7):
    """Random arguments; every seventh row is left out, so that rows are a list."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    widths = [width, 21][:hidden]
    x, columns = draw(n_inputs, n_elements), size * draw(n_elements, width)
    base = [2 * draw(n_inputs, w) for w in widths]
    weights = [draw(b, a) for a, b in zip(widths, [*widths[1:], n_outputs], strict=True)]
    last = draw(n_inputs, widths[-1]) if readout else None
    rows = torch.tensor([r for r in range(n_inputs * n_elements) if r % 7 != 3])
    return x, columns, rows, base, weights[: len(weights) - readout], names, last


def expected(arguments, precision="full"):
    x, columns, rows, base, weights, names, readout = arguments
    x, columns, readout = (None if t is None else t.double() for t in (x, columns, readout))
    base, weights = [z.double() for z in base], [w.double() for w in weights]
    return reference.occlude_linear(x, columns, rows, x.shape[1], base, weights, names, None, None, readout, precision)


def relative(actual, wanted):
    assert actual.shape == wanted.shape
    return float((actual.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [1, 2])
def test_activations(hidden, name, size, readout):
    arguments = case(hidden, [name] * hidden, size=size, readout=readout)
    assert occlude.serves(arguments[0], *arguments[3:6], None, arguments[6], "full")
    assert relative(occlude.occlude_linear(*arguments, "full"), expected(arguments)) < 2e-6


@pytest.mark.parametrize("width", [1, 16, 31, 32, 33, 64])
@pytest.mark.parametrize("n_outputs", [1, 16, 17])
@pytest.mark.parametrize("hidden", [1, 2])
def test_sizes(hidden, n_outputs, width):
    arguments = case(hidden, ["relu", "tanh"][:hidden], n_outputs, width)
    assert relative(occlude.occlude_linear(*arguments, "full"), expected(arguments)) < 2e-6


def test_rows_of_several_programs():
    arguments = case(2, ["relu", "relu"], n_inputs=40, n_elements=9)
    assert relative(occlude.occlude_linear(*arguments, "full"), expected(arguments)) < 2e-6


@pytest.fixture
def bf16_products(monkeypatch):
    """The interpreter multiplies the bits of bf16 numbers as integers; give it their values."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def values(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, values(a), values(b), *rest),
    )


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.usefixtures("bf16_products")
def test_operands_are_bf16(readout, monkeypatch):
    arguments = case(2, ["relu", "relu"], size=1e-4, readout=readout)
    actual = occlude.occlude_linear(*arguments, "bf16")

    def truncated(t, precision):  # which is what the interpreter does
        return (t.float().view(torch.int32) & -65536).view(torch.float32).to(t.dtype)

    monkeypatch.setattr(reference, "round_operand", truncated)
    assert relative(actual, expected(arguments)) < 1e-3
    monkeypatch.undo()
    assert relative(actual, expected(arguments)) > 3e-3


def test_slopes_of_two_layers_are_their_own():
    arguments = case(2, ["leaky_relu:0.3", "leaky_relu:0.05"])
    assert relative(occlude.occlude_linear(*arguments, "full"), expected(arguments)) < 2e-6


def test_large_changes_saturate():
    x, columns, *rest = case(1, ["sigmoid"])
    columns = columns * 1e4
    assert relative(occlude.occlude_linear(x, columns, *rest, "full"), expected((x, columns, *rest))) < 2e-6


def test_what_is_left_to_tiles():
    x, columns, rows, base, weights, names, readout = case(2, ["relu", "relu"])
    order, wide = torch.arange(7)[None], [weights[0], torch.randn(200, 21)]
    assert not occlude.serves(x, base, weights, names, order, None, "full")
    assert not occlude.serves(x.double(), base, weights, names, None, None, "full")
    assert not occlude.serves(x, base, weights, ["relu", "gelu"], None, None, "full")
    assert not occlude.serves(x, [*base, base[1]], [*weights, weights[1]], [*names, "relu"], None, None, "full")
    assert not occlude.serves(x, base, wide, names, None, None, "full")
    assert occlude.serves(x, base, wide, names, None, None, "bf16")


def test_empty():
    x, columns, _, base, weights, names, _ = case(2, ["relu", "relu"])
    rows = torch.zeros(0, dtype=torch.int64)
    assert occlude.occlude_linear(x, columns, rows, base, weights, names, None, "full").shape == (0, 3)
