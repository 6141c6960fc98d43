"""Curves over patches, superpixels and tokens; threshold curves; wrong input."""

from __future__ import annotations

import pytest
import torch
from games import IntegerNet, integers
from test_curves import Recorder, plain_area, plain_counts, plain_order, plain_rows
from torch import nn

import xaifast
from xaifast import insertion_deletion
from xaifast.metrics import threshold_curves
from xaifast.metrics._features import resolve_features
from xaifast.models import VisionTransformer
from xaifast.removal import TokenDrop, TokenSelect

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size, patch", [((6, 6), 3), ((7, 5), 3)])
def test_patch_maps_equal_their_pixel_maps(dtype, size, patch):
    x, mask = integers(3, 2, *size), xaifast.grid_mask(size, patch)
    n = int(mask.max()) + 1
    scores = torch.rand(3, n, dtype=dtype) + 0.1
    scores[:, -1] = scores[:, 1] = scores[:, 0]  # ties, between players of different sizes too
    assert torch.equal(resolve_features(scores[:, mask], x, mask, "test").scores, scores.double())
    net = IntegerNet(2 * mask.numel())
    runs = [
        insertion_deletion(net, x, given, feature_mask=mask, score="logit", target=1, steps=n, insertion_baseline=0.0)
        for given in (scores, scores[:, mask], scores[:, None, mask], scores[:, mask][:, None].expand(-1, 2, -1, -1))
    ]
    for run in runs[1:]:
        assert torch.equal(run.insertion, runs[0].insertion) and torch.equal(run.deletion, runs[0].deletion)
    for b in range(3):
        rows = plain_rows(x[b], mask.expand(2, *size), torch.zeros(2, *size), range(n + 1), "deletion",
                          plain_order(scores[b].tolist()))  # fmt: skip
        assert torch.equal(runs[0].deletion[b], net(rows)[:, 1])


def test_maps_are_averaged_over_players():
    x, mask = torch.rand(2, 3, 4, 6), torch.tensor([0, 1, 1, 2, 2, 2]).expand(4, 6)
    maps = torch.rand(2, 3, 4, 6)
    for given, summed in ((maps, maps.sum(1)), (maps[:, :1], maps[:, 0]), (maps[:, 1], maps[:, 1])):
        got = resolve_features(given, x, mask, "test").scores
        expected = torch.stack([summed[:, mask == m].mean(1) for m in range(3)], 1)
        torch.testing.assert_close(got.float(), expected)
    by_channel = torch.arange(3).view(3, 1, 1)  # a player a channel
    got = resolve_features(maps, x, by_channel, "test").scores
    torch.testing.assert_close(got.float(), maps.mean((2, 3)))
    got = resolve_features(maps[:, 0], x, by_channel, "test").scores
    assert torch.equal(got[:, 0], got[:, 2])
    table = resolve_features(torch.tensor([[1.0, 2.0, 6.0]]), torch.rand(1, 3), torch.tensor([0, 1, 1]), "test")
    assert table.scores.tolist() == [[1.0, 4.0]]


