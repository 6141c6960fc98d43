"""Sensitivity-n: exact on linear models, against SciPy and a plain loop on others."""

from __future__ import annotations

import pytest
import torch
from games import IntegerNet, integers
from scipy.stats import pearsonr
from torch import Tensor, nn

import xaifast
from xaifast import metrics
from xaifast.metrics import sensitivity_n


class Recorder(nn.Module):
    """A model that is not linear, and keeps the inputs it saw."""

    def __init__(self, n_elements: int, n_outputs: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(n_elements, n_outputs, generator=generator, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.tanh(x.double().flatten(1) @ self.weight)


def test_attributions_that_add_up_correlate_perfectly():
    model, x = nn.Linear(30, 4).double(), torch.rand(5, 30, dtype=torch.float64)
    baseline = torch.rand(30, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 0])
    attributions = (x - baseline) * model.weight[target].detach()
    for design in ("shared", "per_input"):
        result = sensitivity_n(
            model, x, attributions, target=target, baselines=baseline, n_subsets=15, design=design, batch_size=7
        )
        torch.testing.assert_close(result.values, torch.ones_like(result.values), rtol=0, atol=1e-10)
        opposite = sensitivity_n(model, x, -3 * attributions, target=target, baselines=baseline, n_subsets=15)
        torch.testing.assert_close(opposite.mean, -torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("design", ["shared", "per_input"])
def test_values_equal_scipys_over_the_sets_the_model_saw(design):
    """The sets are read off the rows: inputs have no zeros, the baseline is zero."""
    x, attributions = 1 + torch.rand(3, 12, dtype=torch.float64), torch.randn(3, 12)
    model = Recorder(12)
    result = sensitivity_n(model, x, attributions, target=1, sizes=(2, 7, 11), n_subsets=9, design=design)
    assert result.sizes.tolist() == [2, 7, 11] and result.n_evaluations == 28
    rows = torch.cat(model.seen)
    full, rows = model(rows[:3])[:, 1], rows[3:].view(3, 3, 9, 12)  # [S, B, N, M]
    for s, size in enumerate((2, 7, 11)):
        removed = rows[s] == 0
        assert (removed.sum(2) == size).all()
        assert torch.equal(rows[s], torch.where(removed, 0, x[:, None]))
        assert torch.equal(removed[0], removed[1]) == (design == "shared")
        for b in range(3):
            lost = full[b] - model(rows[s, b])[:, 1]
            sums = (removed[b] * attributions[b].double()).sum(1)
            expected = pearsonr(sums.numpy(), lost.numpy()).statistic
            assert float(result.values[b, s]) == pytest.approx(expected, abs=1e-10)


def test_sets_are_nested_and_evenly_spread():
    model = Recorder(6)
    sensitivity_n(model, 1 + torch.rand(1, 6), torch.rand(1, 6), target=0, sizes=(2, 4), n_subsets=3000)
    two, four = (torch.cat(model.seen)[1:] == 0).view(2, 3000, 6)
    assert ((two <= four).all(1)).all()
    pairs = torch.unique(two.long() @ (1 << torch.arange(6)), return_counts=True)[1]
    assert len(pairs) == 15 and float(pairs.min()) > 140 and float(pairs.max()) < 260  # 200 expected, 14 is a deviation


def test_pixels_patches_and_superpixels():
    x = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    weight = torch.randn(3, 6, 8, dtype=torch.float64)

    def model(rows: Tensor) -> Tensor:
        return (rows * weight).flatten(1).sum(1)

    ones = torch.ones(2, 3, dtype=torch.float64)
    pixels = sensitivity_n(model, x, x * weight, target=None, sizes=(1, 9, 40), n_subsets=12)
    torch.testing.assert_close(pixels.values, ones, rtol=0, atol=1e-10)
    mask = xaifast.grid_mask((6, 8), 2)
    of_patches = torch.stack([((x * weight).sum(1) * (mask == i)).flatten(1).sum(1) for i in range(12)], 1)
    patches = sensitivity_n(model, x, of_patches, target=None, sizes=(1, 4, 11), n_subsets=12, feature_mask=mask)
    torch.testing.assert_close(patches.values, ones, rtol=0, atol=1e-10)
    superpixels = torch.stack((mask, mask.clamp(max=9)))[:, None]  # 10 and 11 do not occur in the second image
    of_patches[1, 9] += of_patches[1, 10:].sum()
    of_patches[1, 10:] = 77.0
    result = sensitivity_n(model, x, of_patches, target=None, sizes=(1, 4, 11), n_subsets=12, feature_mask=superpixels)
    torch.testing.assert_close(result.values, ones, rtol=0, atol=1e-10)


def test_more_pixels_than_players_are_allowed():
    x = torch.rand(1, 1, 70, 70, dtype=torch.float64)
    result = sensitivity_n(lambda rows: rows.flatten(1).sum(1), x, x, target=None, n_subsets=5)
    torch.testing.assert_close(result.values, torch.ones(1, 12, dtype=torch.float64), rtol=0, atol=1e-10)
    assert result.sizes[0] == 1 and result.sizes[-1] == 3920 and (result.sizes.diff() > 0).all()


def test_constant_sides_have_no_correlation():
    x = torch.rand(2, 5, dtype=torch.float64)
    flat = sensitivity_n(lambda rows: rows.sum(1), x, torch.full((2, 5), 0.1), target=None, sizes=(2, 3))
    assert flat.values.isnan().all() and flat.mean.isnan().all()
    zeros = sensitivity_n(lambda rows: rows.sum(1), x, torch.zeros(2, 5), target=None, sizes=(2,))
    assert zeros.values.isnan().all()
    deaf = sensitivity_n(lambda rows: 0 * rows.sum(1) + 7, x, torch.rand(2, 5), target=None, sizes=(2,))
    assert deaf.values.isnan().all()
    one = torch.tensor([[1.0, 0, 0, 0, 0], [0.3, 0.3, 0.3, 0.3, 0.3]])
    mixed = sensitivity_n(lambda rows: rows.sum(1), x, one, target=None, sizes=(2, 3))
    assert mixed.values.isnan().tolist() == [[False, False], [True, True]] and not mixed.mean[0].isnan()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, where sets that differ by nothing have no correlation."""
    return torch.equal(a.nan_to_num(9), b.nan_to_num(9)) and not a.isnan().all()


def test_results_do_not_depend_on_chunks_or_neighbours():
    model, x, attributions = IntegerNet(20), integers(5, 20), integers(5, 20, seed=1)
    settings = dict(target=1, n_subsets=11, seed=6, design="per_input")
    whole = sensitivity_n(model, x, attributions, first_index=30, **settings)
    for batch_size in (1, 8, 10000):
        again = sensitivity_n(model, x, attributions, first_index=30, batch_size=batch_size, **settings)
        assert same(again.values, whole.values)
    alone = sensitivity_n(model, x[3:4], attributions[3:4], first_index=33, **settings)
    assert same(alone.values, whole.values[3:4])
    assert not same(sensitivity_n(model, x, attributions, first_index=31, **settings).values, whole.values)
    settings["design"] = "shared"
    shared = sensitivity_n(model, x, attributions, **settings)
    assert same(sensitivity_n(model, x[2:3], attributions[2:3], **settings).values, shared.values[2:3])
    assert not same(shared.values, whole.values)


def test_scores_and_removals():
    x, attributions = torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8)
    model = Recorder(64)
    settings = dict(sizes=(5,), n_subsets=6)
    softmax = sensitivity_n(model, x, attributions, score="softmax", **settings)
    by_hand = sensitivity_n(lambda rows: model(rows).softmax(1), x, attributions, **settings)
    torch.testing.assert_close(softmax.values, by_hand.values)
    blurred = sensitivity_n(model, x, attributions, removal="blur", **settings)
    ready = sensitivity_n(
        model, x, attributions, removal=lambda images: xaifast.removal.gaussian_blur(images), **settings
    )
    assert torch.equal(blurred.values, ready.values) and not torch.equal(blurred.values, softmax.values)
    rows = xaifast.Background(torch.rand(3, 1, 8, 8))
    assert sensitivity_n(model, x, attributions, baselines=rows, **settings).n_evaluations == 21
    assert metrics.SensitivityN is type(blurred) and "2 inputs, 1 sizes" in repr(blurred)


def never(x: Tensor) -> Tensor:
    raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(sizes=(0, 2)), "sizes must be ints from 1 to 5"),
        (dict(sizes=(6,)), "sizes must be ints from 1 to 5"),
        (dict(sizes=(2.5,)), "sizes must be ints"),
        (dict(sizes=()), "sizes must be ints"),
        (dict(sizes=5), "sizes must be ints"),
        (dict(attributions=torch.tensor([[0.0] * 6, [torch.inf] + [0.0] * 5])), "finite to be summed.* input 1"),
        (dict(n_subsets=2), "n_subsets must be an int from 3"),
        (dict(design="none"), "design must be"),
        (dict(seed=-1), "seed must be"),
        (dict(first_index=1 << 40, design="per_input"), "first_index must be below"),
        (dict(score=3), "score must be"),
        (dict(inputs=torch.rand(2, 1), attributions=torch.rand(2, 1)), "at least 2 features"),
        (dict(attributions=torch.full((2, 6), torch.nan)), "only NaN"),
        (dict(attributions=torch.rand(2, 5)), "attributions must be"),
        (dict(baselines=torch.rand(5)), "baselines must be"),
    ],
)
def test_bad_input_is_said_before_the_model_runs(changed, message):
    given = dict(forward=never, inputs=torch.rand(2, 6), attributions=torch.rand(2, 6), target=0)
    with pytest.raises(ValueError, match=message):
        sensitivity_n(**{**given, **changed})


def test_sizes_of_a_result_are_sizes():
    model, x, attributions = IntegerNet(20), integers(2, 20), integers(2, 20, seed=1)
    first = sensitivity_n(model, x, attributions, target=0, n_subsets=5)
    again = sensitivity_n(model, x, attributions, target=0, n_subsets=5, sizes=first.sizes)
    assert torch.equal(again.sizes, first.sizes) and same(again.values, first.values)


def test_all_outputs_are_refused():
    with pytest.raises(ValueError, match="target must name an output"):
        sensitivity_n(nn.Linear(6, 2), torch.rand(2, 6), torch.rand(2, 6), target=None)
