"""quantile_masks: hard masks by rank; soft masks, their limits and gradients, and the areas they make of a model."""

import math

import pytest
import torch
from masking_cases import DEVICES

import xaifast
from xaifast.ops import blend_inputs, perturb_by_rank, quantile_masks, rank_features
from xaifast.ops.quantiles import BAND, BAND_ERROR

SHARES = [0.0, 0.004, 0.1, 0.25, 0.5, 0.77, 0.99, 1.0]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def kept(maps, count):
    """Hard mask of one map by a sort of (value, index) pairs."""
    order = sorted(range(maps.numel()), key=lambda i: (-float(maps.flatten()[i]), i))
    mask = torch.zeros(maps.numel())
    mask[order[:count]] = 1
    return mask.view(maps.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_masks_keep_the_first_pixels(dtype, device):
    maps = torch.randint(-2, 3, (3, 7, 9)).to(dtype)  # mostly ties
    maps[0] = 5  # nothing but ties
    masks = quantile_masks(maps.to(device), SHARES)
    counts = [0, 0, 6, 16, 32, 49, 62, 63]  # 63 q with halves rounded up: 0.252, 6.3, 15.75, 31.5, 48.51, 62.37
    assert masks.dtype == dtype
    assert masks.shape == (3, 8, 7, 9)
    for b, row in enumerate(masks.cpu()):
        for mask, count in zip(row, counts, strict=True):
            assert torch.equal(mask.float(), kept(maps[b], count))


def test_masks_are_nested_and_shared_by_all_forms(device):
    maps = torch.randn(2, 5, 6, device=device)
    shares = torch.linspace(0, 1, 31)
    masks = quantile_masks(maps, shares)
    assert torch.equal(masks.sum((2, 3)).cpu(), torch.arange(31.0).expand(2, 31))
    assert (masks[:, 1:] >= masks[:, :-1]).all()
    assert torch.equal(quantile_masks(maps[:, None], shares), masks)
    channels = torch.stack((maps - 1, torch.ones_like(maps)), 1)
    for temperature in (None, 0.5):
        summed = quantile_masks(channels, SHARES, temperature=temperature)
        assert torch.equal(summed, quantile_masks(channels.sum(1), SHARES, temperature=temperature))
    assert xaifast.quantile_masks is quantile_masks


def test_channels_are_summed_without_new_ties():
    maps = torch.zeros(1, 3, 1, 4, dtype=torch.bfloat16)
    maps[0, 0], maps[0, 1, 0] = 256, torch.tensor([0.0, 0.25, 0.5, 0.75])  # bfloat16 has steps of 2 there
    assert quantile_masks(maps, [0.25, 0.5])[0, :, 0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-4, 0.01, 0.3])
def test_soft_masks_are_hard_outside_the_band(temperature, dtype, device):
    maps = torch.randn(4, 11, 13, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    soft = quantile_masks(maps, SHARES, temperature=temperature)
    hard = quantile_masks(maps, SHARES)
    assert soft.dtype == dtype
    flat = maps.flatten(1).double()
    ordered = flat.sort(1, descending=True).values
    for j, q in enumerate(SHARES):
        count = math.floor(q * 143 + 0.5)
        if count in (0, 143):
            assert torch.equal(soft[:, j], hard[:, j])
            continue
        threshold = (ordered[:, count - 1] + ordered[:, count]) / 2
        distance = (flat - threshold[:, None]).abs().view(maps.shape)
        difference = (soft[:, j].double() - hard[:, j].double()).abs()
        outside = distance >= BAND * temperature * 1.001  # a little farther: the threshold itself is rounded
        assert (difference[outside] <= BAND_ERROR).all()
        exact = torch.sigmoid((flat - threshold[:, None]) / temperature).view(maps.shape)
        precise = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        tolerance = (
            torch.finfo(dtype).eps + 4 * precise / temperature
        )  # values up to 4, slope up to 1/4, thrice rounded
        torch.testing.assert_close(soft[:, j].double(), exact, rtol=0, atol=tolerance)
    assert 1 / (1 + math.exp(BAND)) <= BAND_ERROR


def test_soft_masks_tend_to_the_hard_ones_but_for_ties_at_the_boundary():
    maps = torch.tensor([[[3.0, 1.0, 1.0], [1.0, 0.0, -2.0]]])
    soft = quantile_masks(maps, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6], temperature=1e-3)[0].flatten(1)
    assert soft.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 0.5, 0.5, 0.5, 0, 0],
        [1, 0.5, 0.5, 0.5, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]
    constant = quantile_masks(torch.full((1, 4, 4), 7.0), [0, 0.3, 1], temperature=2.0)[0]
    assert [mask.unique().tolist() for mask in constant] == [[0], [0.5], [1]]