def test_channels_are_summed_in_float64():
    values = torch.tensor([1e8, 1.0, -1e8]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    values[0, 1, 0, 1] = 2.0
    features = resolve_features(values, torch.rand(1, 3, 1, 2), None, "test")
    assert features.scores.tolist() == [[1.0, 2.0]]


def superpixels():
    """Three inputs with 5, 3 and 4 of 6 players."""
    masks = torch.tensor([[0, 1, 2, 4, 5], [1, 3, 4, 4, 1], [5, 0, 2, 3, 3]])
    return masks[:, None, None, :].expand(-1, 1, 4, -1).contiguous()


@pytest.mark.parametrize("order", ["most", "least", "random"])
@pytest.mark.parametrize("nan", [False, True])
def test_absent_players_are_no_steps(order, nan):
    x, mask, scores = integers(3, 2, 4, 5), superpixels(), integers(3, 6, seed=1)
    present = [sorted(set(mask[b].flatten().tolist())) for b in range(3)]
    if nan:
        for b in range(3):
            scores[b, [m for m in range(6) if m not in present[b]]] = torch.nan
    net = IntegerNet(40)
    settings = dict(order=order, score="logit", target=2, steps=4)
    base = integers(2, 4, 5, seed=2)
    bases = dict(insertion_baseline=base, deletion_baseline=0.0)
    curves = insertion_deletion(net, x, scores, feature_mask=mask, **settings, **bases)
    assert curves.fractions.shape == (3, 5)
    ranks = resolve_features(scores, x, mask, "test").ranks(order)
    for b in range(3):
        n = len(present[b])
        assert sorted(ranks[b, present[b]].tolist()) == list(range(n))
        counts = plain_counts(n, 4)
        torch.testing.assert_close(curves.fractions[b], torch.tensor(counts) / n, check_dtype=False)
        if order != "random":
            places = [present[b][i] for i in plain_order(scores[b, present[b]].tolist(), order)]
            where = mask[b].expand(2, -1, -1)
            insertion = net(plain_rows(x[b], where, base, counts, "insertion", places))[:, 2]
            deletion = net(plain_rows(x[b], where, torch.zeros(2, 4, 5), counts, "deletion", places))[:, 2]
            assert torch.equal(curves.insertion[b], insertion) and torch.equal(curves.deletion[b], deletion)
            area = plain_area(deletion.tolist(), [k / n for k in counts])
            assert curves.deletion_auc[b].item() == pytest.approx(area, rel=1e-12)
        assert curves.deletion[b, -1] == net(torch.zeros(1, 2, 4, 5))[0, 2]
    some = slice(1, 3)
    part = insertion_deletion(net, x[some], scores[some], feature_mask=mask[some], first_index=1, **settings, **bases)
    assert torch.equal(part.deletion, curves.deletion[some]) and torch.equal(part.insertion, curves.insertion[some])
    assert xaifast.Curves.cat([curves, part]).fractions.shape == (5, 5) and curves.mean().fractions.shape == (5,)


def test_shared_masks_after_per_input_ones_join():
    x, mask = integers(2, 1, 4, 5), superpixels()[:2]
    net = IntegerNet(20)
    settings = dict(score="logit", target=0, steps=2)
    ragged = insertion_deletion(net, x, integers(2, 6), feature_mask=mask, **settings)
    shared = insertion_deletion(net, x, integers(2, 2), feature_mask=xaifast.grid_mask((4, 5), 4), **settings)
    both = xaifast.Curves.cat([shared, ragged])
    assert torch.equal(both.fractions[:2], shared.fractions.expand(2, 3))
    assert torch.equal(both.fractions[2:], ragged.fractions)


def vit(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(16, 4, 5, dim=32, depth=2, heads=4)
        with torch.no_grad():  # as-initialised transformers hardly look at their patches, which hides mistakes
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("patch, steps", [(4, 16), (4, 5), (8, 3)])
def test_token_select_equals_pixels(dtype, patch, steps):
    model, mask = vit(dtype), xaifast.grid_mask((16, 16), patch)
    x, scores = torch.rand(3, 3, 16, 16).to(dtype), torch.randn(3, int(mask.max()) + 1)
    for bases in ({}, dict(insertion_baseline=0.5, deletion_baseline=0.5), dict(insertion_baseline="noise")):
        pixel, token = (
            insertion_deletion(
                model, x, scores, feature_mask=mask, steps=steps, removal=removal, score="logit", batch_size=7, **bases
            )
            for removal in (None, TokenSelect())
        )
        limit = TOLERANCE[dtype] * float(pixel.deletion.abs().max())
        assert float((pixel.deletion - token.deletion).abs().max()) <= limit
        assert float((pixel.insertion - token.insertion).abs().max()) <= limit
        assert torch.equal(pixel.targets, token.targets) and torch.equal(pixel.fractions, token.fractions)
        assert float(pixel.deletion.std(1).min()) > 1e-3 and pixel.one_baseline == token.one_baseline
        assert token.n_evaluations - pixel.n_evaluations == (not pixel.one_baseline)  # two evaluators, both clean


@pytest.mark.parametrize("per_input", [False, True])
def test_token_drop_equals_attention_without_the_tokens(per_input):
    model, x = vit(), torch.rand(3, 3, 16, 16).double()
    mask = xaifast.grid_mask((16, 16), 4)
    if per_input:
        mask = torch.stack((mask, xaifast.grid_mask((16, 16), 8), mask.flip(0)))[:, None]
    scores = torch.randn(3, 16)
    curves = insertion_deletion(model, x, scores, feature_mask=mask, steps=4, removal=TokenDrop(), score="logit")
    for b in range(3):
        ids = mask[b, 0] if per_input else mask
        players = ids[::4, ::4].flatten()
        n = len(players.unique())
        counts, places = plain_counts(n, 4), plain_order(scores[b, :n].tolist())
        for s, k in enumerate(counts):
            for curve, chosen in ((curves.insertion, places[:k]), (curves.deletion, places[k:])):
                kept = torch.isin(players, torch.tensor(chosen, dtype=torch.long))
                expected = masked_vit(model, x[b : b + 1], kept)[0, curves.targets[b]]
                torch.testing.assert_close(curve[b, s], expected, rtol=1e-11, atol=1e-11)
    assert curves.one_baseline


def masked_vit(model, x, kept):
    """The model with the tokens of absent patches cut out behind its embedding."""
    embedding = next(m for m in model.modules() if type(m).__name__ == "PatchEmbeddings")
    keep = torch.cat((torch.ones(1, dtype=torch.bool), kept))
    with embedding.register_forward_hook(lambda module, args, out: out[:, keep]), torch.no_grad():
        return model(x)


def test_token_drop_takes_both_curves_together():
    model, x, shapes = vit(), torch.rand(4, 3, 16, 16).double(), []
    first = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    with first.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2]))):
        insertion_deletion(
            model, x, torch.randn(4, 16), feature_mask=xaifast.grid_mask((16, 16), 4), steps=4, removal=TokenDrop(),
            batch_size=64,
        )  # fmt: skip
    # The clean inputs; all of them without a patch; with 4, 8 and 12 patches, inserted or left.
    assert shapes == [(4, 17), (4, 1), (8, 5), (8, 9), (8, 13)]


