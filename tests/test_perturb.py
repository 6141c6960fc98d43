"""perturb_by_rank, its plan and its operator: every element is where(), by brute force and on every instruction set."""

import hashlib
import itertools
import math

import pytest
import torch
from masking_cases import DEVICES, DTYPES, assert_bytes, random, raw

from xaifast import _native
from xaifast.ops import perturb_by_rank, plan_perturbation, rank_features
from xaifast.reference import perturb as reference

perturb_rows = torch.ops.xaifast.perturb_rows.default
perturb_rows_out = torch.ops.xaifast.perturb_rows_out.default
SHAPE = (2, 3, 4, 6)
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def brute(x, ranks, insertion_counts, deletion_counts, insertion, deletion):
    """One element at a time; ranks and baselines are given for every element."""
    points = [(k, False) for k in insertion_counts] + [(k, True) for k in deletion_counts]
    out = x.new_zeros((len(x), len(points), *x.shape[1:]))
    for b, (n, (count, deletes)) in itertools.product(range(len(x)), enumerate(points)):
        for e in itertools.product(*map(range, x.shape[1:])):
            rank = int(ranks[b][e])
            shown = rank < 0 or (rank >= count if deletes else rank < count)
            out[b, n][e] = x[b][e] if shown else (deletion if deletes else insertion)[b][e]
    return out


RANKS = {
    "pixels [B, H, W]": rank_features(random((2, 4, 6))),
    "pixels [B, 1, H, W]": rank_features(random((2, 1, 4, 6))),
    "elements": rank_features(random(SHAPE)),
    "channels": rank_features(random((2, 3, 1, 1))),
    "rows": rank_features(random((2, 4, 1))),
    "the same for both": rank_features(random((1, 4, 6))).expand(2, 4, 6),
    "int64": rank_features(random((2, 4, 6), seed=3)).long(),
}
MASKS = {
    "superpixels": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 4]] * 2),
    "always present": torch.tensor([-1, 0, 1, -1, 4, 2]),
    "one player": torch.tensor(0),
    "per input": torch.randint(-1, 5, SHAPE, generator=torch.Generator().manual_seed(1)),
    "per input [B, 1, H, W]": torch.randint(0, 5, (2, 1, 4, 6), generator=torch.Generator().manual_seed(2)),
}
BASELINES = {
    "number": lambda seed: 0.25 + seed,
    "tensor": lambda seed: random((3, 4, 6), seed=seed),
    "broadcast": lambda seed: random((3, 1, 1), seed=seed),
    "per input": lambda seed: random(SHAPE, seed=seed),
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("baseline", list(BASELINES))
@pytest.mark.parametrize("kind", [*RANKS, *MASKS])
def test_every_element_is_where(kind, baseline, memory_format, device):
    x, mask = random(SHAPE), MASKS.get(kind)
    insertion, deletion = BASELINES[baseline](1), BASELINES[baseline](2)
    if mask is None:
        ranks = RANKS[kind]
        m = ranks[0].numel()
        full = (ranks if ranks.dim() == 4 else ranks[:, None]).expand(SHAPE)
    else:
        m, ranks, players = 5, rank_features(random((2, 5))), mask.expand(SHAPE)
        full = torch.stack([torch.where(p < 0, -1, r[p.clamp(min=0)]) for p, r in zip(players, ranks, strict=True)])
    inserted, deleted = [0, m, m // 2, 1], [1, 0, m]
    bases = [torch.as_tensor(b).expand(SHAPE) for b in (insertion, deletion)]
    expected = brute(x, full, inserted, deleted, *bases)
    given = {
        "insertion_counts": inserted,
        "deletion_counts": torch.tensor(deleted, device=device),
        "insertion_baseline": insertion.to(device) if isinstance(insertion, torch.Tensor) else insertion,
        "deletion_baseline": deletion.to(device) if isinstance(deletion, torch.Tensor) else deletion,
        "feature_mask": None if mask is None else mask.to(device),
    }
    actual = perturb_by_rank(x.to(device), ranks.to(device), **given, memory_format=memory_format)
    assert_bytes(actual.cpu(), expected)
    assert actual.flatten(0, 1).is_contiguous(memory_format=memory_format)
    assert_bytes(reference.perturb_by_rank(x, ranks, inserted, deleted, insertion, deletion, mask), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 6), (2, 7, 5), (1, 1)], ids=str)
