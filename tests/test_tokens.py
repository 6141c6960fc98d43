import itertools

import pytest
import torch
from masking_cases import DEVICES, assert_bytes, design, random
from masking_cases import DTYPES as ALL_DTYPES

from xaifast.coalitions import Coalitions
from xaifast.ops.coalitions import pack_coalitions
from xaifast.ops.masking import plan_selection
from xaifast.ops.tokens import compact_tokens, select_tokens
from xaifast.reference import tokens as reference
from xaifast.removal.tokens import PreparedDrop

DTYPES = [dtype for dtype in ALL_DTYPES if dtype != torch.bool]
compact_rows = torch.ops.xaifast.compact_rows.default
compact_rows_out = torch.ops.xaifast.compact_rows_out.default


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def kept(present_row, players):
    return [t for t, p in enumerate(players.tolist()) if p < 0 or present_row[p]]


def brute_compact(tokens, present, players, length):
    players = players.expand(tokens.shape[:2])
    out = tokens.new_zeros(tokens.shape[0], present.shape[-2], length, tokens.shape[2])
    for b, n in itertools.product(range(tokens.shape[0]), range(present.shape[-2])):
        row = present[b, n] if present.dim() == 3 else present[n]
        for position, t in enumerate(kept(row, players[b])):
            out[b, n, position] = tokens[b, t]
    return out


