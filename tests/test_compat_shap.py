"""The drop-in for shap.KernelExplainer, held against shap itself and against brute force."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from xaifast.compat._array_game import Pace
from xaifast.compat._selection import Regression
from xaifast.compat.shap import KernelExplainer

shap = pytest.importorskip("shap")
pd = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")


def game(n_features, seed=0, n_outputs=None):
    """A smooth model with interactions, ``[n, P] -> [n]`` or ``[n, K]``, values in (0, 1)."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(n_features, 16)) / math.sqrt(n_features)
    second = rng.normal(size=(16, n_outputs or 1))

    def model(rows):
        out = 1 / (1 + np.exp(-np.tanh(np.asarray(rows, dtype=float) @ first * 1.5) @ second))
        return out if n_outputs else out[:, 0]

    return model


def data(n, n_features, seed=0):
    return np.random.default_rng(100 + seed).normal(size=(n, n_features))


def brute_force(model, row, background, weights=None, groups=None, link=lambda v: v):
    """Shapley values ``[players, K]`` by their definition."""
    groups = groups or [[j] for j in range(len(row))]
    weights = np.full(len(background), 1 / len(background)) if weights is None else weights
    m = len(groups)
    value = {}
    for present in itertools.product([False, True], repeat=m):
        rows = background.copy()
        for group, shown in zip(groups, present, strict=True):
            if shown:
                rows[:, group] = row[group]
        value[present] = link(weights @ model(rows).reshape(len(rows), -1))
    phi = np.zeros((m, len(value[present])))
    for i in range(m):
        for present in value:
            if not present[i]:
                s = sum(present)
                with_i = (*present[:i], True, *present[i + 1 :])
                phi[i] += (value[with_i] - value[present]) / (m * math.comb(m - 1, s))
    return phi


def both(model, background, **kwargs):
    return shap.KernelExplainer(model, background, **kwargs), KernelExplainer(model, background, **kwargs)


def logit(p):
    return np.log(p / (1 - p))


@pytest.mark.parametrize("n_outputs", [None, 1, 3])
@pytest.mark.parametrize("link", ["identity", "logit"])
@pytest.mark.parametrize("n_background", [1, 5])
def test_exact_values_shapes_and_attributes_are_shaps(n_outputs, link, n_background):
    model, background, x = game(5, n_outputs=n_outputs), data(n_background, 5), data(4, 5, seed=1)
    theirs, ours = both(model, background, link=link)
    np.testing.assert_allclose(ours.expected_value, theirs.expected_value, rtol=1e-12)
    assert type(ours.expected_value) is type(theirs.expected_value)
    for rows in (x, x[:1], x[0]):
        expected = theirs.shap_values(rows, silent=True, l1_reg=False)
        values = ours.shap_values(rows, silent=True, l1_reg=False)
        assert values.shape == expected.shape and values.dtype == expected.dtype
        np.testing.assert_allclose(values, expected, atol=1e-9)
    for name in ("N", "P", "D", "vector_out", "nsamples", "l1_reg", "M", "keep_index", "keep_index_ordered"):
        assert getattr(ours, name) == getattr(theirs, name), name
    np.testing.assert_allclose(ours.fnull, theirs.fnull, rtol=1e-12)
    np.testing.assert_array_equal(ours.data.data, theirs.data.data)
    np.testing.assert_allclose(ours.data.weights, theirs.data.weights)
    assert list(ours.data.group_names) == list(theirs.data.group_names)
    assert str(ours.link) == str(theirs.link) == link
    np.testing.assert_allclose(ours.linkfv([0.2, 0.7]), theirs.linkfv([0.2, 0.7]))
    np.testing.assert_allclose(ours.explain(x[:1]), theirs.explain(x[:1]), atol=1e-9)


@pytest.mark.parametrize("link", ["identity", "logit"])
def test_weighted_groups_match_brute_force(link):
    model, background, x = game(7, n_outputs=2), data(6, 7), data(3, 7, seed=1)
    groups = [np.array([0, 3]), np.array([1]), np.array([2, 5, 6]), np.array([4])]
    weights = np.arange(1.0, 7.0)
    made = shap.utils._legacy.DenseData(background, list("abcd"), groups, weights)
    theirs, ours = both(model, made, link=link)
    values = ours.shap_values(x, silent=True, l1_reg=0)
    assert values.shape == (3, 4, 2)
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True, l1_reg=0), atol=1e-9)
    function = logit if link == "logit" else lambda v: v
    for row, value in zip(x, values, strict=True):
        expected = brute_force(model, row, background, weights / weights.sum(), [list(g) for g in groups], function)
        np.testing.assert_allclose(value, expected, atol=1e-9)


