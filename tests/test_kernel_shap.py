"""Kernel SHAP against brute force, public test cases and its own promises."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from games import IntegerNet, brute_force, integers, shapley_by_subsets, small_cnn

import xaifast

ESTIMATORS = ["wls", "adjusted", "permutation"]


def mlp3(x):
    """Captum's BasicModel_MultiLayer, output 0."""
    total = x.sum(1, keepdim=True)
    hidden = torch.cat((total - 10, total + 1, total + 1, total + 1), dim=1)
    return torch.relu(hidden).sum(1) - 1


def mlp3_multi(x1, x2, x3):
    return mlp3(x1 + x2 + x3)


# Public test cases of Captum, expected values re-derived by brute force in float64.
SINGLE = [
    ([20, 50, 30], 0.0, [0, 1, 2], [76.6666666667, 196.6666666667, 116.6666666667]),
    ([20, 50, 30], [10, 20, 10], [0, 1, 2], [40, 120, 80]),
    ([20, 50, 30], 0.0, [0, 0, 1], [275, 115]),
    ([2, 10, 3], 0.0, [0, 1, 2], [7, 32.5, 10.5]),
]
MULTI = [
    (
        [[20, 50, 30], [0, 100, 0], [0, 10, 0]],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        [78, 198, 118, 0, 398, 0, 0, 38, 0],
    ),
    (
        [[23, 100, 0], [20, 50, 30], [0, 100, 10]],
        [[1, 1, 1], [0, 1, 2], [0, 1, 2]],
        [76.6666666667, 1088.6666666667, 156.6666666667],
    ),
    (
        [[20, 50, 0 + 30], [0, 100, 0], [2, 10, 3]],
        [[0, 1, 0], [0, 1, 2], [0, 0, 0]],
        [255, 595, 0],
    ),
]


