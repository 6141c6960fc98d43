"""Models, callers and devices as users bring them."""

from __future__ import annotations

import pytest
import torch
from games import IntegerNet, integers, small_cnn
from torch import nn

import xaifast
from xaifast.coalitions import Coalitions
from xaifast.evaluate import Evaluator
from xaifast.players import resolve_players
from xaifast.removal import TokenDrop, TokenSelect

PATCHES = xaifast.grid_mask((8, 8), 4)
REMOVALS = {"select": TokenSelect(), "drop": TokenDrop()}


def vit():
    return xaifast.models.VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=1).double().eval()


def images(n=2):
    return torch.rand(n, 1, 8, 8, dtype=torch.float64)


def patch_values(model, x, **kwargs):
    return xaifast.kernel_shap(model, x, feature_mask=PATCHES, **kwargs).values


def one_memory(forward):
    """Answers in the same memory every time, as exported engines do."""
    memory = torch.zeros(4096, dtype=torch.float64)

    def run(x):
        return memory[: len(x)].copy_(forward(x))

    return run


def doubling_in_place(x):
    return x.mul_(2).flatten(1).sum(1)


def with_gradients(x):
    with torch.enable_grad():
        return x @ torch.ones(x.shape[1], 2, dtype=x.dtype, requires_grad=True)


@pytest.mark.parametrize("batch_size", [2, 7, 4096])
@pytest.mark.parametrize(
    "odd, plain",
    [
        (lambda x: x, lambda x: x.clone()),
        (doubling_in_place, lambda x: 2 * x.sum(1)),
        (one_memory(lambda x: x.sum(1)), lambda x: x.sum(1)),
        (with_gradients, lambda x: x @ torch.ones(x.shape[1], 2, dtype=x.dtype)),
    ],
    ids=["view of its input", "in place", "one memory", "gradients"],
)
def test_models_that_share_or_change_memory(odd, plain, batch_size):
    x, rows = integers(3, 6), integers(5, 6, seed=1)
    for baselines in (1.0, xaifast.Background(rows)):
        given = x.clone().requires_grad_()
        values = xaifast.kernel_shap(odd, given, baselines=baselines, n_samples=20, batch_size=batch_size).values
        assert torch.equal(values, xaifast.kernel_shap(plain, x, baselines=baselines, n_samples=20).values)
        assert torch.equal(given, x) and not values.requires_grad


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(1, 3, 8, 8).expand(4, 3, 8, 8),
        torch.rand(4, 8, 8, 3).permute(0, 3, 1, 2),
        torch.rand(4, 3, 8, 16)[..., ::2],
        torch.rand(3, 4, 8, 8).transpose(0, 1),
    ],
    ids=["expanded", "channels last", "strided", "transposed"],
)
def test_any_strides(x):
    mask, weight = xaifast.grid_mask((8, 8), 2), torch.rand(3 * 64)
    values = xaifast.kernel_shap(lambda rows: rows.flatten(1) @ weight, x, feature_mask=mask, n_samples=100).values
    expected = torch.zeros(4, 16).index_add_(1, mask.flatten().repeat(3), x.flatten(1) * weight)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_solves_do_not_depend_on_the_callers_mode(mode):
    net, x = IntegerNet(20), integers(2, 20)
    for estimator in ("wls", "adjusted", "permutation"):
        expected = xaifast.kernel_shap(net, x, n_samples=100, estimator=estimator)
        with mode():
            found = xaifast.kernel_shap(net, x, n_samples=100, estimator=estimator)
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("removal", [None, "blur", *REMOVALS.values()], ids=["baseline", "blur", *REMOVALS])
def test_half_precision(removal, dtype):
    model, x = vit(), images()
    exact = patch_values(model, x, removal=removal)
    values = patch_values(model.to(dtype), x.to(dtype), removal=removal)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, atol=0.03, rtol=0)


def test_values_have_the_widest_floating_dtype_of_tuple_inputs():
    ids, x = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.float64)
    assert xaifast.kernel_shap(lambda a, b: a.sum(1) + b.sum(1), (ids, x)).values.dtype == torch.float64


