"""Small budgets: designs row by row, solves against least squares written here, drop-ins against their peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import xaifast
from xaifast.attribution.shapley_solvers import Adjusted, PairedDesign, Wls
from xaifast.attribution.small_budgets import SmallBudget, is_small, small_design

F64 = torch.float64


def values_of(present, seed=0, order=2):
    """A game's values ``[n, 2]``: sums over players, pairs and for ``order=3`` triples; and its Shapley values."""
    m = present.shape[1]
    rng = np.random.default_rng(seed)
    z = present.double()
    single, pair = (torch.from_numpy(rng.normal(size=size)) for size in ((m, 2), (m, m, 2)))
    pair = pair * torch.ones(m, m, dtype=F64).triu(1)[:, :, None] * (order > 1)
    values = 5 + z @ single + torch.einsum("ni,ijk,nj->nk", z, pair, z)
    phi = single + (pair.sum(0) + pair.sum(1)) / 2
    if order == 3:
        values = values + torch.tanh(z @ torch.from_numpy(rng.normal(size=(m, 2))))
    return values, phi


@pytest.mark.parametrize("n_players", [3, 4, 5, 8, 9, 41])
def test_designs_hold_what_the_budget_pays_for_and_nothing_twice(n_players):
    budgets = [n for n in range(4, 100) if is_small(n_players, n)]
    assert budgets[-1] == min(2**n_players, max(80, 2 * n_players + 2)) - 1
    for n in budgets:
        one = small_design(n_players, n, seed=n)
        rows = one.present
        assert len(rows) == (n if n < 2 * n_players else n - n % 2)
        assert rows[0].all() and not rows[1].any() and len(rows.unique(dim=0)) == len(rows)
        assert one.weights[:2].isinf().all() and one.weights[2:].isfinite().all() and (one.weights > 0).all()
        if n >= 2 * n_players:
            assert (rows[2::2] ^ rows[3::2]).all()
        again = small_design(n_players, n, seed=n)
        assert torch.equal(one.bits, again.bits) and torch.equal(one.weights, again.weights)


@pytest.mark.parametrize("n", [9, 13, 16, 24])
def test_blocks_and_seeds_have_other_members(n):
    drawn = [small_design(8, n, seed=seed, block=block) for seed, block in ((3, 0), (3, 1), (4, 0))]
    assert len({one.bits.numpy().tobytes() for one in drawn}) == 3
    small_design(8, n, seed=2**63 - 1, block=2**63 - 1)


def test_single_coalitions_are_large_and_small():
    sizes = torch.cat([small_design(16, 31, seed=seed).present[17:].sum(1) for seed in range(50)])
    assert abs(sizes.double().mean() - 8) < 0.5 and (sizes == 1).any() and (sizes == 15).any()