def test_kmeans_background():
    pytest.importorskip("sklearn")
    model, x = game(5), data(3, 5, seed=1)
    summary = shap.kmeans(data(40, 5), 4)
    assert len(np.unique(summary.weights)) > 1
    theirs, ours = both(model, summary)
    assert ours.data is summary
    assert ours.expected_value == pytest.approx(theirs.expected_value, rel=1e-12)
    values = ours.shap_values(x, silent=True)
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True), atol=1e-9)
    expected = brute_force(model, x[0], summary.data, summary.weights)[:, 0]
    np.testing.assert_allclose(values[0], expected, atol=1e-9)


def test_links_given_as_objects():
    class Cube(shap.utils._legacy.Link):
        @staticmethod
        def f(value):
            return math.copysign(abs(value) ** 3, value)  # takes no arrays

        @staticmethod
        def finv(value):
            return value ** (1 / 3)

    model, background, x = game(4), data(3, 4), data(2, 4, seed=1)
    for link in (Cube(), shap.utils._legacy.LogitLink()):
        theirs, ours = both(model, background, link=link)
        assert ours.link is link
        np.testing.assert_allclose(ours.shap_values(x, silent=True), theirs.shap_values(x, silent=True), atol=1e-9)


def test_logit_of_certain_predictions_is_finite():
    theirs, ours = both(lambda rows: (rows[:, 0] > 0).astype(float), data(4, 3), link="logit")
    x = np.array([[1.0, 0.0, 0.0]])
    values = ours.shap_values(x, silent=True)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True), atol=1e-9)


def test_features_equal_to_the_background_are_zero_row_by_row():
    model, background = game(6), data(4, 6)
    background[:, [1, 4]] = [0.5, np.nan]
    function = lambda rows: model(np.nan_to_num(rows))  # noqa: E731
    x = data(5, 6, seed=1)
    x[0, 1], x[1, 4] = 0.5, np.nan
    x[2, 1], x[2, 4] = 0.5 + 1e-9, np.nan
    theirs, ours = both(function, background)
    x[3] = background[0]  # equal to one row only: varies
    values = ours.shap_values(x, silent=True)
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True), atol=1e-8)
    assert values[0, 1] == values[1, 4] == values[2, 1] == values[2, 4] == 0
    assert (values[4] != 0).all()


def test_single_background_row_gives_each_row_its_own_players():
    model = game(8)
    x = (data(30, 8, seed=1) > 0).astype(float)
    theirs, ours = both(model, np.zeros((1, 8)))
    values = ours.shap_values(x, silent=True, l1_reg=False)
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True, l1_reg=False), atol=1e-9)
    assert (values[x == 0] == 0).all()


@pytest.mark.parametrize("n_outputs", [None, 2])
def test_one_and_no_varying_feature(n_outputs):
    model = game(3, n_outputs=n_outputs)
    background = np.array([[1.0, 2.0, 3.0]])
    x = np.array([[1.0, 2.0, 3.0], [1.0, 5.0, 3.0]])
    theirs, ours = both(model, background, link="logit")
    values = ours.shap_values(x, silent=True)
    np.testing.assert_allclose(values, theirs.shap_values(x, silent=True), atol=1e-12)
    assert (values[0] == 0).all() and (values[1, 1] != 0).all()
    theirs, ours = both(game(1), data(3, 1))
    np.testing.assert_allclose(ours.shap_values(np.ones((2, 1))), theirs.shap_values(np.ones((2, 1)), silent=True))


