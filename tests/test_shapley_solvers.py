"""Solvers against brute force: every value is recomputed here from the definition, with no shared code."""

import itertools
import math

import pytest
import torch

from xaifast.attribution import _adjusted
from xaifast.attribution.shapley_solvers import (
    Adjusted,
    PairedDesign,
    Wls,
    choose_estimator,
    solve_exact,
    solve_permutation,
)
from xaifast.ops.coalitions import pack_coalitions, sample_coalitions

F64 = torch.float64
BRUTE_FORCE_M = 7


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def subsets(n_players):
    """All coalitions as BoolTensor [2^M, M]; row number = bit pattern."""
    return (torch.arange(1 << n_players)[:, None] >> torch.arange(n_players) & 1).bool()


def shapley_by_permutations(values, n_players):
    """Mean marginal contribution over all orders; values [2^M] by bit pattern."""
    total = [0.0] * n_players
    orders = list(itertools.permutations(range(n_players)))
    for order in orders:
        word = 0
        for player in order:
            total[player] += float(values[word | 1 << player] - values[word])
            word |= 1 << player
    return torch.tensor([t / len(orders) for t in total], dtype=F64)


def shapley_by_subsets(values, n_players):
    """Sum over coalitions without the player; values [2^M, ...] by bit pattern."""
    result = torch.zeros(n_players, *values.shape[1:], dtype=F64)
    words = torch.arange(1 << n_players)
    for player in range(n_players):
        without = words[(words >> player & 1) == 0]
        sizes = (without[:, None] >> torch.arange(n_players) & 1).sum(1).tolist()
        orders = [math.factorial(s) * math.factorial(n_players - 1 - s) for s in sizes]
        factor = torch.tensor(orders, dtype=F64) / math.factorial(n_players)
        rise = values[without | 1 << player] - values[without]
        result[player] = torch.tensordot(factor, rise, 1)
    return result


def all_pairs(n_players):
    """Every pair once with kernel weights mu(S) = (M - 1) / (C(M, s) s (M - s))."""
    present = subsets(n_players)
    present = present[(present[:, 0]) & (present.sum(1) < n_players)]
    weights = [(n_players - 1) / (math.comb(n_players, s) * s * (n_players - s)) for s in present.sum(1).tolist()]
    return PairedDesign(present, torch.tensor(weights, dtype=F64))