def test_token_drop_takes_the_default_baselines():
    model, x, scores = vit(), torch.rand(2, 3, 16, 16).double(), torch.randn(2, 16)
    settings = dict(feature_mask=xaifast.grid_mask((16, 16), 4), steps=4, removal=TokenDrop())
    expected = insertion_deletion(model, x, scores, **settings)
    for insertion, deletion in (("blur", 0.0), (0.0, 0.0), (0, None), (None, 0)):
        curves = insertion_deletion(
            model, x, scores, insertion_baseline=insertion, deletion_baseline=deletion, **settings
        )
        assert torch.equal(curves.insertion, expected.insertion) and torch.equal(curves.deletion, expected.deletion)
        assert curves.one_baseline and curves.n_evaluations == expected.n_evaluations
    assert torch.equal(xaifast.metrics.srg(model, x, scores, baseline=0.0, **settings), expected.srg)


def test_removal_makes_both_baselines():
    x = integers(2, 1, 6, 6)
    model = Recorder()
    curves = insertion_deletion(model, x, x, target=None, score="logit", steps=2, removal=lambda t: 2 * t + 1)
    rows = torch.cat(model.rows)[2:].view(2, 3, 1, 6, 6)
    assert curves.one_baseline and torch.equal(rows[:, -1], 2 * x + 1)
    blurred = Recorder()
    assert insertion_deletion(blurred, x, x, target=None, score="logit", removal="blur", steps=2).srg is not None
    rows = torch.cat(blurred.rows)[2:].view(2, 3, 1, 6, 6)
    torch.testing.assert_close(rows[:, -1], xaifast.removal.gaussian_blur(x))