def test_dtypes(shape, dtype, backend, device, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", backend)
    x, base = random(shape, dtype, device), random(shape, dtype, device, seed=1)
    ranks = rank_features(random(shape, device=device))
    counts = range(ranks[0].numel() + 1)
    actual = perturb_by_rank(x, ranks, insertion_counts=counts, deletion_counts=counts, insertion_baseline=base)
    expected = brute(x, ranks, counts, counts, base, torch.zeros_like(x))
    assert_bytes(actual, expected)
    assert_bytes(actual[:, len(counts) - 1], x)
    assert_bytes(actual[:, len(counts)], x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0])
def test_nothing_leaks(value, device):
    x, ranks = random((2, 9), device=device), rank_features(random((2, 9), device=device))
    dirty = torch.full_like(x, value)
    dirty.view(torch.int32)[0, 0] ^= 5  # another NaN, or another number
    ends = {"insertion_counts": [0, 9], "deletion_counts": [0, 9]}
    rows = perturb_by_rank(x, ranks, **ends, insertion_baseline=dirty, deletion_baseline=dirty)
    assert_bytes(rows, torch.stack((dirty, x, x, dirty), 1))
    rows = perturb_by_rank(dirty, ranks, **ends, insertion_baseline=x, deletion_baseline=x)
    assert_bytes(rows, torch.stack((x, dirty, dirty, x), 1))
    half = perturb_by_rank(x, ranks, deletion_counts=[4], deletion_baseline=dirty)[:, 0]
    assert torch.equal(raw(half) != raw(x), ranks < 4)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "NHWC"])