def test_frames_series_and_names():
    pytest.importorskip("matplotlib")
    model = game(4)
    frame = pd.DataFrame(data(5, 4), columns=list("wxyz"), index=list("abcde"))
    theirs, ours = both(model, frame)
    assert ours.data_feature_names == theirs.data_feature_names == list("wxyz")
    np.testing.assert_allclose(ours.shap_values(frame, silent=True), theirs.shap_values(frame, silent=True), atol=1e-9)
    row = frame.iloc[0]
    assert ours.shap_values(row).shape == theirs.shap_values(row).shape == (4,)
    one, other = ours(frame, silent=True), theirs(frame, silent=True)
    assert one.feature_names == other.feature_names
    np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_array_equal(one.base_values, other.base_values)
    series_ours, series_theirs = KernelExplainer(model, row), shap.KernelExplainer(model, row)
    assert series_ours.data.group_names == series_theirs.data.group_names
    np.testing.assert_allclose(
        series_ours.shap_values(frame, silent=True), series_theirs.shap_values(frame, silent=True), atol=1e-9
    )


@pytest.mark.parametrize(("answer", "n_outputs"), [(pd.DataFrame, 2), (pd.Series, None)])
def test_models_that_answer_with_frames(answer, n_outputs):
    model = game(4, n_outputs=n_outputs)
    theirs, ours = both(lambda rows: answer(model(rows)), data(5, 4))
    x = data(3, 4, seed=1)
    np.testing.assert_allclose(ours.expected_value, theirs.expected_value, rtol=1e-12)
    np.testing.assert_allclose(ours.shap_values(x, silent=True), theirs.shap_values(x, silent=True), atol=1e-9)


def test_frames_with_one_column_are_one_output():
    ours, x = KernelExplainer(lambda rows: pd.DataFrame(game(4)(rows)), data(1, 4)), data(3, 4, seed=1)
    np.testing.assert_allclose(ours.shap_values(x), KernelExplainer(game(4), data(1, 4)).shap_values(x), atol=1e-12)


def test_keep_index_shows_the_model_frames_with_the_rows_index():
    frame = pd.DataFrame(data(5, 4), columns=list("wxyz"), index=pd.Index([30, 10, 50, 20, 40], name="id"))
    base = game(4)

    def model(rows):
        assert list(rows.columns) == list("wxyz") and rows.index.name == "id"
        return base(rows.values) * rows.index.values

    theirs, ours = both(model, frame, keep_index=True)
    assert ours.expected_value == pytest.approx(theirs.expected_value, rel=1e-12)
    x = frame.iloc[:3] * 1.5
    expected = theirs.shap_values(x, silent=True)
    np.testing.assert_allclose(ours.shap_values(x, silent=True), expected, atol=1e-8)

    def in_order(rows):
        assert rows.index.is_monotonic_increasing
        return model(rows)

    ordered = KernelExplainer(in_order, frame.sort_index(), keep_index=True, keep_index_ordered=True)
    np.testing.assert_allclose(ordered.shap_values(x.sort_index(), silent=True)[0], expected[1], atol=1e-8)


def test_mixed_types_travel_whole():
    frame = pd.DataFrame({"n": [1, 2, 3], "s": ["a", "b", "a"], "f": [0.5, 1.5, 2.5]})

    def model(rows):
        assert rows.dtype == object
        return np.array([n * f * (2 if s == "a" else 1) for n, s, f in rows], dtype=float)

    theirs, ours = both(model, frame)
    x = pd.DataFrame({"n": [7, 1], "s": ["b", "c"], "f": [3.0, 4.0]})
    np.testing.assert_allclose(ours.shap_values(x, silent=True), theirs.shap_values(x, silent=True), atol=1e-9)


@pytest.mark.parametrize("kind", [int, np.float32, bool, np.uint8])
def test_other_dtypes(kind):
    background, x = (data(5, 4) > 0).astype(kind), (data(3, 4, seed=1) > 0.3).astype(kind)
    seen = set()

    def model(rows):
        seen.add(rows.dtype)
        assert rows.flags.c_contiguous
        return game(4)(rows)

    theirs, ours = both(model, background)
    np.testing.assert_allclose(ours.shap_values(x, silent=True), theirs.shap_values(x, silent=True), atol=1e-9)
    assert seen == {np.dtype(kind)}


def test_integer_background_does_not_truncate_inputs():
    model = game(4)
    background, x = np.array([[0, 1, 2, 3]]), np.array([[0.5, 1.5, 2.5, 3.5]])
    values = KernelExplainer(model, background).shap_values(x, silent=True)
    np.testing.assert_allclose(values[0], brute_force(model, x[0], background.astype(float))[:, 0], atol=1e-9)