def test_threshold_curves_by_hand():
    x, mask = torch.randn(4, 2, 6, 4), xaifast.grid_mask((6, 4), 2)
    a = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]) * torch.ones(4, 1)
    a[1] = a[1].flip(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    target, thresholds = torch.tensor([0, 1, 2, 1]), [i / 10 for i in range(11)]
    curves = threshold_curves(model, x, a, target, feature_mask=mask, batch_size=7)
    assert torch.equal(curves.thresholds, torch.tensor(thresholds)) and curves.n_evaluations == 23
    for b in range(4):
        for t, at in enumerate(torch.tensor(thresholds)):
            for kind, removed in (("insertion", a[b] < at), ("deletion", a[b] > at)):
                with torch.no_grad():
                    out = model(torch.where(removed[mask], 0.0, x[b])[None])[0]
                probability = getattr(curves, f"{kind}_probability")[b, t]
                torch.testing.assert_close(probability, out.softmax(0)[target[b]])
                assert getattr(curves, f"{kind}_correct")[b, t] == (out.argmax() == target[b])
                torch.testing.assert_close(getattr(curves, f"{kind}_masked")[b, t], removed.float().mean())
    assert bool((curves.insertion_masked[:, 0] == 0).all()) and bool((curves.deletion_masked[:, -1] == 0).all())
    assert repr(curves).startswith("ThresholdCurves(4 inputs, 11 thresholds")


def test_threshold_curves_of_superpixels_and_tokens():
    x, mask = integers(3, 1, 4, 5), superpixels()
    a = torch.rand(3, 6)
    curves = threshold_curves(IntegerNet(20), x, a, "predicted", [0.5], feature_mask=mask)
    for b in range(3):
        present = mask[b].unique()
        torch.testing.assert_close(curves.insertion_masked[b, 0], (a[b, present] < 0.5).double().mean())
    model, x, mask = vit(), torch.rand(2, 3, 16, 16).double(), xaifast.grid_mask((16, 16), 4)
    a = torch.rand(2, 16)
    select, pixels = (
        threshold_curves(model, x, a, 1, [0.2, 0.6], feature_mask=mask, removal=removal)
        for removal in (TokenSelect(), None)
    )
    torch.testing.assert_close(select.deletion_probability, pixels.deletion_probability, rtol=1e-10, atol=1e-12)
    drop = threshold_curves(model, x, a, 1, [0.2, 0.6], feature_mask=mask, removal=TokenDrop())
    expected = masked_vit(model, x[1:], a[1] >= 0.6).softmax(1)[0, 1]
    torch.testing.assert_close(drop.insertion_probability[1, 1], expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="target"):
        threshold_curves(model, x, a, None, feature_mask=mask)
    with pytest.raises(ValueError, match="got a Background"):
        threshold_curves(model, x, a, 0, feature_mask=mask, baselines=xaifast.removal.Background(x))
    with pytest.raises(ValueError, match="thresholds must be finite"):
        threshold_curves(model, x, a, 0, [0.1, torch.nan], feature_mask=mask)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.4"):
        threshold_curves(model, x, a, 5, feature_mask=mask)


class Untouched(nn.Module):
    def forward(self, x):
        raise AssertionError("the model has run")


MAP = torch.rand(2, 6, 6)
NAN = MAP.clone()
NAN[1, 2, 3] = torch.nan
ALL_NAN = MAP.clone()
ALL_NAN[1] = torch.nan
MASK = xaifast.grid_mask((6, 6), 3)


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        (dict(attributions=torch.rand(2, 6, 5)), ValueError, "attributions must be"),
        (dict(attributions=torch.rand(1, 6, 6)), ValueError, "attributions must be"),
        (dict(attributions=torch.rand(2, 2, 6, 6)), ValueError, "attributions must be"),
        (dict(attributions=torch.rand(2, 36)), ValueError, "attributions must be"),
        (dict(attributions=torch.rand(2, 5), feature_mask=MASK), ValueError, r"or \[2, 4\]"),
        (dict(attributions=[[1.0]]), TypeError, "dense real tensor"),
        (dict(attributions=MAP.to(torch.complex64)), TypeError, "dense real tensor"),
        (dict(attributions=MAP.to("meta")), ValueError, "on the inputs' device"),
        (dict(attributions=NAN), ValueError, "1 NaN of 36 features of input 1"),
        (dict(attributions=ALL_NAN), ValueError, "only NaN for input 1"),
        (dict(attributions=ALL_NAN, nan="last"), ValueError, "only NaN for input 1"),
        (dict(nan="first"), ValueError, "nan must be"),
        (dict(inputs=torch.rand(0, 3, 6, 6), attributions=torch.rand(0, 6, 6)), ValueError, "B >= 1"),
        (dict(inputs=(torch.rand(2, 3, 6, 6), torch.rand(2, 4))), ValueError, "must be one tensor"),
        (dict(steps=0), ValueError, r"1\.\.36"),
        (dict(steps=37), ValueError, r"1\.\.36"),
        (dict(steps=5, feature_mask=MASK), ValueError, r"1\.\.4"),
        (dict(steps=2.0), TypeError, "steps must be an int"),
        (dict(steps=True), TypeError, "steps must be an int"),
        (dict(order="lerf"), ValueError, "order must be"),
        (dict(score="prob"), ValueError, "score must be"),
        (dict(compat="captum"), ValueError, "compat must be"),
        (dict(compat="quantus", feature_mask=MASK), ValueError, "feature_mask must be None"),
        (dict(insertion_baseline="blurry"), ValueError, "insertion_baseline must be"),
        (dict(insertion_baseline=lambda x: x[:1]), ValueError, "insertion_baseline must return"),
        (dict(deletion_baseline=torch.zeros(3, 6, 5)), ValueError, "deletion_baseline.*broadcastable"),
        (dict(deletion_baseline=[0.0]), TypeError, "deletion_baseline must be"),
        (dict(inputs=torch.ones(2, 7), attributions=torch.ones(2, 7), insertion_baseline="blur"), ValueError, "images"),
        (dict(removal="blur", deletion_baseline=0.0), ValueError, "must be left out"),
        (dict(removal="smear"), ValueError, "removal must be"),
        (dict(removal=TokenDrop(), feature_mask=MASK, deletion_baseline=1.0), ValueError, "takes no baselines"),
        (dict(removal=TokenDrop(), feature_mask=MASK, deletion_baseline="blur"), ValueError, "takes no baselines"),
        (dict(removal=TokenDrop(), insertion_baseline=torch.zeros(3, 1, 1)), ValueError, "takes no baselines"),
        (dict(removal=TokenSelect()), ValueError, "feature_mask must be given"),
        (dict(feature_mask=torch.tensor([0, 2]).repeat(3)), ValueError, "id 1 of 0..2 occurs nowhere"),
        (dict(target=torch.tensor([1])), ValueError, "target must be"),
        (dict(target="best"), TypeError, "target must be"),
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(order="random", seed=-1), ValueError, "seed must be"),
    ],
)
def test_wrong_input_is_refused_before_the_model_runs(settings, kind, message):
    given = {"inputs": torch.rand(2, 3, 6, 6), "attributions": MAP, **settings}
    with pytest.raises(kind, match=f"^xaifast.insertion_deletion.*{message}"):
        insertion_deletion(Untouched().eval(), **given)


