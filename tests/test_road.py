"""ROAD: the imputation against a sparse direct solver, the curve against a plain loop over single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from games import IntegerNet, integers
from torch import Tensor, nn

from xaifast import metrics
from xaifast.noise import IMPUTATION, normal_units
from xaifast.removal import _multigrid
from xaifast.removal.imputed import linear_impute


def impute_directly(image: Tensor, removed: Tensor) -> Tensor:
    """One image ``[C, H, W]``: one equation a removed pixel, written out neighbour by neighbour."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import spsolve

    _, height, width = image.shape
    pixels = removed.nonzero().tolist()
    number = {tuple(pixel): n for n, pixel in enumerate(pixels)}
    entries: dict[tuple[int, int], float] = {}
    right = np.zeros((len(pixels), image.shape[0]))
    for n, (i, j) in enumerate(pixels):
        total = 0.0
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                p, q = i + di, j + dj
                if (di, dj) == (0, 0) or not (0 <= p < height and 0 <= q < width):
                    continue
                weight = 1 / 12 if di and dj else 1 / 6
                total += weight
                if (p, q) in number:
                    entries[n, number[p, q]] = -weight
                else:
                    right[n] += weight * image[:, p, q].double().numpy()
        entries[n, n] = total
    where = np.array(list(entries))
    matrix = csc_matrix((list(entries.values()), (where[:, 0], where[:, 1])), shape=(len(pixels), len(pixels)))
    filled = image.double().clone()
    filled[:, removed] = torch.from_numpy(spsolve(matrix, right).reshape(len(pixels), -1)).T
    return filled


def photographs(height: int, width: int) -> Tensor:
    """``[2, 3, H, W]`` float64 in 0..1."""
    from skimage import data, transform

    pictures = [transform.resize(picture, (height, width)) for picture in (data.astronaut(), data.coffee())]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def removed_shares(n: int, height: int, width: int, share: float, *, smooth: bool, seed: int = 0) -> Tensor:
    """Masks with that share of pixels: scattered, or blobs."""
    values = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(seed))
    if smooth:
        small = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        values = nn.functional.interpolate(small, size=(height, width), mode="bicubic")
    k = round(share * height * width)
    order = values.flatten(1).argsort(1)
    return torch.zeros(n, height * width, dtype=torch.bool).scatter(1, order[:, :k], True).view(n, height, width)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_equals_the_direct_solve_pixel_by_pixel(share, smooth):
    images = photographs(37, 50)
    removed = removed_shares(2, 37, 50, share, smooth=smooth)
    got, single = linear_impute(images, removed, tolerance=1e-10), linear_impute(images.float(), removed)
    assert single.dtype == torch.float32
    for b in range(2):
        expected = impute_directly(images[b], removed[b])
        torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(single[b].double(), expected, rtol=0, atol=5e-5)
        assert torch.equal(got[b][:, ~removed[b]], images[b][:, ~removed[b]])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 9), (9, 1), (2, 2), (2, 7), (3, 40), (16, 16), (17, 33)])