def test_sparse_data():
    model = lambda rows: game(6)(rows.toarray())  # noqa: E731
    background = sparse.random_array((4, 6), density=0.4, format="csr", rng=np.random.default_rng(0))
    x = sparse.random_array((3, 6), density=0.5, format="csr", rng=np.random.default_rng(1))
    background, x = sparse.csr_matrix(background), sparse.csr_matrix(x)
    theirs, ours = both(model, background)
    expected = theirs.shap_values(x, silent=True)
    np.testing.assert_allclose(ours.shap_values(x, silent=True), expected, atol=1e-9)
    np.testing.assert_allclose(ours.shap_values(x.toarray(), silent=True), expected, atol=1e-9)


@pytest.mark.parametrize("l1_reg", [False, "num_features(6)"])
def test_estimates_are_no_worse_than_shaps(l1_reg):
    ours_error = theirs_error = 0.0
    for seed in range(20):
        model, background, x = game(10, seed), data(3, 10, seed), data(1, 10, 50 + seed)
        theirs, ours = both(model, background)
        np.random.seed(seed)
        exact, estimate, other = (
            explainer.shap_values(x, nsamples=n, l1_reg=l1_reg, silent=True)
            for explainer, n in ((theirs, 2**10), (ours, 150), (theirs, 150))
        )
        ours_error += np.square(estimate - exact).sum()
        theirs_error += np.square(other - exact).sum()
    if not l1_reg:
        np.testing.assert_allclose(exact[0], brute_force(model, x[0], background)[:, 0], atol=1e-9)
    assert 0 < ours_error < theirs_error


@pytest.mark.parametrize(("n_features", "k"), [(10, 10), (12, 10), (12, 3)])
@pytest.mark.parametrize("budget", [2.0, 3.0, 8.0, 30.0])
@pytest.mark.filterwarnings("ignore:Regressors in active set", "ignore:Linear regression equation is singular")
def test_default_selection_is_no_worse_than_shaps(n_features, k, budget):
    ours_error = theirs_error = 0.0
    for seed in range(20):
        model, background, x = game(n_features, seed), data(3, n_features, seed), data(1, n_features, 50 + seed)
        theirs, ours = both(model, background)
        exact = ours.shap_values(x, nsamples=2**n_features, l1_reg=False, silent=True)
        np.random.seed(seed)
        n, l1_reg = int(budget * n_features), f"num_features({k})"
        estimate, other = (e.shap_values(x, nsamples=n, l1_reg=l1_reg, silent=True) for e in (ours, theirs))
        assert (estimate != 0).sum() == k
        ours_error += np.square(estimate - exact).sum()
        theirs_error += np.square(other - exact).sum()
    assert 0 < ours_error < theirs_error


@pytest.mark.parametrize("n_features", [5, 8])
def test_additive_models_are_exact_as_soon_as_pairs_suffice(n_features):
    # Two pairs of players that always occur together leave a value open: such designs are drawn again.
    effects = np.arange(1.0, n_features + 1)
    ours = KernelExplainer(lambda rows: rows @ effects, np.zeros((1, n_features)))
    for seed in range(60):
        np.random.seed(seed)
        values = ours.shap_values(np.ones(n_features), nsamples=2 * n_features, l1_reg=False)
        np.testing.assert_allclose(values, effects, atol=1e-8)


@pytest.mark.parametrize(("nsamples", "n_evaluated"), [(1, 2), (5, 6), (6, 6), (29, 30), (30, 30), (1e9, 30)])
@pytest.mark.filterwarnings("ignore:.*do not determine")
def test_coalitions_that_are_evaluated(nsamples, n_evaluated):
    rows = []

    def model(x):
        rows.append(len(x))
        return game(5)(x)

    ours = KernelExplainer(model, np.zeros((1, 5)))
    ours.shap_values(np.ones((1, 5)), nsamples=nsamples, silent=True)
    assert sum(rows) == 1 + 1 + n_evaluated and ours.nsamples == n_evaluated


def test_number_of_features_keeps_the_largest():
    # LARS begins with those that have the total's sign, and leaves out the fourth for the smaller others.
    effects = np.array([3.0, 2.0, 1.5, -4.0, 1.0, 0.9, 0.8])
    ours = KernelExplainer(lambda rows: rows @ effects, np.zeros((1, 7)))
    values = ours.shap_values(np.ones(7), l1_reg="num_features(3)")
    expected = np.where(np.abs(effects) >= 2, effects + (effects.sum() - 1.0) / 3, 0)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    assert (ours.shap_values(np.ones(7), l1_reg="num_features(0)") == 0).all()