def test_the_default_device_does_not_matter():
    net, x = IntegerNet(20), integers(2, 20)
    masks = torch.stack([torch.arange(20), torch.arange(20) % 7])
    model, pictures, patches = vit(), images(), PATCHES

    def run():
        shared = {"feature_mask": masks, "n_samples": 120}
        yield xaifast.kernel_shap(net, x, estimator="wls", target=1, tolerance=0.1, **shared)
        yield xaifast.kernel_shap(net, x, estimator="permutation", design="per_input", **shared)
        for removal in ("blur", TokenSelect(), TokenDrop()):
            yield xaifast.kernel_shap(model, pictures, feature_mask=patches, removal=removal)

    expected = [result.values for result in run()]
    torch.set_default_device("meta")
    try:
        found = [result.values for result in run()]
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Named(nn.Module):
    """Holds a model and does something around it."""

    def __init__(self, model, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
def test_token_removal_leaves_the_callers_model_and_inputs_alone(removal):
    model, x = vit(), images()
    embed = model.embeddings.forward
    model.embeddings.forward = lambda rows: embed(rows) * 3  # as libraries that wrap a module do
    expected, given = model(x), x.clone()
    patch_values(model, x, removal=removal)
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="single memory location"):
        patch_values(Named(model, before=lambda rows: rows.sub_(0.5)), x, removal=removal)
    assert torch.equal(x, given) and torch.equal(model(x), expected)


def test_hooks_on_the_embedding_run_once():
    model, x = vit(), images()
    model.embeddings.register_forward_hook(lambda module, args, tokens: tokens * 3)
    torch.testing.assert_close(patch_values(model, x, removal=TokenSelect()), patch_values(model, x))


@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
def test_interrupted(removal):
    model, x, calls = vit(), images(), []
    expected = model(x)

    def interrupt(out):
        calls.append(len(out))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return out

    with pytest.raises(KeyboardInterrupt):
        patch_values(Named(model, after=interrupt), x, removal=removal, batch_size=2)
    assert torch.equal(model(x), expected) and "forward" not in vars(model.embeddings)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
def test_images_the_model_resizes_are_refused(removal, size):
    model = Named(vit(), before=lambda x: nn.functional.interpolate(x, size=8))
    x = torch.rand(1, 1, size, size, dtype=torch.float64)
    with pytest.raises(ValueError, match="unresized"):
        xaifast.kernel_shap(model, x, feature_mask=xaifast.grid_mask((size, size), 4), removal=removal, n_samples=20)


def test_embeddings_that_are_no_tokens_are_refused():
    class Pair(xaifast.models.vit.PatchEmbeddings):
        def forward(self, x):
            return super().forward(x), x.shape

    model = vit()
    model.embeddings = Pair(8, 4, 1, 8).double()
    with pytest.raises(ValueError, match="return tokens .* got tuple"):
        patch_values(model, images(), removal=TokenSelect("embeddings"))
    model.unused = xaifast.models.vit.PatchEmbeddings(8, 4, 1, 8).double()
    model.embeddings = vit().embeddings
    with pytest.raises(ValueError, match="run by forward"):
        patch_values(model, images(), removal=TokenSelect("unused"))


noisy = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)).double()


def by_global(x):
    return noisy(x)


@torch.no_grad()
def decorated(x):
    return noisy(x)


@pytest.mark.parametrize("forward", [by_global, decorated, torch.compile(by_global, backend="eager")])
def test_active_dropout_is_found_behind_functions(forward):
    with pytest.raises(ValueError, match="Dropout"):
        xaifast.kernel_shap(forward, integers(2, 6))


def test_batch_statistics_are_found_without_training_mode():
    with pytest.raises(ValueError, match="track_running_stats=True"):
        xaifast.kernel_shap(nn.BatchNorm1d(6, track_running_stats=False).eval(), torch.rand(2, 6))
    per_row = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten())  # no matter which mode
    assert per_row.training and xaifast.kernel_shap(per_row, torch.rand(2, 6)).values.shape == (2, 6, 6)


@pytest.mark.parametrize("kind", ["module", "in place", "function"])
def test_everything_compiled_sees_one_shape(kind):
    net, graphs = Named(small_cnn()), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    if kind == "in place":
        forward = Named(net.model)
        forward.compile(backend=backend, dynamic=False)
    else:
        forward = torch.compile(net if kind == "module" else lambda x: net(x), backend=backend, dynamic=False)
    x, arguments = images(3), {"feature_mask": xaifast.grid_mask((8, 8), 2), "n_samples": 90, "batch_size": 16}
    values = xaifast.kernel_shap(forward, x, **arguments).values
    torch.testing.assert_close(values, xaifast.kernel_shap(net, x, **arguments).values, atol=1e-10, rtol=1e-10)
    assert len(graphs) == 1


