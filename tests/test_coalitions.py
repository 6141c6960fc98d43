import itertools
import math
from collections import Counter

import pytest
import torch
from scipy import stats

from xaifast import _native
from xaifast.ops.coalitions import (
    DESIGNS,
    design_size,
    pack_coalitions,
    sample_coalitions,
    unpack_coalitions,
)
from xaifast.reference import coalitions as reference

UNLIKELY = 1e-7  # p-value below which a statistical test fails

needs_native = pytest.mark.skipif(_native.cpu() is None, reason=f"no native module: {_native.why_missing()}")


def draw(n_players, n_samples, design="leverage", **options):
    bits, weights = sample_coalitions(n_players, n_samples, design, **options)
    return unpack_coalitions(bits, n_players), weights


def subsets(present):
    """The sets T_p of a design, as tuples of players."""
    return [tuple(row.nonzero().flatten().tolist()) for row in present[2::2]]


def expected_pairs(n_players, n_pairs, design):
    """Pairs per size by bisection on the water level."""
    capacity, law = {}, {}
    for k in range(1, n_players // 2 + 1):
        share = 0.5 if 2 * k == n_players else 1.0
        capacity[k] = math.comb(n_players, k) * share
        law[k] = share / (k * (n_players - k)) if design == "kernel" else share
    low, high = 0.0, 4.0 * max(capacity[k] / law[k] for k in capacity)
    for _ in range(400):
        level = (low + high) / 2
        if sum(min(capacity[k], level * law[k]) for k in capacity) < n_pairs:
            low = level
        else:
            high = level
    return {k: min(capacity[k], high * law[k]) for k in capacity}


@needs_native
@pytest.mark.parametrize("n_players", [1, 2, 3, 5, 8, 33, 64, 65, 128, 200])
@pytest.mark.parametrize("design", DESIGNS)
def test_native_equals_the_reference_bit_for_bit(n_players, design):
    full = 2 ** min(n_players, 8)
    for n_samples in {2, 4, 5, 30, full - 2, full - 1, full, full + 1, 301}:
        if n_samples < (2 if n_players == 1 else 4):
            continue
        for seed, block in [(0, 0), (2**40 + 7, 2**35 + 3)]:
            n_rows = design_size(n_players, n_samples, design)
            bits, weights = reference.sample_coalitions(n_players, n_rows, design, seed, block)
            native_bits, native_weights = sample_coalitions(n_players, n_samples, design, seed=seed, block=block)
            assert torch.equal(native_bits, bits)
            assert torch.equal(native_weights, weights)


@needs_native
@pytest.mark.parametrize("design", DESIGNS)
def test_streams_longer_than_what_is_made_ahead(design):
    # 600 words a coalition, 1199 a chain, and one stream of 700 ranks.
    for n_players, n_samples in ((1200, 20), (20, 4000)):
        n_rows = design_size(n_players, n_samples, design)
        expected = reference.sample_coalitions(n_players, n_rows, design, 3, 1)
        for got, wanted in zip(sample_coalitions(n_players, n_samples, design, seed=3, block=1), expected, strict=True):
            assert torch.equal(got, wanted)


DIGEST = """
import hashlib, test_coalitions as t
digest = hashlib.sha256()
for n_players, n_samples in ((5, 20), (33, 700), (64, 300), (196, 1000), (1000, 300)):
    for design in t.DESIGNS:
        bits, weights = t.sample_coalitions(n_players, n_samples, design, seed=3, block=5)
        present = t.unpack_coalitions(bits, n_players)
        for values in (bits, weights, present, t.pack_coalitions(present.T)):
            digest.update(values.numpy().tobytes())
digest.update(str(t.native_words((2**32 - 5, 1, 2, 3), (4, 5), 24)).encode())
print(digest.hexdigest())
"""


def test_every_instruction_set_draws_the_same(run_on_every_isa):
    assert len(run_on_every_isa(DIGEST)) == 1


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("n_players", "n_samples"), [(2, 4), (5, 17), (9, 300), (10, 64), (64, 200), (65, 301), (200, 999)]
)
def test_rows_are_paired_and_distinct(n_players, n_samples, design):
    present, weights = draw(n_players, n_samples, design, seed=3)
    assert len(present) == design_size(n_players, n_samples, design) <= n_samples
    assert present[0].all()
    assert not present[1].any()
    assert torch.equal(present[2::2], ~present[3::2])
    assert torch.equal(weights[2::2], weights[3::2])
    assert torch.isinf(weights[:2]).all()
    assert weights[2:].mean().item() == pytest.approx(1.0, abs=1e-12)
    if design != "chain":
        assert len({tuple(row.tolist()) for row in present}) == len(present)
        sizes = present[2::2].sum(1)
        assert torch.equal(sizes, sizes.sort().values)
        assert sizes.max() <= n_players / 2