@pytest.mark.parametrize("n_players", [3, 5, 8, 11, 45])
def test_sums_are_exact_from_the_fewest_coalitions_that_determine_them(n_players):
    last = min(2**n_players, 2 * n_players + 6)
    for n in range(n_players + 1, last):
        if not is_small(n_players, n):
            continue
        for seed in range(5):
            design = small_design(n_players, n, seed=seed)
            solve = SmallBudget(design.present, design.weights, 1e-16)
            assert solve.full_rank
            values, phi = values_of(design.present, seed, order=1 if n < 2 * n_players else 2)
            torch.testing.assert_close(solve(values)[0], phi, atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_sums_in_float32_are_exact_too(scale):
    for n in (16, 17, 18, 20, 24, 40):
        design = small_design(8, n, seed=n)
        values, phi = values_of(design.present, n)
        values = (scale * values).float().double()
        solved, _ = SmallBudget(design.present, design.weights, torch.finfo(torch.float32).eps)(values)
        torch.testing.assert_close(solved, scale * phi, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("n", [5, 8, 10, 13, 15])
def test_single_coalitions_are_solved_by_constrained_least_squares(n):
    design = small_design(8, n, seed=1)
    values, _ = values_of(design.present, order=3)
    solved, errors = SmallBudget(design.present, design.weights, 1e-16)(values)
    x, y = design.present[2:].double(), values[2:] - values[1]
    total = values[0] - values[1]
    # Least squares among values of this sum, the shortest of them: deviations from equal shares in a basis of sum zero.
    basis = torch.linalg.svd(torch.ones(1, 8, dtype=F64))[2][1:].T
    deviation = torch.linalg.lstsq(x @ basis, y - x.sum(1, keepdim=True) / 8 * total, driver="gelsd").solution
    torch.testing.assert_close(solved, total / 8 + basis @ deviation, atol=1e-9, rtol=0)
    assert errors.isnan().all()


@pytest.mark.parametrize(("n", "share"), [(18, 0.5), (20, 0.5), (22, 1.0), (40, 1.0)])
def test_pairs_are_solved_by_the_mean_of_both_and_then_by_the_adjusted_fit(n, share):
    design = small_design(8, n, seed=1)
    values, _ = values_of(design.present, order=3)
    solved, errors = SmallBudget(design.present, design.weights, 1e-16)(values)
    pairs = PairedDesign(design.present[2::2], design.weights[2::2])
    differences, total = (values[2::2] - values[3::2]) / 2, values[0] - values[1]
    wls, adjusted = Wls(pairs)(differences, total), Adjusted(pairs, 1e-16)(differences, total)
    torch.testing.assert_close(solved, (1 - share) * wls[0] + share * adjusted[0], atol=1e-12, rtol=0)
    assert not torch.allclose(wls[0], adjusted[0], rtol=1e-3)
    if share == 1:
        torch.testing.assert_close(errors, adjusted[1], atol=0, rtol=0)
    else:
        assert errors.isnan().all()


@pytest.mark.filterwarnings("ignore:.*is below the number of players")
@pytest.mark.parametrize("n", [6, 9, 12, 14, 16, 18, 30])
@pytest.mark.parametrize("design", ["shared", "per_input"])
def test_absent_players_have_no_value_and_neighbours_no_say(n, design):
    masks = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 2, 2, 4, 5, 5], [0] * 3 + [6] * 4, [3] * 7])
    x = torch.arange(-9, 19, dtype=F64).reshape(4, 7)  # all sums exact, so that no row depends on its batch
    weight = torch.tensor([1.0, -2, 3, 0.5, 4, -1, 2], dtype=F64)

    def model(rows):
        effects = rows @ weight
        return torch.stack([effects, effects * effects * effects], 1)

    def explain(rows):
        arguments = dict(feature_mask=masks[rows], n_samples=n, estimator="small", seed=4, design=design)
        return xaifast.kernel_shap(model, x[rows], **arguments)

    whole = explain([0, 1, 2, 3])
    occurs = torch.zeros(4, 7, dtype=torch.bool).scatter_(1, masks, torch.ones_like(masks, dtype=torch.bool))
    assert whole.estimator == "small" and whole.n_evaluations == (n if n < 14 else n - n % 2)
    assert (whole.values[~occurs] == 0).all()
    torch.testing.assert_close(whole.values.sum(1), model(x), atol=0, rtol=1e-12)
    if n >= 8:
        effects = torch.zeros(4, 7, dtype=F64).scatter_add_(1, masks, x * weight)
        torch.testing.assert_close(whole.values[..., 0], effects, atol=1e-9, rtol=0)
    for other in (1, 2, 3) if design == "shared" else (1,):
        assert torch.equal(explain([0, other]).values, whole.values[[0, other]])


def test_large_budgets_are_refused_and_complete_ones_exact():
    model = torch.nn.Linear(10, 1).eval()
    with pytest.raises(ValueError, match="fewer than 80 samples"):
        xaifast.kernel_shap(model, torch.ones(1, 10), n_samples=80, estimator="small")
    x = torch.ones(1, 5)
    assert xaifast.kernel_shap(lambda rows: rows.prod(1), x, n_samples=32, estimator="small").estimator == "exact"


@pytest.mark.parametrize(
    ("peer", "n_players", "n"),
    [("shap", 5, 10), ("shap", 6, 8), ("shap", 6, 12), ("shap", 6, 24), ("shap", 8, 24), ("shap", 12, 22)]
    + [("captum", 5, 7), ("captum", 12, 25)],
)
@pytest.mark.filterwarnings("ignore:Linear regression equation is singular")
def test_drop_ins_err_no_more_than_their_peers(peer, n_players, n, monkeypatch, request):
    """Mean errors over 20 random games a kind; a larger one must lie within its paired interval."""
    for name in ("shap", "captum", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from bench_dropin_error import compare

    n_threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(n_threads))
    torch.set_num_threads(1)
    for row in compare(peer, n_players, n, 20, ("linear", "pairs", "tanh", "relu")):
        assert row["verdict"] != "larger", row
        assert row["game"] != "linear" or float(row["error"]) < 1e-3
