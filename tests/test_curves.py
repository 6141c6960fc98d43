"""Insertion and deletion curves against plain loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from games import IntegerNet, integers
from torch import nn

import xaifast
from xaifast import insertion_deletion
from xaifast.metrics import srg


def plain_order(scores, order="most"):
    """Features of one input in the order of perturbation, by comparison of pairs."""
    places = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return places if order == "most" else places[::-1]


def plain_rows(x, features, base, counts, kind, order):
    """Rows of one curve of one input ``[*feat]``; features ``[*feat]`` says which feature an element is."""
    rows = []
    for k in counts:
        chosen = torch.zeros_like(features, dtype=torch.bool)
        for i in order[:k]:
            chosen |= features == i
        rows.append(torch.where(chosen, x, base) if kind == "insertion" else torch.where(chosen, base, x))
    return torch.stack(rows)


def plain_counts(n, steps):
    return [math.floor(s * n / steps + 0.5) for s in range(steps + 1)]


def plain_area(curve, fractions):
    return sum(
        (f1 - f0) * (a + b) / 2 for f0, f1, a, b in zip(fractions, fractions[1:], curve, curve[1:], strict=False)
    )


class Recorder(nn.Module):
    """The sum of a row as its one output, and the rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(x.clone())
        return x.flatten(1).double().sum(1)


def pixels(height, width, channels):
    return torch.arange(height * width).view(1, height, width).expand(channels, -1, -1)


CASES = [  # C, H, W, steps
    (1, 5, 7, 4),
    (3, 5, 7, 35),
    (4, 6, 3, 1),
    (3, 4, 4, 7),
]


@pytest.mark.parametrize("channels, height, width, steps", CASES)
@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_every_row_the_model_sees(channels, height, width, steps, order, batch_size):
    x, n = integers(3, channels, height, width), height * width
    maps = integers(3, height, width, seed=1)  # nine values: most pixels tie
    bases = integers(channels, height, width, seed=2), integers(3, channels, height, width, seed=3)
    model = Recorder()
    curves = insertion_deletion(
        model, x, maps, target=None, score="logit", steps=steps, order=order, insertion_baseline=bases[0],
        deletion_baseline=bases[1], batch_size=batch_size,
    )  # fmt: skip
    counts = plain_counts(n, steps)
    assert curves.fractions.tolist() == [k / n for k in counts] and curves.n_evaluations == 2 * steps + 1
    rows = torch.cat(model.rows)
    assert torch.equal(rows[:3], x) and rows.shape[0] == 3 * curves.n_evaluations
    rows = rows[3:].view(3, 2 * steps, *x.shape[1:])
    for b in range(3):
        places = plain_order(maps[b].flatten().tolist(), order)
        where = pixels(height, width, channels)
        insertion = plain_rows(x[b], where, bases[0], counts, "insertion", places)
        deletion = plain_rows(x[b], where, bases[1][b], counts, "deletion", places)
        assert torch.equal(rows[b, :steps], insertion[:-1]) and torch.equal(rows[b, steps:], deletion[1:])
        for curve, area, expected in (
            (curves.insertion, curves.insertion_auc, insertion),
            (curves.deletion, curves.deletion_auc, deletion),
        ):
            sums = expected.flatten(1).sum(1)
            assert torch.equal(curve[b], sums)
            assert area[b].item() == pytest.approx(plain_area(sums.tolist(), [k / n for k in counts]), rel=1e-13)