# class token, then patches, two of which share a player
PLAYERS = torch.tensor([-1, 0, 1, 2, 3, 3, 4])
PLAYERS_EACH = torch.stack((PLAYERS, PLAYERS.flip(0), torch.full_like(PLAYERS, -1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("players", [PLAYERS, PLAYERS_EACH, PLAYERS.int()], ids=["shared", "per input", "int32"])
@pytest.mark.parametrize("per_input", [False, True])
def test_select_tokens(dtype, width, players, per_input, device):
    tokens, base = random((3, 7, width), dtype, device), random((3, 7, width), dtype, device, seed=1)
    present = (
        torch.stack([design(5, device=device, seed=s) for s in range(3)]) if per_input else design(5, device=device)
    )
    baseline = base if per_input else base[0]
    for coalitions in (present, pack_coalitions(present)):
        actual = select_tokens(tokens, coalitions, players.to(device), baseline)
        for b, n, t in itertools.product(range(3), range(8), range(7)):
            player = int(players.expand(3, 7)[b, t])
            row = present[b, n] if per_input else present[n]
            expected = tokens[b, t] if player < 0 or row[player] else (base[b] if per_input else base[0])[t]
            assert_bytes(actual[b, n, t], expected)


def test_select_tokens_is_one_entry_per_token():
    plan = plan_selection(random((3, 7, 16)), PLAYERS[:, None], random((7, 16)))
    assert (plan.rep, plan.index.shape[-1], plan.unit) == (1, 7, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("players", [PLAYERS, PLAYERS_EACH, PLAYERS.int()], ids=["shared", "per input", "int32"])
@pytest.mark.parametrize("per_input", [False, True])
@pytest.mark.parametrize("length", [7, 9])
def test_compact_tokens(dtype, width, players, per_input, length, device):
    tokens = random((3, 7, width), dtype, device)
    present = (
        torch.stack([design(5, device=device, seed=s) for s in range(3)]) if per_input else design(5, device=device)
    )
    expected = brute_compact(tokens, present, players, length)
    for coalitions in (present, pack_coalitions(present)):
        assert_bytes(compact_tokens(tokens, coalitions, players.to(device), length), expected)
    assert_bytes(reference.compact_tokens(tokens, present, players.to(device), length), expected)


@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 33, 65, 197])
def test_numbers_of_tokens(n_tokens, device):
    tokens, present = random((2, n_tokens, 3), device=device), design(n_tokens, device=device)
    expected = brute_compact(tokens, present, torch.arange(n_tokens), n_tokens)
    assert_bytes(compact_tokens(tokens, present, torch.arange(n_tokens), n_tokens), expected)


def test_tight_length(device):
    tokens, present = random((2, 9, 4), device=device), design(9, device=device)[2:]
    length = int(present.sum(1).max())
    assert_bytes(
        compact_tokens(tokens, present, torch.arange(9), length),
        brute_compact(tokens, present, torch.arange(9), length),
    )


def test_nothing_leaks(device):
    tokens = torch.full((1, 4, 3), float("nan"), device=device)
    tokens[0, 1] = float("inf")
    present = torch.zeros(1, 4, dtype=torch.bool, device=device)
    assert_bytes(compact_tokens(tokens, present, torch.arange(4), 4), torch.zeros(1, 1, 4, 3, device=device))
    tokens[0, 2] = -0.0
    present[0, 2] = True
    actual = compact_tokens(tokens, present, torch.arange(4), 2)
    assert_bytes(actual[0, 0, 0], tokens[0, 2])
    assert_bytes(actual[0, 0, 1], torch.zeros(3, device=device))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("length", [0, 4])
def test_empty(shape, length, device):
    n_tokens = shape[1]
    players = torch.arange(n_tokens)
    present = torch.zeros(2, max(1, n_tokens), dtype=torch.bool, device=device)
    actual = compact_tokens(torch.ones(shape, device=device), present, players, length)
    assert_bytes(actual, torch.zeros(shape[0], 2, length, shape[2], device=device))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_overflow_names_the_coalition(backend, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", backend)
    tokens, bits = random((2, 4, 3)), pack_coalitions(torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).bool())
    with pytest.raises(ValueError, match="coalition 2 of input 0, which keeps 3 tokens; raise length to 3"):
        compact_tokens(tokens, bits, torch.arange(4), 2)
    index = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="coalition 1 of input 1"):
        compact_rows(tokens, bits, index, 1, 3, 5)
    with pytest.raises(ValueError, match="coalition 1 of input 1"):
        compact_rows_out(tokens, bits, index, 1, 3, 5, torch.empty(2, 1, 3))
    assert compact_rows(tokens, bits, index, 1, 3, 4).shape == (1, 1, 3)


def test_rows_into_memory_of_the_arguments_are_refused():
    # x, bits and index one after the other, with room between them.
    memory = torch.zeros(64, dtype=torch.int64)
    x, bits, index = memory[:12].view(1, 4, 3), memory[20:22].view(2, 1), memory[30:32].view(torch.int32)
    x.copy_(torch.arange(1, 13).view(1, 4, 3))
    bits.copy_(torch.tensor([[0b0101], [0b1110]]))
    index.copy_(torch.arange(4))
    before = memory.clone()
    for first in (0, 11, 20 - 11, 21, 30 - 11, 31):
        with pytest.raises(ValueError, match="^xaifast.compact_rows: out must share no memory"):
            compact_rows_out(x, bits, index, 4, 0, 1, memory[first : first + 12].view(1, 4, 3))
        assert torch.equal(memory, before)
    expected = reference.compact_rows(x, bits, index, 4, 0, 1)
    for first in (32, 52):
        out = memory[first : first + 12].view(1, 4, 3)
        compact_rows_out(x, bits, index, 4, 0, 1, out)
        assert_bytes(out, expected)
    tight = memory[22:28].view(1, 2, 3)  # begins where bits end
    compact_rows_out(x, bits, index, 2, 0, 1, tight)
    assert_bytes(tight, expected[:, :2])
    overlapping = x.transpose(1, 2).contiguous().transpose(1, 2)  # read from a copy
    compact_rows_out(overlapping, bits, index, 4, 0, 1, overlapping.mT.view(1, 4, 3))
    assert_bytes(overlapping.mT.view(1, 4, 3), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_fills_rows_where_data_is_not_looked_at(dtype, device):
    if device == "cuda":
        compact = compact_rows
    else:
        compact = reference.compact_rows
    tokens, present = random((2, 4, 3), dtype, device), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]], device=device).bool()
    actual = compact(tokens, pack_coalitions(present), torch.arange(4, dtype=torch.int32, device=device), 2, 0, 4)
    over = actual[1::2]
    assert over.isnan().all() if dtype.is_floating_point else (over == torch.tensor(-1).to(over)).all()
    assert_bytes(actual[::2, 0], tokens[:, 0])
    assert not actual[::2, 1].any()


def op_case(device="cpu", dtype=torch.float64, per_input=False, n_coalitions=4):
    """x [3, 7, 5]; units from the middle of the first input to the middle of the last."""
    lead = (3,) if per_input else ()
    bits = torch.randint(0, 2**5, (*lead, n_coalitions, 1), generator=torch.Generator().manual_seed(0)).to(device)
    index = (PLAYERS_EACH if per_input else PLAYERS).to(device, torch.int32)
    return [random((3, 7, 5), dtype, device), bits, index, 8, 1, max(1, 3 * n_coalitions - 1)]


@pytest.mark.parametrize("per_input", [False, True])
@pytest.mark.parametrize("step", [1, 5, 12])
def test_ranges_are_slices_of_the_whole(per_input, step, device):
    x, bits, index, length, _, _ = op_case(device, torch.float32, per_input)
    whole = reference.compact_rows(x, bits, index, length, 0, 12)
    for start in range(0, 12, step):
        stop = min(12, start + step)
        assert_bytes(compact_rows(x, bits, index, length, start, stop), whole[start:stop])
        out = torch.full((stop - start + 2, 8, 5), float("nan"), device=device)
        compact_rows_out(x, bits, index, length, start, stop, out[1:-1])
        assert_bytes(out[1:-1], whole[start:stop])
        assert out[0].isnan().all() and out[-1].isnan().all()
    assert compact_rows(x, bits, index, length, 5, 5).shape == (0, 8, 5)