@pytest.mark.parametrize("x, baseline, mask, expected", SINGLE)
def test_public_single_input_cases(x, baseline, mask, expected):
    result = xaifast.kernel_shap(
        mlp3,
        torch.tensor([x], dtype=torch.float64),
        baselines=torch.tensor(baseline, dtype=torch.float64) if isinstance(baseline, list) else baseline,
        feature_mask=torch.tensor(mask),
    )
    assert result.estimator == "exact"
    torch.testing.assert_close(result.values[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-8)


@pytest.mark.parametrize("inputs, masks, expected", MULTI)
def test_public_multi_input_cases(inputs, masks, expected):
    tensors = tuple(torch.tensor([x], dtype=torch.float64) for x in inputs)
    result = xaifast.kernel_shap(mlp3_multi, tensors, feature_mask=tuple(torch.tensor(m) for m in masks))
    torch.testing.assert_close(result.values[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-8)
    for spread, mask in zip(result.expand(), masks, strict=True):
        assert torch.equal(spread[0], result.values[0][torch.tensor(mask)])


@pytest.mark.parametrize(
    "n_players, value, expected",
    [
        (3, lambda s: float(2 in s and bool(s & {0, 1})), [1 / 6, 1 / 6, 2 / 3]),  # gloves
        (4, lambda s: 12.0 * (s >= {0, 2}), [6, 0, 6, 0]),
        (3, lambda s: float(math.prod([1, 2, 3][i] if i in s else 0 for i in range(3))), [2, 2, 2]),
    ],
)
def test_public_games(n_players, value, expected):
    def forward(x):
        return torch.tensor([value({i for i in range(n_players) if row[i] > 0}) for row in x], dtype=torch.float64)

    result = xaifast.kernel_shap(forward, torch.ones(1, n_players, dtype=torch.float64))
    torch.testing.assert_close(result.values[0], torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_enumeration_equals_brute_force():
    net = small_cnn()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    baseline = torch.full((1, 8, 8), 0.3, dtype=torch.float64)
    mask = xaifast.grid_mask((8, 8), 3)[None]  # 9 players, border patches smaller
    result = xaifast.kernel_shap(net, x, baselines=baseline, feature_mask=mask, n_samples=512)
    assert result.estimator == "exact"
    for b in range(2):
        expected = brute_force(net, x[b], baseline, mask, 9)  # [M, K]
        torch.testing.assert_close(result.values[b], expected, atol=1e-10, rtol=1e-10)
    assert torch.equal(result.std_errors, torch.zeros_like(result.values))


def test_background_equals_mean_of_brute_force():
    net = small_cnn()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator)
    rows = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=generator)
    mask = xaifast.grid_mask((8, 8), 4)[None]
    result = xaifast.kernel_shap(net, x, baselines=xaifast.Background(rows), feature_mask=mask, batch_size=3)
    expected = torch.stack([brute_force(net, x[0], row, mask, 4) for row in rows]).mean(0)
    torch.testing.assert_close(result.values[0], expected, atol=1e-10, rtol=1e-10)
    assert result.n_evaluations == 16 * 5


def test_link_is_applied_after_the_background_mean():
    def forward(x):
        return torch.sigmoid(x.sum(1))

    generator = torch.Generator().manual_seed(3)
    x, rows = torch.randn(1, 4, generator=generator).double(), torch.randn(6, 4, generator=generator).double()
    result = xaifast.kernel_shap(forward, x, baselines=xaifast.Background(rows), link="logit")

    def value(present):
        kept = torch.tensor([i in present for i in range(4)])
        return torch.logit(forward(torch.where(kept, x, rows)).mean())

    torch.testing.assert_close(result.values[0], shapley_by_subsets(value, 4), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(result.base_values[0], torch.logit(forward(rows).mean()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n_players, n_samples", [(2, 512), (5, 16), (13, 40), (65, 300), (70, 400)])
def test_additive_games_are_exact(estimator, n_players, n_samples):
    generator = torch.Generator().manual_seed(n_players)
    weight = torch.randn(n_players, 2, dtype=torch.float64, generator=generator)
    x = torch.randn(3, n_players, dtype=torch.float64, generator=generator)
    result = xaifast.kernel_shap(lambda rows: rows @ weight + 1, x, n_samples=n_samples, estimator=estimator)
    torch.testing.assert_close(result.values, x[:, :, None] * weight, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("n_players, n_samples", [(8, 40), (30, 120), (66, 300)])
def test_two_additive_games_are_exact_with_pairs(n_players, n_samples):
    generator = torch.Generator().manual_seed(n_players)
    pair = torch.randn(n_players, n_players, dtype=torch.float64, generator=generator).triu(1)
    x = torch.randn(2, n_players, dtype=torch.float64, generator=generator)
    result = xaifast.kernel_shap(
        lambda rows: torch.einsum("bi,ij,bj->b", rows, pair, rows), x, n_samples=n_samples, estimator="wls"
    )
    terms = x[:, :, None] * pair * x[:, None, :]
    torch.testing.assert_close(result.values, (terms.sum(1) + terms.sum(2)) / 2, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "auto"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_efficiency(estimator, dtype, tolerance):
    net = small_cnn(dtype)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    result = xaifast.kernel_shap(
        net, x, feature_mask=xaifast.grid_mask((8, 8), 2)[None], n_samples=120, estimator=estimator
    )
    gap = result.values.double().sum(1) - (result.full_values - result.base_values).double()
    scale = result.values.double().abs().sum(1)
    assert float((gap.abs() / scale).max()) <= tolerance
    torch.testing.assert_close(result.full_values, net(x).detach())
    torch.testing.assert_close(result.base_values, net(torch.zeros_like(x)).detach())
    assert result.values.dtype == dtype and not result.values.is_inference()


@pytest.mark.parametrize("estimator", ["wls", "adjusted", "permutation", "exact"])
def test_bitwise_independent_of_chunks_and_neighbours(estimator):
    n_players = 7 if estimator == "exact" else 20
    n_samples = 128 if estimator == "exact" else 111
    net, x = IntegerNet(n_players), integers(5, n_players)

    def run(inputs, batch_size):
        return xaifast.kernel_shap(
            net, inputs, baselines=1.0, n_samples=n_samples, estimator=estimator, batch_size=batch_size
        )

    whole = run(x, 64)
    for batch_size in (1, 7, 110, 4096, "auto"):
        other = run(x, batch_size)
        assert torch.equal(whole.values, other.values)
        assert torch.equal(whole.std_errors, other.std_errors) or bool(whole.std_errors.isnan().all())
    assert torch.equal(whole.values[3:4], run(x[3:4], 64).values)
    assert torch.equal(whole.values[[4, 0]], run(x[[4, 0]], 9).values)


@pytest.mark.parametrize("estimator", ["wls", "adjusted"])
def test_bitwise_independent_of_neighbours_where_some_are_additive(estimator):
    weight = integers(20, 3, seed=2)

    def forward(x):  # the second input is not additive
        return x @ weight + torch.relu(x.sum(1, keepdim=True)) * (x[:, :1] == 3)

    x = integers(5, 20)
    x[:, 0] = torch.tensor([1.0, 3.0, 2.0, 1.0, 0.0])
    whole = xaifast.kernel_shap(forward, x, n_samples=200, estimator=estimator)
    for b in range(5):
        alone = xaifast.kernel_shap(forward, x[b : b + 1], n_samples=200, estimator=estimator)
        assert torch.equal(whole.values[b], alone.values[0])
        assert torch.equal(whole.std_errors[b], alone.std_errors[0])


def test_bitwise_independent_of_chunks_with_a_background():
    net, x, rows = IntegerNet(9), integers(3, 9), integers(8, 9, seed=1)  # a power of two of rows: exact means
    results = [
        xaifast.kernel_shap(net, x, baselines=xaifast.Background(rows), n_samples=60, batch_size=size).values
        for size in (1, 3, 8, 50, 4096)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


_VALUES = """
from games import IntegerNet, integers
import xaifast
r = xaifast.kernel_shap(IntegerNet(4 * 81), integers(2, 4, 9, 9), n_samples=90,
                        feature_mask=xaifast.grid_mask((9, 9), 2)[None], estimator={estimator!r})
print(r.values.numpy().tobytes().hex())
"""


@pytest.mark.parametrize("estimator", ["wls", "adjusted"])
def test_bitwise_the_same_on_every_instruction_set(run_on_every_isa, run_python, request, estimator):
    code = _VALUES.format(estimator=estimator)
    printed = run_on_every_isa(code)
    if estimator == "wls":  # the reference of the adjusted solver is LAPACK's
        printed.add(
            run_python(
                f"import sys; sys.path.insert(0, {str(request.path.parent)!r})\n{code}", XAIFAST_BACKEND="reference"
            )
        )
    assert len(printed) == 1 and len(printed.pop()) > 100


def test_same_seed_same_bits_and_no_global_random_state():
    net, x = IntegerNet(20), integers(2, 20)
    state = torch.random.get_rng_state()
    first = xaifast.kernel_shap(net, x, n_samples=101, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(first.values, xaifast.kernel_shap(net, x, n_samples=101, seed=7).values)
    assert not torch.equal(first.values, xaifast.kernel_shap(net, x, n_samples=101, seed=8).values)


def test_permuting_players_permutes_values_under_enumeration():
    net, x = IntegerNet(8), integers(1, 8)
    mask = torch.arange(8)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    plain = xaifast.kernel_shap(net, x, feature_mask=mask).values
    permuted = xaifast.kernel_shap(net, x, feature_mask=order[mask]).values
    torch.testing.assert_close(permuted[:, order], plain, atol=1e-9, rtol=1e-12)


def test_per_input_design_equals_each_input_alone():
    net, x = IntegerNet(20), integers(3, 20)
    together = xaifast.kernel_shap(net, x, n_samples=90, design="per_input", estimator="wls", batch_size=17)
    for b in range(3):
        alone = xaifast.kernel_shap(net, x[b : b + 1], n_samples=90, block=b, estimator="wls")
        assert torch.equal(together.values[b], alone.values[0])
    shared = xaifast.kernel_shap(net, x, n_samples=90, estimator="wls")
    assert not torch.equal(shared.values[1], together.values[1])


def test_per_input_masks_and_absent_players():
    net = IntegerNet(6)
    x = integers(2, 6)
    masks = torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 0]])  # player 3 does not occur in the second input
    for estimator, n_samples in [("exact", 16), ("wls", 12), ("adjusted", 12), ("permutation", 14)]:
        result = xaifast.kernel_shap(net, x, feature_mask=masks, estimator=estimator, n_samples=n_samples)
        assert torch.equal(result.values[1, 3], torch.zeros(3, dtype=torch.float64))
        gap = result.values.sum(1) - (result.full_values - result.base_values)
        torch.testing.assert_close(gap, torch.zeros_like(gap), atol=1e-9, rtol=0)
    exact = xaifast.kernel_shap(net, x, feature_mask=masks, estimator="exact", n_samples=16)
    expected = brute_force(net, x[1], torch.zeros(6, dtype=torch.float64), masks[1], 3)
    torch.testing.assert_close(exact.values[1, :3], expected, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n_samples", [12, 30, 60, 500, 2040])
def test_inputs_with_fewer_players_than_the_design(estimator, n_samples):
    net, x = IntegerNet(11), integers(4, 11)
    masks = torch.stack([torch.arange(11), torch.arange(11) % 4, torch.zeros(11, dtype=torch.long), torch.arange(11)])
    result = xaifast.kernel_shap(net, x, feature_mask=masks, estimator=estimator, n_samples=n_samples)
    gap = result.values.sum(1) - (result.full_values - result.base_values)
    assert float(gap.abs().max() / result.values.abs().max()) < 1e-12
    assert not bool(result.values[1, 4:].any()) and not bool(result.values[2, 1:].any())
    expected = brute_force(net, x[1], torch.zeros(11, dtype=torch.float64), masks[1], 4)
    error = float((result.values[1, :4] - expected).norm() / expected.norm())
    assert n_samples < 60 or error < {60: 0.3, 500: 0.1, 2040: 0.03}[n_samples]
    if estimator == "wls" and n_samples == 2040:  # nearly all coalitions: only the right weights are this close
        assert error < 1e-3


@pytest.mark.parametrize("n_samples", [4, 5, 20, 60, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_small_budgets_are_finite_and_efficient(estimator, n_samples):
    n_players = 65
    net, x = IntegerNet(n_players), integers(2, n_players)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = xaifast.kernel_shap(net, x, n_samples=n_samples, estimator=estimator)
    assert bool(caught) == (n_samples < 65)
    assert bool(torch.isfinite(result.values).all())
    gap = result.values.sum(1) - (result.full_values - result.base_values)
    assert float((gap.abs() / result.values.abs().sum(1).clamp_min(1.0)).max()) < 1e-12
    if estimator != "permutation":
        assert bool(result.std_errors.isnan().all()) == (n_samples < 2 + 2 * 1.2 * n_players)
        assert result.n_evaluations == n_samples - n_samples % 2


def test_one_and_two_players():
    net = IntegerNet(4)
    x = integers(2, 4)
    one = xaifast.kernel_shap(net, x, feature_mask=torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(one.values[:, 0], net(x) - net(torch.zeros_like(x)))
    assert one.n_evaluations == 2
    mask = torch.tensor([0, 1, 1, 0])
    two = xaifast.kernel_shap(net, x, feature_mask=mask, n_samples=4)
    expected = brute_force(net, x[0], torch.zeros(4, dtype=torch.float64), mask, 2)
    torch.testing.assert_close(two.values[0], expected, atol=1e-9, rtol=1e-12)


def test_estimators_approach_the_exact_values():
    net = small_cnn()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    mask = xaifast.grid_mask((8, 8), 2)[None]
    net = torch.nn.Sequential(net, torch.nn.Softmax(1))
    exact = xaifast.kernel_shap(net, x, feature_mask=mask, n_samples=2**16).values
    limits = {"wls": 0.15, "adjusted": 0.08, "permutation": 0.25}
    for estimator, limit in limits.items():
        result = xaifast.kernel_shap(net, x, feature_mask=mask, n_samples=500, estimator=estimator)
        error = float((result.values - exact).norm() / exact.norm())
        assert 1e-6 < error < limit, (estimator, error)
        predicted = float(result.std_errors.norm() / exact.norm())
        assert error / 3 < predicted < 3 * error, (estimator, error, predicted)


def test_tolerance_stops_early_and_holds():
    net = torch.nn.Sequential(small_cnn(), torch.nn.Softmax(1))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) * 2
    mask = xaifast.grid_mask((8, 8), 2)[None]
    arguments = {"feature_mask": mask, "n_samples": 4000, "estimator": "wls"}
    loose = xaifast.kernel_shap(net, x, tolerance=0.2, **arguments)
    tight = xaifast.kernel_shap(net, x, tolerance=1e-9, **arguments)
    assert loose.n_evaluations < tight.n_evaluations == 4000
    assert float((loose.std_errors.norm(dim=1) / loose.values.norm(dim=1)).max()) <= 0.2
    full = xaifast.kernel_shap(net, x, **arguments)
    torch.testing.assert_close(tight.values, full.values, atol=1e-10, rtol=1e-8)


def test_targets_pick_columns():
    net, x = small_cnn(), torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    mask = xaifast.grid_mask((8, 8), 4)[None]
    every = xaifast.kernel_shap(net, x, feature_mask=mask)
    assert every.values.shape == (3, 4, 4) and every.expand().shape == (3, 1, 8, 8, 4)
    one = xaifast.kernel_shap(net, x, feature_mask=mask, target=2)
    torch.testing.assert_close(one.values, every.values[:, :, 2], atol=1e-13, rtol=1e-12)
    assert one.expand().shape == x.shape and one.base_values.shape == (3,)
    labels = torch.tensor([3, 0, 1])
    each = xaifast.kernel_shap(net, x, feature_mask=mask, target=labels, batch_size=5)
    torch.testing.assert_close(
        each.values, torch.stack([every.values[b, :, labels[b]] for b in range(3)]), atol=1e-13, rtol=1e-12
    )
    predicted = xaifast.kernel_shap(net, x, feature_mask=mask, target="predicted")
    best = net(x).argmax(1)
    torch.testing.assert_close(
        predicted.values, torch.stack([every.values[b, :, best[b]] for b in range(3)]), atol=1e-13, rtol=1e-12
    )


def test_expand_spreads_values_and_repr_says_what_was_done():
    net = small_cnn()
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64) + 1
    mask = xaifast.grid_mask((8, 8), 4)[None]
    result = xaifast.kernel_shap(net, x, feature_mask=mask, target=0)
    expected = result.values[:, mask.expand(1, 8, 8).reshape(-1)].reshape(2, 1, 8, 8)
    assert torch.equal(result.expand(), expected)
    assert "2 inputs, 4 players" in repr(result) and "exact" in repr(result)


def test_integer_inputs_give_float32_values():
    x = torch.tensor([[1, 2, 3]])
    result = xaifast.kernel_shap(lambda rows: rows.float() @ torch.tensor([1.0, 2.0, 3.0]), x)
    assert result.values.dtype == torch.float32
    torch.testing.assert_close(result.values, torch.tensor([[1.0, 4.0, 9.0]]))


def test_to_shap():
    shap = pytest.importorskip("shap")
    result = xaifast.kernel_shap(lambda rows: rows.sum(1), torch.ones(2, 3))
    explanation = result.to_shap()
    assert isinstance(explanation, shap.Explanation)
    torch.testing.assert_close(torch.as_tensor(explanation.values), result.values)
    assert explanation.data.tolist() == [[1, 1, 1], [1, 1, 1]]
    regrouped = xaifast.kernel_shap(lambda rows: rows.sum(1), torch.ones(2, 3), feature_mask=torch.tensor([2, 0, 1]))
    assert regrouped.to_shap().data is None  # columns are not players in this order