@pytest.mark.parametrize("l1_reg", ["aic", "bic", 0.01, "auto"])
@pytest.mark.filterwarnings("ignore:l1_reg='auto'")
def test_selection_on_all_coalitions_is_shaps(l1_reg):
    model, background, x = game(7, n_outputs=2), data(3, 7), data(4, 7, seed=1)
    theirs, ours = both(model, background)
    expected = theirs.shap_values(x, silent=True, l1_reg=l1_reg)
    values = ours.shap_values(x, silent=True, l1_reg=l1_reg)
    np.testing.assert_array_equal(values != 0, expected != 0)
    np.testing.assert_allclose(values, expected, atol=1e-9)


@pytest.mark.parametrize("l1_reg", ["num_features(10)", "aic", 0.005])
def test_selection_on_sampled_coalitions_keeps_shaps_features(l1_reg):
    rng = np.random.default_rng(0)
    effects = np.concatenate([rng.uniform(1, 2, 10), np.full(20, 1e-3)])
    model = lambda rows: rows @ effects + 0.3 * rows[:, 0] * rows[:, 1]  # noqa: E731
    x = np.ones((3, 30))
    theirs, ours = both(model, np.zeros((2, 30)))
    np.random.seed(0)
    expected = theirs.shap_values(x, nsamples=500, l1_reg=l1_reg, silent=True)
    values = ours.shap_values(x, nsamples=500, l1_reg=l1_reg, silent=True)
    if l1_reg != "aic":  # which keeps some of the small ones by chance
        np.testing.assert_array_equal(values != 0, expected != 0)
    assert ((values != 0).sum(1) < 30).all()
    np.testing.assert_allclose(values[:, :10], expected[:, :10], atol=0.02)
    np.testing.assert_allclose(values.sum(1), model(x), atol=1e-9)


def test_the_default_keeps_ten_features_of_small_outputs_too():
    model, background, x = game(15), data(3, 15), data(2, 15, seed=1)
    counts = [
        (KernelExplainer(lambda r, s=scale: s * model(r), background).shap_values(x, silent=True) != 0).sum(1).tolist()
        for scale in (1.0, 1e-4)
    ]
    assert counts == [[10, 10], [10, 10]]


def test_constant_model():
    ours = KernelExplainer(lambda rows: np.full(len(rows), 0.25), data(3, 14))
    assert (ours.shap_values(data(2, 14, seed=1), silent=True) == 0).all()


def test_numpy_seed_decides():
    ours, x = KernelExplainer(game(20), data(3, 20), batch_size=64), data(2, 20, seed=1)
    runs = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        runs.append(ours.shap_values(x, nsamples=100, l1_reg=False, silent=True))
    assert (runs[0] == runs[1]).all() and not np.allclose(runs[0], runs[2], atol=1e-12)


def test_calls_are_of_the_asked_size_and_nothing_is_lost():
    sizes = []

    def model(rows):
        sizes.append(len(rows))
        return game(6)(rows)

    ours = KernelExplainer(model, data(4, 6), batch_size=50)
    x = data(7, 6, seed=1)
    values = ours.shap_values(x, silent=True, l1_reg=False)
    assert max(sizes[2:]) == 48 and sum(sizes[2:]) == 7 * 62 * 4
    np.testing.assert_allclose(values[3], brute_force(game(6), x[3], data(4, 6))[:, 0], atol=1e-9)


def test_values_are_solved_in_blocks(monkeypatch):
    ours, x = KernelExplainer(game(6, n_outputs=2), data(4, 6)), data(7, 6, seed=1)
    whole = ours.shap_values(x, silent=True)
    monkeypatch.setattr("xaifast.compat.shap._BLOCK_VALUES", 300)
    np.testing.assert_allclose(ours.shap_values(x, silent=True), whole, atol=1e-12)


def test_the_adjusted_solve_is_left_out_where_it_would_take_long():
    def adjusted(n_pairs, n_background, n_outputs):
        return Regression(30, 2 * n_pairs, 0, n_background, 1e-16)._affords_adjusted(n_outputs)

    assert adjusted(256, 100, 2) and not adjusted(1054, 100, 2)
    assert adjusted(40, 1, 2) and not adjusted(100, 1, 2)


