"""Maps of patches against a loop over the pixels of `xaifast.grid_mask`."""

from __future__ import annotations

import math

import pytest
import torch

import xaifast
from xaifast.metrics import to_patches


def brute(map, patch, sign="clamp", ignore=None, normalise=True):
    ids = xaifast.grid_mask(map.shape[-2:], patch).flatten().tolist()
    rows = []
    for pixels in map.reshape(len(map), -1).tolist():
        patches = [[] for _ in range(max(ids) + 1)]
        for i, pixel in zip(ids, pixels, strict=True):
            ignored = math.isnan(pixel) if ignore is not None and math.isnan(ignore) else pixel == ignore
            if not ignored:
                patches[i].append(abs(pixel) if sign == "abs" else max(pixel, 0.0))
        means = [sum(p) / len(p) if p else math.nan for p in patches]
        largest = max((v for v in means if not math.isnan(v)), default=0.0)
        rows.append([v / largest for v in means] if normalise and largest > 0 else means)
    return torch.tensor(rows, dtype=torch.float64)


def same(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("sign", ["clamp", "abs"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), 4), ((7, 10), 3), ((5, 4), (2, 3)), ((3, 3), 5), ((1, 6), 1)])
def test_patches(size, patch, normalise, sign):
    map = torch.randn(3, *size)
    map[1] = -map[1].abs() if sign == "clamp" else 0.0
    wanted = brute(map, patch, sign, normalise=normalise)
    same(to_patches(map, patch, sign, normalise=normalise), wanted)
    same(to_patches(map[:, None], patch, sign, normalise=normalise), wanted)
    same(to_patches(map.mT.contiguous().mT, patch, sign, normalise=normalise), wanted)
    assert to_patches(map, patch, sign)[1].tolist() == [0.0] * wanted.shape[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_dtypes(dtype):
    map = (torch.rand(2, 5, 7) * 3).to(dtype)
    got = to_patches(map, 2, normalise=False)
    same(got, brute(map, 2, normalise=False))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("ignore", [255, 0, torch.nan, -1.0])
@pytest.mark.parametrize("normalise", [True, False])
def test_ignored_pixels_do_not_count(ignore, normalise):
    map = torch.randint(0, 2, (3, 7, 8)).float() + torch.rand(3, 7, 8)
    map[torch.rand(map.shape) < 0.4] = ignore
    map[0, :4, 4:] = ignore
    map[1] = ignore
    got = to_patches(map, 4, ignore=ignore, normalise=normalise)
    same(got, brute(map, 4, ignore=ignore, normalise=normalise))
    assert got.isnan().nonzero().tolist() == [[0, 1], *[[1, i] for i in range(4)]]


def test_an_ignored_value_is_compared_as_a_number():
    map = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert to_patches(map, 2, ignore=-1, normalise=False).tolist() == [[127.5]]
    assert to_patches(map, 2, ignore=256, normalise=False).tolist() == [[127.5]]


def test_infinity_behind_an_ignored_pixel_does_not_leak():
    map = torch.tensor([[[torch.inf, 0.5], [0.25, 0.75]]])
    assert to_patches(map, 2, ignore=torch.inf, normalise=False).tolist() == [[0.5]]


def test_large_maps_are_summed_in_float64():
    map = torch.full((1, 1024, 1024), 1e-3)
    map[0, 0, 0] = 2.0**24  # one thousandth is lost beside it in float32
    wanted = (map.double().sum() / 1024**2).item()
    assert float(to_patches(map, 1024, normalise=False)) == pytest.approx(wanted, rel=1e-7)


def test_an_object_smaller_than_a_patch_stays_small():
    seg = torch.zeros(1, 4, 4, dtype=torch.bool)
    seg[0, 0, 0] = True
    assert to_patches(seg, 2, normalise=False).tolist() == [[0.25, 0, 0, 0]]
    assert to_patches(seg, 2).tolist() == [[1, 0, 0, 0]]


def test_gradient_flows():
    map = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_patches(x, 2), map)


def test_patches_meet_the_metrics():
    seg = torch.tensor([[[1, 1, 9, 9], [1, 0, 9, 9]]])
    m = to_patches(seg, 2, ignore=9, normalise=False)
    assert xaifast.metrics.segmentation_difference(torch.tensor([[0.5, 0.0]]), m).tolist() == [0.25]


MAP = torch.rand(2, 4, 4)
BAD = {
    "no tensor": (dict(map=[[1.0]]), TypeError, "must be a tensor"),
    "no batch": (dict(map=MAP[0]), ValueError, r"\[B, H, W\], got \[4, 4\]"),
    "channels": (dict(map=torch.ones(2, 3, 4, 4)), ValueError, "sum over channels"),
    "empty": (dict(map=MAP[:0]), ValueError, "must not be empty"),
    "empty channels": (dict(map=MAP[:0, None]), ValueError, "must not be empty"),
    "patch zero": (dict(patch=0), ValueError, "positive int"),
    "patch float": (dict(patch=(2, 2.0)), ValueError, "positive int"),
    "patch half": (dict(patch=2.0), ValueError, "positive int"),
    "patch none": (dict(patch=None), ValueError, "positive int"),
    "patch of three": (dict(patch=(1, 2, 3)), ValueError, "positive int"),
    "patch text": (dict(patch="2"), ValueError, "positive int"),
    "sign unknown": (dict(sign="square"), ValueError, 'sign must be "clamp" or "abs"'),
    "nan": (
        dict(map=torch.where(torch.arange(32).view(2, 4, 4) == 27, torch.nan, MAP)),
        ValueError,
        r"finite, got nan at \[1, 2, 3\]",
    ),
    "inf": (dict(map=MAP / 0, ignore=torch.nan), ValueError, "finite, got inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, says = BAD[case]
    with pytest.raises(error, match=r"xaifast\.metrics\.to_patches: .*" + says):
        to_patches(**{"map": MAP, "patch": 2, **arguments})
