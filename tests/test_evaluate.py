"""The engine: which rows reach the model, and what it does when things go wrong."""

from __future__ import annotations

import functools

import pytest
import torch
from games import IntegerNet, integers, small_cnn
from torch import nn

import xaifast
from xaifast.coalitions import Coalitions
from xaifast.evaluate import Evaluator
from xaifast.players import resolve_players
from xaifast.stream import Stream


def evaluator(forward, inputs, mask=None, **kwargs):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return Evaluator(forward, inputs, players=resolve_players(mask, inputs, "test"), **kwargs)


class Recorder:
    """A model that keeps what it was given."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, *rest):
        self.rows.append(x.clone())
        return x.flatten(1).nan_to_num().sum(1)


def seen(recorder, n_inputs):
    """All rows after the first chunk (the full coalitions)."""
    rows = torch.cat(recorder.rows)
    return rows[n_inputs:]


def random_coalitions(n, n_players, seed=0, per_input=None):
    shape = (n, n_players) if per_input is None else (per_input, n, n_players)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("batch_size", [1, 5, 16, 4096])
@pytest.mark.parametrize("per_input_bits", [False, True])
def test_every_row_equals_where(batch_size, per_input_bits):
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.randint(0, 66, (5, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.unique(mask, return_inverse=True)[1]
    n_players = int(mask.max()) + 1
    baseline = torch.randn(2, 5, 7)
    present = random_coalitions(11, n_players, per_input=3 if per_input_bits else None)
    present[..., -1, :] = ~present[..., 0, :]
    recorder = Recorder()
    values = evaluator(recorder, x, mask, baselines=baseline, batch_size=batch_size)(Coalitions.from_present(present))
    rows = seen(recorder, 3)
    assert rows.shape[0] == 33 and max(len(r) for r in recorder.rows) <= max(batch_size, 1)
    for b in range(3):
        for c in range(11):
            kept = (present[b, c] if per_input_bits else present[c])[mask]
            expected = torch.where(kept, x[b], baseline)
            assert torch.equal(rows[b * 11 + c], expected)
            torch.testing.assert_close(values[b, c, 0], expected.sum().double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 4, 9, 4096])
def test_background_rows_and_their_mean(batch_size):
    x, background = integers(2, 6), integers(4, 6, seed=1)
    present = random_coalitions(5, 6)
    net = IntegerNet(6)
    values = evaluator(net, x, baselines=xaifast.Background(background), batch_size=batch_size)(
        Coalitions.from_present(present)
    )
    for b in range(2):
        for c in range(5):
            rows = torch.stack([torch.where(present[c], x[b], row) for row in background])
            assert torch.equal(values[b, c], net(rows).mean(0))


def test_background_never_passes_the_batch_size():
    largest = []

    def forward(x):
        largest.append(len(x))
        return x.sum(1)

    evaluator(forward, torch.ones(2, 3), baselines=xaifast.Background(torch.zeros(50, 3)), batch_size=8)(
        Coalitions.from_present(torch.ones(2, 3, dtype=torch.bool))
    )
    assert max(largest) == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_leaks_from_behind_an_absent_or_present_feature(bad):
    x = torch.ones(1, 4)
    x[0, 1] = bad
    baseline = torch.tensor([0.0, 0.0, bad, 0.0])
    present = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)  # 1 absent, 2 present
    recorder = Recorder()
    evaluator(recorder, x, baselines=baseline)(Coalitions.from_present(present))
    assert bool(torch.isfinite(seen(recorder, 1)).all())


def test_tuple_inputs_share_players():
    a, b = integers(2, 3), integers(2, 2, 2, seed=1)
    masks = (torch.tensor([0, 1, 2]), torch.tensor([[2, 3], [0, 0]]))
    rows = []

    def forward(u, v):
        rows.append((u.clone(), v.clone()))
        return u.sum(1) + v.sum((1, 2))

    present = random_coalitions(6, 4)
    evaluator(forward, (a, b), masks, batch_size=5)(Coalitions.from_present(present))
    us, vs = (torch.cat(parts)[2:] for parts in zip(*rows, strict=True))
    for i in range(2):
        for c in range(6):
            assert torch.equal(us[i * 6 + c], torch.where(present[c][masks[0]], a[i], 0.0))
            assert torch.equal(vs[i * 6 + c], torch.where(present[c][masks[1]], b[i], 0.0))


@pytest.mark.parametrize("background", [None, torch.zeros(3, 4)])
def test_additional_arguments_follow_their_input(background):
    x = torch.ones(3, 4)
    scale, shared = torch.tensor([1.0, 10.0, 100.0]), torch.tensor(2.0)

    def forward(rows, factor, constant, text):
        assert text == "as is" and factor.shape == rows.shape[:1]
        return rows.sum(1) * factor + constant

    baselines = 0.0 if background is None else xaifast.Background(background)
    values = evaluator(forward, x, additional_forward_args=(scale, shared, "as is"), batch_size=4, baselines=baselines)(
        Coalitions.from_present(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool))
    )
    expected = torch.tensor([[2.0, 3.0]]) * scale[:, None] + 2
    assert torch.equal(values[..., 0], expected.double())


def test_logits_objects_and_callables():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    def plain(x):
        return x @ torch.ones(3, 2)

    coalitions = Coalitions.from_present(random_coalitions(4, 3))
    expected = evaluator(plain, torch.ones(2, 3))(coalitions)
    assert torch.equal(expected, evaluator(lambda x: Output(plain(x)), torch.ones(2, 3))(coalitions))


def test_blur_and_callable_substrates():
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    mask = xaifast.grid_mask((12, 12), 6)
    blurred = xaifast.removal.gaussian_blur(x)
    assert float((blurred.mean() - x.mean()).abs()) < 0.05 and float(blurred.std()) < 0.5 * float(x.std())
    torch.testing.assert_close(xaifast.removal.gaussian_blur(torch.ones(1, 2, 9, 9)), torch.ones(1, 2, 9, 9))
    for removal, shown in [("blur", blurred), (lambda t: t * 2 + 1, x * 2 + 1)]:
        recorder = Recorder()
        present = random_coalitions(3, 4)
        evaluator(recorder, x, mask, removal=removal)(Coalitions.from_present(present))
        rows = seen(recorder, 2)
        for b in range(2):
            for c in range(3):
                assert torch.equal(rows[b * 3 + c], torch.where(present[c][mask], x[b], shown[b]))


def test_channels_last_inputs_stay_channels_last():
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    layouts = []

    def forward(rows):
        layouts.append(rows.is_contiguous(memory_format=torch.channels_last))
        return rows.sum((1, 2, 3))

    mask, present = xaifast.grid_mask((6, 6), 2), random_coalitions(5, 9)
    last = evaluator(forward, x, mask)(Coalitions.from_present(present))
    first = evaluator(lambda rows: rows.sum((1, 2, 3)), x.contiguous(), mask)(Coalitions.from_present(present))
    assert all(layouts)
    torch.testing.assert_close(last, first, atol=1e-4, rtol=1e-5)


class OutOfMemoryAbove(nn.Module):
    """Refuses chunks of more rows than fit."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.sizes = limit, []

    def forward(self, x):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        self.sizes.append(len(x))
        return x.sum(1)


