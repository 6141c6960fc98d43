"""The drop-in for Captum's KernelShap: brute force for values, Captum itself for shapes, dtypes and errors."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from games import IntegerNet, brute_force, integers, shapley_by_subsets
from torch import nn

from xaifast.compat.captum import KernelShap

EXACT = 64  # at most six features here: enumerated
INPUTS = torch.tensor([[1.0, -2.0, 3.0, 0.5], [2.0, 1.0, -1.0, 1.5], [0.0, 3.0, 1.0, -2.0]])


class Net(nn.Module):
    """Four features to three outputs, nonlinear, any dtype in."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(4, 8, generator=generator))
        self.second = nn.Parameter(torch.randn(8, 3, generator=generator))

    def forward(self, x):
        return torch.tanh(x.to(self.first.dtype) @ self.first) @ self.second


NET = Net().eval()


def cube(x):
    """Outputs [b, 3, 2]."""
    return torch.stack((NET(x), NET(x) ** 2), dim=2)


def by_hand(forward, x, mask, baseline=0.0, n_players=None):
    """Brute force of inputs [B, ...] with masks of one input or of each; expanded to the inputs' shape."""
    baseline = torch.as_tensor(baseline, dtype=x.dtype).expand(x.shape)
    mask = mask.expand(x.shape)
    n_players = n_players or int(mask.max()) + 1
    phi = [brute_force(forward, *one, n_players) for one in zip(x, baseline, mask, strict=True)]
    return torch.stack([p[m] for p, m in zip(phi, mask, strict=True)]).float()


