"""The operator behind every hard mask: torch.ops.xaifast.select_rows and its out form."""

import itertools

import pytest
import torch
from masking_cases import DEVICES, assert_bytes, random

import xaifast.ops  # noqa: F401  registers the operators
from xaifast.reference import masking as reference

select_rows = torch.ops.xaifast.select_rows.default
select_rows_out = torch.ops.xaifast.select_rows_out.default


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def op_case(device="cpu", dtype=torch.float64, per_input=False, n_background=2, n_coalitions=4):
    """x [3, 30], player map [5] with rep 2 and unit 3, units from within the first input to within the last."""
    generator = torch.Generator().manual_seed(0)
    lead = (3,) if per_input else ()
    bits = torch.randint(0, 2**5, (*lead, n_coalitions, 1), generator=generator).to(device)
    index = torch.tensor([0, 3, -1, 1, 3], dtype=torch.int32)
    if per_input:
        index = torch.stack((index, index.flip(0), index + 1))
    x, baseline = random((3, 30), dtype, device), random((*lead, n_background, 30), dtype, device, seed=1)
    return [x, bits, index.to(device), baseline, 2, 3, 1, max(1, 3 * n_coalitions - 1)]


@pytest.mark.parametrize("per_input", [False, True])
@pytest.mark.parametrize("start_stop", [(0, 12), (1, 11), (5, 6), (4, 4)])
def test_operator_against_reference_and_brute_force(per_input, start_stop, device):
    x, bits, index, baseline, rep, unit, _, _ = case = op_case(device, torch.float32, per_input)
    case[6:] = start_stop
    out = torch.full((start_stop[1] - start_stop[0], 2, 30), float("nan"), device=device)
    select_rows_out(*case, out)
    for u, r, e in itertools.product(range(*start_stop), range(2), range(30)):
        b, n = divmod(u, 4)
        player = int((index[b] if per_input else index)[e // unit % 5])
        word = int((bits[b, n] if per_input else bits[n])[0])
        base = (baseline[b] if per_input else baseline)[r, e]
        expected = x[b, e] if player < 0 or word >> player & 1 else base
        assert out[u - start_stop[0], r, e] == expected
    assert_bytes(select_rows(*case), out)
    assert_bytes(reference.select_rows(*case), out)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("words", [0, 1, 2])
def test_ids_beyond_the_words_are_absent_and_ids_below_zero_present(words, backend, device, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", backend)
    last = 64 * words
    players = [-9, -1, 0, last - 1, last, last + 1, 2**31 - 1]
    x = torch.arange(1, 8, dtype=torch.float64, device=device)[None]
    bits, index = torch.full((1, words), -1, device=device), torch.tensor(players, dtype=torch.int32, device=device)
    out = select_rows(x, bits, index, -x, 1, 1, 0, 1)
    assert (out[0, 0] > 0).tolist() == [player < last for player in players]
    kept = torch.ops.xaifast.compact_rows(x[..., None], bits, index, 7, 0, 1)
    assert torch.equal(kept[0, : (out > 0).sum(), 0], out[out > 0])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", ["shared", "per input", "no units", "noncontiguous", "bfloat16"])
def test_opcheck(variant, requires_grad, device):
    case = op_case(device, torch.bfloat16 if variant == "bfloat16" else torch.float32, variant == "per input")
    if variant == "no units":
        case[7] = case[6]
    if variant == "noncontiguous":
        case[0] = torch.stack((case[0], case[0]), -1)[..., 0]
        case[3] = case[3].t().contiguous().t()
    out = torch.empty(case[7] - case[6], 2, 30, dtype=case[0].dtype, device=device)
    torch.library.opcheck(select_rows_out, (*case, out))
    for position in (0, 3):
        case[position] = case[position].detach().requires_grad_(requires_grad)
    torch.library.opcheck(select_rows, tuple(case))


@pytest.mark.parametrize("per_input", [False, True])
def test_gradients(per_input, device):
    x, bits, index, baseline, *rest = op_case(device, per_input=per_input)
    x.requires_grad_()
    baseline.requires_grad_()
    function = lambda x, baseline: select_rows(x, bits, index, baseline, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, baseline))
    assert torch.autograd.gradgradcheck(function, (x, baseline))


def quadratic(case):
    """A scalar function of x and the baseline with a known gradient, through the operator or through aten."""
    _, bits, index, _, *rest = case

    def loss(select, x, baseline):
        return (select(x, bits, index, baseline, *rest) ** 2).sum()

    return loss


def test_func_transforms(device):
    x, _, _, baseline, *_ = case = op_case(device)
    loss = quadratic(case)
    args = (x, baseline)
    op = lambda x, b: loss(select_rows, x, b)  # noqa: E731
    ref = lambda x, b: loss(reference.select_rows, x, b)  # noqa: E731
    wide = (torch.stack((x, x + 1)), torch.stack((baseline, baseline - 1)))
    for transform, given in [
        (lambda f: torch.func.grad(f, (0, 1)), args),
        (lambda f: torch.func.jacrev(f, (0, 1)), args),
        (lambda f: torch.func.jacfwd(f, (0, 1)), args),
        (lambda f: torch.func.hessian(f, 0), args),
        (lambda f: torch.vmap(f), wide),
        (lambda f: torch.vmap(torch.func.grad(f, (0, 1))), wide),
        (lambda f: torch.vmap(torch.func.jacrev(f, (0, 1)), in_dims=(0, None)), (wide[0], baseline)),
    ]:
        actual, expected = transform(op)(*given), transform(ref)(*given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert all(t.abs().sum() > 0 for t in (actual if isinstance(actual, tuple) else (actual,)))


def test_vmap_over_coalitions(device):
    x, bits, index, baseline, *rest = op_case(device)
    many = torch.stack((bits, bits ^ 31))
    actual = torch.vmap(lambda bits: select_rows(x, bits, index, baseline, *rest))(many)
    assert_bytes(actual, torch.stack([select_rows(x, b, index, baseline, *rest) for b in many]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    """Forward, out=, backward, and the compiled transforms that are known to give silent zero gradients elsewhere."""
    torch._dynamo.reset()
    x, _, _, baseline, *rest = case = op_case(device)
    loss = quadratic(case)
    op = lambda x, b: loss(select_rows, x, b)  # noqa: E731
    ref = lambda x, b: loss(reference.select_rows, x, b)  # noqa: E731
    compiled = lambda f: torch.compile(f, fullgraph=True, backend=backend)  # noqa: E731
    close = lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # noqa: E731
    close(compiled(op)(x, baseline), ref(x, baseline))

    leaves = [t.clone().requires_grad_() for t in (x, baseline)]
    compiled(op)(*leaves).backward()
    grads = torch.func.grad(ref, (0, 1))(x, baseline)
    close(tuple(t.grad for t in leaves), grads)
    close(compiled(torch.func.grad(op, (0, 1)))(x, baseline), grads)
    wide = (torch.stack((x, x + 1)), torch.stack((baseline, baseline - 1)))
    close(compiled(torch.vmap(torch.func.grad(op, (0, 1))))(*wide), torch.vmap(torch.func.grad(ref, (0, 1)))(*wide))

    def filled(x, bits, index, baseline, out):
        select_rows_out(x, bits, index, baseline, *rest, out)
        return out + 1

    out = torch.full((rest[3] - rest[2], 2, 30), float("nan"), dtype=x.dtype, device=device)
    close(compiled(filled)(*case[:4], out), reference.select_rows(*case) + 1)
    close(out, reference.select_rows(*case))


def test_compile_dynamic(device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, bits, index, baseline, stop: select_rows(x, bits, index, baseline, 2, 3, 1, stop),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n_coalitions in (4, 7, 3):
        case = op_case(device, n_coalitions=n_coalitions)
        assert_bytes(compiled(*case[:4], case[7]), reference.select_rows(*case))
