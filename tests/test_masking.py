import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from masking_cases import DEVICES, DTYPES, assert_bytes, design, random

from xaifast.ops.coalitions import pack_coalitions
from xaifast.ops.masking import blend_inputs, mask_inputs, plan_selection
from xaifast.reference import masking as reference


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def brute(x, present, players, background):
    """where() for one row at a time; players and background [R] given for every input: [B, N, R, *feat]."""
    n_inputs, n_coalitions, n_background = len(x), present.shape[-2], background.shape[1]
    out = x.new_zeros((n_inputs, n_coalitions, n_background, *x.shape[1:]))
    for b, n, r in itertools.product(range(n_inputs), range(n_coalitions), range(n_background)):
        row = present[b, n] if present.dim() == 3 else present[n]
        seen = torch.tensor([p < 0 or bool(row[p]) for p in players[b].flatten().tolist()], dtype=torch.bool)
        out[b, n, r] = torch.where(seen.to(x.device).reshape(x.shape[1:]), x[b], background[b, r])
    return out


SHAPE = (2, 3, 4, 6)
MASKS = {
    "superpixels": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 4]] * 2),
    "superpixels [1, H, W]": torch.tensor([[[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2]),
    "superpixels [1, C, H, W]": torch.tensor([[[[0, 0, 0, 1, 1, 1]] * 4] * 3]),
    "channels": torch.arange(3).reshape(3, 1, 1),
    "rows": torch.arange(4).reshape(4, 1),
    "channels and columns": torch.arange(3).reshape(3, 1, 1) * 6 + torch.arange(6),
    "pixels": torch.arange(24).reshape(4, 6),
    "elements": torch.arange(72).reshape(3, 4, 6),
    "per input": torch.randint(-1, 9, SHAPE, generator=torch.Generator().manual_seed(1)),
    "per input [B, 1, H, W]": torch.randint(0, 9, (2, 1, 4, 6), generator=torch.Generator().manual_seed(2)),
    "always present": torch.tensor([-1, 0, 1, -1, 70, 2]),
    "one player": torch.tensor(0),
    "int32": torch.arange(24, dtype=torch.int32).reshape(4, 6),
    "none": None,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("baseline", ["number", "tensor", "broadcast", "per input", "background"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_every_row_is_where(mask, baseline, memory_format, device):
    x = random(SHAPE, device=device)
    feature_mask = MASKS[mask]
    players = torch.arange(72).reshape(3, 4, 6) if feature_mask is None else feature_mask
    players = players.expand(SHAPE)
    present = design(int(players.max()) + 1, device=device)
    background = {
        "number": torch.full((2, 1, *SHAPE[1:]), 0.25),
        "tensor": random((1, 1, *SHAPE[1:]), seed=2).expand(2, -1, -1, -1, -1),
        "broadcast": random((1, 1, 3, 1, 1), seed=3).expand(2, 1, *SHAPE[1:]),
        "per input": random((2, 1, *SHAPE[1:]), seed=4),
        "background": random((1, 5, *SHAPE[1:]), seed=5).expand(2, -1, -1, -1, -1),
    }[baseline].to(device)
    arguments = {
        "number": {"baselines": 0.25},
        "tensor": {"baselines": background[0, 0]},
        "broadcast": {"baselines": background[0, 0, :, :1, :1]},
        "per input": {"baselines": background[:, 0]},
        "background": {"background": background[0]},
    }[baseline]
    expected = brute(x, present, players, background)
    if baseline != "background":
        expected = expected[:, :, 0]
    given = None if feature_mask is None else feature_mask.to(device)
    for coalitions in (present, pack_coalitions(present)):
        actual = mask_inputs(x, coalitions, given, **arguments, memory_format=memory_format)
        assert_bytes(actual, expected)
        assert actual.flatten(0, actual.dim() - 4).is_contiguous(memory_format=memory_format)
    assert_bytes(reference.mask_inputs(x, present, given, **arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 6), (2, 7, 5)], ids=str)
def test_dtypes(dtype, shape, device):
    x, base = random(shape, dtype, device), random((1, *shape[1:]), dtype, device, seed=1)
    players = torch.arange(base.numel()).reshape(shape[1:]) % 4
    present = design(4, device=device)
    expected = brute(x, present, players.expand(shape), base.expand(shape)[:, None])[:, :, 0]
    assert_bytes(mask_inputs(x, present, players.to(device), base), expected)


@pytest.mark.parametrize("n_players", [1, 2, 64, 65, 130])
def test_numbers_of_players(n_players, device):
    x, present = random((2, n_players), device=device), design(n_players, device=device)
    expected = torch.where(present, x[:, None], 0.0)
    assert_bytes(mask_inputs(x, present), expected)
    assert_bytes(mask_inputs(x, pack_coalitions(present)), expected)


def test_coalitions_of_each_input(device):
    x = random((3, 70), device=device)
    present = torch.stack([design(70, device=device, seed=s) for s in range(3)])
    expected = torch.where(present, x[:, None], 1.5)
    assert_bytes(mask_inputs(x, present, baselines=1.5), expected)
    assert_bytes(mask_inputs(x, pack_coalitions(present), baselines=1.5), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_leaks(value, device):
    x, present = random((2, 9), device=device), design(9, device=device)
    dirty = torch.full_like(x, value)
    assert_bytes(mask_inputs(dirty, present[1:2], baselines=x), x[:, None])
    assert_bytes(mask_inputs(x, present[:1], baselines=dirty), x[:, None])
    signed = torch.tensor([[-0.0, value]], device=device)
    assert_bytes(mask_inputs(signed, present[:1, :2], baselines=3.0), signed[None])


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_normalisation_and_cast_commute_with_selection(dtype, source, memory_format, device):
    x, background = random(SHAPE, source, device), random((4, *SHAPE[1:]), source, device, seed=1)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    players = MASKS["superpixels"].to(device)
    present = design(5, device=device)
    precision = source if source.is_floating_point else torch.float32
    mean_t, std_t = (torch.tensor(v, dtype=precision, device=device) for v in (mean, std))
    expected = reference.mask_inputs(x, present, players, background=background, mean=mean_t, std=std_t, dtype=dtype)
    actual = mask_inputs(
        x, present, players, background=background, mean=mean, std=std_t, dtype=dtype, memory_format=memory_format
    )
    assert_bytes(actual, expected)


@pytest.mark.parametrize("change", ["transposed", "sliced", "expanded", "channels_last", "strided coalitions"])
def test_noncontiguous(change, device):
    x, present, base = (
        random((2, 4, 3, 6), device=device),
        design(18, device=device),
        random((4, 3, 6), device=device, seed=1),
    )
    players = torch.arange(18, device=device).reshape(3, 6)
    bits = pack_coalitions(present)
    if change == "transposed":
        x, base, players = x.transpose(2, 3), base.transpose(1, 2), players.t()
    elif change == "sliced":
        x, base, players = x[:, ::2, 1:, ::3], base[::2, 1:, ::3], players[1:, ::3]
    elif change == "expanded":
        x = x[:1].expand(2, -1, -1, -1)
    elif change == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    else:
        bits = torch.stack((bits, bits), 1)[:, 0]
    expected = brute(x, present, players.expand(x.shape), base.expand(x.shape)[:, None])[:, :, 0]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_bytes(mask_inputs(x, bits, players, base, memory_format=memory_format), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_out(memory_format, device):
    x, present, background = (
        random(SHAPE, device=device),
        design(24, device=device),
        random((3, 3, 4, 6), device=device, seed=1),
    )
    players = MASKS["pixels"].to(device)
    expected = reference.mask_inputs(x, present, players, background=background)
    out = torch.full((2 * 8 * 3, 3, 4, 6), float("nan"), device=device).to(memory_format=memory_format)
    given = out.unflatten(0, (2, 8, 3))
    result = mask_inputs(x, present, players, background=background, memory_format=memory_format, out=given)
    assert result is given
    assert_bytes(given, expected)


def chunked_case(device, **kwargs):
    x, present = random((3, 3, 4, 6), device=device), torch.stack([design(24, device=device, seed=s) for s in range(3)])
    plan = plan_selection(
        x, MASKS["pixels"].to(device), background=random((2, 3, 4, 6), device=device, seed=1), **kwargs
    )
    return plan, pack_coalitions(present)


@pytest.mark.parametrize("step", [1, 5, 7, 24])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_chunks_are_slices_of_the_whole(step, memory_format, device):
    plan, bits = chunked_case(device, memory_format=memory_format)
    whole = plan.rows(bits)
    assert whole.shape == (3 * 8 * 2, 3, 4, 6)
    buffer = torch.full_like(whole, float("nan"))
    for start in range(0, 24, step):
        stop = min(start + step, 24)
        rows = slice(start * 2, stop * 2)
        assert_bytes(plan.rows(bits, start, stop), whole[rows])
        assert plan.rows(bits, start, stop, out=buffer[rows]) is not None
    assert_bytes(buffer, whole)


def test_chunks_under_inference_mode(device):
    plan, bits = chunked_case(device)
    whole = plan.rows(bits)
    with torch.inference_mode():
        assert_bytes(plan.rows(bits, 3, 9), whole[6:18])


@pytest.mark.parametrize(
    ("shape", "mask", "memory_format", "expected"),
    [
        ((2, 3, 4, 6), MASKS["pixels"], torch.contiguous_format, (3, 24, 1)),
        ((2, 3, 4, 6), MASKS["pixels"].expand(1, 3, 4, 6).contiguous(), torch.contiguous_format, (3, 24, 1)),
        ((2, 3, 4, 6), MASKS["pixels"], torch.channels_last, (1, 24, 3)),
        ((2, 3, 4, 6), MASKS["channels"], torch.contiguous_format, (1, 3, 24)),
        ((2, 3, 4, 6), MASKS["channels"], torch.channels_last, (24, 3, 1)),
        ((2, 3, 4, 6), MASKS["rows"], torch.contiguous_format, (3, 4, 6)),
        ((2, 3, 4, 6), MASKS["channels and columns"], torch.contiguous_format, (1, 72, 1)),
        ((2, 5, 7), torch.arange(5)[:, None], torch.contiguous_format, (1, 5, 7)),
        ((2, 30), None, torch.contiguous_format, (1, 30, 1)),
        ((2, 30), torch.zeros(30, dtype=torch.long), torch.contiguous_format, (1, 1, 30)),
        # Neighbours that stay together in every input: runs of 6, and of 4 from another place on, are runs of 2.
        ((2, 12), torch.tensor([[0] * 6 + [1] * 6, [0] * 4 + [-1] * 4 + [1] * 4]), torch.contiguous_format, (1, 6, 2)),
    ],
)
def test_player_map_is_factored(shape, mask, memory_format, expected):
    plan = plan_selection(torch.zeros(shape), mask, memory_format=memory_format)
    assert (plan.rep, plan.index.shape[-1], plan.unit) == expected
    assert plan.index.dtype == torch.int32


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0, 3, 4, 6)], ids=str)
def test_empty_inputs(shape, device):
    n_players = max(1, torch.Size(shape[1:]).numel())
    present = design(n_players, device=device)
    result = mask_inputs(torch.zeros(shape, device=device), present)
    assert result.shape == (shape[0], 8, *shape[1:])


def test_no_units(device):
    x = random((2, 6), device=device)
    assert mask_inputs(x, torch.zeros(0, 6, dtype=torch.bool, device=device)).shape == (2, 0, 6)
    plan, bits = plan_selection(x), pack_coalitions(design(6, device=device))
    assert plan.rows(bits, 5, 5).shape == (0, 6)
    plan.rows(bits, 5, 5, out=torch.empty(0, 6, device=device))


def test_backend_reference_agrees(monkeypatch, device):
    plan, bits = chunked_case(device)
    auto = plan.rows(bits, 2, 21)
    monkeypatch.setenv("XAIFAST_BACKEND", "reference")
    assert_bytes(plan.rows(bits, 2, 21), auto)


ISA_CASES = """
import hashlib, sys, torch
from xaifast.ops.masking import plan_selection
generator = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for feat, mask, rows in [
    ((3, 32, 48), torch.arange(6).reshape(2, 3).repeat_interleave(16, 0).repeat_interleave(16, 1), 1),
    ((3, 9, 11), torch.randint(-1, 70, (9, 11), generator=generator), 2),
    ((30,), None, 17), ((13, 24), torch.arange(13)[:, None] - 1, 1), ((257,), torch.arange(257) // 3, 3),
]:
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        x, base = ((torch.rand(n, *feat, generator=generator) * 200).to(dtype) for n in (2, rows))
        bits = torch.randint(-2**63, 2**63 - 1, (5, 2), generator=generator)
        out = plan_selection(x, mask, background=base).rows(bits, 1, 9)
        digest.update(out.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("settings", [{"XAIFAST_CPU_ISA": isa} for isa in ("baseline", "v3", "v4")], ids=str)
def test_instruction_sets_agree(settings):
    native = pytest.importorskip("xaifast._cpu", reason="the native module is not built")
    isa = settings["XAIFAST_CPU_ISA"]
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"not compiled for {isa}")

    def run(**env):
        command = [sys.executable, "-c", ISA_CASES]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)

    forced = run(**settings)
    if "lacks these instructions" in forced.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert forced.returncode == 0, forced.stderr
    assert forced.stdout == run(XAIFAST_BACKEND="reference").stdout
    assert len(forced.stdout.strip()) == len(hashlib.sha256().hexdigest())


def test_gradient_is_clean_behind_a_mask(device):
    x = random((2, 4), device=device).requires_grad_()
    base = random((4,), device=device, seed=1).requires_grad_()
    present = torch.tensor([[True, False, True, False]], device=device)
    out = mask_inputs(x, present, baselines=base)
    out.backward(torch.where(present, 1.0, float("nan")).expand(out.shape))
    assert torch.equal(x.grad, torch.tensor([1.0, 0.0, 1.0, 0.0], device=device).expand(2, 4))
    assert base.grad[[0, 2]].tolist() == [0.0, 0.0]
    assert base.grad[[1, 3]].isnan().all()


def test_gradient_accumulates_in_float32(device):
    x = torch.ones(1, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
    mask_inputs(x, torch.ones(1000, 3, dtype=torch.bool, device=device)).sum().backward()
    assert x.grad.tolist() == [[1000.0] * 3]


def test_compile_of_the_public_function(device):
    torch._dynamo.reset()
    x, present = random(SHAPE, device=device), design(5, device=device)
    players, base = MASKS["superpixels"].to(device), random(SHAPE[1:], device=device, seed=1)
    function = lambda x, c, m, b: mask_inputs(x, c, m, b, mean=0.5, std=2.0, dtype=torch.bfloat16)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_bytes(compiled(x, present, players, base), function(x, present, players, base))


def test_registered_mask_inputs(device):
    x, present, players = random(SHAPE, device=device), design(5, device=device), MASKS["superpixels"].to(device)
    base = torch.tensor(0.5, device=device)
    op = torch.ops.xaifast.mask_inputs.default
    assert_bytes(op(x, present, players, base), mask_inputs(x, present, players, 0.5))
    torch.library.opcheck(op, (x.requires_grad_(), pack_coalitions(present), players, base))


X = torch.zeros(2, 3, 4, 6)
BITS = torch.zeros(4, 1, dtype=torch.int64)
ERRORS = {
    "coalition dtype": (lambda: mask_inputs(X, torch.zeros(4, 5), MASKS["superpixels"]), TypeError, "packed int64"),
    "coalition rank": (lambda: mask_inputs(X, BITS[0], MASKS["superpixels"]), ValueError, "coalitions must be"),
    "coalition batch": (lambda: mask_inputs(X, BITS.expand(3, 4, 1), MASKS["superpixels"]), ValueError, "each input"),
    "too few columns": (
        lambda: mask_inputs(X, torch.zeros(4, 4, dtype=torch.bool), MASKS["superpixels"]),
        ValueError,
        "5 players",
    ),
    "too few words": (lambda: mask_inputs(X, BITS), ValueError, "72 players"),
    "mask shape": (
        lambda: mask_inputs(X, BITS, torch.zeros(5, 6, dtype=torch.long)),
        ValueError,
        "feature_mask must be broad",
    ),
    "mask batch": (
        lambda: mask_inputs(X, BITS, torch.zeros(3, 1, 1, 6, dtype=torch.long)),
        ValueError,
        "first dimension 1 or 2",
    ),
    "mask rank": (
        lambda: mask_inputs(X, BITS, torch.zeros(1, 2, 3, 4, 6, dtype=torch.long)),
        ValueError,
        "feature_mask",
    ),
    "mask dtype": (lambda: mask_inputs(X, BITS, torch.zeros(4, 6)), TypeError, "integer player ids"),
    "negative ids": (lambda: mask_inputs(X, BITS, torch.full((4, 6), -2)), ValueError, "got -2"),
    "baseline shape": (lambda: mask_inputs(X, BITS, MASKS["rows"], torch.zeros(5)), ValueError, "baselines must be"),
    "baseline batch": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], torch.zeros(3, 3, 4, 6)),
        ValueError,
        "baselines must be",
    ),
    "both baselines": (lambda: mask_inputs(X, BITS, MASKS["rows"], 1.0, background=X), ValueError, "got both"),
    "background shape": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], background=X[:, :2]),
        ValueError,
        "background must be",
    ),
    "no background rows": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], background=X[:0]),
        ValueError,
        "at least one row",
    ),
    "integer baseline": (lambda: mask_inputs(X.long(), BITS, MASKS["rows"], 0.5), ValueError, "torch.int64"),
    "byte baseline": (lambda: mask_inputs(X.byte(), BITS, MASKS["rows"], 256), ValueError, "got 256"),
    "float baseline": (lambda: mask_inputs(X.byte(), BITS, MASKS["rows"], X), TypeError, "integer inputs"),
    "mean": (lambda: mask_inputs(X, BITS, MASKS["rows"], mean=[0.0, 1.0]), ValueError, "mean must be"),
    "memory format": (lambda: mask_inputs(X[0], BITS, memory_format=torch.channels_last), ValueError, "channels_last"),
    "preserve format": (lambda: mask_inputs(X, BITS, memory_format=torch.preserve_format), ValueError, "memory_format"),
    "complex": (lambda: mask_inputs(X.to(torch.complex64), BITS), TypeError, "real"),
    "out shape": (lambda: mask_inputs(X, BITS, MASKS["rows"], out=torch.empty(2, 4, 3, 4, 5)), ValueError, "out must"),
    "out dtype": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], out=torch.empty(2, 4, 3, 4, 6).half()),
        ValueError,
        "out must be",
    ),
    "out layout": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], memory_format=torch.channels_last, out=torch.empty(2, 4, 3, 4, 6)),
        ValueError,
        "channels_last",
    ),
    "out strides": (
        lambda: mask_inputs(X, BITS, MASKS["rows"], out=torch.empty(4, 2, 3, 4, 6).transpose(0, 1)),
        ValueError,
        "contiguous over inputs",
    ),
    "out and grad": (
        lambda: mask_inputs(X.clone().requires_grad_(), BITS, MASKS["rows"], out=torch.empty(2, 4, 3, 4, 6)),
        ValueError,
        "no gradient",
    ),
    "range": (lambda: plan_selection(X, MASKS["rows"]).rows(BITS, 3, 9), ValueError, "units 3..9"),
    "backward range": (lambda: plan_selection(X, MASKS["rows"]).rows(BITS, 3, 2), ValueError, "units 3..2"),
    "op: sizes": (
        lambda: torch.ops.xaifast.select_rows(
            X.reshape(2, 72), BITS, torch.tensor([0], dtype=torch.int32), X.reshape(2, 72), 1, 71, 0, 1
        ),
        ValueError,
        "rep 1, unit 71",
    ),
    "blend: integer": (lambda: blend_inputs(X.long(), torch.zeros(4, 4), MASKS["rows"]), TypeError, "floating"),
    "blend: bool": (lambda: blend_inputs(X, torch.zeros(4, 4, dtype=torch.bool), MASKS["rows"]), TypeError, "floating"),
    "blend: players": (lambda: blend_inputs(X, torch.zeros(4, 3), MASKS["rows"]), ValueError, "4 players"),
    "blend: rank": (lambda: blend_inputs(X, torch.zeros(4), MASKS["rows"]), ValueError, "masks must be"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors(case):
    function, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        function()
    assert str(caught.value).startswith("xaifast.")


@pytest.mark.parametrize("mask", ["superpixels", "per input", "always present", "channels", "none"])
@pytest.mark.parametrize("baseline", ["number", "tensor", "per input"])
@pytest.mark.parametrize("per_input", [False, True])
def test_blend_every_element(mask, baseline, per_input, device):
    x = random(SHAPE, torch.float64, device)
    players = (torch.arange(72).reshape(3, 4, 6) if MASKS[mask] is None else MASKS[mask]).expand(SHAPE)
    masks = torch.rand(*((2,) if per_input else ()), 5, int(players.max()) + 1, dtype=torch.float64).to(device)
    base = {"number": 0.25, "tensor": random(SHAPE[1:], torch.float64, device, 1), "per input": x.flip(0)}[baseline]
    actual = blend_inputs(x, masks, None if MASKS[mask] is None else MASKS[mask].to(device), base)
    assert actual.shape == (2, 5, *SHAPE[1:])
    rows = torch.as_tensor(base, dtype=x.dtype, device=device).expand(SHAPE)
    for b, n in itertools.product(range(2), range(5)):
        row = masks[b, n] if per_input else masks[n]
        weight = torch.tensor([1.0 if p < 0 else float(row[p]) for p in players[b].flatten().tolist()], dtype=x.dtype)
        weight = weight.to(x).reshape(SHAPE[1:])
        expected = rows[b] + weight * (x[b] - rows[b])
        torch.testing.assert_close(actual[b, n], expected, rtol=1e-12, atol=1e-12)
    args = (x, masks, None if MASKS[mask] is None else MASKS[mask].to(device), base)
    torch.testing.assert_close(actual, reference.blend_inputs(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blend_with_hard_masks_is_selection(dtype, device):
    x, present, base = random(SHAPE, dtype, device), design(24, device=device), random(SHAPE[1:], dtype, device, seed=1)
    players = MASKS["pixels"].to(device)
    torch.testing.assert_close(
        blend_inputs(x, present.to(dtype), players, base), mask_inputs(x, present, players, base), rtol=0, atol=0
    )


@pytest.mark.parametrize("per_input", [False, True])
def test_blend_gradients(per_input, device):
    x = random((2, 3, 2, 2), torch.float64, device).requires_grad_()
    base = random((3, 2, 2), torch.float64, device, 1).requires_grad_()
    masks = torch.rand(*((2,) if per_input else ()), 2, 4, dtype=torch.float64).to(device).requires_grad_()
    players = torch.tensor([[0, -1], [3, 1]], device=device)
    function = lambda x, m, b: blend_inputs(x, m, players, b)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, masks, base))
    assert torch.autograd.gradgradcheck(function, (x, masks, base))
    loss = lambda x, m, b: (function(x, m, b) ** 2).sum()  # noqa: E731
    args = tuple(t.detach() for t in (x, masks, base))
    expected = torch.func.grad(loss, (0, 1, 2))(*args)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss, (0, 1, 2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected)
    wide = torch.vmap(torch.func.grad(loss, 1), in_dims=(None, 0, None))(x, torch.stack((masks, masks)), base)
    torch.testing.assert_close(wide[1], expected[1])