def attribute(forward, inputs, n_samples=EXACT, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return KernelShap(forward).attribute(inputs, n_samples=n_samples, **arguments)


# ---- values


@pytest.mark.parametrize("target", [2, (2,), torch.tensor(2), torch.tensor([2])])
def test_one_target_for_all(target):
    expected = by_hand(lambda x: NET(x)[:, 2], INPUTS, torch.arange(4))
    torch.testing.assert_close(attribute(NET, INPUTS, target=target), expected)


@pytest.mark.parametrize("target", [[2, 0, 1], torch.tensor([2, 0, 1]), [(2,), (0,), (1,)]])
@pytest.mark.parametrize("per_eval", [1, 3, 50])
def test_target_of_each_input(target, per_eval):
    expected = torch.cat([
        by_hand(lambda x, k=k: NET(x)[:, k], row[None], torch.arange(4))
        for row, k in zip(INPUTS, (2, 0, 1), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(attribute(NET, INPUTS, target=target, perturbations_per_eval=per_eval), expected)


def test_targets_of_many_output_axes():
    one = by_hand(lambda x: cube(x)[:, 1, 1], INPUTS, torch.arange(4))
    torch.testing.assert_close(attribute(cube, INPUTS, target=(1, 1)), one)
    each = attribute(cube, INPUTS, target=[(1, 1), (0, 0), (2, 1)])
    torch.testing.assert_close(each[0], one[0])
    torch.testing.assert_close(each[1:2], by_hand(lambda x: cube(x)[:, 0, 0], INPUTS[1:2], torch.arange(4)))
    torch.testing.assert_close(each[2:3], by_hand(lambda x: cube(x)[:, 2, 1], INPUTS[2:3], torch.arange(4)))


@pytest.mark.parametrize(
    "baseline", [None, 2, 0.5, torch.tensor(1.5), torch.arange(4.0), torch.arange(4.0)[None], INPUTS.flip(0)]
)
def test_baselines(baseline):
    expected = by_hand(lambda x: NET(x)[:, 0], INPUTS, torch.arange(4), 0.0 if baseline is None else baseline)
    torch.testing.assert_close(attribute(NET, INPUTS, target=0, baselines=baseline), expected)


@pytest.mark.parametrize("mask", [[0, 1, 1, 2], [[0, 0, 1, 1]], [[0, 1, 1, 2], [0, 0, 0, 0], [2, 0, 0, 2]]])
def test_masks(mask):
    mask = torch.tensor(mask)
    expected = by_hand(lambda x: NET(x)[:, 1], INPUTS, mask)
    torch.testing.assert_close(attribute(NET, INPUTS, target=1, feature_mask=mask), expected)


def test_coefficients_of_ids_that_do_not_occur_are_zero():
    mask = torch.tensor([0, 4, 4, 2])
    expected = by_hand(lambda x: NET(x)[:, 1], INPUTS, torch.tensor([0, 2, 2, 1]))
    values = attribute(NET, INPUTS, target=1, feature_mask=mask, return_input_shape=False)
    assert values.shape == (3, 5) and bool((values[:, [1, 3]] == 0).all())
    torch.testing.assert_close(values[:, [0, 4, 2]], expected[:, [0, 1, 3]])
    torch.testing.assert_close(attribute(NET, INPUTS, target=1, feature_mask=mask), expected)


def test_ids_that_occur_in_other_inputs_only_are_zero():
    mask = torch.tensor([[0, 1, 1, 2], [0, 0, 2, 2], [2, 2, 2, 2]])
    values = attribute(NET, INPUTS, target=1, feature_mask=mask, return_input_shape=False)
    torch.testing.assert_close(values[0], by_hand(lambda x: NET(x)[:, 1], INPUTS[:1], mask[0])[0, [0, 1, 3]])
    assert values[1, 1] == 0 and values[2, 0] == 0 and values[2, 1] == 0
    torch.testing.assert_close(values[2, 2], (NET(INPUTS[2]) - NET(torch.zeros(4)))[1].detach())


def test_smallest_id_is_shifted_to_zero():
    with pytest.warns(UserWarning, match="smallest is -3"):
        values = KernelShap(NET).attribute(
            INPUTS, target=1, feature_mask=torch.tensor([-3, -2, -2, -1]), n_samples=EXACT, return_input_shape=False
        )
    expected = by_hand(lambda x: NET(x)[:, 1], INPUTS, torch.tensor([0, 1, 1, 2]))
    torch.testing.assert_close(values, expected[:, [0, 1, 3]])


def test_tuple_inputs_share_ids():
    a, b = integers(2, 3, seed=1), integers(2, 2, 2, seed=2)
    net = IntegerNet(7, n_outputs=1)
    mask_a, mask_b = torch.tensor([0, 1, 2]), torch.tensor([[1, 1], [3, 0]])
    maps = attribute(
        lambda a, b: net(torch.cat((a, b.flatten(1)), 1)), (a, b), feature_mask=(mask_a, mask_b), baselines=(1, -1.0)
    )
    whole, mask = torch.cat((a, b.flatten(1)), 1), torch.cat((mask_a, mask_b.flatten()))
    baseline = torch.tensor([1.0] * 3 + [-1.0] * 4, dtype=whole.dtype)
    expected = by_hand(lambda x: net(x)[:, 0], whole, mask, baseline)
    assert isinstance(maps, tuple) and maps[1].shape == b.shape
    torch.testing.assert_close(torch.cat((maps[0], maps[1].flatten(1)), 1), expected)


def test_tensors_of_one_axis_and_empty_ones():
    a, b = INPUTS[:, 0], INPUTS[:, 1]

    def product(a, empty, b):
        assert a.dim() == b.dim() == 1 and empty.shape == (len(a), 0)
        return a * b + a

    maps = attribute(product, (a, INPUTS[:, :0], b), baselines=(torch.tensor([1.0, 2.0, 3.0]), 0, 0.5))
    base = torch.stack((torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 0.5)), 1)
    expected = by_hand(lambda x: x[:, 0] * x[:, 1] + x[:, 0], INPUTS[:, :2], torch.arange(2), base)
    torch.testing.assert_close(torch.stack((maps[0], maps[2]), 1), expected)
    assert maps[1].shape == (3, 0)


def test_additional_arguments_go_with_their_input():
    weights, table, names = torch.tensor([1.0, 2.0, 3.0]), torch.eye(4), ["a", "b", "c"]
    letter = {"a": 1.0, "b": 10.0, "c": 100.0}

    def forward(x, weights, table, names, power):
        assert len(x) == len(weights) == len(names) and table.shape == (4, 4)
        scale = torch.tensor([letter[name] for name in names])
        return (NET(x @ table)[:, 0] * weights) ** power + scale * x[:, 0]

    for per_eval in (1, 7):
        maps = attribute(
            forward, INPUTS, additional_forward_args=(weights, table, names, 2), perturbations_per_eval=per_eval
        )
        for i, name in enumerate(names):
            alone = lambda x, i=i, name=name: (NET(x)[:, 0] * weights[i]) ** 2 + letter[name] * x[:, 0]  # noqa: E731
            torch.testing.assert_close(maps[i : i + 1], by_hand(alone, INPUTS[i : i + 1], torch.arange(4)))


def test_one_additional_argument_needs_no_tuple():
    expected = by_hand(lambda x: 3 * NET(x)[:, 0], INPUTS, torch.arange(4))
    got = attribute(lambda x, scale: NET(x)[:, 0] * scale, INPUTS, additional_forward_args=torch.full((3,), 3.0))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("as_number", [False, True])
def test_one_number_for_the_whole_batch(as_number):
    """The batch is one game: a feature is removed from all inputs together."""

    def total(x):
        value = NET(x)[:, 0].prod()
        return value.item() if as_number else value

    def value(present):
        kept = torch.tensor([[player in present for player in mask] for mask in masks.tolist()])
        return NET(torch.where(kept, INPUTS, 0.5))[:, 0].prod().detach().double()

    masks = torch.tensor([[0, 1, 1, 2], [2, 0, 1, 1], [1, 1, 0, 0]])
    expected = shapley_by_subsets(value, 3).float()
    arguments = dict(baselines=0.5, feature_mask=masks)
    torch.testing.assert_close(attribute(total, INPUTS, return_input_shape=False, **arguments), expected[None])
    torch.testing.assert_close(attribute(total, INPUTS, **arguments), expected[masks[:1]])


@pytest.mark.parametrize(
    "forward",
    [lambda x: NET(x)[0, 0], lambda x: NET(x)[0, :1], lambda x: NET(x)[:, 0].item(), lambda x: NET(x.view(1, 4))[:, 0]],
    ids=["scalar", "first row", "number", "one row only"],
)
def test_functions_of_a_single_row(forward):
    expected = by_hand(lambda x: NET(x)[:, 0], INPUTS[:1], torch.arange(4))
    with pytest.warns(UserWarning, match="row by row"):
        got = KernelShap(forward).attribute(INPUTS[:1], n_samples=EXACT)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_functions_that_return_numpy_arrays(batch):
    expected = by_hand(lambda x: NET(x)[:, 0], INPUTS[:batch], torch.arange(4))
    got = attribute(lambda x: NET(x).numpy(force=True), INPUTS[:batch], target=0)
    torch.testing.assert_close(got, expected)


def test_integer_inputs_become_what_baselines_need():
    seen = set()

    def forward(x):
        seen.add(x.dtype)
        return NET(x)[:, 0]

    whole = INPUTS.long()
    for baseline, dtype in ((None, torch.int64), (2, torch.int64), (0.5, torch.float32)):
        seen.clear()
        got = attribute(forward, whole, baselines=baseline)
        assert seen == {dtype}
        torch.testing.assert_close(
            got, by_hand(lambda x: NET(x)[:, 0], whole.float(), torch.arange(4), baseline or 0.0)
        )
    seen.clear()
    got = attribute(forward, INPUTS > 0)
    assert seen == {torch.bool}
    torch.testing.assert_close(got, by_hand(lambda x: NET(x)[:, 0], (INPUTS > 0).float(), torch.arange(4)))


def test_a_single_feature_gets_the_whole_difference():
    got = attribute(NET, INPUTS, target=0, feature_mask=torch.zeros(1, 4, dtype=torch.int64), return_input_shape=False)
    torch.testing.assert_close(got, (NET(INPUTS) - NET(torch.zeros(1, 4)))[:, :1].detach())


# ---- budgets, batches, randomness


@pytest.mark.parametrize("n_samples", [1, 2, 3])
def test_budgets_without_a_pair_are_an_even_split(n_samples):
    mask = torch.tensor([[0, 1, 1, 3], [0, 0, 0, 0], [1, 1, 3, 3]])
    with pytest.warns(UserWarning, match="even split"):
        got = KernelShap(NET).attribute(
            INPUTS, target=0, feature_mask=mask, n_samples=n_samples, return_input_shape=False
        )
    total = (NET(INPUTS) - NET(torch.zeros(1, 4)))[:, 0].detach()
    third, half = total[0] / 3, total[2] / 2
    zero = torch.zeros(())
    expected = torch.stack((third, third, zero, third, total[1], zero, zero, zero, zero, half, zero, half)).view(3, 4)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n_samples", [4, 5, 25, 300])
def test_evaluations_are_counted_as_captum_counts(n_samples):
    x, rows = torch.randn(3, 12), []

    def forward(x):
        rows.append(len(x))
        return torch.tanh(x).cumprod(1).sum(1)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "xaifast.kernel_shap: n_samples=. is below the number of players")
        KernelShap(forward).attribute(x, n_samples=n_samples)
    assert sum(rows) <= 3 * n_samples + 3  # and the inputs once, as Captum
    assert sum(rows) >= 3 * min(24, n_samples - 1)


@pytest.mark.parametrize("name", ["n_samples", "perturbations_per_eval"])
@pytest.mark.parametrize("count", [None, 2.5, "2"])
def test_counts_are_integers(name, count):
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(count).__name__}"):
        KernelShap(NET).attribute(INPUTS, target=0, **{name: count})


@pytest.mark.parametrize(("n_features", "n_samples"), [(9, 30), (26, 64), (36, 72), (36, 88), (36, 90), (100, 240)])
def test_single_features_and_pairs_are_exact_from_two_samples_a_feature(n_features, n_samples):
    generator = torch.Generator().manual_seed(n_features)
    single, pairs = (
        torch.randn(n_features, generator=generator),
        torch.randn(n_features, n_features, generator=generator),
    )
    pairs = pairs.triu(1)

    def forward(x):
        return x @ single + ((x @ pairs) * x).sum(1)

    expected = single + (pairs + pairs.T).sum(1) / 2  # a pair's term is shared in halves
    torch.manual_seed(0)
    for _ in range(10):
        got = attribute(forward, torch.ones(1, n_features), n_samples)
        torch.testing.assert_close(got[0], expected, atol=1e-4 * float(expected.norm()), rtol=0)


def test_design_does_not_depend_on_last_bits(monkeypatch):
    """Designs of equal quality are common; rounding, which machines do differently, must not choose among them."""
    svdvals, noise = torch.linalg.svdvals, torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: svdvals(a) + 1e-13 * torch.rand(16, 1, generator=noise))
    x, chosen = torch.linspace(0.5, 1.5, 5)[None], set()
    for _ in range(5):
        torch.manual_seed(0)
        values = attribute(lambda x: torch.tanh(x).cumprod(1).sum(1), x, n_samples=24)
        chosen.add(tuple(values.flatten().tolist()))
    assert len(chosen) == 1


