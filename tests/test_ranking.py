"""rank_features: a total order, the orders of other tools, and random orders that depend on seed and index alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from masking_cases import DEVICES

from xaifast import _native
from xaifast.ops import rank_features
from xaifast.reference import ranking as reference
from xaifast.reference.coalitions import Stream

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WIDTHS = (0, 1, 2, 24, 25, 48, 49, 96, 97, 1000, 1023, 1024, 4099)  # about where the kernel's way of sorting changes
NAN, INF = math.nan, math.inf


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=["auto", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", request.param)


def brute(row):
    """Places by comparing every pair: descending value, then index; NaNs last."""
    row = row.double().tolist() if row.is_floating_point() else row.tolist()
    place = []
    for i, v in enumerate(row):
        before = 0
        for j, w in enumerate(row):
            if math.isnan(v):
                before += not math.isnan(w) or j < i
            else:
                before += w > v or (w == v and j < i)
        place.append(before)
    return torch.tensor(place, dtype=torch.int32)


def ranks_of(order):
    """Inverse of a NumPy permutation [B, M]."""
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
    return torch.from_numpy(ranks).to(torch.int32)


def tied(shape, dtype, seed=0):
    """Few levels, so that most values tie; for wide types also values that differ in their last bit alone."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, shape, generator=generator)
    if dtype == torch.bool:
        return values > 0
    if dtype.is_floating_point:
        noise = torch.randint(0, 2, shape, generator=generator).to(dtype) * torch.finfo(dtype).eps
        return values.to(dtype) * (1 + noise)
    return (values.abs() if dtype == torch.uint8 else values).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_every_pair_is_in_order(dtype, backend, device):
    for width in WIDTHS[:-2]:
        values = tied((2, width), dtype)
        expected = torch.stack([brute(row) for row in values])
        assert torch.equal(rank_features(values.to(device)).cpu(), expected)


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int16, torch.int32, torch.int64), ids=str)
def test_all_bit_patterns_sort_as_the_reference(dtype):
    """Subnormal, huge, infinite, NaN of both signs and payloads: the kernel's keys against comparisons of values."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    for width in WIDTHS:
        bits = torch.randint(info.min, info.max, (3, width), generator=torch.Generator().manual_seed(width))
        values = bits.to(integer).view(dtype)
        for order, compat in itertools.product(("most", "least"), (None, "rise", "torchcam", "quantus")):
            actual = rank_features(values, order=order, nan="last", compat=compat)
            assert torch.equal(actual, reference.rank_features(values, order, compat))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [9, 900])
def test_special_values(dtype, width, backend, device):
    few = [NAN, -INF, 0.0, INF, -0.0, NAN, -NAN, 1.0, -1.0]
    values = torch.tensor([few, few[::-1]], dtype=dtype, device=device).repeat(1, width // 9)
    expected = torch.stack([brute(row) for row in values.cpu()])
    most = rank_features(values, nan="last")
    assert torch.equal(most.cpu(), expected)
    assert torch.equal(rank_features(values, nan="last", order="least"), width - 1 - most)
    assert rank_features(values[:1, :9], nan="last").tolist() == [[6, 5, 2, 0, 3, 7, 8, 1, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [30, 700])
def test_orders_of_other_tools_are_numpys(dtype, width, backend, device):
    values = tied((3, width), dtype)
    values[0, ::4], values[1, 1] = NAN, INF
    array = values.numpy()
    rise = ranks_of(np.flip(np.argsort(array, axis=1, kind="stable"), 1))
    quantus = ranks_of(np.argsort(-array, axis=1, kind="stable"))
    torchcam = ranks_of(torch.argsort(values, dim=1, descending=True, stable=True).numpy())
    for compat, expected in {"rise": rise, "xplique": rise, "quantus": quantus, "torchcam": torchcam}.items():
        actual = rank_features(values.to(device), compat=compat).cpu()
        assert torch.equal(actual, expected), compat
        least = rank_features(values.to(device), compat=compat, order="least").cpu()
        assert torch.equal(least, width - 1 - expected), compat
    assert len({tuple(r.flatten().tolist()) for r in (rise, quantus, torchcam)}) == 3


def test_shapes_and_layouts(backend, device):
    values = torch.randn(4, 3, 5, 7, device=device)
    flat = rank_features(values.flatten(1))
    assert torch.equal(rank_features(values), flat.view(4, 3, 5, 7))
    for laid_out in (values.to(memory_format=torch.channels_last), torch.stack((values, -values), -1)[..., 0]):
        assert not laid_out.is_contiguous()
        assert torch.equal(rank_features(laid_out), flat.view(4, 3, 5, 7))
    same = torch.zeros(2, 1, device=device).expand(2, 600)
    assert torch.equal(rank_features(same), torch.arange(600, dtype=torch.int32, device=device).expand(2, 600))
    assert rank_features(values[:0]).shape == (0, 3, 5, 7)
    assert rank_features(values[:, :0]).shape == (4, 0, 5, 7)
    assert rank_features(values.requires_grad_()).dtype == torch.int32


def test_a_row_does_not_depend_on_its_neighbours_or_threads(backend):
    values = tied((9, 2000), torch.float32)
    alone = torch.cat([rank_features(row[None]) for row in values])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(rank_features(values), alone)
            assert torch.equal(rank_features(values.double()), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("width", [1, 2, 16, 17, 1001])
def test_random_orders_sort_the_words_of_their_stream(width, backend, device):
    seed, first = 2**40 + 7, 2**32 - 1
    blank = torch.full((3, width), NAN, device=device)
    ranks = rank_features(blank, order="random", seed=seed, first_index=first).cpu()
    for b, row in enumerate(ranks):
        stream = Stream(seed, first + b, 5)
        words = [stream.word() for _ in range(width)]
        signed = [w - (w >> 63 << 64) for w in words]
        assert row[torch.tensor(np.argsort([-s for s in signed], kind="stable"))].tolist() == list(range(width))
    assert torch.equal(rank_features(blank[1:], order="random", seed=seed, first_index=first + 1).cpu(), ranks[1:])
    shaped = rank_features(blank.view(3, width, 1).int(), order="random", seed=seed, first_index=first)
    assert torch.equal(shaped.cpu().flatten(1), ranks)


def test_random_orders_are_uniform_and_leave_the_global_state():
    state = torch.get_rng_state()
    ranks = rank_features(torch.zeros(6000, 3), order="random")
    assert torch.equal(torch.get_rng_state(), state)
    seen = torch.unique(ranks, dim=0, return_counts=True)[1]
    assert len(seen) == 6
    assert ((seen - 1000).abs() < 150).all()  # five standard deviations
    assert not torch.equal(ranks, rank_features(torch.zeros(6000, 3), order="random", seed=1))


def test_a_default_device_changes_nothing(backend):
    values = torch.randn(2, 20)
    expected = rank_features(values), rank_features(values, order="random")
    with torch.device("meta"):
        actual = rank_features(values), rank_features(values, order="random")
    assert all(map(torch.equal, actual, expected))


def test_nan_is_refused_by_name(device):
    values = torch.zeros(3, 2, 2, device=device)
    values[1, 0, 1] = values[2, 1, 1] = NAN
    with pytest.raises(ValueError, match=r"rank_features: values must not be NaN, got 1 in input 1; .*nan=\"last\""):
        rank_features(values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "must be a tensor"),
        ((torch.zeros(2, 3, dtype=torch.complex64),), TypeError, "got torch.complex64"),
        ((torch.zeros(3),), ValueError, r"got \[3\]; add a batch dimension"),
        ((torch.zeros(1, 1).expand(1, 2**31),), ValueError, "fewer than 2\\^31"),
        (({"order": "best"}), ValueError, "order must be one of 'most', 'least', 'random', got 'best'"),
        (({"nan": "first"}), ValueError, "nan must be one of 'raise', 'last'"),
        (({"compat": "captum"}), ValueError, "compat must be one of None, 'rise'"),
        (({"order": "random", "seed": -1}), ValueError, "seed must be an integer between"),
        (({"order": "random", "seed": 1.0}), ValueError, "got 1.0"),
        (({"order": "random", "first_index": 2**63}), ValueError, "first_index must be"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        if isinstance(arguments, dict):
            rank_features(torch.zeros(1, 3), **arguments)
        else:
            rank_features(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_opcheck(dtype, device):
    values = tied((3, 40), dtype).to(device)
    for layout in (values, values.t().contiguous().t(), values[:0]):
        torch.library.opcheck(torch.ops.xaifast.rank_features.default, (layout, "most", None))
        torch.library.opcheck(torch.ops.xaifast.rank_features.default, (layout, "least", "rise"))
    torch.library.opcheck(torch.ops.xaifast.random_ranks.default, (3, 4, 2, 30), {"device": device})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(device):
    torch._dynamo.reset()

    def both(values, order):
        return rank_features(values * 2, order=order) + 1, rank_features(values, order="random", seed=3)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for rows in (2, 5, 3):
        values = tied((rows, 50), torch.float32).to(device)
        for order in ("most", "least"):
            for actual, expected in zip(compiled(values, order), both(values, order), strict=True):
                assert torch.equal(actual, expected)


def test_func_transforms(device):
    values = tied((4, 2, 30), torch.float64).to(device)
    assert torch.equal(torch.vmap(rank_features)(values), torch.stack([rank_features(v) for v in values]))

    def weighted(values):
        return (rank_features(values) * values).sum()

    one = values[0]
    assert torch.equal(torch.func.grad(weighted)(one), rank_features(one).double())
    compiled = torch.compile(torch.vmap(torch.func.grad(weighted)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), torch.vmap(rank_features)(values).double())


@pytest.mark.skipif(_native.cpu() is None, reason="the native CPU module is not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 1, 2, 3, 0, 0, False, 1), "itemsize must be"),
        ((8, 8, -1, 2, 4, 0, 0, False, 1), "sizes out of range"),
        ((8, 8, 1, 2, 4, 0, 3, False, 1), "ties must be"),
        ((0, 8, 1, 2, 4, 0, 0, False, 1), "null pointer"),
    ],
)
def test_the_binding_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.cpu().rank_features(*arguments)