def test_a_default_device_changes_nothing():
    maps = torch.randn(1, 3, 3)
    for temperature in (None, 0.5):
        expected = quantile_masks(maps, SHARES, temperature=temperature)
        with torch.device("meta"):
            assert torch.equal(quantile_masks(maps, SHARES, temperature=temperature), expected)


def test_huge_values():
    maps = torch.tensor([[[3e38, 2e38, -3e38, -3.1e38]]])
    assert (
        quantile_masks(maps, [0.25, 0.5, 0.75], temperature=1.0).tolist()
        == quantile_masks(maps, [0.25, 0.5, 0.75]).tolist()
    )
    assert quantile_masks(torch.tensor([[[math.inf, 0.0, -math.inf]]]), [1 / 3])[0, 0].tolist() == [[1, 0, 0]]


def test_gradients(device):
    maps = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda a: quantile_masks(a, SHARES, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, maps)
    assert torch.autograd.gradgradcheck(function, maps)
    channels = torch.randn(2, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(function, channels)
    weights = torch.randn(2, 8, 3, 4, dtype=torch.float64, device=device)
    (function(maps) * weights).sum().backward()
    assert maps.grad.abs().sum() > 0
    assert (maps.grad.sum((1, 2)).abs() < 1e-12).all()  # adding a constant moves the thresholds too


def test_gradients_at_ties_are_finite():
    maps = torch.zeros(1, 3, 3, requires_grad=True)
    (quantile_masks(maps, [0, 0.5, 1], temperature=0.1) * torch.randn(3, 3, 3)).sum().backward()
    assert maps.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_compile(device):
    maps = torch.randn(3, 2, 4, 5, device=device)
    for temperature in (None, 0.3):
        function = lambda a, t=temperature: quantile_masks(a, SHARES, temperature=t)  # noqa: E731
        expected = torch.stack([function(a) for a in maps])
        torch.testing.assert_close(torch.vmap(function)(maps), expected)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(maps[0]), expected[0])
        given = torch.compile(quantile_masks, fullgraph=True, backend="aot_eager")
        shares = torch.tensor(SHARES, dtype=torch.float64, device=device)
        torch.testing.assert_close(given(maps[0], shares, temperature=temperature), expected[0])
    loss = lambda a: (quantile_masks(a, SHARES, temperature=0.3) ** 2).sum()  # noqa: E731
    leaf = maps[0].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(maps[0]), leaf.grad)


def network(side=6, n_classes=3):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(n_classes, 2 * side * side, generator=generator, dtype=torch.float64)
    return lambda rows: (torch.tanh(rows.flatten(1)) @ weight.T).softmax(-1)[:, 0]


def areas(model, x, base, masks, shares):
    """Insertion and deletion areas [B] of images under masks [B, Q, H, W]."""
    pixels = torch.arange(masks[0, 0].numel()).view(masks.shape[-2:])
    means = []
    for m in (masks, 1 - masks):
        rows = blend_inputs(x, m.flatten(2), pixels, base)  # [B, Q, C, H, W]
        means.append(torch.trapezoid(model(rows.flatten(0, 1)).view(rows.shape[:2]), shares))
    return means


