"""The native kernel regression: element by element against dense NumPy, and `Adjusted` with and without it."""

import numpy as np
import pytest
import torch
from test_shapley_solvers import game_differences, leverage_design, randn, triple_game

from xaifast import _native
from xaifast.attribution import _adjusted
from xaifast.attribution.shapley_solvers import Adjusted, PairedDesign

native = _native.cpu()
pytestmark = pytest.mark.skipif(native is None, reason=f"no native module: {_native.why_missing()}")

ROWS = [1, 2, 7, 8, 9, 63, 64, 65, 130, 250, 257]
PLAYERS = [1, 3, 49, 64, 70]
SPARE = 13


def make_case(n_rows, n_players, n_outputs, n_probes=0, n_sizes=5):
    rng = np.random.default_rng([n_rows, n_players, n_outputs])
    x = rng.choice([-1.0, 1.0], (n_rows, n_players))
    return {
        "columns": np.concatenate([x, 0.2 * rng.standard_normal((n_rows, n_sizes))], 1),
        "weights": rng.random((n_outputs, n_players)) / n_players,
        "size_weights": rng.random(n_outputs),
        "diagonal": 0.05 + rng.random((n_outputs, n_rows)),
        "y": rng.standard_normal((n_outputs, n_rows)),
        "probes": rng.choice([-1.0, 1.0], (n_probes, n_rows)),
    }


def regress(case, with_inverse=True, n_threads=1):
    """alpha [B, n], quadratic [B], log_determinant [B], inverse_diagonal [B, n] and info [B]."""
    n_outputs, n_rows = case["y"].shape
    n_players = case["weights"].shape[1]
    sizes = (n_outputs * n_rows, n_outputs, n_outputs, n_outputs * n_rows)
    results = [np.full(size + SPARE, 7.0) for size in sizes]
    info = np.full(n_outputs + SPARE, 7, dtype=np.int32)
    pointers = [array.ctypes.data for array in (*case.values(), *results)]
    if not with_inverse:
        pointers[-1] = 0
    native.cubic_regression(
        *pointers, info.ctypes.data, n_outputs, n_rows, n_players, case["columns"].shape[1] - n_players,
        len(case["probes"]), n_threads,
    )  # fmt: skip
    for array in (*results, info):
        assert (array[-SPARE:] == 7).all(), "wrote beyond the end"
    alpha, quadratic, log_determinant, inverse_diagonal = (array[:-SPARE] for array in results)
    shape = (n_outputs, n_rows)
    return alpha.reshape(shape), quadratic, log_determinant, inverse_diagonal.reshape(shape), info[:-SPARE]


def covariance(case, output):
    n_players = case["weights"].shape[1]
    x, sizes = case["columns"][:, :n_players], case["columns"][:, n_players:]
    a = (x * case["weights"][output]) @ x.T
    return a + a**3 + case["size_weights"][output] * sizes @ sizes.T + np.diag(case["diagonal"][output])