def test_groups_of_dropped_tokens_share_one_memory(device):
    tokens, index, present = random((2, 7, 4), device=device), PLAYERS.to(device, torch.int32), design(5, 8)
    tokens_of, image = torch.bincount(PLAYERS[1:]).double(), tokens[:1]
    first, other = (
        PreparedDrop(None, image, tokens=tokens, token_players=index, tokens_of=tokens_of, n_prefix=1, length=7)
        for _ in range(2)
    )
    (longest,) = first.rows(pack_coalitions(present).to(device), 0, 36, ())
    groups = first.groups(Coalitions.from_present(present))
    assert len(groups) > 3
    for group in groups:
        bits = pack_coalitions(present[group.members]).to(device)
        for start, stop in ((0, len(bits)), (1, 2 * len(bits)), (0, 1)):
            with torch.inference_mode(start == 0):
                (rows,) = group.prepared.rows(bits, start, stop, ())
            assert_bytes(rows, reference.compact_rows(tokens, bits, index, group.prepared.length, start, stop))
            assert rows.data_ptr() == longest.data_ptr()
    before = rows.clone()
    other.rows(pack_coalitions(present).to(device), 0, 36, ())
    assert_bytes(rows, before)


@pytest.mark.parametrize("change", ["tokens", "width", "expanded"])
def test_noncontiguous(change, device):
    tokens, present = random((2, 6, 8), device=device), design(6, device=device)
    tokens = {
        "tokens": tokens.transpose(0, 1).contiguous().transpose(0, 1),
        "width": random((2, 6, 16), device=device)[..., ::2],
        "expanded": tokens[:1].expand(2, -1, -1),
    }[change]
    players = torch.arange(6)
    assert_bytes(compact_tokens(tokens, present, players, 6), brute_compact(tokens, present, players, 6))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", ["shared", "per input", "no units", "noncontiguous", "bfloat16"])
def test_opcheck(variant, requires_grad, device):
    case = op_case(device, torch.bfloat16 if variant == "bfloat16" else torch.float32, variant == "per input")
    if variant == "no units":
        case[5] = case[4]
    if variant == "noncontiguous":
        case[0] = torch.stack((case[0], case[0]), -1)[..., 0]
    out = torch.empty(case[5] - case[4], 8, 5, dtype=case[0].dtype, device=device)
    torch.library.opcheck(compact_rows_out, (*case, out))
    case[0] = case[0].detach().requires_grad_(requires_grad)
    torch.library.opcheck(compact_rows, tuple(case))


def test_opcheck_of_the_registered_functions(device):
    tokens, base, bits = random((3, 7, 5), device=device), random((7, 5), device=device, seed=1), op_case(device)[1]
    players = PLAYERS.to(device)
    select, compact = torch.ops.xaifast.select_tokens.default, torch.ops.xaifast.compact_tokens.default
    assert_bytes(select(tokens, bits, players, base), select_tokens(tokens, bits, players, base))
    assert_bytes(compact(tokens, bits, players, 7), compact_tokens(tokens, bits, players, 7))
    torch.library.opcheck(select, (tokens.requires_grad_(), bits, players, base))
    torch.library.opcheck(compact, (tokens, bits, players, 7))


