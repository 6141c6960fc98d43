"""Occlusion by receptive fields equals occlusion of whole images, layer by layer and for whole networks."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xaifast
from xaifast.attribution import _patched_graph as patched_graph
from xaifast.attribution._patched_graph import FieldError, PatchedGraph
from xaifast.attribution._patches import Span
from xaifast.attribution._receptive_field import FieldWindow


@pytest.fixture(autouse=True)
def patches_of_any_size(monkeypatch):
    """Small maps are mostly changed; patch them anyway."""
    monkeypatch.setattr(patched_graph, "_SHARE", 1.0)


def normed(channels):
    norm = nn.BatchNorm2d(channels).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    return norm


class Last(nn.Module):
    """A body, then numbers that every position of its map decides about."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.mix = None

    def forward(self, x):
        maps = self.body(x)
        if self.mix is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.mix = torch.randn(maps[0].numel(), 3, dtype=maps.dtype)
        return maps.flatten(1) @ self.mix


def both(model, x, **options):
    model = model.to(x.dtype).eval()
    model(x[:1])
    plain = xaifast.occlusion(model, x, **options)
    fields = xaifast.occlusion(model, x, receptive_field=True, **options)
    return plain, fields


def same(model, x, **options):
    plain, fields = both(model, x, **options)
    torch.testing.assert_close(fields, plain, rtol=1e-9, atol=1e-10)
    assert plain.abs().max() > 1e-3


LAYERS = {
    "conv": lambda: [nn.Conv2d(2, 3, 3)],
    "padded": lambda: [nn.Conv2d(2, 3, 5, padding=2)],
    "strided": lambda: [nn.Conv2d(2, 3, 3, stride=2, padding=1)],
    "skipping": lambda: [nn.Conv2d(2, 3, 1, stride=3)],
    "uneven": lambda: [nn.Conv2d(2, 3, (1, 4), stride=(2, 1), padding=(0, 3), dilation=(1, 2))],
    "dilated": lambda: [nn.Conv2d(2, 4, 3, dilation=3, padding=3, groups=2, bias=False)],
    "reflected": lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")],
    "same": lambda: [nn.Conv2d(2, 3, 3, padding="same")],
    "valid": lambda: [nn.Conv2d(2, 3, 2, padding="valid")],
    "deep": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 2, 2, padding=1)],
    "max pool": lambda: [nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2, 1)],
    "dilated pool": lambda: [nn.MaxPool2d(2, 1, dilation=2)],
    "ceil pool": lambda: [nn.MaxPool2d(2, ceil_mode=True)],
    "avg pool": lambda: [nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 2, 2)],
    "avg pool of what is there": lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "norm": lambda: [nn.Conv2d(2, 3, 3, bias=False), normed(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)],
    "group norm": lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)],
    "dropout": lambda: [
        nn.Conv2d(2, 4, 3),
        nn.Dropout2d(),
        nn.Identity(),
        nn.Dropout(inplace=True),
        nn.Conv2d(4, 2, 3),
    ],
    "activations": lambda: [nn.GELU(), nn.PReLU(2), nn.ELU(), nn.Hardswish(), nn.SiLU(), nn.LeakyReLU(inplace=True)],
    "softmax": lambda: [nn.Conv2d(2, 4, 3), nn.Softmax(1), nn.Conv2d(4, 2, 3)],
    "upsampled": lambda: [nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3)],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 2), ((2, 5), (2, 4)), (11, 1)])
def test_layers(layers, window, stride):
    same(Last(*layers()), torch.randn(2, 2, 11, 12, dtype=torch.float64), window=window, stride=stride)


