"""Figures show the numbers they are given: colours, bar lengths, scales and texts are read back from them."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

import xaifast

pytest.importorskip("matplotlib")

from matplotlib import image as mpl_image

from xaifast import figures


def texts(figure):
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in found)


def pictures(figure):
    """Arrays of all images drawn, in drawing order."""
    return [np.asarray(i.get_array()) for axis in figure.findobj(lambda a: hasattr(a, "images")) for i in axis.images]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return mpl_image.imread(buffer)


def test_signed_limit_is_robust_and_never_zero():
    values = torch.ones(1000)
    values[0] = -1000.0
    assert figures.signed_limit(values) == 1.0
    assert figures.signed_limit(torch.zeros(5)) == 1.0
    assert figures.signed_limit(torch.tensor([torch.nan])) == 1.0
    sparse = torch.zeros(10_000)
    sparse[7] = -3.0
    assert figures.signed_limit(sparse) == 3.0


def test_signed_rgba():
    rgba = figures.signed_rgba(torch.tensor([-4.0, -1.0, 0.0, 2.0, 9.0, torch.nan]), 4.0)
    assert rgba[:, 3].tolist() == [255, 64, 0, 128, 255, 0]
    assert rgba[0, :3].tolist() == list(figures.NEGATIVE) and rgba[3, :3].tolist() == list(figures.POSITIVE)


def test_display_image():
    inside = torch.rand(3, 4, 5)
    assert np.allclose(figures.display_image(inside), inside.permute(1, 2, 0))
    assert np.allclose(figures.display_image(inside[:2]), inside[:2].mean(0), atol=1e-6)
    shown = figures.display_image(torch.linspace(-2, 3, 10_000).reshape(100, 100))
    assert shown.min() == 0 and shown.max() == 1 and abs(shown.mean() - 0.5) < 1e-3
    assert (figures.display_image(torch.full((1, 2, 2), 7.0)) == 0.5).all()
    with pytest.raises(ValueError, match=r"\[H, W\].*got shape \(3,\).*batch axis"):
        figures.display_image(torch.ones(3))


def image_result(target=1, batch=2, **kwargs):
    torch.manual_seed(0)
    weight = torch.randn(64, 3)
    x = torch.rand(batch, 1, 8, 8)
    mask = xaifast.grid_mask((8, 8), 4)
    return xaifast.kernel_shap(
        lambda x: (x.flatten(1) @ weight).tanh(), x, feature_mask=mask, target=target, **{"n_samples": 14} | kwargs
    ), mask


def test_plot_draws_the_values_over_the_images():
    result, mask = image_result()
    figure = result.plot()
    drawn = [a for a in pictures(figure) if a.ndim == 3]
    limit = figures.signed_limit(result.values[:, mask])
    assert len(drawn) == 2
    for i in range(2):
        assert np.array_equal(drawn[i], figures.signed_rgba(result.values[i][mask], limit))
    errors = [a for a in pictures(figure) if a.ndim == 2 and np.allclose(a, result.std_errors[1][mask])]
    assert len(errors) == 1
    assert "Shapley value of output 1" in texts(figure) and "standard error" in texts(figure)
    assert png(figure).std() > 0.05


def test_plot_chooses_inputs_and_outputs():
    result, mask = image_result(target=None, batch=3)
    figure = result.plot(2)
    best = int(result.full_values[2].argmax())
    assert f"Shapley value of output {best}" in texts(figure) and "input 2" in texts(figure)
    values = result.values[2, :, best][mask]
    overlay = next(a for a in pictures(figure) if a.ndim == 3)
    assert np.array_equal(overlay, figures.signed_rgba(values, figures.signed_limit(values)))
    figure = result.plot([0, -1], output=0)
    assert "Shapley value of output 0" in texts(figure) and "input 2" in texts(figure)
    assert "input 1" not in texts(figure)
    assert len([a for a in pictures(image_result(batch=6)[0].plot(max_items=5)) if a.ndim == 3]) == 5


def test_plot_takes_any_integer_and_all_inputs_that_are_named():
    result = xaifast.kernel_shap(lambda x: torch.stack((x[:, 0], -x[:, 0]), 1), torch.rand(10, 3), n_samples=8)
    for index in (3, np.int64(3), torch.tensor(3), [3], np.array([3])):
        assert "input 3" in texts(result.plot(index, output=np.int64(1)))
    assert "input 9" in texts(result.plot(range(10))) and "input 9" not in texts(result.plot())
    with pytest.raises(TypeError):
        result.plot([0.7])


def test_plot_without_standard_errors():
    result, _ = image_result(n_samples=16)
    assert result.estimator == "exact" and "standard error" not in texts(result.plot())
    result, _ = image_result(n_samples=6)
    assert result.std_errors.isnan().all()
    assert "too few for standard errors" in texts(result.plot())


def test_plot_sums_players_of_channels():
    x = torch.rand(1, 3, 2, 2)
    weight = torch.arange(12.0) - 4
    result = xaifast.kernel_shap(lambda x: x.flatten(1) @ weight, x, n_samples=60)
    overlay = next(a for a in pictures(result.plot()) if a.ndim == 3 and a.shape[-1] == 4)
    maps = (x * weight.reshape(3, 2, 2)).sum(1)[0]
    assert (
        np.abs(overlay[..., 3].astype(float) - figures.signed_rgba(maps, figures.signed_limit(maps))[..., 3]).max() <= 1
    )
    assert np.array_equal(overlay[..., 0] == figures.POSITIVE[0], maps >= 0)


def test_plot_superpixels_and_zero_values():
    segments = torch.stack([torch.zeros(4, 4, dtype=torch.long), xaifast.grid_mask((4, 4), 2)]).unsqueeze(1)
    result = xaifast.kernel_shap(
        lambda x: x.sum((1, 2, 3)), torch.ones(2, 1, 4, 4), feature_mask=segments, n_samples=16
    )
    first, second = [a[..., 3] for a in pictures(result.plot()) if a.ndim == 3]
    assert (first == 255).all() and (second == 64).all()
    result = xaifast.kernel_shap(lambda x: 0 * x.sum((1, 2, 3)), torch.ones(1, 1, 4, 4), n_samples=60)
    assert all((a[..., 3] == 0).all() for a in pictures(result.plot()) if a.ndim == 3)
    png(result.plot())


def bars(figure):
    return [(patch.get_x(), patch.get_width()) for axis in figure.axes for patch in axis.patches]


def test_plot_tables_as_bars_from_base_to_full():
    weight = torch.tensor([1.0, -3.0, 2.0])
    x = torch.tensor([[1.0, 1.0, 1.0]])
    result = xaifast.kernel_shap(lambda x: x @ weight + 5, x, n_samples=8)
    figure = result.plot(names=["small", "big & negative", "middle"])
    assert np.allclose(bars(figure), [(5, -3), (2, 2), (4, 1)], atol=1e-5)
    shown = texts(figure)
    assert shown.index("big & negative = 1") < shown.index("middle = 1") < shown.index("small = 1")
    assert "base 5" in shown and "full 5" in shown
    png(figure)


def test_bars_sum_the_rest():
    values = torch.arange(1.0, 21.0)[None]
    figure = figures.bar_figure(values, names=[f"f{i}" for i in range(20)], max_bars=5)
    assert [w for _, w in bars(figure)] == [20, 19, 18, 17, 16, 120]
    assert "15 others" in texts(figure)
    one_more = figures.bar_figure(values[:, :6], names=list("abcdef"), max_bars=5)
    assert len(bars(one_more)) == 6 and "others" not in texts(one_more)


def test_other_inputs_become_bars():
    def model(tokens, row):
        return tokens.sum((1, 2)) + row.sum(1)

    mask = (torch.arange(3)[:, None], torch.tensor([3, 3]))
    result = xaifast.kernel_shap(model, (torch.ones(1, 3, 4), torch.ones(1, 2)), feature_mask=mask, n_samples=16)
    assert np.allclose([w for _, w in bars(result.plot())], [4, 4, 4, 2], atol=1e-5)
    result = xaifast.kernel_shap(
        lambda t: t.sum((1, 2)), torch.ones(1, 3, 4), feature_mask=torch.arange(3)[:, None], n_samples=8
    )
    assert "player 2" in texts(result.plot())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(index=5), IndexError, "0..1, got 5"),
        (dict(index=[]), IndexError, "0..1"),
        (dict(output=0), ValueError, "target=None"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=f"xaifast.ShapleyResult.plot: .*{message}"):
        image_result()[0].plot(**arguments)


def test_bad_output_and_names():
    result = xaifast.kernel_shap(lambda x: x, torch.ones(2, 3), n_samples=8)
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        result.plot(output=3)
    with pytest.raises(ValueError, match=r"one name a player \(3\), got 2"):
        result.plot(names=["a", "b"])


def test_no_global_state():
    result, _ = image_result()
    before = "matplotlib.pyplot" in sys.modules
    assert result.plot()._repr_png_()[:4] == b"\x89PNG"
    assert ("matplotlib.pyplot" in sys.modules) == before