def leverage_design(n_players, n_pairs, seed):
    """Distinct pairs, sizes spread evenly over the classes, weights kernel mass / inclusion probability."""
    rng = generator(seed)
    half = n_players // 2
    cap = [math.comb(n_players, k) // (2 if 2 * k == n_players else 1) for k in range(1, half + 1)]
    law = [0.5 if 2 * k == n_players else 1.0 for k in range(1, half + 1)]
    expected, open_classes = [0.0] * half, set(range(half))
    while open_classes:
        left = n_pairs - sum(cap[i] for i in range(half) if i not in open_classes)
        scale = left / sum(law[i] for i in open_classes)
        full = {i for i in open_classes if scale * law[i] >= cap[i]}
        for i in open_classes:
            expected[i] = float(cap[i]) if i in full else scale * law[i]
        if not full:
            break
        open_classes -= full
    u = float(torch.rand((), generator=rng, dtype=F64))
    rows, weights, reached, before = [], [], 0.0, 0
    for i in range(half):
        k = i + 1
        reached += expected[i]
        after = n_pairs if i == half - 1 else math.floor(reached + u)
        count, before = min(after - before, cap[i]), after
        seen = set()
        while len(seen) < count:
            members = torch.randperm(n_players, generator=rng)[:k].tolist()
            if 2 * k == n_players and 0 not in members:
                members = [p for p in range(n_players) if p not in members]
            seen.add(tuple(sorted(members)))
        for members in sorted(seen):
            row = torch.zeros(n_players, dtype=torch.bool)
            row[list(members)] = True
            rows.append(row)
            weights.append(law[i] / (k * (n_players - k) * expected[i]))
    weights = torch.tensor(weights, dtype=F64)
    return PairedDesign(torch.stack(rows), weights / weights.mean())


def game_differences(game, design):
    """d [h, K] and D [K] of a function of BoolTensor [n, M]."""
    everybody = torch.ones(1, design.n_players, dtype=torch.bool)
    differences = (game(design.present) - game(~design.present)) / 2
    return differences, (game(everybody) - game(~everybody))[0]


def additive_game(n_players, n_outputs, seed):
    worth = randn(n_players, n_outputs, seed=seed)
    return (lambda present: present.double() @ worth + 3.0), worth


def pairwise_game(n_players, n_outputs, seed):
    linear = randn(n_players, n_outputs, seed=seed)
    pairs = randn(n_players, n_players, n_outputs, seed=seed + 1)
    pairs = (pairs + pairs.transpose(0, 1)) / 2
    pairs[range(n_players), range(n_players)] = 0

    def game(present):
        z = present.double()
        return z @ linear + torch.einsum("ni,nj,ijk->nk", z, z, pairs) / 2

    return game, linear + pairs.sum(1) / 2


def triple_game(n_players, n_terms, seed, strength=1.0):
    """Linear terms and products of three signs on part of the players; Shapley values of each term in closed form."""
    linear = randn(n_players, 1, seed=seed) * torch.exp(randn(n_players, 1, seed=seed + 1))
    chance = linear.abs().squeeze(1) + 0.05
    triples = torch.stack([torch.multinomial(chance, 3, generator=generator(seed + 2 + t)) for t in range(n_terms)])
    size = randn(n_terms, seed=seed + 1000) * strength

    def game(present):
        x = 2 * present.double() - 1
        return (x @ linear).squeeze(1)[:, None] / 2 + (x[:, triples].prod(2) @ size)[:, None]

    exact = linear.clone()
    for triple, s in zip(triples, size, strict=True):
        exact[triple] += 2 / 3 * s
    return game, exact


# --- exact ---


@pytest.mark.parametrize("n_players", [1, 2, 3, 5, 8, 10])
def test_exact_equals_the_definition(n_players):
    values = randn(1 << n_players, 3, seed=n_players) + 100
    order = torch.randperm(1 << n_players, generator=generator(0))
    got = solve_exact(pack_coalitions(subsets(n_players))[order], values[order], n_players)
    torch.testing.assert_close(got, shapley_by_subsets(values, n_players), rtol=0, atol=1e-10)
    if n_players <= BRUTE_FORCE_M:
        torch.testing.assert_close(got[:, 1], shapley_by_permutations(values[:, 1], n_players), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.sum(0), values[-1] - values[0], rtol=0, atol=1e-12)


def test_exact_in_chunks(monkeypatch):
    from xaifast.attribution import shapley_solvers

    values, bits = randn(256, 2, seed=1), pack_coalitions(subsets(8))
    whole = solve_exact(bits, values, 8)
    monkeypatch.setattr(shapley_solvers, "_EXACT_CHUNK", 100)
    torch.testing.assert_close(solve_exact(bits, values, 8), whole, rtol=0, atol=1e-13)


# Public test cases of Captum and shap, re-derived by brute force.
GLOVE = (3, lambda s: float(bool(s & {0, 1}) and 2 in s), [1 / 6, 1 / 6, 2 / 3])
UNANIMITY = (4, lambda s: 12.0 * ({0, 2} <= s), [6.0, 0.0, 6.0, 0.0])
PRODUCT = (3, lambda s: float(s == {0, 1, 2}) * 6.0, [2.0, 2.0, 2.0])


@pytest.mark.parametrize("n_players,worth,expected", [GLOVE, UNANIMITY, PRODUCT])
def test_public_games(n_players, worth, expected):
    present = subsets(n_players)
    values = torch.tensor([[worth({i for i in range(n_players) if row[i]})] for row in present], dtype=F64)
    expected = torch.tensor(expected, dtype=F64)[:, None]
    torch.testing.assert_close(solve_exact(pack_coalitions(present), values, n_players), expected, rtol=0, atol=1e-12)
    design = all_pairs(n_players)
    words = pack_coalitions(design.present)[:, 0]
    differences = (values[words] - values[(1 << n_players) - 1 - words]) / 2
    got, _ = Wls(design)(differences, values[-1] - values[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "n_players,size,weight",
    [
        (5, 1, 0.2),
        (5, 2, 0.0666666667),
        (10, 1, 0.1),
        (10, 2, 0.0125),
        (10, 5, 0.0014285714),
        (49, 1, 0.0204081633),
        (49, 2, 0.00043421624),
        (49, 24, 1.26571657764e-15),
    ],
)
def test_kernel_weight_of_the_public_cases(n_players, size, weight):
    assert (n_players - 1) / (math.comb(n_players, size) * size * (n_players - size)) == pytest.approx(weight, rel=1e-7)
    if n_players <= 10:
        design = all_pairs(n_players)
        sizes = design.present.sum(1)
        torch.testing.assert_close(
            design.weights[sizes == size], torch.full_like(design.weights[sizes == size], weight), rtol=1e-7, atol=0
        )


# --- least squares ---


@pytest.mark.parametrize("n_players", [2, 3, 4, 7, 10])
def test_wls_with_all_pairs_is_exact(n_players):
    table = randn(1 << n_players, 2, seed=n_players)
    design = all_pairs(n_players)
    words = pack_coalitions(design.present)[:, 0]
    differences = (table[words] - table[(1 << n_players) - 1 - words]) / 2
    got, _ = Wls(design)(differences, table[-1] - table[0])
    torch.testing.assert_close(got, shapley_by_subsets(table, n_players), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_players,n_pairs", [(5, 8), (9, 14), (20, 40), (65, 100)])
def test_wls_minimises_the_weighted_squares_under_the_constraint(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=3)
    differences, total = randn(n_pairs, 2, seed=1), randn(2, seed=2)
    values, errors = Wls(design)(differences, total)
    # Lagrange system in the players themselves.
    z = design.present.double() - 0.5
    gram = z.T @ (design.weights[:, None] * z)
    system = torch.zeros(n_players + 1, n_players + 1, dtype=F64)
    system[:-1, :-1], system[-1, :-1], system[:-1, -1] = gram, 1, 1
    right = torch.cat([z.T @ (design.weights[:, None] * differences), total[None]])
    torch.testing.assert_close(values, torch.linalg.solve(system, right)[:-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(values.sum(0), total, rtol=0, atol=1e-12)
    # Leave-one-pair-out residuals by refitting, carried by the map of the whole fit.
    left_out = torch.empty_like(differences)
    columns = torch.empty(n_players, n_pairs, dtype=F64)
    for p in range(n_pairs):
        keep = [q for q in range(n_pairs) if q != p]
        refit, _ = Wls(PairedDesign(design.present[keep], design.weights[keep]))(differences[keep], total)
        left_out[p] = differences[p] - z[p] @ refit
        unit = torch.zeros(n_pairs, 1, dtype=F64)
        unit[p] = 1
        columns[:, p] = Wls(design)(unit, torch.zeros(1, dtype=F64))[0][:, 0]
    expected = (columns.square() @ left_out.square()).sqrt()
    torch.testing.assert_close(errors, expected, rtol=1e-6, atol=1e-9)


FULL_RANK = [
    (2, 1),
    (3, 2),
    (4, 5),
    (7, 8),
    (10, 12),
    (17, 16),
    (30, 31),
    (49, 97),
    (65, 64),
    (65, 130),
    (150, 149),
    (12, 1000),
]


def full_rank_design(n_players, n_pairs):
    for seed in range(50):
        design = leverage_design(n_players, n_pairs, seed)
        z = design.present.double() - 0.5
        if torch.linalg.matrix_rank(z - z.mean(1, keepdim=True)) == n_players - 1:
            return design
    raise AssertionError("no design of full rank")


@pytest.mark.parametrize("n_players,n_pairs", FULL_RANK)
def test_wls_is_exact_for_games_of_order_one_and_two(n_players, n_pairs):
    solver = Wls(full_rank_design(n_players, n_pairs))
    assert solver.full_rank
    for make in (additive_game, pairwise_game):
        game, exact = make(n_players, 3, seed=5)
        got, _ = solver(*game_differences(game, solver._design))
        assert (got - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("n_players,n_pairs", [c for c in FULL_RANK if c[1] > c[0] - 1])
def test_adjusted_is_exact_for_additive_games(n_players, n_pairs):
    design = full_rank_design(n_players, n_pairs)
    game, exact = additive_game(n_players, 3, seed=5)
    got, errors = Adjusted(design)(*game_differences(game, design))
    assert (got - exact).norm() <= 1e-10 * exact.norm()
    assert not (errors > 1e-9).any()


@pytest.mark.parametrize("n_players,n_pairs", [(10, 1), (10, 4), (30, 28), (100, 60), (200, 199)])
def test_deficient_designs_get_the_solution_of_minimum_norm(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=1)
    differences, total = randn(n_pairs, 2, seed=1), randn(2, seed=2)
    solver = Wls(design)
    values, errors = solver(differences, total)
    z = design.present.double() - 0.5
    centred = z - z.mean(1, keepdim=True)
    root = design.weights.sqrt()[:, None]
    target = differences - z.mean(1, keepdim=True) * total
    least = torch.linalg.lstsq(root * centred, root * target, driver="gelsd").solution
    torch.testing.assert_close(values, least + total / n_players, rtol=1e-7, atol=1e-7 * float(least.abs().max()))
    assert solver.rank == torch.linalg.matrix_rank(centred)
    assert errors.isnan().all()


def test_repeated_pairs_do_not_count_for_rank():
    design = leverage_design(12, 6, seed=0)
    twice = PairedDesign(design.present.repeat(4, 1), design.weights.repeat(4))
    solver = Wls(twice)
    differences, total = randn(6, 1, seed=0), randn(1, seed=1)
    values, errors = solver(differences.repeat(4, 1), total)
    assert solver.rank == 6 and errors.isnan().all()
    torch.testing.assert_close(values, Wls(design)(differences, total)[0], rtol=0, atol=1e-9)
    # A perfect fit of a deficient design is no sign of an additive game.
    game, exact = additive_game(12, 1, seed=3)
    adjusted, _ = Adjusted(twice)(*game_differences(game, twice))
    least, _ = solver(*game_differences(game, twice))
    assert adjusted.isfinite().all() and (adjusted - least).norm() > 1e-3 * exact.norm()


# --- adjusted: the parts ---


def brute_fit(design, relevance, cubic, ratio):
    """Covariance [h + 1, h + 1] and its extension to all coalitions [2^M, h + 1], from the kernel's formula."""
    n_players = design.n_players
    rows = torch.cat([torch.ones(1, n_players, dtype=torch.bool), design.present])

    def odd_size_kernel(s, t):
        def gauss(a, b):
            return torch.exp(-((a[:, None] - b[None]) ** 2) / (2 * 0.5**2))

        a, b = 2 * s.double() / n_players - 1, 2 * t.double() / n_players - 1
        return (gauss(a, b) - gauss(a, -b)) / 2

    def kernel(a, b):
        u = (2 * a.double() - 1) @ torch.diag(relevance) @ (2 * b.double() - 1).T
        return u + cubic * u**3 + size_scale * odd_size_kernel(a.sum(1), b.sum(1))

    size_scale = 0.03 / odd_size_kernel(rows[1:].sum(1), rows[1:].sum(1)).diagonal().mean()
    noise = torch.cat([torch.zeros(1, dtype=F64), 1 / design.weights / (1 / design.weights).mean()]).clamp_min(1e-3)
    covariance = kernel(rows, rows) + torch.diag(ratio * cubic * noise + 1e-11)
    return covariance, kernel(subsets(n_players), rows)


@pytest.mark.parametrize("n_pairs", [11, 30])
def test_kernel_fit_against_enumeration(n_pairs):
    """Values are the Shapley values of the fitted function over all coalitions; residuals those of refits."""
    n_players = 7
    design = leverage_design(n_players, n_pairs, seed=2)
    fit = _adjusted.CubicFit(design.present, design.weights)
    y = randn(2, n_pairs + 1, seed=4)
    relevance = torch.rand(2, n_players, generator=generator(5), dtype=F64) + 0.1
    relevance /= relevance.sum(1, keepdim=True)
    cubic = torch.tensor([[0.3], [0.02]], dtype=F64)
    evidence, values, residuals = fit._solve(y, relevance, cubic, 0.1, True)
    other_evidence, _, _ = fit._solve(y, relevance, cubic, 0.01, False)
    for b in range(2):
        covariance, extension = brute_fit(design, relevance[b], float(cubic[b]), 0.1)
        alpha = torch.linalg.solve(covariance, y[b])
        expected = shapley_by_subsets(extension @ alpha, n_players)
        torch.testing.assert_close(values[b], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))

        def log_evidence(c, y):
            return 0.5 * len(y) * torch.log(y @ torch.linalg.solve(c, y)) + 0.5 * torch.linalg.slogdet(c)[1]

        other, _ = brute_fit(design, relevance[b], float(cubic[b]), 0.01)
        assert float(evidence[b] - other_evidence[b]) == pytest.approx(
            float(log_evidence(covariance, y[b]) - log_evidence(other, y[b])), rel=1e-6, abs=1e-8
        )
        for p in range(n_pairs + 1):
            keep = [q for q in range(n_pairs + 1) if q != p]
            predicted = covariance[p, keep] @ torch.linalg.solve(covariance[keep][:, keep], y[b, keep])
            assert float(residuals[b, p]) == pytest.approx(float(y[b, p] - predicted), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("n_players,n_pairs", [(9, 40), (30, 12), (6, 9)])
def test_ridge_against_the_dense_form(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=6)
    fit = _adjusted.CubicFit(design.present, design.weights)
    ridge, n_rows = fit._ridge, n_pairs + 1
    y = randn(1, n_rows, seed=7)
    values, level, gain = ridge(y)
    noise = torch.cat([torch.zeros(1, dtype=F64), 1 / design.weights / (1 / design.weights).mean()]).clamp_min(1e-6)
    root = noise.rsqrt()
    columns = torch.cat([fit._x[:n_rows] / math.sqrt(n_players), fit._sizes[:n_rows]], 1) * root[:, None]
    levels = 10 ** torch.arange(-10, 0.01, 0.25, dtype=F64)
    target = y[0] * root

    def cost(r):
        covariance = columns @ columns.T + r * torch.eye(n_rows, dtype=F64)
        fit = target @ torch.linalg.solve(covariance, target)
        return 0.5 * n_rows * torch.log(fit) + 0.5 * torch.logdet(covariance)

    floor = 0.02 if n_pairs < n_players - 1 else 1e-3 if n_pairs < 1.2 * n_players else 0.0
    best = max(float(levels[torch.stack([cost(r) for r in levels]).argmin()]), floor)
    assert float(level) == pytest.approx(best, rel=1e-9)
    linear_effect = 2 / math.sqrt(n_players) * torch.eye(n_players, dtype=F64)
    effect = torch.cat([linear_effect, fit._size_effect.expand(n_players, -1)], 1)
    gram = columns.T @ columns + best * torch.eye(columns.shape[1], dtype=F64)
    linear_map = effect @ torch.linalg.solve(gram, columns.T) * root
    torch.testing.assert_close(values[0], linear_map @ y[0], rtol=1e-7, atol=1e-8)
    left_out = randn(n_rows, seed=8)
    centred = linear_map - linear_map.mean(0)
    torch.testing.assert_close(
        ridge.errors(gain[0], left_out), (centred.square() @ left_out.square()).sqrt(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("n_pairs,floor", [(12, 0.02), (31, 1e-3), (60, 0.0)])
def test_an_exact_fit_of_few_pairs_is_not_taken_for_precision(n_pairs, floor):
    design = leverage_design(30, n_pairs, seed=0)
    ridge = _adjusted.CubicFit(design.present, design.weights)._ridge
    equal = torch.cat([torch.ones(1, 30), 2 * design.present - 1.0]).double().sum(1)
    _, level, _ = ridge(equal[None])
    assert float(level) == pytest.approx(floor, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n_players", [2, 3, 7, 49])
def test_size_features_are_the_odd_size_kernel(n_players):
    t = 2 * torch.arange(n_players + 1, dtype=F64) / n_players - 1
    gauss = torch.exp(-((t[:, None] - t) ** 2) / 0.5)
    odd = (gauss - gauss.flip(1)) / 2
    features = _adjusted.size_features(n_players)
    assert features.shape == (n_players + 1, min(5, (n_players + 1) // 2))
    assert (features @ features.T - odd).abs().max() < 1e-7


def test_probes_give_the_diagonal_of_the_inverse():
    """Above 256 pairs the errors use fixed probes: their norm stays near the exact one."""
    design = leverage_design(20, 300, seed=0)
    game, _ = triple_game(20, 200, seed=1)
    differences, total = game_differences(game, design)
    _, probed = Adjusted(design)(differences, total)
    exact = _adjusted._EXACT_DIAGONAL
    try:
        _adjusted._EXACT_DIAGONAL = 10_000
        _, direct = Adjusted(design)(differences, total)
    finally:
        _adjusted._EXACT_DIAGONAL = exact
    assert float(probed.norm() / direct.norm()) == pytest.approx(1, abs=0.1)
    signs = _adjusted.probe_signs(300)
    assert signs.abs().eq(1).all() and signs.mean(0).abs().max() < 0.2


# --- adjusted: the whole ---


def adjusted_in_the_open(design, differences, total):
    """One output by dense inverses, step by step: values and standard errors without their limits."""
    h, n_players = design.present.shape
    x = torch.cat([torch.ones(1, n_players, dtype=F64), 2 * design.present.double() - 1])
    y = torch.cat([total[None] / 2, differences])
    inverse_weights = 1 / design.weights
    noise = torch.cat([torch.zeros(1, dtype=F64), inverse_weights / inverse_weights.mean()])
    t = torch.arange(n_players + 1, dtype=F64) * 2 / n_players - 1
    gauss = torch.exp(-((t[:, None] - t) ** 2) / 0.5)
    eigenvalues, vectors = torch.linalg.eigh((gauss - gauss.flip(1)) / 2)
    table = (vectors * eigenvalues.clamp_min(0).sqrt())[:, -5:]
    sizes = table[((x + 1) / 2).sum(1).long()]
    scale = (0.03 / sizes[1:].square().sum(1).mean()).sqrt()
    sizes, size_effect = sizes * scale, (table[-1] - table[0]) * scale / n_players
    # Ridge.
    root = noise.clamp_min(1e-6).rsqrt()
    columns = torch.cat([x / math.sqrt(n_players), sizes], 1) * root[:, None]
    linear_effect = 2 / math.sqrt(n_players) * torch.eye(n_players, dtype=F64)
    effect = torch.cat([linear_effect, size_effect.expand(n_players, -1)], 1)
    best = (math.inf, None)
    for r in 10 ** torch.arange(-10, 0.01, 0.25, dtype=F64):
        covariance = columns @ columns.T / r + torch.eye(h + 1, dtype=F64)
        q = (y * root) @ torch.linalg.solve(covariance, y * root) / r
        cost = 0.5 * (h + 1) * q.log() + 0.5 * (torch.logdet(covariance) + (h + 1) * r.log())
        best = min(best, (float(cost), float(r)))
    r = max(best[1], 0.02 if h < n_players - 1 else 1e-3 if h < 1.2 * n_players else 0)
    gram = columns.T @ columns + r * torch.eye(columns.shape[1], dtype=F64)
    ridge = effect @ torch.linalg.solve(gram, columns.T) * root
    values = ridge @ y
    # Kernel.
    cubic, passes = 3 * r, 2 if h <= 256 else 1
    for step in range(passes):
        relevance = values.abs() / values.square().mean().sqrt() + 0.05
        relevance = relevance / relevance.sum()
        identified = step == passes - 1 and h >= math.comb(n_players, 3)
        best = (math.inf, None, None)
        for ratio in (0.1, 0.01, 0.0005) if identified else (0.1,):
            u = (x * relevance) @ x.T
            covariance = u + cubic * u**3 + sizes @ sizes.T + torch.diag(ratio * cubic * noise.clamp_min(1e-3) + 1e-11)
            inverse = torch.linalg.inv(covariance)
            alpha = inverse @ y
            evidence = float(0.5 * (h + 1) * (y @ alpha).log() + 0.5 * torch.logdet(covariance))
            shift = x @ relevance
            fitted = 2 * relevance * (x.T @ alpha + cubic * x.T @ ((shift**2 + 2 * (relevance**2).sum()) * alpha))
            fitted -= 4 * cubic * relevance**2 * (shift @ alpha)
            fitted += size_effect @ sizes.T @ alpha
            if evidence < best[0]:
                best = (evidence, fitted, alpha / inverse.diagonal())
        values = best[1]
    values = values + (total - values.sum()) / n_players
    centred = ridge - ridge.mean(0)
    return values, (centred[:, 1:].square() @ best[2][1:].square()).sqrt()


@pytest.mark.parametrize(
    "n_players,n_pairs,strength",
    [(30, 12, 0.0), (30, 31, 0.0), (25, 60, 0.1), (20, 240, 1.0), (8, 90, 1.0), (15, 300, 1.0)],
)
def test_adjusted_step_by_step(n_players, n_pairs, strength):
    design = leverage_design(n_players, n_pairs, seed=5)
    game, _ = triple_game(n_players, 40, seed=7, strength=strength)
    differences, total = game_differences(game, design)
    if n_pairs > n_players:
        differences = differences + 1e-3 * randn(n_pairs, 1, seed=9)
    values, errors = Adjusted(design)(differences, total)
    expected, expected_errors = adjusted_in_the_open(design, differences[:, 0], total[0])
    if (n_players, n_pairs) == (30, 31):
        # One spare pair shows this game to be additive: compare below the guard.
        fitted, _ = Adjusted(design)._fit(torch.cat([total / 2, differences[:, 0]])[None])
        values = fitted.T + (total - fitted.sum()) / n_players
    torch.testing.assert_close(values[:, 0], expected, rtol=1e-6, atol=1e-7)
    if n_pairs > 256:
        assert float(errors.norm() / expected_errors.norm()) == pytest.approx(1, abs=0.15)
    elif n_pairs >= 1.2 * n_players:
        torch.testing.assert_close(errors[:, 0], expected_errors, rtol=1e-6, atol=1e-8)


def test_adjusted_beats_wls_on_third_order():
    ratios = []
    for seed in range(6):
        design = leverage_design(30, 249, seed)
        game, exact = triple_game(30, 60, seed=100 * seed, strength=0.3)
        differences, total = game_differences(game, design)
        wls = (Wls(design)(differences, total)[0] - exact).norm()
        adjusted = (Adjusted(design)(differences, total)[0] - exact).norm()
        ratios.append(float(adjusted / wls))
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.8, ratios


def test_order_three_is_found_where_it_is_identified():
    """With more pairs than triples the noise may go far below the cubic part."""
    design = leverage_design(9, 200, seed=0)
    game, exact = triple_game(9, 30, seed=11)
    differences, total = game_differences(game, design)
    wls = (Wls(design)(differences, total)[0] - exact).norm()
    fit = Adjusted(design)
    full = (fit(differences, total)[0] - exact).norm()
    fit._fit._last_ratios = (0.1,)
    plain = (fit(differences, total)[0] - exact).norm()
    assert full < 0.5 * plain and full < 0.1 * wls


@pytest.mark.parametrize("n_pairs", [8, 21, 60, 300])
def test_scale_does_not_matter(n_pairs):
    design = leverage_design(20, n_pairs, seed=0)
    differences, total = game_differences(triple_game(20, 30, seed=1)[0], design)
    for solver in (Wls(design), Adjusted(design)):
        values, errors = solver(differences, total)
        for scale in (1e-30, 1e8, -3.0):
            scaled, scaled_errors = solver(differences * scale, total * scale)
            torch.testing.assert_close(scaled / scale, values, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(scaled_errors / abs(scale), errors, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("n_players,n_pairs", [(2, 1), (3, 2), (20, 5), (20, 22), (20, 60), (9, 200)])
def test_zero_games_and_null_outputs(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=0)
    game, _ = triple_game(n_players, 30, seed=1) if n_players > 2 else additive_game(2, 1, seed=1)
    differences, total = game_differences(game, design)
    mixed, mixed_total = torch.cat([differences * 0, differences], 1), torch.cat([total * 0, total])
    for solver in (Wls(design), Adjusted(design)):
        values, errors = solver(differences * 0, total * 0)
        assert torch.equal(values, torch.zeros(n_players, 1, dtype=F64))
        assert bool((errors.isnan() | (errors == 0)).all())
        both, _ = solver(mixed, mixed_total)
        assert torch.equal(both[:, :1], values)
        torch.testing.assert_close(both[:, 1:], solver(differences, total)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n_players,n_pairs", [(2, 1), (3, 3), (11, 3), (11, 11), (11, 40), (23, 300), (65, 150)])
def test_shapes_efficiency_and_limits_of_the_errors(n_players, n_pairs):
    design = leverage_design(n_players, n_pairs, seed=0)
    n_outputs = 5
    differences, total = randn(n_pairs, n_outputs, seed=0), randn(n_outputs, seed=1)
    for solver in (Wls(design), Adjusted(design)):
        values, errors = solver(differences, total)
        assert values.shape == errors.shape == (n_players, n_outputs)
        assert values.dtype == errors.dtype == F64
        torch.testing.assert_close(values.sum(0), total, rtol=1e-12, atol=1e-12)
        assert bool(errors.isnan().all()) == (n_pairs < 1.2 * n_players)


@pytest.mark.parametrize("n_players,n_pairs", [(13, 20), (20, 60), (30, 150), (21, 249), (49, 300), (64, 600)])
def test_results_do_not_depend_on_neighbours(n_players, n_pairs):
    """Bit for bit: earlier calls leave nothing behind, and `Adjusted` fits each output as if it were alone."""
    design = leverage_design(n_players, n_pairs, seed=0)
    n_outputs = 7
    game = torch.tanh(randn(n_players, n_outputs, seed=1))

    def values_of(present):
        return torch.tanh((2 * present.double() - 1) @ game) + 0.1

    differences, total = game_differences(values_of, design)
    adjusted, wls = Adjusted(design), Wls(design)
    together, together_errors = adjusted(differences, total)
    for k in reversed(range(n_outputs)):
        alone, alone_errors = adjusted(differences[:, k : k + 1], total[k : k + 1])
        assert torch.equal(alone[:, 0], together[:, k])
        assert torch.equal(alone_errors[:, 0].nan_to_num(-1), together_errors[:, k].nan_to_num(-1))
    least = wls(differences, total)[0]
    for k in range(n_outputs):
        alone = wls(differences[:, k : k + 1], total[k : k + 1])[0]
        torch.testing.assert_close(alone[:, 0], least[:, k], rtol=1e-12, atol=1e-13)
    # Other inputs before, after, and on a solver of their own.
    inputs = [(differences * s + 0.1 * randn(*differences.shape, seed=s), total * s) for s in range(1, 4)]
    for make in (Adjusted, Wls):
        one = make(design)
        forwards = [one(d, t) for d, t in inputs]
        backwards = [one(d, t) for d, t in reversed(inputs)][::-1]
        fresh = [make(design)(d, t) for d, t in inputs]
        for a, b, c in zip(forwards, backwards, fresh, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[0], c[0])
            assert torch.equal(a[1].nan_to_num(-1), b[1].nan_to_num(-1))


@pytest.mark.parametrize("solver", [Wls, Adjusted])
def test_coverage_of_the_standard_errors(solver):
    n_players, n_pairs, hits, seeds = 12, 60, [], 12
    for seed in range(seeds):
        design = leverage_design(n_players, n_pairs, seed)
        worth = randn(n_players, 1, seed=1000 + seed)
        noise = randn(n_pairs, 1, seed=2000 + seed) * 0.3 / design.weights.sqrt()[:, None]
        differences = (design.present.double() - 0.5) @ worth + noise
        values, errors = solver(design)(differences, worth.sum(0))
        hits.append(((values - worth).abs() <= 1.96 * errors).double().mean())
    assert 0.85 <= float(torch.stack(hits).mean()) <= 1.0


def test_rounded_outputs_count_as_additive_only_below_their_spacing():
    design = leverage_design(20, 100, seed=0)
    game, exact = additive_game(20, 1, seed=3)
    differences, total = game_differences(game, design)
    noisy = differences * (1 + 1e-4 * randn(100, 1, seed=1))
    least = Wls(design)(noisy, total)[0]
    assert torch.equal(Adjusted(design, output_eps=2**-7)(noisy, total)[0], least)
    assert not torch.equal(Adjusted(design, output_eps=2**-23)(noisy, total)[0], least)


def test_a_broken_output_stays_alone():
    design = leverage_design(10, 30, seed=0)
    differences, total = game_differences(triple_game(10, 20, seed=1)[0], design)
    broken = torch.cat([differences, differences], 1)
    broken[3, 0] = math.nan
    values, _ = Adjusted(design)(broken, total.expand(2))
    assert values[:, 0].isnan().all()
    assert torch.equal(values[:, 1], Adjusted(design)(differences, total)[0][:, 0])


def test_many_players_few_pairs():
    design = leverage_design(2000, 40, seed=0)
    differences, total = randn(40, 2, seed=0), randn(2, seed=1)
    for solver in (Wls(design), Adjusted(design)):
        values, errors = solver(differences, total)
        assert values.isfinite().all() and errors.isnan().all()
        torch.testing.assert_close(values.sum(0), total, rtol=1e-12, atol=1e-12)


def test_no_global_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    design = leverage_design(20, 300, seed=0)
    Adjusted(design)(randn(300, 1, seed=0), randn(1, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_real_models_gain_from_the_adjustment():
    """Small networks on breast cancer data against long runs: adjusted / wls below 0.8 in the geometric mean."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = datasets.load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=F64)
    labels = torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(30, 32), torch.nn.GELU(), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 2)
        ).double()
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-3)
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            optimiser.step()
    model.requires_grad_(False)
    ratios = []
    long_run = PairedDesign.from_bits(*sample_coalitions(30, 40_000, seed=999), 30)
    long_solver = Wls(long_run)
    short = [leverage_design(30, n // 2 - 1, seed) for n in (120, 500) for seed in range(2)]
    solvers = [(d, Wls(d), Adjusted(d)) for d in short]
    for row in (20, 60, 150, 400):

        def game(present, row=row):
            return model(torch.where(present, x[row], 0.0))[:, :1]

        reference, reference_errors = long_solver(*game_differences(game, long_run))
        assert reference_errors.norm() < 0.03 * reference.norm()
        for design, wls, adjusted in solvers:
            d, total = game_differences(game, design)
            ratios.append(float((adjusted(d, total)[0] - reference).norm() / (wls(d, total)[0] - reference).norm()))
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.8, ratios


# --- permutations ---


def chain_design(n_players, n_chains, seed):
    orders = [torch.randperm(n_players, generator=generator(seed + c)) for c in range(n_chains)]
    rows = torch.zeros(n_chains, n_players - 1, n_players, dtype=torch.bool)
    for c, order in enumerate(orders):
        for j in range(n_players - 1):
            rows[c, j, order[: j + 1]] = True
    return orders, rows.flatten(0, 1)


@pytest.mark.parametrize("n_players,n_chains", [(2, 1), (2, 3), (6, 1), (6, 4), (7, 5)])
def test_permutations_against_a_loop(n_players, n_chains):
    table = randn(1 << n_players, 2, seed=n_players)
    orders, present = chain_design(n_players, n_chains, seed=0)
    words = pack_coalitions(present)[:, 0]
    first, second = table[words], table[(1 << n_players) - 1 - words]
    values, errors = solve_permutation(present, first, second, table[-1], table[0])
    chains = torch.zeros(n_chains, n_players, 2, dtype=F64)
    for c, order in enumerate(orders):
        for direction in (order.tolist(), order.tolist()[::-1]):
            word = 0
            for player in direction:
                chains[c, player] += (table[word | 1 << player] - table[word]) / 2
                word |= 1 << player
    torch.testing.assert_close(values, chains.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(values.sum(0), table[-1] - table[0], rtol=0, atol=1e-12)
    if n_chains == 1:
        assert errors.isnan().all()
    else:
        torch.testing.assert_close(errors, chains.std(0) / math.sqrt(n_chains), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("n_players,n_samples", [(2, 4), (6, 7), (6, 12), (9, 82), (70, 300)])
def test_sampled_designs_fit_the_solvers(n_players, n_samples):
    """Additive games are exact from sampled chains, and from sampled pairs of full rank."""
    game, exact = additive_game(n_players, 2, seed=0)
    bits, weights = sample_coalitions(n_players, n_samples, "chain", seed=3)
    chains = PairedDesign.from_bits(bits, weights, n_players)
    everybody = torch.ones(1, n_players, dtype=torch.bool)
    full, empty = game(everybody)[0], game(~everybody)[0]
    values, _ = solve_permutation(chains.present, game(chains.present), game(~chains.present), full, empty)
    torch.testing.assert_close(values.sum(0), full - empty, rtol=1e-12, atol=1e-12)
    if chains.n_pairs >= n_players - 1:
        torch.testing.assert_close(values, exact, rtol=0, atol=1e-11)
    pairs = PairedDesign.from_bits(*sample_coalitions(n_players, n_samples, seed=3), n_players)
    solver = Wls(pairs)
    if solver.full_rank:
        torch.testing.assert_close(solver(*game_differences(game, pairs))[0], exact, rtol=0, atol=1e-10)


def test_a_shortened_chain_shares_its_steps():
    n_players, sizes = 9, [2, 5, 6]
    order = torch.randperm(n_players, generator=generator(1)).tolist()
    present = torch.zeros(3, n_players, dtype=torch.bool)
    for j, s in enumerate(sizes):
        present[j, order[:s]] = True
    table = randn(1 << n_players, 1, seed=2)
    words = pack_coalitions(present)[:, 0]
    full = (1 << n_players) - 1
    values, errors = solve_permutation(present, table[words], table[full - words], table[full], table[0])
    expected = torch.zeros(n_players, 1, dtype=F64)
    bounds, reach = [0, *sizes, n_players], [0, *words.tolist(), full]
    for low, high, before, after in zip(bounds, bounds[1:], reach, reach[1:], strict=False):
        rise = ((table[after] - table[before]) + (table[full - before] - table[full - after])) / 2
        for player in order[low:high]:
            expected[player] = rise / (high - low)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert errors.isnan().all()


# --- design, choice, errors ---


@pytest.mark.parametrize("n_players", [1, 3, 64, 65, 130])
def test_design_from_bits(n_players):
    n_pairs = 0 if n_players == 1 else 3
    present = torch.rand(n_pairs, n_players, generator=generator(0)) < 0.5
    if n_pairs:
        present[:, 0], present[:, -1] = True, False
    ends = torch.stack([torch.ones(n_players), torch.zeros(n_players)]).bool()
    rows = torch.cat([ends, torch.stack([present, ~present], 1).flatten(0, 1)])
    weights = torch.tensor([math.inf, math.inf] + [w for w in (0.5, 1.0, 1.5)[:n_pairs] for _ in range(2)], dtype=F64)
    design = PairedDesign.from_bits(pack_coalitions(rows), weights, n_players)
    assert torch.equal(design.present, present) and design.weights.tolist() == [0.5, 1.0, 1.5][:n_pairs]
    assert (design.n_pairs, design.n_players) == (n_pairs, n_players)
    if n_pairs == 0:
        for solver in (Wls(design), Adjusted(design)):
            values, _ = solver(torch.zeros(0, 2, dtype=F64), torch.tensor([3.0, -1.0], dtype=F64))
            assert values.tolist() == [[3.0, -1.0]]


@pytest.mark.parametrize(
    "n_players,n_samples,n_outputs,expected",
    [
        (3, 8, 1, "exact"),
        (3, 7, 1, "adjusted"),
        (10, 1024, 1000, "exact"),
        (49, 4096, 1, "adjusted"),
        (49, 1900, 10, "adjusted"),
        (49, 2100, 10, "wls"),
        (196, 4096, 1, "adjusted"),
        (196, 4100, 1, "wls"),
        (30, 512, 1000, "wls"),
        (4096, 512, 1, "wls"),
        (1, 2, 1, "exact"),
    ],
)
def test_choice_of_the_estimator(n_players, n_samples, n_outputs, expected):
    assert choose_estimator(n_players, n_samples, n_outputs) == expected


def zeros(*shape):
    return torch.zeros(*shape, dtype=F64)


def good_bits():
    rows = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]]).bool()
    return pack_coalitions(rows), torch.tensor([math.inf, math.inf, 1, 1], dtype=F64)


def from_bits(bits, weights, n_players=3):
    return PairedDesign.from_bits(bits, weights, n_players)


def solve(solver, differences, total):
    return solver(from_bits(*good_bits()))(differences, total)


def permute(present, first, second, full, empty):
    return solve_permutation(torch.tensor(present).bool(), first, second, full, empty)


CHAIN = [[1, 0, 0], [1, 1, 0]]
BITS, WEIGHTS = good_bits()
EVERY = pack_coalitions(subsets(3))


@pytest.mark.parametrize(
    "function,arguments,error,words",
    [
        (PairedDesign, (torch.ones(2, 3), torch.ones(2, dtype=F64)), ValueError, "bool"),
        (PairedDesign, (torch.eye(3).bool(), torch.ones(2, dtype=F64)), ValueError, "one for each pair"),
        (PairedDesign, (torch.eye(3).bool(), torch.ones(3)), ValueError, "float64"),
        (PairedDesign, (torch.eye(3).bool(), zeros(3)), ValueError, "positive"),
        (PairedDesign, (torch.ones(1, 3).bool(), torch.ones(1, dtype=F64)), ValueError, "nobody nor everybody"),
        (from_bits, (BITS[:3], WEIGHTS[:3]), ValueError, "N even"),
        (from_bits, (BITS, WEIGHTS, 65), ValueError, r"\[N, 2\]"),
        (from_bits, (BITS, WEIGHTS[:2]), ValueError, "weights"),
        (from_bits, (BITS.flip(0), WEIGHTS), ValueError, "another order"),
        (solve, (Wls, torch.zeros(1, 2), torch.zeros(2)), TypeError, "float64"),
        (solve, (Wls, zeros(2, 2), zeros(2)), ValueError, r"\[1, K\]"),
        (solve, (Adjusted, zeros(1, 2), zeros(1)), ValueError, "total"),
        (solve, (Adjusted, zeros(1, 0), zeros(0)), ValueError, "K"),
        (solve_exact, (EVERY[:7], zeros(7, 1), 3), ValueError, "every coalition"),
        (solve_exact, (EVERY * 0, zeros(8, 1), 3), ValueError, "repeated"),
        (solve_exact, (EVERY + 8, zeros(8, 1), 3), ValueError, "foreign"),
        (solve_exact, (EVERY, torch.zeros(8, 1), 3), ValueError, "float64"),
        (permute, ([*CHAIN, CHAIN[0]], zeros(3, 1), zeros(3, 1), zeros(1), zeros(1)), ValueError, "whole chains"),
        (permute, (CHAIN[::-1], zeros(2, 1), zeros(2, 1), zeros(1), zeros(1)), ValueError, "hold the one before"),
        (permute, (CHAIN, zeros(3, 1), zeros(3, 1), zeros(1), zeros(1)), ValueError, r"\[2, K\]"),
        (permute, (CHAIN, *[torch.zeros(2, 1)] * 2, *[torch.zeros(1)] * 2), TypeError, "float64"),
    ],
)
def test_wrong_input(function, arguments, error, words):
    with pytest.raises(error, match=words):
        function(*arguments)