def test_imputation_of_all_shapes(size, channels):
    images = torch.rand(1, channels, *size, dtype=torch.float64)
    for share in (0.3, 0.8):
        removed = removed_shares(1, *size, share, smooth=False, seed=channels)
        expected = impute_directly(images[0], removed[0])
        torch.testing.assert_close(linear_impute(images, removed, tolerance=1e-10)[0], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("length", [7, 500, 4001])
def test_a_line_is_interpolated(length):
    """Of one row the neighbours' mean is the straight line between known pixels."""
    line = torch.rand(1, 1, 1, length, dtype=torch.float64)
    scattered, long = removed_shares(1, 1, length, 0.5, smooth=False), torch.ones(1, 1, length, dtype=torch.bool)
    long[..., [0, length - 2]] = False
    for removed in (scattered, long):
        known = (~removed[0, 0]).nonzero()[:, 0].numpy()
        expected = torch.from_numpy(np.interp(np.arange(length), known, line[0, 0, 0].numpy()[known]))
        for transposed in (False, True):
            image, hole = (x.mT if transposed else x for x in (line, removed))
            got = linear_impute(image, hole, tolerance=1e-10).flatten()
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("height", [2, 3, 8])
def test_long_holes_of_narrow_images_converge(height):
    image, removed = torch.rand(1, 1, height, 2000, dtype=torch.float64), torch.ones(1, height, 2000, dtype=torch.bool)
    removed[..., 0] = removed[..., -1] = False
    image[..., 0], image[..., -1] = 0, 1999
    expected = torch.arange(2000.0, dtype=torch.float64).expand_as(image)
    torch.testing.assert_close(linear_impute(image, removed, tolerance=1e-10), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_images_of_any_magnitude(scale):
    images, removed = photographs(16, 20).float(), removed_shares(2, 16, 20, 0.7, smooth=True)
    assert torch.equal(linear_impute(images * scale, removed), linear_impute(images, removed) * scale)


def test_a_large_offset_costs_no_more_than_its_rounding():
    images, removed = (photographs(40, 40) * 4096).round() / 4096, removed_shares(2, 40, 40, 0.9, smooth=True)
    expected = linear_impute(images, removed, tolerance=1e-10)
    moved = linear_impute((images + 100).float(), removed).double() - 100  # its bits end at 2^-17
    torch.testing.assert_close(moved, expected, rtol=0, atol=2**-16)


@pytest.mark.parametrize("known", [(0, 0), (12, 7), (20, 18)])
def test_one_pixel_left_fills_the_image(known):
    removed = torch.ones(1, 21, 19, dtype=torch.bool)
    removed[0, known[0], known[1]] = False
    image = torch.rand(1, 2, 21, 19)
    expected = image[:, :, known[0], known[1], None, None].expand_as(image)
    torch.testing.assert_close(linear_impute(image, removed), expected, rtol=0, atol=1e-6)


def test_a_frame_and_a_plane():
    """A linear function is its neighbours' mean, away from borders: known around a hole, it comes back."""
    plane = torch.arange(30.0, dtype=torch.float64)[:, None] * 2 - torch.arange(41.0, dtype=torch.float64)
    removed = torch.zeros(1, 30, 41, dtype=torch.bool)
    removed[0, 1:-1, 1:-1] = True
    filled = linear_impute(plane[None, None], removed, tolerance=1e-12)
    torch.testing.assert_close(filled[0, 0], plane, rtol=0, atol=1e-8)


def test_what_removed_pixels_hold_is_not_read():
    images, removed = torch.rand(2, 3, 15, 15), removed_shares(2, 15, 15, 0.6, smooth=True)
    poisoned = torch.where(removed[:, None], torch.nan, images)
    assert torch.equal(linear_impute(poisoned, removed), linear_impute(images, removed))


def test_imputation_does_not_depend_on_neighbours_or_pieces(monkeypatch):
    images = torch.rand(7, 3, 45, 61)
    shares = torch.linspace(0, 0.95, 7)
    removed = torch.cat([removed_shares(1, 45, 61, float(share), smooth=True) for share in shares])
    together = linear_impute(images, removed)
    monkeypatch.setitem(_multigrid._PIECE, "cpu", 1)
    assert torch.equal(linear_impute(images, removed), together)
    for b in (0, 3, 6):
        assert torch.equal(linear_impute(images[b : b + 1], removed[b : b + 1])[0], together[b])


def test_threads_do_not_share_a_sum():
    maps = torch.rand(3, 1, 250, 251)  # more than a thread takes alone
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = _multigrid._total(maps)
        assert torch.equal(_multigrid._total(maps[1:2]), together[1:2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(_multigrid._total(maps[1:2]), together[1:2])


def test_memory_formats_and_low_precision():
    images, removed = photographs(20, 24), removed_shares(2, 20, 24, 0.5, smooth=True)
    expected = linear_impute(images.float(), removed)
    assert torch.equal(linear_impute(images.float().to(memory_format=torch.channels_last), removed), expected)
    for dtype in (torch.float16, torch.bfloat16):
        low = linear_impute(images.to(dtype), removed)
        assert low.dtype == dtype
        assert torch.equal(low, linear_impute(images.to(dtype).float(), removed).to(dtype))


def test_bad_images():
    removed = torch.zeros(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"images must be floating \[B, C, H, W\]"):
        linear_impute(torch.zeros(1, 1, 4, 4, dtype=torch.int64), removed)
    with pytest.raises(ValueError, match="removed must be a BoolTensor"):
        linear_impute(torch.zeros(1, 1, 4, 4), removed.float())
    with pytest.raises(ValueError, match="none in image 1"):
        linear_impute(torch.zeros(2, 1, 4, 4), torch.stack((removed[0], ~removed[0])))
    removed[0, 0] = True
    with pytest.raises(RuntimeError, match="must converge"):
        linear_impute(torch.full((1, 1, 4, 4), torch.nan), removed)


class Recorder(nn.Module):
    """Answers with a linear function of the image and keeps the images it saw."""

    def __init__(self, n_elements: int, n_outputs: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(n_elements, n_outputs, generator=generator, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return x.double().flatten(1) @ self.weight


@pytest.mark.parametrize("channels", [1, 3])
def test_road_equals_a_loop(channels):
    x = torch.rand(2, channels, 11, 14, dtype=torch.float64)
    attributions = torch.randint(0, 4, (2, 11, 14)).float()  # ties
    percentages = (10, 55.5, 90)
    model = Recorder(channels * 11 * 14)
    result = metrics.road(
        model, x, attributions, target=1, percentages=percentages, order="combined", noise=0.3, score="logit", seed=4,
        first_index=20,
    )  # fmt: skip
    assert result.percentages.tolist() == [10, 55.5, 90]
    assert result.n_evaluations == 7 and result.targets.tolist() == [1, 1]
    noise = 0.3 * normal_units(0, 2, 1, channels * 154, domain=IMPUTATION, seed=4, first_index=20).view_as(x)
    for b in range(2):
        order = sorted(range(154), key=lambda i: (-float(attributions[b].flatten()[i]), i))
        torch.testing.assert_close(result.full[b], model(x[b : b + 1])[0, 1])
        for s, percentage in enumerate(percentages):
            k = int(percentage * 154 / 100 + 0.5)
            for pixels, scores in ((order[:k], result.most), (order[154 - k :], result.least)):
                removed = torch.zeros(154, dtype=torch.bool)
                removed[pixels] = True
                removed = removed.view(11, 14)
                image = impute_directly(x[b], removed) + noise[b] * removed
                torch.testing.assert_close(scores[b, s], model(image[None])[0, 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.scores, (result.least - result.most) / 2)
    torch.testing.assert_close(result.mean, result.scores.mean(1))


def test_rows_are_clean_images_with_removed_pixels_filled_and_noise():
    x = photographs(12, 13).float()
    model = Recorder(3 * 12 * 13)
    metrics.road(model, x, torch.rand(2, 1, 12, 13), target=0, percentages=(40,), noise=0, batch_size=1)
    assert all(torch.equal(seen[0], x[b]) for b, seen in enumerate(model.seen[:2]))
    kept = [(seen[0] == x[b]).all(0).sum() for b, seen in enumerate(model.seen[2:])]
    assert [int(n) for n in kept] == [156 - 62] * 2  # floor(0.4 * 156 + 1/2) removed


def test_channels_last_stays():
    x, attributions = photographs(10, 12).float(), torch.rand(2, 10, 12)
    model = Recorder(3 * 120)
    expected = metrics.road(model, x, attributions, target=0).scores
    model.seen.clear()
    again = metrics.road(model, x.to(memory_format=torch.channels_last), attributions, target=0).scores
    assert torch.equal(again, expected)
    assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in model.seen)


def test_one_order_is_half_of_both():
    x, attributions = torch.rand(3, 1, 9, 9), torch.rand(3, 9, 9)
    model = Recorder(81)
    both = metrics.road(model, x, attributions, order="combined")
    most = metrics.road(model, x, attributions, order="most")
    least = metrics.road(model, x, attributions, order="least")
    assert most.least is None and least.most is None and most.n_evaluations == 10
    assert torch.equal(most.scores, both.most) and torch.equal(least.scores, both.least)
    assert torch.equal(least.scores, metrics.road(model, x, -attributions, order="most").scores)  # no ties
    assert "combined" in repr(both) and "most" in repr(most) and "least" in repr(least)


def test_results_do_not_depend_on_chunks_or_neighbours():
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scaled = (x.double() * 2**20).round().flatten(1)
            return torch.stack((scaled.sum(1), scaled[:, ::2].sum(1)), 1)  # exact: sums of integers

    x, attributions = torch.rand(5, 3, 13, 13), torch.rand(5, 13, 13)
    settings = dict(score="logit", seed=3, order="combined")
    whole = metrics.road(Whole(), x, attributions, first_index=40, **settings)
    for batch_size in (1, 4, 7, 1000):
        again = metrics.road(Whole(), x, attributions, first_index=40, batch_size=batch_size, **settings)
        assert torch.equal(again.scores, whole.scores)
    alone = metrics.road(Whole(), x[2:3], attributions[2:3], first_index=42, **settings)
    assert torch.equal(alone.scores, whole.scores[2:3])
    other = metrics.road(Whole(), x, attributions, first_index=41, **settings)
    assert not torch.equal(other.scores, whole.scores)


def test_noise_is_of_removed_pixels_and_the_same_at_every_percentage():
    x = torch.full((2, 2, 8, 8), 0.5)
    model = Recorder(2 * 64)
    metrics.road(model, x, torch.arange(128.0).view(2, 8, 8), target=0, percentages=(25, 75), noise=0.1, batch_size=1)
    (a, b), (c, d) = (model.seen[2:4], model.seen[4:6])
    for little, much in ((a, b), (c, d)):
        moved = little != 0.5
        assert int(moved.sum()) == 2 * 16 and int((much != 0.5).sum()) == 2 * 48
        torch.testing.assert_close(little[moved], much[moved], rtol=0, atol=1e-6)
    assert not torch.equal(a[0, :, -2:] - 0.5, c[0, :, -2:] - 0.5)  # another image, other noise


def test_scores():
    x, attributions = torch.rand(2, 1, 6, 6), torch.rand(2, 6, 6)
    model = Recorder(36)
    softmax = metrics.road(model, x, attributions, target=2, noise=0)
    by_hand = metrics.road(model, x, attributions, target=2, noise=0, score=lambda out: out.softmax(1))
    assert torch.equal(softmax.scores, by_hand.scores) and 0 < float(softmax.full[0]) < 1
    accuracy = metrics.road(model, x, attributions, noise=0, score="accuracy")
    assert accuracy.full.tolist() == [1, 1] and set(accuracy.scores.flatten().tolist()) <= {0.0, 1.0}
    assert metrics.road(model, x.half(), attributions, target=0).scores.dtype == torch.float32
    assert metrics.road(model, x.double(), attributions, target=0).scores.dtype == torch.float64
    single = metrics.road(lambda rows: rows.flatten(1).sum(1), x, attributions, target=None, score="logit")
    assert single.scores.shape == (2, 9) and single.targets is None


class Unused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(percentages=(0, 50)), "percentages must be numbers between 0 and 100"),
        (dict(percentages=()), "percentages must be numbers"),
        (dict(percentages="10"), "percentages must be numbers"),
        (dict(percentages=None), "percentages must be numbers"),
        (dict(percentages=(50, 99.9)), "must remove at least one of the 16 pixels and leave one, got 99.9 %"),
        (dict(percentages=(0.1, 0.9)), "must remove at least one of the 16 pixels and leave one, got 0.1 %"),
        (dict(order="random"), "order must be"),
        (dict(noise=-1), "noise must be"),
        (dict(score="margin"), "score must be"),
        (dict(seed=-1), "seed must be"),
        (dict(attributions=torch.rand(2, 3, 4)), "attributions must be"),
        (dict(attributions=torch.full((2, 4, 4), torch.nan)), "only NaN for input 0"),
        (dict(inputs=torch.rand(2, 4, 4)), r"images must be floating \[B, C, H, W\]"),
        (dict(inputs=torch.full((2, 1, 4, 4), torch.inf)), "inputs must be finite"),
        (dict(inputs=torch.zeros(2, 1, 4, 4, dtype=torch.int64)), "images must be floating"),
    ],
)
def test_bad_input_is_said_before_the_model_runs(changed, message):
    given = dict(forward=Unused(), inputs=torch.rand(2, 1, 4, 4), attributions=torch.rand(2, 4, 4), target=0)
    with pytest.raises(ValueError, match=message):
        metrics.road(**{**given, **changed})


def test_pixels_without_an_attribution_are_the_least_relevant():
    x, attributions = torch.rand(2, 1, 6, 6), torch.rand(2, 6, 6)
    attributions[:, 2:4, 1] = torch.nan
    by_hand = metrics.road(Recorder(36), x, attributions.nan_to_num(-1.0), target=0, order="combined")
    result = metrics.road(Recorder(36), x, attributions, target=0, order="combined", nan="last")
    assert torch.equal(result.most, by_hand.most) and torch.equal(result.least, by_hand.least)


def test_targets_that_do_not_fit():
    x, attributions = torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4)
    with pytest.raises(ValueError, match="target must name an output"):
        metrics.road(Recorder(16), x, attributions, target=None)
    with pytest.raises(ValueError, match="target must lie in 0..2"):
        metrics.road(Recorder(16), x, attributions, target=3)
    with pytest.raises(ValueError, match='score="softmax" needs a model with at least two outputs'):
        metrics.road(lambda rows: rows.flatten(1).sum(1), x, attributions, target=None)


def test_global_random_state_is_left_alone():
    x, attributions = integers(2, 1, 4, 4), torch.rand(2, 4, 4)
    before = torch.random.get_rng_state()
    metrics.road(IntegerNet(16), x, attributions, target=0)
    assert torch.equal(torch.random.get_rng_state(), before)