@pytest.mark.parametrize("design", ["leverage", "kernel"])
@pytest.mark.parametrize(("n_players", "n_samples"), [(4, 12), (5, 16), (8, 100), (9, 60), (12, 40), (15, 2000)])
def test_sizes_and_weights_follow_the_formula(n_players, n_samples, design):
    n_pairs = (n_samples - 2) // 2
    expected = expected_pairs(n_players, n_pairs, design)
    present, weights = draw(n_players, n_samples, design, seed=11)
    sizes = present[2::2].sum(1).tolist()
    drawn = Counter(sizes)
    for k, pairs in expected.items():
        assert abs(drawn[k] - pairs) < 1 + 1e-5
    raw = {k: (0.5 if 2 * k == n_players else 1.0) / (k * (n_players - k) * pairs) for k, pairs in expected.items()}
    mean = sum(raw[k] for k in sizes) / n_pairs
    torch.testing.assert_close(
        weights[2::2], torch.tensor([raw[k] / mean for k in sizes], dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("n_players", [1, 2, 3, 6, 7])
def test_a_large_budget_enumerates(n_players, design):
    present, weights = draw(n_players, 2**n_players + 5, design, seed=5)
    everything = set(itertools.product([False, True], repeat=n_players))
    assert len(present) == 2**n_players
    assert {tuple(row.tolist()) for row in present} == everything
    mass = [1 / (math.comb(n_players, int(s)) * int(s) * (n_players - int(s))) for s in present[2:].sum(1)]
    torch.testing.assert_close(weights[2:] * sum(mass), torch.tensor(mass, dtype=torch.float64) * len(mass))


def test_classes_that_are_exhausted_are_in_lexicographic_order():
    present, _ = draw(7, 2**7)
    by_size = {k: [t for t in subsets(present) if len(t) == k] for k in (1, 2, 3)}
    for k, found in by_size.items():
        assert found == list(itertools.combinations(range(7), k))


def test_unranking_is_lexicographic():
    for n, k in [(1, 1), (6, 1), (6, 3), (7, 6), (9, 4)]:
        expected = list(itertools.combinations(range(n), k))
        assert [tuple(reference.unrank(rank, n, k)) for rank in range(math.comb(n, k))] == expected


def test_rounding_is_unbiased_and_the_same_in_every_block():
    n_players, n_pairs, n_seeds = 12, 20, 600
    expected = expected_pairs(n_players, n_pairs, "leverage")
    drawn = Counter()
    for seed in range(n_seeds):
        present, weights = draw(n_players, 2 * n_pairs + 2, seed=seed)
        sizes = present[2::2].sum(1)
        drawn.update(sizes.tolist())
        other, other_weights = draw(n_players, 2 * n_pairs + 2, seed=seed, block=seed + 1)
        assert torch.equal(other[2::2].sum(1), sizes)
        assert torch.equal(other_weights, weights)
        assert not torch.equal(other, present)
    for k, pairs in expected.items():
        assert drawn[k] / n_seeds == pytest.approx(pairs, abs=6 * 0.5 / math.sqrt(n_seeds))


@pytest.mark.parametrize(("n_players", "n_samples"), [(24, 202), (49, 500), (65, 130)])
def test_grouped_sizes_are_few_and_expected_as_often(n_players, n_samples):
    n_pairs, n_seeds = (n_samples - 2) // 2, 400
    expected = expected_pairs(n_players, n_pairs, "leverage")
    limit = {k: math.comb(n_players, k) >> (2 * k == n_players) for k in expected}
    open_sizes = [k for k in expected if expected[k] < limit[k] - 1e-3]
    groups = [open_sizes[i : i + 4] for i in range(0, len(open_sizes), 4)]
    drawn = Counter()
    for seed in range(n_seeds):
        bits, weights = sample_coalitions(n_players, n_samples, "grouped", seed=seed)
        sizes = Counter(unpack_coalitions(bits, n_players)[2::2].sum(1).tolist())
        drawn.update(sizes)
        for group in groups:
            room = all(limit[k] > sum(expected[j] for j in group) + 1 for k in group)
            assert not room or sum(k in sizes for k in group) == 1
    # A size has all pairs of its group or none: at most four times its expectation.
    for k, pairs in expected.items():
        assert drawn[k] / n_seeds == pytest.approx(pairs, abs=6 * 2 * max(pairs, 1) / math.sqrt(n_seeds))
    raw = {k: (0.5 if 2 * k == n_players else 1.0) / (k * (n_players - k) * expected[k]) for k in sizes}
    found = dict(zip(unpack_coalitions(bits, n_players)[2::2].sum(1).tolist(), weights[2::2].tolist(), strict=True))
    ratios = [found[k] / raw[k] for k in sizes]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_a_group_goes_to_its_sizes_in_proportion_to_what_they_expect():
    pairs = {3: 2, 4: 2, 5: 2, 6: 1}
    expected = {k: float(n) for k, n in pairs.items()}
    found = Counter()
    for i in range(700):
        drawn = dict(pairs)
        reference.gather_group(list(pairs), dict.fromkeys(pairs, 8), expected, drawn, (i + 0.5) / 700)
        found.update(k for k in pairs if drawn[k] == 7)
    assert found == {3: 200, 4: 200, 5: 200, 6: 100}
    drawn = dict(pairs)
    reference.gather_group(list(pairs), {3: 7, 4: 8, 5: 8, 6: 8}, expected, drawn, 0.5)
    assert drawn == pairs


def test_subsets_drawn_by_rank_are_uniform():
    # Size 2 of 6 players: 15 subsets; the middle class (size 3, player 0 in it): 10.
    counts = Counter(t for block in range(3000) for t in subsets(draw(6, 14, seed=1, block=block)[0]))
    for k, n_subsets in [(1, 6), (2, 15), (3, 10)]:
        found = [count for t, count in counts.items() if len(t) == k]
        assert len(found) == n_subsets
        assert all(len(t) != 3 or t[0] == 0 for t in counts)
        # Draws without repetition within a design vary less than independent ones: the test is conservative.
        assert stats.chisquare(found).pvalue > UNLIKELY
        assert max(found) > min(found)


def test_subsets_drawn_player_by_player_are_uniform():
    # Sizes of 40 players above 2^31 subsets: every player and every pair of players is equally likely.
    present = torch.cat([draw(40, 402, seed=2, block=block)[0][2::2] for block in range(20)])
    present = present[present.sum(1) == 19]
    assert len(present) > 150
    share = present.double().mean(0)
    assert (share - 19 / 40).abs().max() < 6 * math.sqrt(0.25 / len(present))
    middle = torch.cat([draw(40, 402, seed=2, block=block)[0][2::2] for block in range(60)])
    middle = middle[middle.sum(1) == 20]
    assert middle[:, 0].all()
    assert (middle[:, 1:].double().mean(0) - 19 / 39).abs().max() < 6 * math.sqrt(0.25 / len(middle))


@needs_native
def test_repeated_subsets_are_drawn_again():
    # About nine repetitions are expected among the classes of 35 players above 2^31 subsets.
    bits, _ = sample_coalitions(35, 2**22, seed=4)
    assert len(torch.unique(bits)) == len(bits) == 2**22


@pytest.mark.parametrize(("n_players", "n_samples"), [(5, 26), (20, 100), (65, 300)])
def test_chains_are_nested_and_whole(n_players, n_samples):
    steps = n_players - 1
    n_chains = ((n_samples - 2) // 2) // steps
    present, weights = draw(n_players, n_samples, "chain", seed=6)
    assert len(present) == 2 + 2 * steps * n_chains
    assert (weights[2:] == 1).all()
    chains = present[2::2].reshape(n_chains, steps, n_players)
    assert torch.equal(chains.sum(2), torch.arange(1, n_players).expand(n_chains, steps))
    assert (chains[:, 1:] | ~chains[:, :-1]).all()
    if n_chains > 1:
        assert not torch.equal(chains[0], chains[1])


@pytest.mark.parametrize("n_pairs", [1, 2, 7, 18])
def test_a_short_chain_spreads_its_sizes(n_pairs):
    present, _ = draw(20, 2 + 2 * n_pairs, "chain", seed=6)
    sizes = present[2::2].sum(1).tolist()
    assert sizes == [1 + math.floor((2 * j + 1) * 19 / (2 * n_pairs)) for j in range(n_pairs)]
    assert sizes == sorted(set(sizes))
    assert max(sizes) <= 19


def test_chains_begin_with_any_player():
    first = Counter(t[0] for seed in range(400) for t in subsets(draw(6, 62, "chain", seed=seed)[0]) if len(t) == 1)
    assert len(first) == 6
    assert stats.chisquare(list(first.values())).pvalue > UNLIKELY


def test_design_size():
    assert [design_size(1, n) for n in (2, 3, 100)] == [2, 2, 2]
    assert [design_size(4, n) for n in (4, 5, 15, 16, 17)] == [4, 4, 14, 16, 16]
    assert design_size(100, 1001, "kernel") == 1000
    assert [design_size(11, n, "chain") for n in (4, 21, 22, 41, 42, 43)] == [4, 20, 22, 22, 42, 42]
    assert design_size(4096, 512) == 512


def test_no_global_random_state_is_used():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_coalitions(30, 100, seed=9)
    torch.manual_seed(2)
    second = sample_coalitions(30, 100, seed=9)
    assert torch.equal(first[0], second[0])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_players": 0}, ValueError, "n_players must be between 1 and 4096, got 0"),
        ({"n_players": -3}, ValueError, "got -3"),
        ({"n_players": 4097}, ValueError, "grid_mask"),
        ({"n_players": 2.5}, TypeError, "n_players must be an integer"),
        ({"n_samples": 3}, ValueError, "at least 4 for 10 players"),
        ({"n_players": 1, "n_samples": 1}, ValueError, "at least 2 for 1 players"),
        ({"n_samples": "many"}, TypeError, "n_samples must be an integer"),
        ({"design": "sobol"}, ValueError, "leverage, kernel, chain, grouped, got 'sobol'"),
        ({"seed": -1}, ValueError, "seed must be between 0"),
        ({"block": 2**63}, ValueError, "block must be between 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match="xaifast.sample_coalitions: ") as raised:
        sample_coalitions(**{"n_players": 10, "n_samples": 20, **options})
    assert text in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("n_players", [0, 1, 2, 8, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (70,)])
def test_packing(n_players, shape, backend, monkeypatch):
    monkeypatch.setenv("XAIFAST_BACKEND", backend)
    present = torch.rand(*shape, n_players, generator=torch.Generator().manual_seed(n_players)) < 0.5
    bits = pack_coalitions(present)
    assert bits.dtype == torch.int64
    assert bits.shape == (*shape, -(-n_players // 64))
    rows = (t.reshape(math.prod(shape), t.shape[-1]).tolist() for t in (present, bits))
    for row, words in zip(*rows, strict=True):
        number = sum(1 << player for player, there in enumerate(row) if there)
        assert sum((word % 2**64) << (64 * w) for w, word in enumerate(words)) == number
    assert torch.equal(unpack_coalitions(bits, n_players), present)
    if n_players % 64:
        bits[..., -1] |= -1 << n_players % 64  # beyond the last player
        assert torch.equal(unpack_coalitions(bits, n_players), present)


def test_packing_of_views():
    present = torch.rand(6, 5, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    for view in (
        present[::2],
        present.transpose(0, 1),
        present[..., 1::2],
        present[..., 3:80],
        present[:1].expand(4, 5, 150),
    ):
        bits = pack_coalitions(view)
        assert torch.equal(bits, pack_coalitions(view.clone()))
        assert torch.equal(unpack_coalitions(bits, view.shape[-1]), view)
        wide = torch.stack((bits, ~bits), -1)[..., 0]
        assert torch.equal(unpack_coalitions(wide, view.shape[-1]), view)


def test_packing_under_transforms_and_compilation():
    present = torch.rand(3, 4, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_coalitions(present)
    assert torch.equal(torch.vmap(pack_coalitions)(present), bits)
    assert torch.equal(torch.vmap(lambda b: unpack_coalitions(b, 70))(bits), present)
    compiled = torch.compile(lambda p: unpack_coalitions(pack_coalitions(p), 70), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(present), present)
    assert pack_coalitions(present.to("meta")).shape == bits.shape


def test_packing_refuses_nonsense():
    with pytest.raises(TypeError, match="bool tensor, got torch.float32"):
        pack_coalitions(torch.ones(3))
    with pytest.raises(ValueError, match="scalar"):
        pack_coalitions(torch.tensor(True))
    with pytest.raises(TypeError, match="int64 tensor, got torch.int32"):
        unpack_coalitions(torch.zeros(1, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"\[..., 2\] for 65 players, got \[4, 1\]"):
        unpack_coalitions(torch.zeros(4, 1, dtype=torch.int64), 65)


@pytest.mark.parametrize("design", DESIGNS)
def test_operator_registration(design):
    op = torch.ops.xaifast.sample_coalitions.default
    torch.library.opcheck(op, (10, 40, design, 1, 0), {"device": torch.device("cpu")})
    torch.library.opcheck(op, (3, 40, design, 1, 0))


def test_compiles_without_graph_breaks():
    def make(offset):
        bits, weights = sample_coalitions(10, 41, "leverage", seed=7)
        return unpack_coalitions(bits, 10) & ~offset, weights

    offset = torch.zeros(10, dtype=torch.bool)
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")(offset)
    for got, expected in zip(compiled, make(offset), strict=True):
        assert torch.equal(got, expected)


def test_the_reference_serves_when_asked_for(monkeypatch):
    expected = sample_coalitions(20, 100)
    monkeypatch.setenv("XAIFAST_BACKEND", "reference")
    for got, wanted in zip(sample_coalitions(20, 100), expected, strict=True):
        assert torch.equal(got, wanted)
    monkeypatch.setenv("XAIFAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="auto, native, triton, reference, got 'gpu'"):
        sample_coalitions(20, 100)


# The vectors of Random123's kat_vectors file.
PHILOX = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def native_words(counter, key, n_calls):
    words = torch.full((2 * n_calls + 8,), -1, dtype=torch.int64)
    _native.cpu().philox_words(words.data_ptr(), n_calls, counter, key)
    assert (words[2 * n_calls :] == -1).all(), "wrote beyond the end"
    return [word % 2**64 for word in words[: 2 * n_calls].tolist()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter, key, expected):
    assert reference.philox4x32(counter, key) == expected
    if _native.cpu() is not None:
        w0, w1, w2, w3 = expected
        assert native_words(counter, key, 8)[:2] == [w0 | w1 << 32, w2 | w3 << 32]


@needs_native
@pytest.mark.parametrize("n_calls", [0, 8, 16, 72])
@pytest.mark.parametrize("first", [0, 5, 2**32 - 3])
def test_native_philox_counts_up(first, n_calls):
    tail, key = (7, 2**32 - 1, 3 << 24), (2**31, 0xDEADBEEF)
    expected = []
    for call in range(n_calls):
        w0, w1, w2, w3 = reference.philox4x32(((first + call) % 2**32, *tail), key)
        expected += [w0 | w1 << 32, w2 | w3 << 32]
    assert native_words((first, *tail), key, n_calls) == expected


@needs_native
def test_native_philox_refuses_nonsense():
    words = torch.zeros(16, dtype=torch.int64)
    for address, n_calls in [(words.data_ptr(), 4), (words.data_ptr(), -8), (0, 8)]:
        with pytest.raises(ValueError, match="philox_words: "):
            _native.cpu().philox_words(address, n_calls, (0, 0, 0, 0), (0, 0))