def test_compat_needs_as_many_players_everywhere():
    with pytest.raises(ValueError, match="as many players in every input, got 3 to 5"):
        insertion_deletion(Untouched(), torch.rand(3, 1, 4, 5), torch.rand(3, 6), feature_mask=superpixels(),
                           compat="torchcam")  # fmt: skip


def test_wrong_models_are_refused():
    x = torch.rand(2, 1, 4, 4)
    two = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)).eval()
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.1"):
        insertion_deletion(two, x, x, target=2)
    with pytest.raises(ValueError, match="model with 2 outputs, got None"):
        insertion_deletion(two, x, x, target=None)
    with pytest.raises(ValueError, match="target must be None"):
        insertion_deletion(one, x, x)
    for score in ("softmax", "accuracy"):
        with pytest.raises(ValueError, match="at least two outputs"):
            insertion_deletion(one, x, x, target=None, score=score)
    with pytest.raises(ValueError, match="input 0, deletion point 16 of 16"):
        insertion_deletion(
            lambda rows: rows.sum((1, 2, 3)).log(), x, x, target=None, score="logit", insertion_baseline=0
        )
    with pytest.raises(ValueError, match="training mode"):
        insertion_deletion(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 2)), x, x)


def test_nan_goes_last_on_request():
    x = torch.arange(1.0, 5.0).view(1, 4)
    maps = torch.tensor([[1.0, torch.nan, 2.0, torch.nan]])
    for order, expected in (("most", [10, 7, 6, 4, 0]), ("least", [10, 6, 4, 3, 0])):
        curves = insertion_deletion(Recorder(), x, maps, target=None, score="logit", nan="last", order=order)
        assert curves.deletion[0].tolist() == expected