def test_models_keep_their_torch_threads():
    before, seen = torch.get_num_threads(), set()

    def model(rows):
        seen.add(torch.get_num_threads())
        return game(8)(rows)

    torch.set_num_threads(3)
    try:
        KernelExplainer(model, data(3, 8)).shap_values(data(1, 8, seed=1), nsamples=100, silent=True)
        assert seen == {3} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_pace_grows_while_rows_get_cheaper():
    pace = Pace(None, 8)
    cost = {8192: 1.0, 16384: 0.5, 32768: 0.3, 65536: 0.29}
    sizes = []
    for call in range(60):
        sizes.append(pace.rows)
        pace.observe(pace.rows * cost[pace.rows] * (10 if call % 4 == 0 else 1))  # another process gets in the way
    assert sizes[:4] == [8192, 16384, 8192, 16384] and set(sizes[30:]) == {32768}
    assert Pace(None, 2**30).rows == 1
    fixed = Pace(100, 8)
    for _ in range(20):
        fixed.observe(1.0)
    assert fixed.rows == 100


def test_bar_and_memory_errors(capsys):
    def model(rows):
        if len(rows) > 40:
            raise MemoryError
        return game(4)(rows)

    ours = KernelExplainer(model, data(4, 4), batch_size=64)
    values = ours.shap_values(data(5, 4, seed=1), gc_collect=True, check_additivity=False)
    assert "5/5" in capsys.readouterr().err
    np.testing.assert_allclose(values[0], brute_force(game(4), data(5, 4, seed=1)[0], data(4, 4))[:, 0], atol=1e-9)