def check_against_numpy(case):
    alpha, quadratic, log_determinant, inverse_diagonal, info = regress(case)
    assert not info.any()
    for b, y in enumerate(case["y"]):
        inverse = np.linalg.inv(covariance(case, b))
        expected = inverse.diagonal()
        if len(case["probes"]):
            expected = (case["probes"] * (case["probes"] @ inverse)).mean(0)
        np.testing.assert_allclose(alpha[b], inverse @ y, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(inverse_diagonal[b], expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(quadratic[b], y @ inverse @ y, rtol=1e-10)
        np.testing.assert_allclose(log_determinant[b], np.linalg.slogdet(covariance(case, b))[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n_players", PLAYERS)
@pytest.mark.parametrize("n_rows", ROWS)
def test_against_numpy(n_rows, n_players):
    for n_outputs in (1, 3, 17):
        check_against_numpy(make_case(n_rows, n_players, n_outputs))


@pytest.mark.parametrize("n_probes", [1, 7, 8, 9, 32])
@pytest.mark.parametrize("n_rows", ROWS)
def test_probes_against_numpy(n_rows, n_probes):
    check_against_numpy(make_case(n_rows, 20, 2, n_probes))


@pytest.mark.parametrize("n_sizes", [0, 1, 3])
def test_number_of_size_features(n_sizes):
    check_against_numpy(make_case(30, 6, 2, n_sizes=n_sizes))


@pytest.mark.parametrize("n_probes", [0, 32])
@pytest.mark.parametrize("n_rows", [9, 64, 130])
def test_an_output_does_not_depend_on_threads_or_neighbours(n_rows, n_probes):
    case = make_case(n_rows, 49, 17, n_probes)
    together = regress(case)
    for n_threads in (2, 3, 40):
        for got, expected in zip(regress(case, n_threads=n_threads), together, strict=True):
            assert np.array_equal(got, expected)
    for b in (0, 5, 16):
        own = {k: case[k][b : b + 1] for k in ("weights", "size_weights", "diagonal", "y")}
        for got, expected in zip(regress({**case, **own}), together, strict=True):
            assert np.array_equal(got[0], expected[b])
    for got, expected in list(zip(regress(case, with_inverse=False), together, strict=True))[:3]:
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("n_probes", [0, 9])
@pytest.mark.parametrize("row", [0, 3, 4, 8, 20, 63, 64])
def test_a_failure_is_said_and_stays_alone(row, n_probes):
    case = make_case(65, 10, 3, n_probes)
    sound = regress(case)
    case["diagonal"][1, row] = -100.0
    broken = regress(case)
    assert broken[4].tolist() == [0, row + 1, 0]
    for got, expected in zip(broken[:4], sound[:4], strict=True):
        assert np.isnan(got[1]).all()
        assert np.array_equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weights", "size_weights", "diagonal"])
def test_what_is_not_finite_is_a_failure(name, value):
    case = make_case(20, 6, 3)
    sound = regress(case)
    case[name][1] = value
    broken = regress(case)
    assert broken[4][1] != 0 and broken[4][[0, 2]].tolist() == [0, 0]
    for got, expected in zip(broken[:4], sound[:4], strict=True):
        assert np.isnan(got[1]).all()
        assert np.array_equal(got[[0, 2]], expected[[0, 2]])


def test_broken_observations_are_not_a_failure_of_the_matrix():
    case = make_case(20, 6, 3)
    sound = regress(case)
    case["y"][1, 7] = np.nan
    alpha, quadratic, log_determinant, inverse_diagonal, info = regress(case)
    assert not info.any()
    assert np.isnan(alpha[1]).all() and np.isnan(quadratic[1])
    assert np.array_equal(log_determinant, sound[2]) and np.array_equal(inverse_diagonal, sound[3])
    assert np.array_equal(alpha[[0, 2]], sound[0][[0, 2]])


DIGEST = """
import hashlib, test_cubic
digest = hashlib.sha256()
for n_rows in test_cubic.ROWS:
    for n_players, n_probes in ((1, 0), (49, 0), (70, 0), (49, 32)):
        for result in test_cubic.regress(test_cubic.make_case(n_rows, n_players, 3, n_probes)):
            digest.update(result.tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(run_on_every_isa):
    assert len(run_on_every_isa(DIGEST)) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_rows": -1}, "sizes must not be negative"),
        ({"n_rows": 0}, "a row and a player are needed"),
        ({"n_players": 0}, "a row and a player are needed"),
        ({"y": 0}, "null pointer"),
        ({"alpha": 0}, "null pointer"),
        ({"probes": 0, "n_probes": 1}, "null pointer"),
    ],
)
def test_nonsense_is_refused(change, text):
    buffer = np.ones(64)
    names = ("columns", "weights", "size_weights", "diagonal", "y", "probes", "alpha", "quadratic", "log_determinant")
    arguments = dict.fromkeys((*names, "inverse_diagonal", "info"), buffer.ctypes.data)
    arguments |= {"n_outputs": 1, "n_rows": 2, "n_players": 1, "n_sizes": 0, "n_probes": 0, "n_threads": 1}
    native.cubic_regression(*arguments.values())
    with pytest.raises(ValueError, match=text):
        native.cubic_regression(*(arguments | change).values())
    native.cubic_regression(*(arguments | change | {"n_outputs": 0, "n_rows": 2, "n_players": 1}).values())


def both_ways(monkeypatch, design):
    solvers = []
    for backend, regressions in (("native", "NativeRegressions"), ("reference", "TorchRegressions")):
        monkeypatch.setenv("XAIFAST_BACKEND", backend)
        solvers.append(Adjusted(design))
        assert type(solvers[-1]._fit._regressions).__name__ == regressions
    return solvers


@pytest.mark.parametrize(
    "n_players,n_pairs,n_outputs", [(2, 1, 1), (8, 90, 3), (30, 31, 1), (49, 97, 70), (20, 249, 3), (15, 300, 2)]
)
def test_adjusted_is_the_same_with_and_without_the_kernel(monkeypatch, n_players, n_pairs, n_outputs):
    design = leverage_design(n_players, n_pairs, seed=0)
    differences, total = randn(n_pairs, n_outputs, seed=2), randn(n_outputs, seed=3)
    if n_players > 2:
        game, total_of_game = game_differences(triple_game(n_players, 40, seed=1)[0], design)
        differences, total = game + 0.05 * differences, total_of_game.expand(n_outputs)
    kernel, reference = (solver(differences, total) for solver in both_ways(monkeypatch, design))
    for got, expected in zip(kernel, reference, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert (got - expected).nan_to_num().norm() <= 1e-9 * expected.nan_to_num().norm()


@pytest.mark.parametrize("n_players,n_pairs", [(49, 97), (20, 249), (15, 600)])
def test_adjusted_fits_each_of_many_outputs_as_if_alone(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=0)
    differences, total = randn(n_pairs, 70, seed=2), randn(70, seed=3)
    solver = Adjusted(design)
    together = solver(differences, total)
    for k in (0, 40, 63, 64, 69):
        for got, expected in zip(solver(differences[:, k : k + 1], total[k : k + 1]), together, strict=True):
            assert torch.equal(got[:, 0], expected[:, k])


def test_adjusted_with_repeated_pairs_and_broken_outputs(monkeypatch):
    design = leverage_design(12, 30, seed=0)
    design = PairedDesign(design.present.repeat(2, 1), design.weights.repeat(2))
    differences, total = randn(60, 3, seed=2), randn(3, seed=3)
    differences[5, 1] = float("nan")
    kernel, reference = (solver(differences, total)[0] for solver in both_ways(monkeypatch, design))
    assert kernel[:, 1].isnan().all()
    torch.testing.assert_close(kernel, reference, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_large_designs_are_left_to_torch(monkeypatch):
    design = leverage_design(10, 40, seed=0)
    monkeypatch.setattr(_adjusted, "_NATIVE_ROWS", 40)
    assert type(Adjusted(design)._fit._regressions) is _adjusted.TorchRegressions


def test_the_default_device_does_not_matter(monkeypatch):
    design = leverage_design(10, 40, seed=0)
    differences, total = randn(40, 3, seed=2), randn(3, seed=3)
    expected = [solver(differences, total) for solver in both_ways(monkeypatch, design)]
    with torch.device("meta"):
        found = [solver(differences, total) for solver in both_ways(monkeypatch, design)]
    for got, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
