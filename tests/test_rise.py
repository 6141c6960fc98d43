"""RISE: its masks written out in plain loops, and its sums beside brute force over stored masks."""

from __future__ import annotations

import math

import pytest
import torch
from games import IntegerNet, integers, small_cnn

import xaifast
from xaifast.attribution import rise as rise_function
from xaifast.noise import uniform_units
from xaifast.removal.smooth_masks import MaskLaw

LAWS = [
    ((8, 8), (4, 4), 0.5),
    ((12, 10), (4, 3), 0.3),
    ((9, 7), (1, 2), 0.5),
    ((5, 6), (5, 6), 0.7),
    ((7, 11), (3, 4), 0.5),
]


def masks_of(law, n):
    grids, places = law.draw(0, n)
    return law.enlarge(grids.double(), places)


def enlarged_by_loop(grid, height, width):
    """Bilinear enlargement pixel by pixel: centres of cells, constant beyond the outermost."""
    out = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * grid.shape[0] / height - 0.5, 0), grid.shape[0] - 1)
            x = min(max((j + 0.5) * grid.shape[1] / width - 0.5, 0), grid.shape[1] - 1)
            top, left = math.floor(y), math.floor(x)
            for row, at_row in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, at_column in ((left, 1 - (x - left)), (left + 1, x - left)):
                    if at_row * at_column:
                        out[i, j] += at_row * at_column * grid[row, column]
    return out


@pytest.mark.parametrize(("size", "cells", "p"), LAWS)
def test_masks_equal_a_plain_loop(size, cells, p):
    law = MaskLaw(size, cells, p, 11)
    grids, places = law.draw(0, 5)
    units = uniform_units(0, 5, 2**40, math.prod(cells) + 2, domain=32, seed=11, first_index=0)
    cell = [math.ceil(n / g) for n, g in zip(size, cells, strict=True)]
    masks = law.enlarge(grids.double(), places)
    for n in range(5):
        grid = torch.tensor([float(u < p) for u in units[n, :-2].tolist()]).double().reshape(cells)
        y, x = (int(u * c) for u, c in zip(units[n, -2:].tolist(), cell, strict=True))
        big = enlarged_by_loop(grid, *((g + 1) * c for g, c in zip(cells, cell, strict=True)))
        torch.testing.assert_close(masks[n], big[y : y + size[0], x : x + size[1]], rtol=0, atol=1e-14)
    assert masks.shape[1:] == size