@pytest.mark.parametrize("per_eval", [2, 5, 16])
def test_perturbations_per_eval_bounds_the_rows_of_a_call(per_eval):
    rows = []

    def forward(x):
        rows.append(len(x))
        return NET(x)[:, 0]

    bounded = attribute(forward, INPUTS[:1], perturbations_per_eval=per_eval)
    assert max(rows) <= per_eval
    torch.testing.assert_close(bounded, attribute(forward, INPUTS[:1]))
    assert max(rows) > per_eval or per_eval == 16


def test_results_follow_the_global_seed_and_differ_between_calls():
    x = torch.randn(2, 12)
    explainer = KernelShap(lambda x: torch.tanh(x).cumprod(1).sum(1))
    torch.manual_seed(5)
    first, second = explainer.attribute(x, n_samples=40), explainer.attribute(x, n_samples=40)
    torch.manual_seed(5)
    assert torch.equal(explainer.attribute(x, n_samples=40), first)
    assert not torch.equal(first, second)


def test_inputs_and_model_state_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    x = INPUTS.clone().requires_grad_()
    maps = KernelShap(model).attribute(x)  # Captum does not look at the mode, so this does not
    assert model.training and not maps.requires_grad and torch.equal(x, INPUTS) and x.grad is None


def test_progress_bar(capsys):
    KernelShap(NET).attribute(INPUTS, target=0, show_progress=True)
    assert "100%" in capsys.readouterr().err
    KernelShap(NET).attribute(INPUTS, target=0)
    assert capsys.readouterr().err == ""