def test_chunks_of_one_shape_get_smaller_when_memory_runs_out():
    sizes = []

    @torch.compiler.disable
    def refuse(x):
        if len(x) > 10:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        sizes.append(len(x))

    def forward(x):
        refuse(x)
        return x.sum(1)

    x = integers(3, 5)
    values = xaifast.kernel_shap(torch.compile(forward, backend="eager"), x, n_samples=20, batch_size=64).values
    torch.testing.assert_close(values, x)
    assert 5 <= max(sizes) <= 10


def test_a_background_that_proved_too_large_stays_in_pieces():
    refusals = []

    def forward(x):
        if len(x) > 3:
            refusals.append(len(x))
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return x.sum(1)

    present = torch.rand(30, 5) < 0.5
    x, rows = integers(2, 5), integers(8, 5, seed=1)
    run = Evaluator(
        forward, (x,), players=resolve_players(None, (x,), "test"), baselines=xaifast.Background(rows), batch_size=8
    )
    refusals.clear()
    run(Coalitions.from_present(present))
    assert len(refusals) <= 2


class Replay:
    """What a captured graph does: it reads the addresses of its first call and answers in one memory."""

    def __init__(self, forward):
        self.forward, self.calls = forward, 0
        self.reset()

    def reset(self):
        self.args = self.outputs = None

    def __call__(self, *args):
        self.calls += 1
        if self.args is None:
            self.args, self.outputs = args, self.forward(*args).clone()
        return self.outputs.copy_(self.forward(*self.args))


@pytest.mark.parametrize("removal", [None, *REMOVALS.values()], ids=["baseline", *REMOVALS])
@pytest.mark.parametrize("background", [1, 3, 20])
def test_graphs_are_replayed_only_on_the_rows_they_read(removal, background):
    if isinstance(removal, TokenDrop) and background > 1:
        return
    model, x = vit(), images(3)
    rows = torch.rand(background, 1, 8, 8, dtype=torch.float64)
    given = {"players": resolve_players(PATCHES, (x,), "test"), "removal": removal, "batch_size": 8}
    given |= {"baselines": xaifast.Background(rows)} if background > 1 else {}
    coalitions = Coalitions.from_present(torch.rand(15, 4) < 0.5)
    run = Evaluator(model, (x,), **given)
    run._graph, run._one_shape = Replay(model), True
    torch.testing.assert_close(run(coalitions), Evaluator(model, (x,), **given)(coalitions))
    assert bool(run._graph.calls) == (background <= 8 and not isinstance(removal, TokenDrop))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("removal", [None, "blur", *REMOVALS.values()], ids=["baseline", "blur", *REMOVALS])
def test_a_gpu_gives_what_the_cpu_gives(removal, autocast, cuda_graph):
    model, x = vit().float(), images(3).float()
    kinds = [{}] if removal == "blur" or isinstance(removal, TokenDrop) else [{}, {"baselines": torch.rand(5, 1, 8, 8)}]
    for kind in kinds:
        results = []
        for device in ("cpu", "cuda"):
            moved = {name: xaifast.Background(rows.to(device)) for name, rows in kind.items()}
            on_gpu = {"autocast": autocast, "cuda_graph": cuda_graph} if device == "cuda" else {}
            for batch_size in (4, 17, "auto"):
                result = xaifast.kernel_shap(
                    model.to(device),
                    x.to(device),
                    feature_mask=PATCHES,
                    removal=removal,
                    batch_size=batch_size,
                    **moved,
                    **on_gpu,
                )
                results.append(result.values.cpu())
        tolerance = 1e-4 if autocast is None else 0.05
        assert all(torch.allclose(results[0], other, atol=tolerance) for other in results[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_additional_arguments_follow_their_input_under_a_graph():
    x, scale = torch.rand(5, 6), torch.tensor([1.0, 10, 100, 1000, 10000])

    def forward(rows, factor):
        return rows.sum(1) * factor

    given = {"additional_forward_args": scale.cuda(), "n_samples": 20, "batch_size": 7, "cuda_graph": True}
    values = xaifast.kernel_shap(forward, x.cuda(), **given).values.cpu()
    torch.testing.assert_close(values, x * scale[:, None], atol=1e-2, rtol=1e-4)


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    x, forward = torch.ones(2, 5), lambda rows: rows @ torch.ones(5, 3)
    plain = xaifast.kernel_shap(forward, x, n_samples=20, target=2)
    other = xaifast.kernel_shap(forward, x, n_samples=numpy.int64(20), target=numpy.int32(2))
    assert torch.equal(plain.values, other.values) and plain.n_evaluations == other.n_evaluations