def test_fitted_estimators_do_not_warn_of_names():
    linear_model = pytest.importorskip("sklearn.linear_model")
    frame = pd.DataFrame(data(30, 4), columns=list("wxyz"))
    fitted = linear_model.LogisticRegression().fit(frame, frame["w"] > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = KernelExplainer(fitted.predict_proba, frame.iloc[:5])
        values = ours.shap_values(frame.iloc[5:7], silent=True)
    assert values.shape == (2, 4, 2) and list(fitted.feature_names_in_) == list("wxyz")


@pytest.mark.parametrize("n_outputs", [None, 2])
@pytest.mark.filterwarnings("ignore")
def test_plots_take_the_explanations(n_outputs):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.DataFrame(data(12, 4), columns=list("wxyz"))
    theirs, ours = both(game(4, n_outputs=n_outputs), frame.iloc[:5])
    made, expected = ours(frame, silent=True), theirs(frame, silent=True)
    assert made.shape == expected.shape and made.base_values.shape == expected.base_values.shape
    made = made[..., 1] if n_outputs else made
    shap.plots.waterfall(made[0], show=False)
    shap.plots.beeswarm(made, show=False)
    shap.plots.bar(made, show=False)
    shap.plots.scatter(made[:, "x"], show=False)
    plt.close("all")
    array = ours(frame.to_numpy(), silent=True, nsamples=14)
    assert array.feature_names == list("wxyz")


@pytest.mark.filterwarnings("ignore")
def test_errors_of_shaps_kinds():
    model, background = game(4), data(3, 4)
    cases = [
        lambda cls: cls(model, "rows"),
        lambda cls: cls(model, background, link="square"),
        lambda cls: cls(model, background, link=shap.links.logit),
        lambda cls: cls(3, background),
        lambda cls: cls(lambda rows: rows.sum(1), shap.utils._legacy.DenseData(background.T, list("abcd"))),
        lambda cls: cls(model, background).shap_values(np.zeros((2, 2, 4)), silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, nsamples="many", silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, l1_reg="num_features(x)", silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, l1_reg="lots", silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, l1_reg=None, silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, nsamples=8.0, silent=True),
        lambda cls: cls(model, background).shap_values(background + 1, nsamples=0, silent=True),
        lambda cls: cls(model, background).shap_values(background.tolist(), silent=True),
        lambda cls: cls(model, background).shap_values(np.matrix(background), silent=True),
        lambda cls: cls(model, background).shap_values(background[:, :3], silent=True),
        lambda cls: cls(model, background).shap_values(background[0, :3], silent=True),
        lambda cls: cls(model, background).shap_values(np.zeros((2, 5)), silent=True),
        lambda cls: cls(model, background).explain(background[0]),
        lambda cls: cls(model, background, link=object()),
        lambda cls: cls(model, background[0]),
        lambda cls: cls(model, background.tolist()),
        lambda cls: cls(lambda rows: rows[:, 0].tolist(), background),
        lambda cls: cls(lambda rows: None, background),
        lambda cls: cls(lambda rows: np.float64(1), background),
        lambda cls: cls(lambda rows: rows[:-1], background),
    ]
    for case in cases:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            case(shap.KernelExplainer)
        with pytest.raises(theirs.type) as ours:
            case(KernelExplainer)
        assert ours.type is theirs.type


def test_other_bad_input():
    model, background = game(4), data(3, 4)
    ours = KernelExplainer(model, background)
    with pytest.raises(IndexError, match="4 columns"):
        ours.shap_values(np.zeros((2, 3)))
    with pytest.raises(AssertionError, match="X must be"):
        ours.shap_values([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(TypeError, match="nsamples"):
        ours.shap_values(background + 1, nsamples=8.0)
    with pytest.raises(ValueError, match="at least 1"):
        ours.shap_values(background + 1, nsamples=0)
    with pytest.raises(ValueError, match="keep 0 features or more"):
        ours.shap_values(background + 1, l1_reg="num_features(-1)")
    twice = shap.utils._legacy.DenseData(background, list("abc"), [np.array([0, 1]), np.array([1]), np.array([2])])
    with pytest.raises(ValueError, match="columns once"):
        KernelExplainer(model, twice)
    with pytest.raises(ValueError, match="at least one row"):
        KernelExplainer(model, background[:0])
    with pytest.raises(IndexError, match=r"\[rows, features\]"):
        KernelExplainer(model, background[0])
    with pytest.raises(ValueError, match="batch_size"):
        KernelExplainer(model, background, batch_size=0)
    with pytest.raises(ValueError, match=r"\[n\] or \[n, K\]"):
        KernelExplainer(lambda rows: rows[:-1], background)
    with pytest.raises(AttributeError, match=r"\[n\] or \[n, K\]"):
        KernelExplainer(lambda rows: "none", background)
    with pytest.raises(TypeError, match=r"\[n\] or \[n, K\]"):
        KernelExplainer(lambda rows: np.full(len(rows), "a"), background)
    with pytest.raises(ValueError, match="as for the background"):
        KernelExplainer(lambda rows: rows[:, : 2 + (len(rows) > 3)], background).shap_values(background + 1)
    with pytest.raises(ValueError, match="finite, got nan for input 1"):
        KernelExplainer(lambda rows: rows[:, 0], background).shap_values(np.array([[9.0] * 4, [np.nan] * 4]))
    mixed = KernelExplainer(lambda r: np.where((r[:, 0] == 9) & (r[:, 1] != 9), np.inf, 0.0), background)
    with pytest.raises(ValueError, match="finite, got inf for input 0, coalition"):
        mixed.shap_values(np.full((1, 4), 9.0))
    with pytest.warns(UserWarning, match="do not determine"):
        KernelExplainer(game(30), data(3, 30)).shap_values(data(1, 30, 1), nsamples=20, l1_reg=False, silent=True)


def test_no_rows():
    assert KernelExplainer(game(4, n_outputs=2), data(3, 4)).shap_values(np.zeros((0, 4))).shape == (0, 4, 2)


def test_shap_and_scikit_learn_are_needed_only_where_they_are_used(run_python):
    printed = run_python("""
import sys
sys.modules.update({"shap": None, "sklearn": None, "pandas": None, "scipy": None})
import numpy as np
from xaifast.compat.shap import KernelExplainer
explainer = KernelExplainer(lambda x: x.sum(1), np.zeros((1, 12)))
print(explainer.shap_values(np.ones((1, 12)), l1_reg=False, silent=True).sum().round(9))
print((explainer.shap_values(np.ones((1, 12)), silent=True) != 0).sum())
for call in (lambda: explainer(np.ones((1, 12))), lambda: explainer.shap_values(np.ones((1, 12)), l1_reg="aic")):
    try:
        call()
    except ImportError as error:
        print("xaifast[compat]" in str(error))
""")
    assert printed.split() == ["12.0", "10", "True", "True"]