def test_captum_is_not_needed(run_python):
    code = """
import sys
sys.modules["captum"] = None
import torch
from xaifast.compat.captum import KernelShap
print(KernelShap(torch.nn.Linear(3, 2)).attribute(torch.ones(1, 3), target=1).shape)
"""
    assert "torch.Size([1, 3])" in run_python(code)


# ---- beside Captum

BOTH = pytest.mark.filterwarnings("ignore")
MASK = torch.tensor([0, 1, 1, 2])
SAME_SHAPE = {
    "tensor": (NET, INPUTS, dict(target=0)),
    "one input": (NET, INPUTS[:1], dict(target=0)),
    "tuple of one": (NET, (INPUTS,), dict(target=0)),
    "negative target": (NET, INPUTS, dict(target=-1)),
    "list target": (NET, INPUTS, dict(target=[0, 1, 2])),
    "tensor target": (NET, INPUTS, dict(target=torch.tensor([0, 1, 2]))),
    "list target, one input": (NET, INPUTS[:1], dict(target=[1])),
    "tuple target": (cube, INPUTS, dict(target=(0, 1))),
    "list of tuples": (cube, INPUTS, dict(target=[(0, 1), (1, 0), (2, 0)])),
    "[b]": (lambda x: NET(x)[:, 0], INPUTS, {}),
    "[b, 1]": (lambda x: NET(x)[:, :1], INPUTS, {}),
    "[b, 1, 1]": (lambda x: NET(x)[:, :1, None], INPUTS, {}),
    "bool outputs": (lambda x: NET(x)[:, 0] > 0, INPUTS, {}),
    "integer outputs": (lambda x: NET(x).argmax(1), INPUTS, {}),
    "one number a batch": (lambda x: NET(x).sum(), INPUTS, {}),
    "[1] a batch": (lambda x: NET(x).sum().view(1), INPUTS, {}),
    "one Python number a batch": (lambda x: NET(x).sum().item(), INPUTS, {}),
    "NumPy number": (lambda x: np.float32(NET(x)[0, 0].item()), INPUTS[:1], {}),
    "NumPy array of one": (lambda x: NET(x)[:, 0].numpy(force=True), INPUTS[:1], {}),
    "one number a batch of one": (lambda x: NET(x).sum(), INPUTS[:1], {}),
    "[1, K] a batch, target": (lambda x: NET(x).sum(0, keepdim=True), INPUTS, dict(target=[2])),
    "mask": (NET, INPUTS, dict(target=0, feature_mask=MASK)),
    "mask, leading one": (NET, INPUTS, dict(target=0, feature_mask=MASK[None])),
    "mask of each": (NET, INPUTS, dict(target=0, feature_mask=MASK.repeat(3, 1))),
    "mask in a tuple": (NET, INPUTS, dict(target=0, feature_mask=(MASK,))),
    "mask, int32": (NET, INPUTS, dict(target=0, feature_mask=MASK.int())),
    "mask with gaps": (NET, INPUTS, dict(target=0, feature_mask=MASK * 3)),
    "mask from 5": (NET, INPUTS, dict(target=0, feature_mask=MASK + 5)),
    "image mask": (lambda x: x.flatten(1).sum(1), torch.ones(2, 3, 2, 2), dict(feature_mask=MASK.view(1, 1, 2, 2))),
    "image mask [H, W]": (lambda x: x.flatten(1).sum(1), torch.ones(1, 3, 2, 2), dict(feature_mask=MASK.view(2, 2))),
    "baseline number": (NET, INPUTS, dict(target=0, baselines=1)),
    "baseline of one": (NET, INPUTS, dict(target=0, baselines=torch.ones(1, 4))),
    "baseline of each": (NET, INPUTS, dict(target=0, baselines=torch.ones(3, 4))),
    "two inputs": (lambda a, b: NET(a + b)[:, 0], (INPUTS, INPUTS), {}),
    "two inputs, baselines": (lambda a, b: NET(a + b)[:, 0], (INPUTS, INPUTS), dict(baselines=(0, torch.ones(3, 4)))),
    "two inputs, masks": (lambda a, b: NET(a + b)[:, 0], (INPUTS, INPUTS), dict(feature_mask=(MASK, MASK + 1))),
    "inputs of one axis": (lambda a, b: a * b, (INPUTS[:, 0], INPUTS[:, 1]), {}),
    "empty input": (lambda a, b: NET(a)[:, 0], (INPUTS, INPUTS[:, :0]), {}),
    "arguments": (lambda x, a, b: NET(x)[:, 0] * a + b, INPUTS, dict(additional_forward_args=(torch.ones(3), 1))),
    "float64": (NET, INPUTS.double(), dict(target=0)),
    "float16": (NET, INPUTS.half(), dict(target=0)),
    "bfloat16": (NET, INPUTS.bfloat16(), dict(target=0)),
    "int64": (NET, INPUTS.long(), dict(target=0)),
    "uint8": (NET, INPUTS.byte(), dict(target=0)),
    "int64, float baseline": (NET, INPUTS.long(), dict(target=0, baselines=0.5)),
    "bool": (NET, INPUTS > 0, dict(target=0)),
    "requires grad": (NET, INPUTS.clone().requires_grad_(), dict(target=0)),
    "channels last": (lambda x: x.flatten(1).sum(1), torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last), {}),
    "n = 2": (NET, INPUTS, dict(target=0, n_samples=2)),
    "n = 3": (NET, INPUTS, dict(target=0, n_samples=3)),
    "n = 7": (NET, INPUTS, dict(target=0, n_samples=7)),
    "several per eval": (NET, INPUTS, dict(target=0, perturbations_per_eval=7)),
    "more per eval than samples": (NET, INPUTS, dict(target=0, perturbations_per_eval=100)),
    "all per eval": (NET, INPUTS, dict(target=0, perturbations_per_eval=0)),
}
SAME_ERROR = {
    "list of inputs": (NET, [INPUTS], dict(target=0)),
    "no tensor": (NET, 1.0, dict(target=0)),
    "several outputs": (NET, INPUTS, {}),
    "several outputs, one input": (NET, INPUTS[:1], {}),
    "several outputs, many a call": (NET, INPUTS[:1], dict(perturbations_per_eval=10)),
    "target beyond": (NET, INPUTS, dict(target=3)),
    "target beyond, one input": (NET, INPUTS[:1], dict(target=3)),
    "targets beyond": (NET, INPUTS, dict(target=[0, 1, 3])),
    "tensor beyond": (NET, INPUTS, dict(target=torch.tensor([0, 1, 3]))),
    "tuples beyond": (cube, INPUTS, dict(target=[(0, 1), (1, 0), (2, 2)])),
    "too few targets": (NET, INPUTS, dict(target=[0, 1])),
    "too many targets": (NET, INPUTS[:1], dict(target=[0, 1])),
    "too many in a tensor": (NET, INPUTS[:1], dict(target=torch.tensor([0, 1]))),
    "too many, many a call": (NET, INPUTS[:1], dict(target=[0, 1], perturbations_per_eval=2)),
    "target of too many axes": (NET, INPUTS, dict(target=(0, 1))),
    "target of [b]": (lambda x: NET(x)[:, 0], INPUTS, dict(target=0)),
    "target of too few axes": (cube, INPUTS, dict(target=1)),
    "ints for many axes": (cube, INPUTS, dict(target=[0, 1, 2])),
    "target text": (NET, INPUTS, dict(target="0")),
    "target float": (NET, INPUTS, dict(target=1.5)),
    "target of two axes": (NET, INPUTS, dict(target=torch.tensor([[0], [1], [2]]))),
    "targets float": (NET, INPUTS, dict(target=[0.5, 1.0, 2.0])),
    "batch number, many a call": (lambda x: NET(x).sum(), INPUTS, dict(perturbations_per_eval=2)),
    "one number, many a call": (lambda x: NET(x).sum(), INPUTS[:1], dict(perturbations_per_eval=2)),
    "Python number, many a call": (lambda x: NET(x).sum().item(), INPUTS[:1], dict(perturbations_per_eval=2)),
    "baseline list": (NET, INPUTS, dict(target=0, baselines=[0.0])),
    "mask list": (NET, INPUTS, dict(target=0, feature_mask=[MASK])),
    "empty mask": (NET, INPUTS, dict(target=0, feature_mask=MASK[:0])),
    "no samples": (NET, INPUTS, dict(target=0, n_samples=0)),
    "half a sample": (NET, INPUTS, dict(target=0, n_samples=2.5)),
    "not a number": (lambda x: NET(x) * float("nan"), INPUTS, dict(target=0)),
    "model fails": (lambda x: {}[0], INPUTS, {}),
    "model fails, one input": (lambda x: {}[0], INPUTS[:1], {}),
}