class Residual(nn.Module):
    """Branches whose fields differ, written every way people write them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 5, padding=2)
        self.short = nn.Conv2d(2, 2, 1, bias=False)
        self.scale = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.slope = nn.Parameter(torch.randn(12))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.one(x)
        if self.kind == "plus":
            return self.relu(self.two(self.relu(y)) + self.short(x))
        if self.kind == "in place":
            out = self.two(y)
            out += x
            return out
        if self.kind == "read before written":
            before = self.two(y)
            after = F.relu(y, inplace=True)
            return before + after * y
        if self.kind == "written method":
            return self.two(y.relu_()) + y.mul(2.0) - x
        if self.kind == "cat":
            return torch.cat([y, x, self.two(x)], dim=1)
        if self.kind == "scaled":
            return self.two(y) * self.scale + 0.5 * y / 2
        if self.kind == "by place":
            return self.two(y) * self.slope
        if self.kind == "gate":
            return y * torch.sigmoid(F.adaptive_avg_pool2d(self.two(x), 1))
        if self.kind == "functional":
            z = F.max_pool2d(torch.relu(y), 2, stride=1)
            return F.avg_pool2d(F.dropout(F.leaky_relu(z, 0.3), 0.5, self.training), kernel_size=2, padding=1)
        if self.kind == "written function":
            before = self.two(self.two(y))
            torch.sigmoid_(y)
            return torch.cat(tensors=[before + self.two(y), y], dim=1)
        if self.kind == "clamped by place":
            return self.two(torch.clamp(y, min=self.slope)) + y.clamp(self.scale).abs() ** self.slope.exp()
        if self.kind == "constant":
            return self.two(y * torch.tensor([2.0, 3.0], dtype=y.dtype).view(1, 2, 1, 1))
        if self.kind == "same twice":
            return y + y
        if self.kind == "sizes":
            return (self.two(y).view(x.size(0), x.shape[1], -1) ** 2).reshape(-1, 2, 11, 12)
        if self.kind == "without maps":
            return x.mean((2, 3), keepdim=True) + self.two(y)
        raise AssertionError


KINDS = [
    "plus", "in place", "read before written", "written method", "cat", "scaled", "by place", "gate", "functional",
    "same twice", "sizes", "without maps", "written function", "clamped by place", "constant",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 4])
def test_branches(kind, window):
    model = Last(Residual(kind), nn.Conv2d({"cat": 6, "written function": 4}.get(kind, 2), 2, 3))
    same(model, torch.randn(2, 2, 11, 12, dtype=torch.float64), window=window, stride=window)


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), normed(after)
        self.two, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), normed(after)
        self.short = None
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), normed(after))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        out += x if self.short is None else self.short(x)
        return self.relu(out)


def small_resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3, bias=False), normed(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), Block(4, 4, 1),
        Block(4, 6, 2), Block(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_residual_network(share, layout, monkeypatch):
    monkeypatch.setattr(patched_graph, "_SHARE", share)
    x = torch.randn(3, 3, 37, 33, dtype=torch.float64).contiguous(memory_format=layout)
    same(small_resnet(), x, window=8, stride=5, target="predicted", baselines=torch.randn(3, 3, 37, 33).double())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
def test_chunks_and_neighbours(batch_size):
    model, x = Last(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(5, 1, 8, 8).double()
    same(model, x, window=4, stride=4, batch_size=batch_size, baselines=0.3)
    fields = xaifast.occlusion(model, x, window=4, stride=4, receptive_field=True, batch_size=batch_size)
    alone = xaifast.occlusion(model, x[3:4], window=4, stride=4, receptive_field=True)
    torch.testing.assert_close(fields[3:4], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = small_resnet().to(dtype).eval()
    x = torch.randn(2, 3, 32, 32).to(dtype)
    plain, fields = both(model, x, window=8, stride=8, target=1)
    bound = 16 * torch.finfo(dtype).eps * model(x).abs().max()  # attributions are differences of outputs
    assert fields.dtype == torch.float32 and (plain - fields).abs().max() <= bound


def test_less_is_computed_than_of_whole_images(monkeypatch):
    monkeypatch.setattr(patched_graph, "_SHARE", 0.7)
    areas = []
    real = F.conv2d

    def counted(x, *rest):
        areas.append(x.shape[0] * x.shape[2] * x.shape[3])
        return real(x, *rest)

    monkeypatch.setattr(F, "conv2d", counted)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
                          nn.Linear(4 * 32 * 32, 2)).eval()  # fmt: skip
    xaifast.occlusion(model, torch.randn(1, 1, 32, 32), window=4, stride=4, target=0, receptive_field=True)
    clean, compared, windows = 32 * 32, 9, 64
    patches = {n * side * side for n in (compared, windows) for side in (8, 10)}
    assert set(areas) == {clean, compared * clean, *patches}


def test_nan_behind_a_window_stays_there():
    x = torch.randn(1, 1, 12, 12).double()
    x[0, 0, :4, :4] = torch.nan
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).double().eval()
    prepared = FieldWindow(_grids(12, 4), xaifast.removal.Replace())
    hidden = x.clone()
    hidden[0, 0, :4, :4] = 0
    with torch.inference_mode():
        removal = prepared.prepare(model, (x.nan_to_num(),), None, 0.0, (), "test")
        removal = dataclasses.replace(removal, images=x)
        rows = removal.rows(torch.tensor([[0, 0, 0, 0]]), 0, 1, ())
        torch.testing.assert_close(removal.run(model, rows, ()), model(hidden))


def _grids(size, window):
    from xaifast.removal.windows import Grid

    return (Grid((1, size, size), (1, window, window), (1, window, window)),)


@pytest.mark.parametrize("size", [7, 8, 20])
@pytest.mark.parametrize(
    "geometry", [(3, 1, 0, 1), (3, 2, 1, 1), (1, 3, 0, 1), (4, 2, 3, 2), (2, 2, 0, 1), (5, 3, 2, 1)]
)
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 3), (7, 2)])
def test_spans_cover_what_changes_and_little_more(size, geometry, window, stride):
    """A kernel of random positive weights: an output changes exactly where the window is seen."""
    kernel, step, padding, dilation = geometry
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        pytest.skip("the kernel does not fit")
    weights = torch.rand(1, 1, kernel, dtype=torch.float64) + 0.1
    starts = torch.arange(-(-(size - window) // stride) + 1) * stride
    span = Span.of(size, starts, starts + window)
    clean = F.conv1d(torch.zeros(1, 1, size).double(), weights, None, step, padding, dilation)
    after = span.through(*geometry, clean.shape[-1])
    for i, start in enumerate(starts.tolist()):
        x = torch.zeros(1, 1, size).double()
        x[..., start : start + window] = 1
        changed = (F.conv1d(x, weights, None, step, padding, dilation) != 0).flatten().nonzero().flatten().tolist()
        if changed:
            assert (int(after.low[i]), int(after.high[i])) == (changed[0], changed[-1] + 1)
            assert after.start[i] <= changed[0] and changed[-1] < after.start[i] + after.length
        assert 0 <= after.start[i] <= after.size - after.length


def test_the_model_is_left_as_it_was():
    model = small_resnet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    xaifast.occlusion(model, torch.randn(1, 3, 32, 32), window=8, stride=8, target=0, receptive_field=True)
    assert modules == [id(module) for module in model.modules()] and not any(m.training for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Dynamic(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return (x + y).flatten(1)


def hooked():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten())
    model[0].register_forward_hook(lambda *_: None)
    return model


REFUSED = [
    (Dynamic(), "torch.fx can trace"),
    (hooked(), "without forward hooks, 0 has some"),
    (lambda x: x.flatten(1), "forward to be an nn.Module"),
    (TwoInputs(), "torch.fx can trace, got TypeError: .*missing 1 required positional argument: 'y'"),
]


@pytest.mark.parametrize(("model", "words"), REFUSED)
def test_what_cannot_be_done_is_said_or_gone_around(model, words, caplog):
    x = torch.randn(2, 1, 6, 6)
    options = dict(window=3, stride=3, target=0)
    with pytest.raises(FieldError, match=words) as caught:
        xaifast.occlusion(model, x, receptive_field=True, **options)
    assert str(caught.value).startswith("xaifast.occlusion: receptive_field needs")
    if isinstance(model, TwoInputs):
        return
    with caplog.at_level(logging.WARNING, "xaifast"):
        shown = xaifast.occlusion(model, x, receptive_field="auto", **options)
    assert torch.equal(shown, xaifast.occlusion(model, x, **options)) and "whole images are run" in caplog.text


class Viewed(nn.Module):
    """Views need the layout that maps have on the plain path; a default and a shared tensor need care in tracing."""

    def __init__(self):
        super().__init__()
        inner = nn.Module()
        inner.scale = torch.rand(1, 3, 1, 1, dtype=torch.float64)
        self.first, self.second = nn.Module(), nn.Module()
        self.first.inner = self.second.inner = inner
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(3 * 9 * 10, 4)

    def forward(self, x, mask=None):
        x = self.conv(x) * self.second.inner.scale
        if mask is not None:
            x = x * mask
        return self.linear(x.view(-1, 270))


def test_views_defaults_and_shared_tensors():
    same(Viewed(), torch.randn(2, 2, 11, 12, dtype=torch.float64), window=3, stride=2)


def test_tracing_leaves_no_constants_in_the_model():
    model = Last(Residual("constant"))
    model.double().eval()(x := torch.randn(1, 2, 11, 12, dtype=torch.float64))
    before = [set(vars(module)) for module in model.modules()]
    xaifast.occlusion(model, x, window=4, receptive_field=True)
    assert [set(vars(module)) for module in model.modules()] == before


class OnlyTwice(nn.Module):
    """Runs when traced, and on batches of the inputs' size."""

    def forward(self, x):
        return x.reshape(36, -1, 2)[0]