def test_masks_equal_torch_interpolation():
    law = MaskLaw((14, 14), (7, 7), 0.5, 0)
    grids, places = law.draw(0, 3)
    big = torch.nn.functional.interpolate(grids.double()[:, None], size=(16, 16), mode="bilinear")[:, 0]
    for mask, image, (y, x) in zip(law.enlarge(grids.double(), places), big, places.tolist(), strict=True):
        torch.testing.assert_close(mask, image[y : y + 14, x : x + 14], rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_cells_and_places_follow_the_law(p):
    law = MaskLaw((12, 10), (4, 3), p, 5)
    n = 4000
    grids, places = law.draw(0, n)
    masks = law.enlarge(grids.double(), places)
    deviation = math.sqrt(p * (1 - p) / n)
    assert (grids.double().mean(0) - p).abs().max() < 4.5 * deviation
    assert (masks.mean(0) - p).abs().max() < 4.5 * deviation
    for axis, cell in enumerate((3, 4)):
        counts = places[:, axis].bincount(minlength=cell)
        assert len(counts) == cell and (counts / n - 1 / cell).abs().max() < 4.5 * math.sqrt(1 / cell / n)
    assert masks.min() >= 0 and masks.max() <= 1


def test_a_mask_depends_on_the_seed_and_its_number_alone():
    law = MaskLaw((8, 8), (3, 3), 0.5, 7)
    grids, places = law.draw(0, 600)
    later, there = law.draw(517, 5)
    assert torch.equal(later, grids[517:522]) and torch.equal(there, places[517:522])
    assert not torch.equal(MaskLaw((8, 8), (3, 3), 0.5, 8).draw(0, 600)[0], grids)
    assert len(grids.flatten(1).unique(dim=0)) > 300


def by_brute_force(forward, x, masks, baseline=0.0, score=None):
    """``sum_n score(f(m_n x + (1 - m_n) b)) m_n``, all masks stored: ``[B, H, W, K]``."""
    out = []
    for b in range(len(x)):
        base = torch.as_tensor(baseline, dtype=x.dtype).expand(x.shape)[b]
        values = forward(masks[:, None] * x[b] + (1 - masks[:, None]) * base)
        values = values.softmax(1) if score is None else score(values)
        out.append(torch.einsum("nk,nhw->hwk", values, masks))
    return torch.stack(out)


@pytest.mark.parametrize("n_masks", [1, 3, 256, 700])
@pytest.mark.parametrize("baseline", [0.0, "tensor"])
def test_equals_brute_force(n_masks, baseline):
    net, x = small_cnn(channels=2), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    baseline = torch.randn(3, 2, 8, 8, dtype=torch.float64) if baseline == "tensor" else baseline
    masks = masks_of(MaskLaw((8, 8), (3, 4), 0.4, 9), n_masks)
    sums = by_brute_force(net, x, masks, baseline).detach()
    options = dict(n_masks=n_masks, cells=(3, 4), p=0.4, seed=9, baselines=baseline, target=None)
    torch.testing.assert_close(xaifast.rise(net, x, **options), sums / (n_masks * 0.4), rtol=1e-11, atol=1e-13)
    shown = masks.sum(0)[..., None]
    expected = torch.where(shown > 0, sums / shown, 0)
    observed = xaifast.rise(net, x, normalise="observed", **options)
    torch.testing.assert_close(observed, expected, rtol=1e-9, atol=1e-12)


def test_targets_and_scores():
    net, x = small_cnn(channels=3), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    masks = masks_of(MaskLaw((8, 8), (7, 7), 0.5, 0), 50)
    probabilities = by_brute_force(net, x, masks).detach() / 25
    predicted = net(x).argmax(1)
    shown = xaifast.rise(net, x, n_masks=50)
    assert shown.shape == (3, 8, 8)
    expected = torch.stack([probabilities[b, ..., k] for b, k in enumerate(predicted)])
    torch.testing.assert_close(shown, expected, rtol=1e-11, atol=1e-13)
    logits = by_brute_force(net, x, masks, score=lambda v: v).detach() / 25
    torch.testing.assert_close(
        xaifast.rise(net, x, n_masks=50, score="logit", target=2), logits[..., 2], rtol=1e-9, atol=1e-12
    )
    squared = xaifast.rise(net, x, n_masks=50, score=lambda outputs: outputs**2, target=torch.tensor([0, 3, 1]))
    expected = by_brute_force(net, x, masks, score=lambda v: v**2).detach() / 25
    expected = torch.stack([expected[b, ..., k] for b, k in enumerate((0, 3, 1))])
    torch.testing.assert_close(squared, expected, rtol=1e-9, atol=1e-12)


def test_a_constant_score_gives_its_value():
    x = torch.rand(1, 1, 12, 12)
    shown = xaifast.rise(
        lambda rows: torch.full((len(rows),), 3.0), x, target=None, score="logit", normalise="observed"
    )
    torch.testing.assert_close(shown, torch.full((1, 12, 12), 3.0))
    shown = xaifast.rise(lambda rows: torch.full((len(rows),), 3.0), x, target=None, score="logit", n_masks=20000)
    assert (shown - 3).abs().max() < 3 * 4.5 / math.sqrt(20000)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_neither_chunks_nor_neighbours_matter(channels, layout):
    x = torch.randn(4, channels, 9, 7).contiguous(memory_format=layout)
    weights = torch.randn(channels * 63, 3)

    def forward(rows):  # sums in one order, whatever the batch
        return (rows.reshape(len(rows), -1, 1) * weights).double().cumsum(1)[:, -1]

    options = dict(n_masks=300, cells=3, target=1, baselines=0.25)
    whole = xaifast.rise(forward, x, **options)
    for size in (1, 7, 100, 5000):
        assert torch.equal(xaifast.rise(forward, x, batch_size=size, **options), whole)
    assert torch.equal(xaifast.rise(forward, x[2:3], **options), whole[2:3])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_background_is_the_mean_over_its_rows(batch_size):
    net, x, rows = IntegerNet(16), integers(2, 1, 4, 4), integers(3, 1, 4, 4, seed=1)
    options = dict(n_masks=10, cells=2, target=None, score="logit", batch_size=batch_size)
    shown = xaifast.rise(net, x, baselines=xaifast.Background(rows), **options)
    expected = torch.stack([xaifast.rise(net, x, baselines=row, **options) for row in rows]).mean(0)
    torch.testing.assert_close(shown, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [1e-9, torch.tensor(0.3, dtype=torch.float32).numpy()[()], 1 - 1e-9])
def test_extreme_and_foreign_probabilities(p):
    x = torch.rand(1, 2, 6, 5)
    shown = xaifast.rise(lambda rows: rows.sum((1, 2, 3)) + 1, x, target=None, score="logit", p=p, n_masks=300,
                         cells=2, normalise="observed")  # fmt: skip
    if p < 1e-6:
        assert bool((shown == 0).all())  # no mask shows anything
    else:
        assert bool((shown >= 1).all()) and bool((shown <= x.sum() * 1.001 + 1).all())


def test_blur():
    net, x = small_cnn(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = xaifast.rise(net, x, n_masks=20, baselines=xaifast.removal.gaussian_blur(x))
    torch.testing.assert_close(xaifast.rise(net, x, n_masks=20, removal="blur"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    net, x = small_cnn(channels=1), torch.rand(2, 1, 8, 9, dtype=torch.float64)[..., :8]
    exact = xaifast.rise(net, x, n_masks=40, target=1)
    shown = xaifast.rise(lambda rows: net(rows.double()), x.to(dtype), n_masks=40, target=1)
    assert shown.dtype == torch.float32
    torch.testing.assert_close(shown.double(), exact, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 2e-2))


def test_memory_does_not_grow_with_the_masks():
    """The largest tensors of a call are those of one block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor):
                    self.largest = max(self.largest, part.untyped_storage().nbytes())
            return out

    sizes = []
    for n_masks in (256, 256 * 8):
        with Largest() as mode:
            xaifast.rise(lambda rows: rows.sum((1, 2, 3)), torch.rand(2, 1, 16, 16), n_masks=n_masks, target=None,
                         score="logit", batch_size=64)  # fmt: skip
        sizes.append(mode.largest)
    assert sizes[0] == sizes[1]


def test_one_bar(capsys):
    xaifast.rise(small_cnn(), torch.rand(2, 1, 8, 8).double(), n_masks=600, show_progress=True)
    shown = capsys.readouterr().err
    assert shown.count("rise:   0%") == 1 and "1.20k/1.20k" in shown


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    xaifast.rise(small_cnn(), torch.ones(1, 1, 8, 8).double(), n_masks=10)
    assert torch.equal(torch.get_rng_state(), before)


BAD = [
    (dict(n_masks=0), ValueError, "n_masks must be a positive int"),
    (dict(cells=0), ValueError, "cells must be"),
    (dict(cells=9), ValueError, "cells must be"),
    (dict(cells=(2, 3, 4)), ValueError, "cells must be"),
    (dict(p=0), ValueError, "p must lie between 0 and 1"),
    (dict(p=1.0), ValueError, "p must lie between 0 and 1"),
    (dict(seed=-1), ValueError, "seed must be"),
    (dict(score="odds"), ValueError, "score must be"),
    (dict(normalise="none"), ValueError, "normalise must be"),
    (dict(removal=xaifast.removal.TokenDrop()), ValueError, "removal must be None"),
    (dict(target=9), ValueError, "target must lie in 0..3"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words) as caught:
        rise_function(small_cnn(), torch.ones(1, 1, 8, 8).double(), **arguments)
    assert str(caught.value).startswith("xaifast.rise: ")


@pytest.mark.parametrize("inputs", [torch.ones(1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.int64)])
def test_bad_inputs(inputs):
    with pytest.raises(ValueError, match="one tensor of floating images"):
        xaifast.rise(small_cnn(), inputs)


def test_a_bad_output_is_named_by_its_mask():
    seen = []

    def forward(rows):
        seen.extend(range(len(seen), len(seen) + len(rows)))
        return torch.where(torch.tensor(seen[-len(rows) :]) == 1 + 290, torch.nan, rows.sum((1, 2, 3)))

    with pytest.raises(ValueError, match=r"input 0, mask 290; 1 of 44 evaluations"):
        xaifast.rise(forward, torch.ones(1, 1, 8, 8), n_masks=300, score="logit", target=None)


def test_softmax_of_one_output_is_refused():
    with pytest.raises(ValueError, match='"softmax" needs a model'):
        xaifast.rise(lambda rows: rows.sum((1, 2, 3)), torch.ones(1, 1, 8, 8), target=None)