@BOTH
@pytest.mark.parametrize("return_input_shape", [True, False])
@pytest.mark.parametrize("case", SAME_SHAPE)
def test_shapes_and_dtypes_are_captums(case, return_input_shape):
    peer = pytest.importorskip("captum.attr").KernelShap
    forward, inputs, arguments = SAME_SHAPE[case]
    theirs, ours = (
        explainer(forward).attribute(inputs, return_input_shape=return_input_shape, **arguments)
        for explainer in (peer, KernelShap)
    )
    assert type(ours) is type(theirs)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
        assert (a.shape, a.dtype, a.device, a.requires_grad) == (b.shape, b.dtype, b.device, b.requires_grad)


@BOTH
@pytest.mark.parametrize("case", SAME_ERROR)
def test_errors_are_of_captums_types(case):
    peer = pytest.importorskip("captum.attr").KernelShap
    forward, inputs, arguments = SAME_ERROR[case]
    with pytest.raises(Exception) as theirs:  # noqa: B017  (whatever it is)
        peer(forward).attribute(inputs, **arguments)
    with pytest.raises(theirs.type):
        KernelShap(forward).attribute(inputs, **arguments)


def test_interface_is_captums():
    peer = pytest.importorskip("captum.attr").KernelShap
    ours, theirs = (inspect.signature(explainer.attribute).parameters.values() for explainer in (KernelShap, peer))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]
    ours, theirs = KernelShap(NET), peer(NET)
    assert ours.forward_func is theirs.forward_func is NET
    assert ours.has_convergence_delta() is theirs.has_convergence_delta()
    assert ours.multiplies_by_inputs is theirs.multiplies_by_inputs
    assert ours.get_name() == theirs.get_name()
    for explainer in (ours, theirs):
        assert not hasattr(explainer, "compute_convergence_delta")
        with pytest.raises(NotImplementedError):
            explainer.attribute_future()