def test_what_does_not_run_in_parts_is_refused():
    with pytest.raises(FieldError, match="must be able to run the traced model, got RuntimeError: shape"):
        xaifast.occlusion(OnlyTwice(), torch.randn(2, 1, 6, 6), window=3, stride=3, receptive_field=True)


def test_other_inputs_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).eval()
    with pytest.raises(FieldError, match="one floating input"):
        xaifast.occlusion(model, torch.randn(2, 12), window=2, receptive_field=True)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).eval()
    x = torch.randn(2, 2, 4, 4)
    with pytest.raises(FieldError, match="over all channels"):
        xaifast.occlusion(flat, x, window=(1, 2, 2), receptive_field=True)
    with pytest.raises(FieldError, match="one baseline, got a Background of 3"):
        xaifast.occlusion(
            flat, x, window=2, baselines=xaifast.Background(torch.zeros(3, 2, 4, 4)), receptive_field=True
        )
    with pytest.raises(FieldError, match="pixel replacement"):
        xaifast.occlusion(flat, x, window=2, removal=xaifast.removal.TokenDrop(), receptive_field=True)
    with pytest.raises(FieldError, match="autocast=torch.bfloat16"):
        xaifast.occlusion(flat, x, window=2, autocast=torch.bfloat16, receptive_field=True)
    for unclear in (1, None, "yes", torch.ones(2)):
        with pytest.raises(ValueError, match='receptive_field must be True, False or "auto"'):
            xaifast.occlusion(flat, x, window=2, receptive_field=unclear)


def test_auto_goes_around_options_too(caplog):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1)).eval(), torch.randn(2, 2, 4, 4)
    options = dict(window=2, autocast=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "xaifast"):
        shown = xaifast.occlusion(model, x, receptive_field="auto", **options)
    assert torch.equal(shown, xaifast.occlusion(model, x, **options)) and "whole images are run" in caplog.text


def test_a_wrong_result_is_found_before_it_is_used(monkeypatch):
    real = PatchedGraph.__call__
    monkeypatch.setattr(PatchedGraph, "__call__", lambda *args: real(*args) + 1e-3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)).eval()
    with pytest.raises(FieldError, match="must give what whole images give"):
        xaifast.occlusion(model, torch.randn(1, 1, 6, 6), window=2, target=0, receptive_field=True)