def test_chunks_halve_when_memory_runs_out(caplog):
    model = OutOfMemoryAbove(10)
    x, present = integers(3, 5), random_coalitions(40, 5)
    values = evaluator(model, x, batch_size=64)(Coalitions.from_present(present))
    expected = (x[:, None] * present[None]).sum(2)
    assert torch.equal(values[..., 0], expected)
    assert max(model.sizes) == 8 and "going on with chunks" in caplog.text


def test_backgrounds_split_when_memory_runs_out():
    model, x, rows = OutOfMemoryAbove(3), integers(2, 5), integers(8, 5, seed=1)
    values = evaluator(model, x, baselines=xaifast.Background(rows), batch_size=64)(
        Coalitions.from_present(torch.zeros(4, 5, dtype=torch.bool))
    )
    assert torch.equal(values[..., 0], rows.sum(1).mean().expand(2, 4))


def test_one_row_too_large_says_so():
    with pytest.raises(torch.OutOfMemoryError, match="single unit"):
        evaluator(OutOfMemoryAbove(0), torch.ones(2, 3))


def test_other_errors_pass_through():
    def forward(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        evaluator(forward, torch.ones(2, 3))


def test_memory_does_not_grow_with_coalitions():
    """Row buffers are made once and written again: every chunk has the same address."""
    addresses = set()

    def forward(x):
        addresses.add(x.data_ptr())
        return x.sum(1)

    run = evaluator(forward, torch.ones(1, 6), batch_size=16)
    addresses.clear()
    run(Coalitions.from_present(random_coalitions(300, 6)))
    assert len(addresses) == 1


def test_model_is_left_as_it_was():
    net = small_cnn(torch.float32)
    net[2].train()  # a mode that does not matter is kept
    before = {name: module.training for name, module in net.named_modules()}
    hooks = [len(module._forward_hooks) for module in net.modules()]
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    values = evaluator(net, x, xaifast.grid_mask((8, 8), 4))(Coalitions.from_present(random_coalitions(3, 4)))
    assert {name: module.training for name, module in net.named_modules()} == before
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert x.requires_grad and x.grad is None and all(p.requires_grad for p in net.parameters())
    assert not values.is_inference() and not values.requires_grad
    values.add_(1)  # a normal tensor


@pytest.mark.parametrize("wrap", ["module", "method", "partial", "closure"])
def test_active_dropout_is_found_behind_callables(wrap):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    forwards = {
        "module": model,
        "method": model.forward,
        "partial": functools.partial(model),
        "closure": lambda x: model(x),
    }
    with pytest.raises(ValueError, match="Dropout"):
        evaluator(forwards[wrap], torch.ones(1, 3))
    model.eval()
    evaluator(forwards[wrap], torch.ones(1, 3))


def test_stochastic_depth_is_found():
    class DropPath(nn.Module):  # as timm and Hugging Face call it
        drop_prob = 0.1

        def forward(self, x):
            return x

    model = nn.Sequential(nn.Linear(3, 3), DropPath())
    with pytest.raises(ValueError, match="DropPath"):
        evaluator(model, torch.ones(1, 3))
    evaluator(model.eval(), torch.ones(1, 3))


def test_autocast_reaches_the_model():
    dtypes = set()
    layer = nn.Linear(4, 2).eval()

    def forward(x):
        out = layer(x)
        dtypes.add(out.dtype)
        return out

    evaluator(forward, torch.ones(2, 4), autocast=torch.bfloat16)(Coalitions.from_present(random_coalitions(3, 4)))
    assert dtypes == {torch.bfloat16}


def test_compiled_models_see_one_shape():
    net = small_cnn(torch.float32)
    shapes = []

    def backend(graph, example):
        shapes.append(tuple(example[-1].shape) if hasattr(example[-1], "shape") else None)
        return graph.forward

    compiled = torch.compile(net, backend=backend, dynamic=False)
    x, mask = torch.randn(3, 1, 8, 8), xaifast.grid_mask((8, 8), 2)
    coalitions = Coalitions.from_present(random_coalitions(25, 16))
    values = evaluator(compiled, x, mask, batch_size=16)(coalitions)
    torch.testing.assert_close(values, evaluator(net, x, mask, batch_size=16)(coalitions), atol=1e-5, rtol=1e-5)
    assert len(shapes) == 1  # 3 clean rows, 64 rows and a last chunk of 11: all of 16


def test_stream_covers_its_range_once_and_remembers():
    calls = []

    def step(start, stop):
        if stop - start > 3:
            raise torch.OutOfMemoryError("no")
        calls.append((start, stop))

    with Stream(20, 8, show_progress=False, description="test") as stream:
        stream.run(10, step)
        stream.run(10, step)
    covered = [i for start, stop in calls for i in range(start, stop)]
    assert covered == [*range(10), *range(10)] and stream.rows == 2


def test_stream_scale_never_loops_forever():
    def step(start, stop):
        if stop - start > 1:
            raise torch.OutOfMemoryError("no")

    with Stream(5, 4, show_progress=False, description="test") as stream:
        stream.run(5, step, scale=100.0)


def test_progress_bar_counts_coalitions(capsys):
    run = evaluator(lambda x: x.sum(1), torch.ones(2, 3), show_progress=True, caller="xaifast.kernel_shap")
    run(Coalitions.from_present(random_coalitions(6, 3)))
    shown = capsys.readouterr().err
    assert "kernel_shap" in shown and "12/12" in shown.replace(".0", "")
