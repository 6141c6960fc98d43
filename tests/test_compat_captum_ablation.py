"""The drop-ins for Captum's FeatureAblation, Occlusion and ShapleyValueSampling give what Captum gives."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from games import IntegerNet, brute_force, integers

from xaifast.compat.captum import FeatureAblation, Occlusion, ShapleyValueSampling

captum = pytest.importorskip("captum.attr")
OURS = {"FeatureAblation": FeatureAblation, "Occlusion": Occlusion, "ShapleyValueSampling": ShapleyValueSampling}


def both(name, forward, *args, **kwargs):
    results = []
    for kind in (OURS[name], getattr(captum, name)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(kind(forward).attribute(*args, **kwargs))
    return results


def same(name, forward, *args, **kwargs):
    ours, theirs = both(name, forward, *args, **kwargs)
    assert isinstance(ours, tuple) == isinstance(theirs, tuple)
    for mine, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, theirs)), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-5)


NUMBERS = {
    "a row": lambda x: x.prod(1),
    "a row and axis": lambda x: x.sum(1, keepdim=True),
    "several a row": lambda x: torch.stack([x.sum(1), x.prod(1)], 1),
    "a table a row": lambda x: x[:, :, None] * torch.arange(1.0, 3),
    "one for the batch": lambda x: x.prod(1).sum(),
    "one with an axis": lambda x: x.prod(1).sum()[None],
    "five for the batch": lambda x: x.prod(1).sum() * torch.arange(5.0),
    "two batches": lambda x: torch.cat([x.sum(1), x.prod(1)]),
    "a float": lambda x: float(x.prod(1).sum()),
    "an int": lambda x: int(x.prod(1).sum()),
    "integers": lambda x: x.prod(1).long(),
    "double": lambda x: x.double().prod(1),
    "half": lambda x: x.sum(1).half(),
}


@pytest.mark.parametrize("forward", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("n_inputs", [1, 3])
def test_shapes_and_dtypes_of_every_kind_of_output(forward, n_inputs):
    x = integers(n_inputs, 4, dtype=torch.float32)
    same("FeatureAblation", forward, x)
    same("FeatureAblation", forward, x, 1.0, feature_mask=torch.tensor([[0, 7, 7, -2]]))
    same("Occlusion", forward, x, (3,), 2)
    ours, theirs = both("ShapleyValueSampling", forward, x, n_samples=1)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32


@pytest.mark.parametrize("per_eval", [1, 2, 5, 100])
@pytest.mark.parametrize("target", [None, 1, torch.tensor([0, 2, 1]), [2, 1, 0], torch.tensor([2])])
def test_targets_and_perturbations_per_eval(per_eval, target):
    net, x = IntegerNet(12), integers(3, 4, 3)
    masks = torch.randint(0, 5, (1, 4, 3), generator=torch.Generator().manual_seed(1))
    base = integers(3, 4, 3, seed=2)
    same("FeatureAblation", net, x, base, target, feature_mask=masks, perturbations_per_eval=per_eval)
    same("Occlusion", net, x, (2, 2), (2, 1), base, target, perturbations_per_eval=per_eval)


@pytest.mark.parametrize("target", [[2, 1, 0], torch.tensor([0, 2, 1]), [1], torch.tensor([2]), 1, (2,)])
def test_shapley_values_of_targets_have_captums_shape(target):
    one = isinstance(target, list | torch.Tensor) and len(target) == 1
    net, x = IntegerNet(4), integers(1 if one else 3, 2, 2)
    ours, theirs = both("ShapleyValueSampling", net, x, target=target, n_samples=30)
    assert ours.shape == theirs.shape == x.shape
    torch.testing.assert_close(ours.sum((1, 2)), theirs.sum((1, 2)), rtol=1e-5, atol=1e-3)  # both add up to the drop


def test_masks_of_each_input():
    x = integers(3, 2, 5)
    masks = torch.randint(3, 9, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    same("FeatureAblation", lambda rows: rows.prod(2).sum(1), x, feature_mask=masks)
    same("FeatureAblation", lambda rows: rows.prod(2).sum(1)[:, None].sum(1), x, feature_mask=masks, baselines=2.0)


def test_several_inputs_with_arguments_and_an_empty_one():
    a, b, nothing = integers(3, 4), integers(3, 2, 3, seed=1), torch.zeros(3, 0).double()
    scale, offset = torch.tensor([1.0, 2, 3]).double(), 5

    def forward(u, v, w, scale, offset):
        assert w.shape == (len(u), 0)
        return (u.prod(1) * v.sum((1, 2)) + offset) * scale

    options = dict(baselines=(1.0, integers(1, 2, 3, seed=2), 0), additional_forward_args=(scale, offset))
    same("FeatureAblation", forward, (a, b, nothing), **options)
    shared = (torch.tensor([[0, 1, 1, 2]]), torch.tensor([[[2, 2, 0], [4, 4, 4]]]), torch.zeros(1, 0).long())
    same("FeatureAblation", forward, (a, b, nothing), feature_mask=shared, **options)

    def pair(u, v, scale, offset):
        return forward(u, v, u[:, :0], scale, offset)

    windows, options["baselines"] = ((2,), (2, 2)), options["baselines"][:2]
    for strides in (None, (2, 1), ((1,), (2, 1))):
        same("Occlusion", pair, (a, b), windows, strides, **options)


def test_inputs_without_another_axis():
    x = torch.tensor([2.0, 3.0, 5.0])
    same("FeatureAblation", lambda rows: rows**2, x)
    ours, theirs = both("ShapleyValueSampling", lambda rows: rows**2, x)
    torch.testing.assert_close(ours, theirs)
    assert Occlusion(lambda rows: rows**2).attribute(x, ()).tolist() == [4, 9, 25]  # Captum fails on these


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_dtypes_of_inputs(dtype):
    x = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]]).to(dtype)
    for baseline in (None, 0.5) if dtype != torch.bool else (None,):
        same("FeatureAblation", lambda rows: rows.double().sum(1), x, baseline)
        same("Occlusion", lambda rows: rows.double().sum(1), x, (2,), None, baseline)


def test_shapley_values_are_exact_where_they_can_be():
    net, x, base = IntegerNet(5, n_outputs=2), integers(2, 5), integers(1, 5, seed=1)
    expected = torch.stack([brute_force(net, row, base[0], torch.arange(5), 5) for row in x])  # [B, M, K]
    shown = ShapleyValueSampling(net).attribute(x, base, n_samples=16)
    torch.testing.assert_close(shown, expected.mT.float(), rtol=1e-5, atol=1e-4)
    one = ShapleyValueSampling(net).attribute(x, base, target=1, n_samples=16)
    torch.testing.assert_close(one, expected[..., 1].float(), rtol=1e-5, atol=1e-4)


def test_shapley_sampling_is_as_good_as_captums():
    net, x, mask = IntegerNet(36, n_outputs=1), integers(2, 6, 6), (torch.arange(36).reshape(1, 6, 6) // 3)
    values = torch.stack([brute_force(net, row, torch.zeros(6, 6).double(), mask[0], 12) for row in x])[..., 0]
    exact = values[:, mask[0]]
    errors = []
    for kind in (ShapleyValueSampling, captum.ShapleyValueSampling):
        torch.manual_seed(0)
        runs = [kind(net).attribute(x, target=0, feature_mask=mask, n_samples=10) - exact for _ in range(8)]
        errors.append(torch.stack(runs).square().mean().sqrt())
    assert errors[0] < errors[1]


def test_one_pair_of_permutations_is_exact_for_pairs_of_features():
    x = integers(3, 30)
    matrix = integers(30, 30, seed=1)

    def forward(rows):
        return ((rows @ matrix) * rows).sum(1)

    shown = ShapleyValueSampling(forward).attribute(x, n_samples=2)
    symmetric = (matrix + matrix.T) / 2
    torch.testing.assert_close(shown, (x * (x @ symmetric)).float(), rtol=1e-5, atol=1e-3)


def test_the_number_of_evaluations():
    seen = []

    def forward(rows):
        seen.append(len(rows))
        return rows.prod(1)

    for n_samples, permutations in ((1, 2), (2, 2), (25, 26)):
        seen.clear()
        ShapleyValueSampling(forward).attribute(torch.ones(3, 20), n_samples=n_samples, perturbations_per_eval=7)
        assert sum(seen) == 3 * (1 + 1 + 1 + permutations * 19) and max(seen) <= 7  # full twice, nothing, the others


def test_shapley_seeds_come_from_torch():
    net, x = IntegerNet(16, n_outputs=1), integers(1, 16)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ShapleyValueSampling(net).attribute(x, n_samples=2))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", OURS)
def test_the_class_looks_like_captums(name):
    ours, theirs = OURS[name], getattr(captum, name)
    assert list(inspect.signature(ours.attribute).parameters) == list(inspect.signature(theirs.attribute).parameters)
    for mine, other in zip(
        inspect.signature(ours.attribute).parameters.values(),
        inspect.signature(theirs.attribute).parameters.values(),
        strict=True,
    ):
        assert mine.default == other.default and mine.kind == other.kind
    a, b = ours(sum), theirs(sum)
    assert a.get_name() == b.get_name() and a.has_convergence_delta() == b.has_convergence_delta()
    assert a.multiplies_by_inputs == b.multiplies_by_inputs
    with pytest.raises(NotImplementedError):
        a.attribute_future(torch.ones(1, 2))


def raised(kind, *args, **kwargs):
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        kind(lambda x: torch.stack([x.sum(1), x.sum(1)], 1)).attribute(*args, **kwargs)
    return caught.value


BAD = [
    ("Occlusion", ((5,),), {}),
    ("Occlusion", ((2, 2),), {}),
    ("Occlusion", ([2],), {}),
    ("Occlusion", (2,), {}),
    ("Occlusion", ((2.0,),), {}),
    ("Occlusion", ((2,), 3), {}),
    ("Occlusion", ((2,), (1, 1)), {}),
    ("Occlusion", ((0,),), {}),
    ("FeatureAblation", (), dict(target=2)),
    ("FeatureAblation", (), dict(target=[0])),
    ("FeatureAblation", (), dict(baselines="zero")),
    ("FeatureAblation", (), dict(perturbations_per_eval=0)),
    ("FeatureAblation", (), dict(perturbations_per_eval=1.5)),
    ("FeatureAblation", (), dict(feature_mask="all")),
    ("ShapleyValueSampling", (), dict(target=2)),
    ("ShapleyValueSampling", (), dict(perturbations_per_eval=0)),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), BAD)
def test_errors_are_of_captums_kinds(name, args, kwargs):
    x = torch.ones(2, 4)
    mine = raised(OURS[name], x, *args, **kwargs)
    kind = type(raised(getattr(captum, name), x, *args, **kwargs))
    assert isinstance(mine, kind)
    if not isinstance(mine, IndexError | RuntimeError):  # torch's own
        assert str(mine).startswith(f"xaifast.compat.captum.{name}: ")


@pytest.mark.parametrize("target", [0, (1,), [0, 0], torch.tensor([1, 1])])
def test_a_number_has_no_target(target):
    for kind in (FeatureAblation, captum.FeatureAblation):
        with pytest.raises(IndexError):
            kind(lambda x: x.sum()).attribute(torch.ones(2, 3), target=target)


@pytest.mark.parametrize("name", ["FeatureAblation", "Occlusion"])
def test_one_number_for_the_batch_takes_one_perturbation_a_call(name):
    window = [(1,)] if name == "Occlusion" else []
    for kind in (OURS[name], getattr(captum, name)):
        with pytest.raises(AssertionError):
            kind(lambda x: x.sum()).attribute(torch.ones(2, 3), *window, perturbations_per_eval=2)


def test_progress(capsys):
    FeatureAblation(lambda x: x.sum(1)).attribute(torch.ones(2, 3), show_progress=True)
    assert "6/6" in capsys.readouterr().err.replace("6.00", "6")