@pytest.mark.parametrize("per_input", [False, True])
def test_gradients(per_input, device):
    x, *rest = op_case(device, per_input=per_input)
    function = lambda x: compact_rows(x, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_gradient_of_padding_is_dropped(device):
    tokens = random((1, 4, 3), device=device).requires_grad_()
    present = torch.tensor([[True, False, True, False]], device=device)
    out = compact_tokens(tokens, present, torch.arange(4), 4)
    grad = torch.full_like(out, float("nan"))
    grad[0, 0, :2] = torch.tensor([[2.0], [5.0]], device=device)
    out.backward(grad)
    assert tokens.grad[0, :, 0].tolist() == [2.0, 0.0, 5.0, 0.0]


def test_func_transforms(device):
    x, *rest = op_case(device)
    op = lambda x: (compact_rows(x, *rest) ** 2).sum()  # noqa: E731
    ref = lambda x: (reference.compact_rows(x, *rest) ** 2).sum()  # noqa: E731
    wide = torch.stack((x, x + 1))
    for transform, given in [
        (torch.func.grad, x),
        (torch.func.jacrev, x),
        (torch.func.jacfwd, x),
        (torch.vmap, wide),
        (lambda f: torch.vmap(torch.func.grad(f)), wide),
    ]:
        actual = transform(op)(given)
        torch.testing.assert_close(actual, transform(ref)(given), rtol=0, atol=0)
        assert actual.abs().sum() > 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    torch._dynamo.reset()
    x, *rest = case = op_case(device)
    op = lambda x: (compact_rows(x, *rest) ** 2).sum()  # noqa: E731
    ref = lambda x: (reference.compact_rows(x, *rest) ** 2).sum()  # noqa: E731
    compiled = lambda f: torch.compile(f, fullgraph=True, backend=backend)  # noqa: E731
    assert_bytes(compiled(lambda *a: compact_rows(*a))(*case), reference.compact_rows(*case))
    leaf = x.clone().requires_grad_()
    compiled(op)(leaf).backward()
    expected = torch.func.grad(ref)(x)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(compiled(torch.func.grad(op))(x), expected)
    wide = torch.stack((x, x + 1))
    torch.testing.assert_close(compiled(torch.vmap(torch.func.grad(op)))(wide), torch.vmap(torch.func.grad(ref))(wide))

    def filled(x, bits, index, out):
        compact_rows_out(x, bits, index, *rest[2:], out)
        return out + 1

    out = torch.full((rest[4] - rest[3], 8, 5), float("nan"), dtype=x.dtype, device=device)
    expected = reference.compact_rows(*case)
    assert_bytes(compiled(filled)(*case[:3], out), expected + 1)
    assert_bytes(out, expected)
    bits = pack_coalitions(design(5, device=device))
    public = lambda x, bits, players: compact_tokens(x, bits, players, 7)  # noqa: E731
    players = PLAYERS.to(device)
    assert_bytes(compiled(public)(x, bits, players), public(x, bits, players))


TOKENS = torch.zeros(2, 7, 3)
BITS = torch.zeros(4, 1, dtype=torch.int64)


def fill(out):
    compact_rows_out(TOKENS, BITS, PLAYERS.int(), 7, 0, 8, out)


ERRORS = {
    "token rank": (lambda: compact_tokens(TOKENS[0], BITS, PLAYERS, 7), ValueError, "tokens must be"),
    "players shape": (lambda: compact_tokens(TOKENS, BITS, PLAYERS[:6], 7), ValueError, "token_players must be"),
    "players batch": (lambda: select_tokens(TOKENS, BITS, PLAYERS_EACH, TOKENS), ValueError, "token_players must be"),
    "players dtype": (lambda: compact_tokens(TOKENS, BITS, PLAYERS.float(), 7), TypeError, "integer ids"),
    "length": (lambda: compact_tokens(TOKENS, BITS, PLAYERS, -1), ValueError, "negative"),
    "coalition dtype": (lambda: compact_tokens(TOKENS, BITS.int(), PLAYERS, 7), TypeError, "int64"),
    "coalition batch": (
        lambda: compact_tokens(TOKENS, BITS.expand(3, 4, 1), PLAYERS, 7),
        ValueError,
        "coalitions must be",
    ),
    "too few columns": (lambda: compact_tokens(TOKENS, torch.ones(4, 4).bool(), PLAYERS, 7), ValueError, "5 players"),
    "too few words": (lambda: compact_tokens(TOKENS, BITS, PLAYERS + 64, 7), ValueError, "69 players"),
    "negative ids": (lambda: compact_tokens(TOKENS, BITS, PLAYERS - 1, 7), ValueError, "got -2"),
    "baseline": (lambda: select_tokens(TOKENS, BITS, PLAYERS, TOKENS[0, 0, :2]), ValueError, "baselines must be"),
    "op: range": (lambda: compact_rows(TOKENS, BITS, PLAYERS.int(), 7, 0, 9), ValueError, "units 0..9"),
    "out: shape": (
        lambda: fill(torch.empty(7, 7, 3)),
        ValueError,
        r"out must be contiguous, torch.float32 \[8, 7, 3\]",
    ),
    "out: length": (lambda: fill(torch.empty(8, 8, 3)), ValueError, "out must be contiguous"),
    "out: dtype": (lambda: fill(torch.empty(8, 7, 3).double()), ValueError, "got torch.float64"),
    "out: layout": (lambda: fill(torch.empty(8, 3, 7).mT), ValueError, r"with strides \[21, 1, 7\]"),
    "out: device": (lambda: fill(torch.empty(8, 7, 3, device="meta")), ValueError, "on meta"),
    "op: index": (lambda: compact_rows(TOKENS, BITS, PLAYERS, 7, 0, 8), ValueError, "int32 index"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors(case):
    function, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        function()
    assert str(caught.value).startswith("xaifast.")