def test_areas_tend_to_those_of_the_curves():
    x, base = torch.randn(2, 2, 6, 6, dtype=torch.float64), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    maps, model = torch.randn(2, 6, 6, dtype=torch.float64), network()
    counts = list(range(0, 37, 4))
    shares = torch.tensor(counts, dtype=torch.float64) / 36
    rows = perturb_by_rank(
        x, rank_features(maps), insertion_counts=counts, deletion_counts=counts, insertion_baseline=base,
        deletion_baseline=base,
    )  # fmt: skip
    values = model(rows.flatten(0, 1)).view(2, 2, len(counts))
    hard = torch.trapezoid(values, shares)  # [B, insertion | deletion]
    errors = []
    for temperature in (0.3, 1e-6):
        soft = areas(model, x, base, quantile_masks(maps, shares, temperature=temperature), shares)
        errors.append((torch.stack(soft, 1) - hard).abs().max())
    assert errors[0] > 1e-4  # the limit is one
    assert errors[1] < 1e-12
    exact = areas(model, x, base, quantile_masks(maps, shares), shares)
    torch.testing.assert_close(torch.stack(exact, 1), hard)


@pytest.mark.parametrize("kind", [0, 1])
def test_descent_on_an_attribution_improves_its_hard_area(kind):
    x, base, model = torch.randn(2, 2, 6, 6, dtype=torch.float64), torch.zeros(2, 6, 6, dtype=torch.float64), network()
    shares = torch.linspace(0, 1, 10, dtype=torch.float64)
    maps = torch.randn(2, 6, 6, dtype=torch.float64).requires_grad_()
    before = areas(model, x, base, quantile_masks(maps.detach(), shares), shares)[kind]
    optimizer = torch.optim.Adam([maps], lr=0.05)
    sign = -1 if kind == 0 else 1
    for _ in range(60):
        optimizer.zero_grad()
        area = areas(model, x, base, quantile_masks(maps, shares, temperature=0.2), shares)[kind]
        (sign * area.sum()).backward()
        optimizer.step()
    after = areas(model, x, base, quantile_masks(maps.detach(), shares), shares)[kind]
    assert (sign * (after - before) < -0.05).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], [0.5]), TypeError, "must be a floating tensor, got list"),
        ((torch.zeros(1, 2, 2, dtype=torch.int64), [0.5]), TypeError, "got torch.int64; convert"),
        ((torch.zeros(2, 2), [0.5]), ValueError, r"must be \[B, H, W\] or \[B, C, H, W\] .* got \[2, 2\]"),
        ((torch.zeros(1, 0, 2, 2), [0.5]), ValueError, r"got \[1, 0, 2, 2\]"),
        ((torch.zeros(2, 0, 4), [0.5]), ValueError, r"at least one pixel, got \[2, 0, 4\]"),
        ((torch.zeros(1, 2, 2), 0.5), ValueError, r"one or more shares \[Q\] .* got 0.5"),
        ((torch.zeros(1, 2, 2), torch.zeros(1, 1)), ValueError, r"one or more shares \[Q\]"),
        ((torch.zeros(1, 2, 2), [0.5, 1.5]), ValueError, "between 0 and 1, got"),
        ((torch.zeros(1, 2, 2), [math.nan]), ValueError, "between 0 and 1"),
        ((torch.zeros(1, 2, 2), []), ValueError, "one or more shares"),
        ((torch.full((1, 2, 2), math.nan), [0.5]), ValueError, "must not be NaN"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"xaifast.quantile_masks: .*{message}"):
        quantile_masks(*arguments)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, True, "soft"])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number or None"):
        quantile_masks(torch.zeros(1, 2, 2), [0.5], temperature=temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_soft_masks_refuse_what_has_no_threshold(value):
    with pytest.raises(ValueError, match="must be finite where masks are soft"):
        quantile_masks(torch.tensor([[[0.0, value]]]), [0.5], temperature=1.0)
