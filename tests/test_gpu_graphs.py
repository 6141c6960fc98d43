"""CUDA graphs and streams: what is captured replays on new data, and streams do not get into each other's way."""

import functools

import pytest
import torch

import xaifast
from xaifast.coalitions import Coalitions
from xaifast.evaluate import Evaluator
from xaifast.ops import pack_coalitions, plan_selection
from xaifast.ops.select import select_rows, select_rows_out
from xaifast.ops.tokens import compact_rows
from xaifast.players import resolve_players
from xaifast.reference import masking as reference
from xaifast.reference import tokens as reference_tokens
from xaifast.removal import TokenDrop, TokenSelect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MASK = xaifast.grid_mask((16, 16), 4)
SPINS = 20_000_000  # cycles: some hundredths of a second


def capture(call):
    """A graph of a call, warmed up on a side stream as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def select_arguments(seed, n=33):
    torch.manual_seed(seed)
    plan = plan_selection(torch.randn(2, 3, 16, 16, device="cuda"), MASK.cuda(), torch.randn(3, 16, 16, device="cuda"))
    bits = pack_coalitions(torch.rand(n, 16, device="cuda") < 0.5)
    return [plan.x, bits, plan.index, plan.baseline, plan.rep, plan.unit, 0, 2 * n]


def compact_arguments(seed, n=33):
    torch.manual_seed(seed)
    x, index = torch.randn(2, 17, 24, device="cuda"), torch.arange(-1, 16, dtype=torch.int32, device="cuda")
    return [x, pack_coalitions(torch.rand(n, 16, device="cuda") < 0.5), index, 17, 0, 2 * n]


def replace(old, new):
    for a, b in zip(old, new, strict=True):
        if isinstance(a, torch.Tensor):
            a.copy_(b)


def test_select_rows_is_captured_and_replays_on_new_data():
    arguments = select_arguments(0)
    out = torch.zeros(66, 1, 3 * 256, device="cuda")
    graph, _ = capture(lambda: select_rows_out(*arguments, out))
    for seed in (1, 2):
        replace(arguments, select_arguments(seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, reference.select_rows(*arguments))


def test_compact_rows_is_captured_and_replays_on_new_data():
    arguments = compact_arguments(0)
    graph, out = capture(lambda: compact_rows(*arguments))
    for seed in (1, 2):
        replace(arguments, compact_arguments(seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, reference_tokens.compact_rows(*arguments))


def model():
    torch.manual_seed(0)
    return xaifast.models.VisionTransformer(16, 4, 10, dim=24, depth=2, heads=2).eval().cuda()


@pytest.mark.parametrize("removal", [None, TokenSelect(), TokenDrop()], ids=["baseline", "token-select", "token-drop"])
def test_the_evaluator_replays_its_graph_on_every_chunk(removal):
    network, coalitions = model(), Coalitions.sample(16, 100, "leverage", seed=0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(3, 3, 16, 16, device="cuda")
        given = {"players": resolve_players(MASK, (x,), "test"), "removal": removal, "target": 1}
        plain = Evaluator(network, (x,), **given)(coalitions)
        graphed = Evaluator(network, (x,), **given, batch_size=32, cuda_graph=True)(coalitions)
        torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=1e-4)


def on_two_streams(calls):
    """Results of two calls that run at the same time, each behind a wait so that both are queued first."""
    streams, results = [torch.cuda.Stream() for _ in calls], []
    for stream, call in zip(streams, calls, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPINS)
            results.append(call())
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize(
    ("operator", "make"),
    [(select_rows, select_arguments), (compact_rows, compact_arguments)],
    ids=["select", "compact"],
)
def test_two_streams_give_what_one_gives(operator, make):
    calls = [functools.partial(operator, *make(seed, 2000)) for seed in (0, 1)]
    serial = [call() for call in calls]
    torch.cuda.synchronize()
    assert not torch.equal(*serial)
    for _ in range(5):
        for mine, alone in zip(on_two_streams(calls), serial, strict=True):
            assert torch.equal(mine, alone)


def test_a_kernel_runs_on_the_current_stream():
    x, bits, index, *rest = compact_arguments(0, 2000)
    new = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPINS)
        x.copy_(new)  # on another stream the kernel would read what was there before
        out = compact_rows(x, bits, index, *rest)
    torch.cuda.synchronize()
    assert torch.equal(out, reference_tokens.compact_rows(new, bits, index, *rest))


def test_two_streams_of_explanations():
    network = model()
    inputs = [torch.randn(4, 3, 16, 16, device="cuda") for _ in range(2)]
    calls = [lambda x=x: xaifast.kernel_shap(network, x, feature_mask=MASK, n_samples=100).values for x in inputs]
    serial = [call() for call in calls]
    for mine, alone in zip(on_two_streams(calls), serial, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)