@BOTH
def test_long_run_of_captum_agrees():
    """Not brute force again: the same game, so masks, baselines, targets and arguments mean what Captum means."""
    peer = pytest.importorskip("captum.attr").KernelShap
    arguments = dict(
        baselines=INPUTS.flip(0),
        target=[2, 0, 1],
        feature_mask=torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0], [1, 0, 2, 2]]),
        additional_forward_args=(torch.tensor([1.0, 2.0, 3.0]),),
        n_samples=3000,
        perturbations_per_eval=500,
    )

    def forward(x, scale):
        return NET(x) * scale[:, None]

    theirs, ours = (explainer(forward).attribute(INPUTS, **arguments) for explainer in (peer, KernelShap))
    torch.testing.assert_close(ours, theirs, atol=0.02 * float(ours.abs().max()), rtol=0)


def _games(n_features):
    generator = torch.Generator().manual_seed(1)
    linear = torch.randn(n_features, generator=generator)
    pairs = torch.randn(n_features, n_features, generator=generator) / n_features
    first, second = torch.randn(n_features, 16, generator=generator), torch.randn(16, generator=generator)
    return {
        "linear": lambda x: x @ linear,
        "pairs": lambda x: x @ linear + ((x @ pairs) * x).sum(1),
        "tanh": lambda x: torch.tanh(x @ first) @ second,
        "relu": lambda x: torch.relu(x @ first) @ second,
    }