def test_normalisation_and_cast_commute_with_selection(dtype, source, memory_format, device):
    x, base = random(SHAPE, source, device), random(SHAPE, source, device, seed=1)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ranks = RANKS["pixels [B, H, W]"].to(device)
    mean_t, std_t = (torch.tensor(v, device=device) for v in (mean, std))
    expected = reference.perturb_by_rank(x, ranks, [3, 9], [5], base, 7, mean=mean_t, std=std_t, dtype=dtype)
    actual = perturb_by_rank(
        x, ranks, insertion_counts=[3, 9], deletion_counts=[5], insertion_baseline=base, deletion_baseline=7,
        mean=mean, std=std_t, dtype=dtype, memory_format=memory_format,
    )  # fmt: skip
    assert_bytes(actual, expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_chunks_of_any_size_are_the_same_rows(dtype, memory_format, device):
    x, ranks = random((3, 3, 5, 7), dtype, device), rank_features(random((3, 5, 7), device=device))
    plan = plan_perturbation(x, ranks, insertion_baseline=2, memory_format=memory_format)
    points = plan.points([0, 7, 35], [1, 34])
    assert points.tolist() == [[0, 0], [7, 0], [35, 0], [1, 1], [34, 1]]
    full = plan.rows(points)
    assert full.shape == (15, 3, 5, 7)
    for size in (1, 2, 4, 5, 7, 15):
        buffer = torch.empty((size, 3, 5, 7), dtype=dtype, device=device).to(memory_format=memory_format)
        for start in range(0, 15, size):
            stop = min(start + size, 15)
            assert_bytes(plan.rows(points, start, stop), full[start:stop])
            part = buffer[: stop - start]
            assert plan.rows(points, start, stop, out=part) is part
            assert_bytes(part, full[start:stop])
    assert plan.rows(points, 4, 4).shape == (0, 3, 5, 7)
    assert plan.rows(points[:0]).shape == (0, 3, 5, 7)


@pytest.mark.parametrize("change", ["transposed", "sliced", "expanded", "reversed ranks"])
def test_noncontiguous(change, device):
    x, ranks = random((4, 6, 6), device=device), rank_features(random((4, 6, 6), device=device))
    base = random((4, 6, 6), device=device, seed=1)
    if change == "transposed":
        x, base, ranks = x.transpose(1, 2), base.transpose(1, 2), ranks.transpose(1, 2)
    elif change == "sliced":
        x, base, ranks = x[:, ::2, 1:], base[:, 1::2, 1:], ranks[:, ::2, :-1]
    elif change == "expanded":
        x, base, ranks = x[:1].expand(4, 6, 6), base[0, 0, 0].expand(6, 6), ranks[:, :1].expand(4, 6, 6)
    else:
        ranks = ranks.flip(0)
    expected = brute(x, ranks, [3, 11], [5], base.expand(x.shape), torch.zeros_like(x))
    assert_bytes(
        perturb_by_rank(x, ranks, insertion_counts=[3, 11], deletion_counts=[5], insertion_baseline=base), expected
    )


def test_a_default_device_changes_nothing():
    x, ranks, mask = random(SHAPE), rank_features(random((2, 5))), MASKS["superpixels"]
    arguments = {"insertion_counts": [1, 4], "deletion_counts": [2], "feature_mask": mask, "insertion_baseline": 2.0}
    expected = perturb_by_rank(x, ranks, **arguments)
    with torch.device("meta"):
        assert_bytes(perturb_by_rank(x, ranks, **arguments), expected)


def test_empty(device):
    x = random((2, 3, 4), device=device)
    ranks = rank_features(x)
    assert perturb_by_rank(x, ranks, insertion_counts=[]).shape == (2, 0, 3, 4)
    assert perturb_by_rank(x[:0], ranks[:0], deletion_counts=[1, 2]).shape == (0, 2, 3, 4)
    assert perturb_by_rank(x[:, :0], ranks[:, :0], deletion_counts=[0]).shape == (2, 1, 0, 4)


def op_case(device="cpu", dtype=torch.float64, per_input=True, rep=2, unit=3, period=5):
    """x [3, 30], rank map [5] with rep 2 and unit 3, units from within the first input to within the last."""
    n_inputs, width = 3, rep * period * unit
    rows = n_inputs if per_input else 1
    rank = torch.stack([torch.randperm(period, generator=torch.Generator().manual_seed(b)) for b in range(rows)])
    rank[:, -1] = -1
    points = torch.tensor([[2, 0], [0, 1], [period, 1], [3, 1], [-4, 0], [2**40, 0]])
    x, insertion, deletion = (random((n, width), dtype, device, seed=n) for n in (n_inputs, rows, rows))
    return [x, insertion, -deletion, rank.int().to(device), rep, unit, points.to(device), 2, 15]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_input", [False, True])
@pytest.mark.parametrize(("rep", "unit"), [(1, 1), (3, 1), (2, 3), (1, 16), (2, 33), (1, 2500)])
@pytest.mark.parametrize("period", [1, 5, 67])
def test_operator_against_reference(period, rep, unit, per_input, dtype, device):
    case = op_case(device, dtype, per_input, rep, unit, period)
    width = rep * unit * period
    memory = torch.full((15, width), 77, dtype=dtype, device=device)
    perturb_rows_out(*case, memory[1:14])
    assert_bytes(memory[1:14], reference.perturb_rows(*case))
    assert_bytes(perturb_rows(*case), memory[1:14])
    assert (memory[[0, 14]] == 77).all()


def test_blocks_of_long_rows(device):
    for dtype, period in ((torch.float32, 2048), (torch.bfloat16, 4097), (torch.float64, 6001)):
        case = op_case(device, dtype, True, 2, 1, period)
        assert_bytes(perturb_rows(*case), reference.perturb_rows(*case))


def digest_of_cases():
    digest = hashlib.sha256()
    for dtype, (rep, unit), period in itertools.product(
        (torch.uint8, torch.bfloat16, torch.float32, torch.float64), ((1, 1), (3, 1), (2, 3), (1, 40)), (1, 63, 2100)
    ):
        digest.update(raw(perturb_rows(*op_case("cpu", dtype, True, rep, unit, period))).numpy().tobytes())
    return digest.hexdigest()


def test_every_instruction_set_writes_the_same_bytes(run_on_every_isa, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", "reference")
    expected = digest_of_cases()
    assert run_on_every_isa("import test_perturb; print(test_perturb.digest_of_cases())") == {expected + "\n"}


def test_threads_write_the_same_bytes():
    x, ranks = random((3, 3, 64, 64)), rank_features(random((3, 64, 64)))
    expected = reference.perturb_by_rank(x, ranks, [5, 900], [4000], 1.5, -2.0)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            actual = perturb_by_rank(
                x, ranks, insertion_counts=[5, 900], deletion_counts=[4000], insertion_baseline=1.5,
                deletion_baseline=-2.0,
            )  # fmt: skip
            assert_bytes(actual, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", ["shared", "per input", "no units", "noncontiguous", "bfloat16"])
def test_opcheck(variant, requires_grad, device):
    case = op_case(device, torch.bfloat16 if variant == "bfloat16" else torch.float32, variant != "shared")
    if variant == "no units":
        case[8] = case[7]
    if variant == "noncontiguous":
        case[0] = torch.stack((case[0], case[0]), -1)[..., 0]
        case[1], case[3] = case[1].t().contiguous().t(), case[3].t().contiguous().t()
    out = torch.empty(case[8] - case[7], 30, dtype=case[0].dtype, device=device)
    torch.library.opcheck(perturb_rows_out, (*case, out))
    for position in (0, 1, 2):
        case[position] = case[position].detach().requires_grad_(requires_grad)
    torch.library.opcheck(perturb_rows, tuple(case))


@pytest.mark.parametrize("per_input", [False, True])
def test_gradients(per_input, device):
    *data, rank, rep, unit, points, start, stop = op_case(device, per_input=per_input)
    data = [t.requires_grad_() for t in data]
    function = lambda *data: perturb_rows(*data, rank, rep, unit, points, start, stop)  # noqa: E731
    assert torch.autograd.gradcheck(function, data)
    assert torch.autograd.gradgradcheck(function, data)


def test_gradients_of_the_public_function(device):
    x = random((2, 2, 3), torch.float64, device).requires_grad_()
    base = random((3,), torch.float64, device, seed=1).requires_grad_()
    ranks = rank_features(random((2, 2, 3), device=device))

    def rows(x, base):
        return perturb_by_rank(
            x, ranks, insertion_counts=[2], deletion_counts=[1, 6], insertion_baseline=base, deletion_baseline=base
        )

    assert torch.autograd.gradcheck(rows, (x, base))
    rows(x, base).sum().backward()
    assert torch.equal(x.grad, (ranks < 2).double() + (ranks >= 1).double())


def loss_of(case):
    _, _, _, *rest = case
    return lambda write: lambda *data: (write(*data, *rest) ** 2).sum()


def test_func_transforms(device):
    case = op_case(device)
    data, loss = tuple(case[:3]), loss_of(case)
    op, ref = loss(perturb_rows), loss(reference.perturb_rows)
    wide = tuple(torch.stack((t, t + 1)) for t in data)
    for transform, given in [
        (lambda f: torch.func.grad(f, (0, 1, 2)), data),
        (lambda f: torch.func.jacrev(f, (0, 1, 2)), data),
        (lambda f: torch.func.jacfwd(f, (0, 1, 2)), data),
        (lambda f: torch.func.hessian(f, 0), data),
        (lambda f: torch.vmap(f), wide),
        (lambda f: torch.vmap(torch.func.grad(f, (0, 1, 2))), wide),
    ]:
        actual, expected = transform(op)(*given), transform(ref)(*given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert all(t.abs().sum() > 0 for t in (actual if isinstance(actual, tuple) else (actual,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(device):
    torch._dynamo.reset()
    case = op_case(device)
    data, loss = tuple(case[:3]), loss_of(case)
    op, ref = loss(perturb_rows), loss(reference.perturb_rows)
    compiled = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")  # noqa: E731
    grads = torch.func.grad(ref, (0, 1, 2))(*data)
    leaves = [t.clone().requires_grad_() for t in data]
    compiled(op)(*leaves).backward()
    torch.testing.assert_close(tuple(t.grad for t in leaves), grads)
    torch.testing.assert_close(compiled(torch.func.grad(op, (0, 1, 2)))(*data), grads)
    wide = tuple(torch.stack((t, t + 1)) for t in data)
    expected = torch.vmap(torch.func.grad(ref, (0, 1, 2)))(*wide)
    torch.testing.assert_close(compiled(torch.vmap(torch.func.grad(op, (0, 1, 2))))(*wide), expected)

    def filled(x, insertion, deletion, rank, points, out):
        perturb_rows_out(x, insertion, deletion, rank, 2, 3, points, 2, 15, out)
        return out + 1

    out = torch.full((13, 30), math.nan, dtype=torch.float64, device=device)
    torch.testing.assert_close(compiled(filled)(*case[:4], case[6], out), reference.perturb_rows(*case) + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_of_a_whole_curve(device):
    torch._dynamo.reset()

    def curve(x, attributions, mask):
        ranks = rank_features(attributions)
        options = {"insertion_counts": [0, 2, 5], "deletion_counts": [3], "insertion_baseline": 0.5}
        return perturb_by_rank(x, ranks, feature_mask=mask, **options)

    compiled = torch.compile(curve, fullgraph=True, dynamic=True, backend="aot_eager")
    mask = MASKS["superpixels"].to(device)
    for n in (2, 4, 3):
        x, attributions = random((n, 3, 4, 6), device=device), random((n, 5), device=device)
        assert_bytes(compiled(x, attributions, mask), curve(x, attributions, mask))


X, R = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "insertion_counts or deletion_counts must be given"),
        ({"inputs": [1.0]}, TypeError, r"inputs must be a tensor \[B, \*feat\], got list"),
        ({"inputs": torch.zeros(3)}, TypeError, r"got \[3\]"),
        ({"ranks": R.float()}, TypeError, "got torch.float32; rank values by"),
        ({"ranks": R > 0}, TypeError, "got torch.bool"),
        ({"ranks": R[:1]}, ValueError, r"ranks must be \[2, \*feat\].*got \[1, 3, 4\]"),
        ({"ranks": R[:, :2]}, ValueError, r"got \[2, 2, 4\]"),
        ({"ranks": R[0, 0]}, ValueError, r"got \[4\]"),
        ({"feature_mask": torch.zeros(4, dtype=torch.int64)}, ValueError, r"ranks must be \[2, M\] beside"),
        ({"ranks": R[:, 0], "feature_mask": torch.arange(12).view(3, 4)}, ValueError, "each of the 12 players"),
        ({"insertion_counts": [0, 13]}, ValueError, "insertion_counts must lie between 0 and the 12 features, got 13"),
        ({"deletion_counts": torch.tensor([3, -1])}, ValueError, "deletion_counts must lie .* got -1"),
        ({"insertion_counts": [0.5]}, TypeError, "insertion_counts must be integers"),
        ({"deletion_counts": torch.tensor([0.5])}, TypeError, "deletion_counts must be integers"),
        ({"deletion_baseline": torch.zeros(5)}, ValueError, "baselines must be a number"),
        ({"memory_format": torch.channels_last}, ValueError, "channels_last must be given inputs"),
    ],
)
def test_bad_input(arguments, error, message):
    given = {"inputs": X, "ranks": R, "deletion_counts": [1], **arguments}
    if not arguments:
        given.pop("deletion_counts")
    with pytest.raises(error, match=message):
        perturb_by_rank(**given)


def test_bad_buffers_and_ranges():
    plan = plan_perturbation(X.requires_grad_(False), R)
    points = plan.points([1])
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        plan.rows(points, 0, 3)
    for out in (torch.zeros(2, 3, 5), torch.zeros(2, 3, 4).double(), torch.zeros(2, 4, 3).mT):
        with pytest.raises(ValueError, match=r"PerturbPlan.rows: out must be torch.float32 \[2, 3, 4\]"):
            plan.rows(points, out=out)
    leaf = plan_perturbation(X.clone().requires_grad_(), R)
    with pytest.raises(ValueError, match="out must be None where inputs or baselines require grad"):
        leaf.rows(points, out=torch.zeros(2, 3, 4))
    case = op_case()
    case[3] = case[3].long()
    with pytest.raises(ValueError, match="perturb_rows: must be given x"):
        perturb_rows(*case)


@pytest.mark.skipif(_native.cpu() is None, reason="the native CPU module is not built")
@pytest.mark.parametrize(
    ("changed", "message"), [({6: 3}, "itemsize"), ({7: -1}, "sizes"), ({16: 5}, "start <= stop"), ({0: 0}, "null")]
)
def test_the_binding_refuses(changed, message):
    arguments = [8, 8, 8, 8, 8, 8, 4, 2, 2, 1, 1, 1, False, False, False, 0, 4, 1]
    for position, value in changed.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        _native.cpu().perturb_rows(*arguments)