def test_sum_of_pixels_by_hand():
    x = torch.tensor([[0.4, 0.3], [0.2, 0.1]])[None, None]

    def forward(rows):
        score = rows.sum((1, 2, 3))
        return torch.stack((score, 1 - score), 1)

    curves = insertion_deletion(forward, x, x[:, 0], target=0, score="logit", steps=2, insertion_baseline="zero")
    torch.testing.assert_close(curves.fractions, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(curves.deletion, torch.tensor([[1.0, 0.3, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(curves.insertion, torch.tensor([[0.0, 0.7, 1.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(curves.deletion_auc, torch.tensor([0.4]))
    torch.testing.assert_close(curves.insertion_auc, torch.tensor([0.6]))
    torch.testing.assert_close(curves.srg, torch.tensor([0.2]))
    assert curves.one_baseline and curves.n_evaluations == 4  # clean, empty, one point inside of each curve


def test_least_is_most_read_backwards():
    x, maps = integers(4, 2, 6, 4), integers(4, 6, 4, seed=1)
    net = IntegerNet(48)
    most, least = (
        insertion_deletion(net, x, maps, steps=8, order=order, score="logit", insertion_baseline=0, target=1)
        for order in ("most", "least")
    )
    assert torch.equal(most.deletion.flip(1), least.insertion) and torch.equal(most.insertion.flip(1), least.deletion)
    assert not torch.equal(most.deletion, least.deletion)
    torch.testing.assert_close(most.srg, least.deletion_auc - most.deletion_auc, rtol=1e-12, atol=0)
    assert torch.equal(most.srg, least.srg)
    assert torch.equal(srg(net, x, maps, target=1, score="logit", steps=8), most.srg)


def test_areas_of_a_linear_model_add_up():
    model = nn.Linear(13, 3).double().eval()
    x, base = torch.randn(5, 13, dtype=torch.float64), torch.randn(13, dtype=torch.float64)
    curves = insertion_deletion(
        model, x, torch.randn(5, 13), target=2, score="logit", steps=6, insertion_baseline=base, deletion_baseline=base
    )
    total = model(x)[:, 2] + model(base)[2]
    torch.testing.assert_close(curves.insertion_auc + curves.deletion_auc, total, rtol=1e-12, atol=1e-12)


def test_different_baselines_have_no_gain():
    x = torch.rand(2, 1, 4, 4)
    curves = insertion_deletion(IntegerNet(16), x, x[:, 0], score="logit", steps=2)
    assert curves.srg is None and not curves.one_baseline and curves.n_evaluations == 5


def test_a_constant_map_goes_by_index():
    model, x = Recorder(), integers(1, 1, 3, 4) + 10
    insertion_deletion(model, x, torch.ones(1, 3, 4), target=None, score="logit", insertion_baseline=0.0, steps=12)
    deleted = torch.cat(model.rows)[-12:].flatten(1) == 0  # [12, 12]
    assert torch.equal(deleted, torch.ones(12, 12).tril().bool())


def test_random_orders():
    x, net = integers(6, 1, 5, 5), IntegerNet(25)

    def run(rows, **kwargs):
        settings = dict(order="random", target=0, score="logit", steps=5)
        return insertion_deletion(net, x[rows], x[rows, 0], **settings, **kwargs).deletion

    whole = run(slice(None), seed=3)
    assert torch.equal(run(slice(2, 5), seed=3, first_index=2), whole[2:5])
    assert not torch.equal(run(slice(None), seed=4), whole)
    same = integers(1, 1, 5, 5).expand(6, -1, -1, -1)
    curves = insertion_deletion(net, same, same[:, 0], order="random", target=0, score="logit", steps=5)
    assert len({tuple(row) for row in curves.deletion.tolist()}) == 6  # each input has its own permutation


@pytest.mark.parametrize("baseline", ["blur", "mean", "noise", "black", "zero"])
def test_neighbours_and_chunks_change_nothing(baseline):
    x, maps, net = integers(7, 1, 6, 6), integers(7, 6, 6, seed=1), IntegerNet(36)

    def run(rows, **kwargs):
        # Rounded: the net is exact for integers only.
        def forward(images):
            return net((images * 256).round())

        return insertion_deletion(
            forward, x[rows], maps[rows], steps=9, insertion_baseline=baseline, score="softmax", first_index=rows.start,
            **kwargs,
        )  # fmt: skip

    whole = run(slice(0, 7))
    for other in (run(slice(0, 7), batch_size=1), run(slice(0, 7), batch_size=13), run(slice(0, 7), batch_size=64)):
        for name in ("insertion", "deletion", "insertion_auc", "deletion_auc", "targets"):
            assert torch.equal(getattr(other, name), getattr(whole, name))
    for rows in (slice(0, 1), slice(3, 4), slice(4, 7)):
        part = run(rows)
        for name in ("insertion", "deletion", "insertion_auc", "deletion_auc", "targets"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    joined = xaifast.Curves.cat([run(slice(0, 3)), run(slice(3, 7))])
    assert torch.equal(joined.insertion, whole.insertion) and torch.equal(joined.fractions, whole.fractions)
    assert torch.equal(joined.targets, whole.targets)


def test_named_baselines():
    x = torch.randn(3, 2, 16, 17)
    shown = {
        "blur": xaifast.removal.gaussian_blur(x),
        "mean": x.mean((2, 3), keepdim=True).expand_as(x),
        "black": x.amin((1, 2, 3), keepdim=True).expand_as(x),
        "zero": torch.zeros_like(x),
    }
    for name, expected in {**shown, None: shown["blur"]}.items():
        model = Recorder()
        insertion_deletion(
            model, x, x, target=None, score="logit", steps=1, insertion_baseline=name, deletion_baseline=7
        )
        rows = torch.cat(model.rows)[3:].view(3, 2, *x.shape[1:])
        torch.testing.assert_close(rows[:, 0], expected)
        assert bool((rows[:, 1] == 7).all())
    model = Recorder()
    state = torch.get_rng_state()
    settings = dict(target=None, score="logit", steps=1, insertion_baseline="noise", deletion_baseline="noise")
    x = torch.zeros(4, 3, 64, 63)
    curves = insertion_deletion(model, x, x, **settings)
    noise = torch.cat(model.rows)[4:]
    assert noise.shape == x.shape and curves.one_baseline and torch.equal(state, torch.get_rng_state())
    size = noise[0].numel() ** 0.5
    for one in noise:
        assert abs(one.mean()) < 5 / size and abs(one.var() - 1) < 8 / size and abs((one**4).mean() - 3) < 50 / size
        assert abs((one[..., 1:] * one[..., :-1]).mean()) < 5 / size
    assert abs((noise[0] * noise[1]).mean()) < 5 / size
    other = Recorder()
    insertion_deletion(other, x[1:2], x[1:2], **settings, first_index=1)
    assert torch.equal(torch.cat(other.rows)[1], noise[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 1, 32, 32), (6, 3, 31, 33), (6, 2, 1, 3), (6, 3, 80, 97)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_a_blur_is_a_gaussian_sum_whatever_the_batch(dtype, shape, layout):
    x = torch.rand(shape, dtype=torch.float64).to(dtype).to(memory_format=layout)
    whole = xaifast.removal.gaussian_blur(x)
    for rows in (slice(0, 1), slice(2, 4), slice(5, 6)):
        assert torch.equal(xaifast.removal.gaussian_blur(x[rows]), whole[rows])
    taps = torch.exp(-0.5 * ((torch.arange(11).double() - 5) / 5) ** 2)
    taps = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    padded = nn.functional.pad(x.double(), (5, 5, 5, 5), mode="replicate").flatten(0, 1)[:, None]
    expected = nn.functional.conv2d(padded, taps).view(shape)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(whole.double(), expected, rtol=8 * eps, atol=eps)
    assert whole.dtype == dtype and whole.is_contiguous(memory_format=layout)


def test_scores():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).eval()
    x, maps = torch.randn(3, 1, 3, 3), torch.randn(3, 3, 3)
    target = torch.tensor([3, 0, 2])

    def run(score, forward=model, **kwargs):
        return insertion_deletion(
            forward, x, maps, target=target, steps=3, insertion_baseline=0.0, score=score, **kwargs
        )

    model_rows = Recorder()
    insertion_deletion(model_rows, x, maps, target=None, steps=3, insertion_baseline=0.0, score="logit")
    rows = torch.cat(model_rows.rows)[3:].view(3, 5, 1, 3, 3)[:, 2:]
    outputs = torch.cat((x[:, None], rows), 1).flatten(0, 1)
    with torch.no_grad():
        outputs = model(outputs)
    own = target.repeat_interleave(4)

    def column(values):
        return values.gather(1, own[:, None]).view(3, 4)

    torch.testing.assert_close(run("softmax").deletion, column(outputs.softmax(1)))
    torch.testing.assert_close(run("logit").deletion, column(outputs))
    right = (outputs.argmax(1) == own).float().view(3, 4)
    assert torch.equal(run("accuracy").deletion, right)
    assert torch.equal(run("accuracy").mean().deletion, right.mean(0))
    torch.testing.assert_close(run(lambda out: out**2).deletion, column(outputs**2))
    torch.testing.assert_close(run(lambda out: out.amax(1)).deletion, outputs.amax(1).view(3, 4))
    assert run("softmax").targets.tolist() == target.tolist()
    half = run("softmax", lambda rows: model(rows).bfloat16())
    torch.testing.assert_close(half.deletion, column(outputs.bfloat16().float().softmax(1)))
    with torch.no_grad():
        predicted = model(x).argmax(1)
    assert torch.equal(insertion_deletion(model, x, maps).targets, predicted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_dtypes(dtype):
    x = (torch.rand(2, 3, 5, 5) * 200).to(dtype)
    seen = set()

    def forward(rows):
        seen.add(rows.dtype)
        return torch.stack((rows.double().sum((1, 2, 3)), torch.zeros(len(rows)).double()), 1) / 1e4

    curves = insertion_deletion(forward, x, torch.rand(2, 5, 5).to(dtype if dtype.is_floating_point else torch.float32))
    assert seen == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("fractions", "insertion", "deletion", "insertion_auc", "deletion_auc"):
        assert getattr(curves, name).dtype == wide
    assert torch.equal(curves.deletion[:, 0], curves.insertion[:, -1]) and bool((curves.deletion[:, -1] == 0.5).all())
    assert (curves.insertion[0, 0] > 0.5) == dtype.is_floating_point  # blurred, or 0


def test_tables_and_sequences():
    net, x, maps = IntegerNet(11), integers(3, 11), integers(3, 11, seed=1)
    curves = insertion_deletion(net, x, maps, target=0, score="logit")  # steps default to all features, baselines to 0
    assert curves.deletion.shape == (3, 12) and curves.one_baseline
    for b in range(3):
        rows = plain_rows(x[b], torch.arange(11), torch.zeros(11), range(12), "deletion", plain_order(maps[b].tolist()))
        assert torch.equal(curves.deletion[b], net(rows)[:, 0])
    net, x, maps = IntegerNet(12), integers(2, 3, 4), integers(2, 3, 4, seed=1)
    curves = insertion_deletion(net, x, maps, target=0, score="logit", steps=12)
    where = torch.arange(12).view(3, 4)
    for b in range(2):
        places = plain_order(maps[b].flatten().tolist())
        rows = plain_rows(x[b], where, torch.zeros(3, 4), range(13), "insertion", places)
        assert torch.equal(curves.insertion[b], net(rows)[:, 0])


def test_layouts_and_strides():
    x, maps = integers(3, 3, 6, 8), integers(3, 6, 8, seed=1)
    net = IntegerNet(144)
    expected = insertion_deletion(net, x, maps, score="logit", steps=7, insertion_baseline=0.0, target=0)
    layouts = []

    def forward(rows):
        layouts.append(rows.is_contiguous(memory_format=torch.channels_last))
        return net(rows)

    last = x.to(memory_format=torch.channels_last)
    sliced = torch.stack((maps, maps), -1)[..., 0]
    got = insertion_deletion(forward, last, sliced, score="logit", steps=7, insertion_baseline=0.0, target=0)
    assert all(layouts) and torch.equal(got.deletion, expected.deletion)
    assert torch.equal(got.insertion, expected.insertion)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    got = insertion_deletion(net, turned, maps[:, None], score="logit", steps=7, insertion_baseline=0.0, target=0)
    assert torch.equal(got.insertion, expected.insertion)


def test_memory_does_not_grow_with_steps():
    import tracemalloc

    largest = []

    def forward(rows):
        largest.append(rows.shape[0])
        return rows.sum((1, 2, 3))

    x = torch.rand(2, 1, 64, 64)
    peaks = []
    for steps in (16, 4096):
        pointers = set()

        def record(rows, pointers=pointers):
            pointers.add(rows.data_ptr())
            return forward(rows)

        tracemalloc.start()
        curves = insertion_deletion(record, x, x, target=None, score="logit", steps=steps, batch_size=32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert curves.deletion.shape == (2, steps + 1) and max(largest) <= 32
        assert len(pointers) <= 3  # the clean inputs' buffer, then one that is written again
    assert peaks[1] < 8 * peaks[0]  # no Python object a point


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.BatchNorm2d(1), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("third call")
        return self.inner(x).flatten(1)


def test_state_is_restored_when_the_model_raises():
    model = Fails().eval()
    hook = model.inner.register_forward_hook(lambda *_: None)
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    hooks, state = dict(model.inner._forward_hooks), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="third call"):
        insertion_deletion(model, x, x.detach(), batch_size=2, steps=8, insertion_baseline="noise")
    assert model.inner._forward_hooks == hooks and not model.training and not model.inner.training
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled() and x.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    hook.remove()


def test_nothing_leaks_from_behind_a_feature():
    x = torch.ones(1, 4)
    x[0, 0] = 3
    base = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    curves = insertion_deletion(
        Recorder(), x, torch.tensor([[4.0, 3.0, 2.0, 1.0]]), target=None, score=lambda out: out.clamp(max=50), steps=4,
        deletion_baseline=base,
    )  # fmt: skip
    assert curves.insertion[0].tolist() == [0, 3, 4, 5, 6] and curves.deletion[0].tolist() == [6, 50, 50, 50, 50]


def test_additional_arguments_follow_their_input():
    scale = torch.tensor([1.0, 100.0])
    x = torch.ones(2, 4)

    def forward(rows, factor):
        return rows.sum(1) * factor

    curves = insertion_deletion(forward, x, x, target=None, score="logit", additional_forward_args=scale, batch_size=3)
    assert curves.insertion.tolist() == [[0, 1, 2, 3, 4], [0, 100, 200, 300, 400]]