def _enumerated(forward, x):
    """Shapley values of x [1, M] with baseline zero: all coalitions in one call, then the subset formula."""
    n_features = x.shape[1]
    present = (torch.arange(2**n_features)[:, None] >> torch.arange(n_features)) & 1
    values = forward(present * x).double()
    factorial = torch.lgamma(torch.arange(n_features + 1.0, dtype=torch.float64) + 1).exp()
    size, codes = present.sum(1), torch.arange(2**n_features)
    phi = []
    for i in range(n_features):
        without = codes[present[:, i] == 0]
        weight = factorial[size[without]] * factorial[n_features - size[without] - 1] / factorial[n_features]
        phi.append((weight * (values[without + (1 << i)] - values[without])).sum())
    return torch.stack(phi)


def test_enumeration_is_the_subset_formula():
    x = INPUTS[:1]
    expected = by_hand(lambda x: NET(x)[:, 0], x, torch.arange(4))[0]
    torch.testing.assert_close(_enumerated(lambda x: NET(x)[:, 0].detach(), x).float(), expected)


@BOTH
@pytest.mark.parametrize("n_features", [8, 10, 12])
@pytest.mark.parametrize("game", ["linear", "pairs", "tanh", "relu"])
def test_error_is_no_larger_than_captums(game, n_features, request):
    """Mean error over 20 seeds against all coalitions, from two samples a feature on."""
    peer = pytest.importorskip("captum.attr").KernelShap
    n_threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(n_threads))
    torch.set_num_threads(1)  # many tiny solves beside scikit-learn's own threads
    forward = _games(n_features)[game]
    x = torch.randn(1, n_features, generator=torch.Generator().manual_seed(3))
    exact = _enumerated(forward, x)
    for n_samples in (25, 60):
        error = {}
        for explainer in (peer, KernelShap):
            torch.manual_seed(0)
            runs = [
                explainer(forward).attribute(x, n_samples=n_samples, perturbations_per_eval=n_samples)
                for _ in range(20)
            ]
            error[explainer] = float(torch.stack([(run[0] - exact).norm() for run in runs]).mean() / exact.norm())
        assert error[KernelShap] <= error[peer] + 1e-6
        if game in ("linear", "pairs"):
            assert error[KernelShap] < 1e-6
