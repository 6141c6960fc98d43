"""What the evaluation part of a report says is what the store holds; rankings are those of a plain bootstrap."""

import re

import numpy as np
import pytest
import torch
from test_report import make_run, page, parse, picture

from xaifast.evaluation import rank_methods, read_curves, read_scores, write_scores
from xaifast.report import write_report
from xaifast.report.evaluation import EvaluationPart, _Axis
from xaifast.run import open_run
from xaifast.store import Store

METHODS = ["kernel-shap", "random", "rise"]
N, S = 12, 5


def make_evaluation(path, *, n=N, methods=METHODS, order="most", finished=None, skipped=(), srg=False, **changes):
    """An evaluation with random numbers; ``changes`` replaces its tensors."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.rand(n, len(methods), *shape, generator=generator)

    tensors = {
        "label": torch.arange(n) % 3,
        "predicted": torch.arange(n) % 3,
        "target": torch.arange(n) % 3,
        "fractions": torch.linspace(0, 1, S + 1, dtype=torch.float64).expand(n, -1),
        "insertion": random(S + 1),
        "deletion": random(S + 1),
        "insertion_auc": random(),
        "deletion_auc": random(),
        **({"srg": random()} if srg else {}),
        "sparsity": random(),
    } | changes
    names = ("insertion_auc", "deletion_auc", "srg", "sparsity", "macro_iou")
    settings = {
        "methods": list(methods), "scores": [name for name in names if name in tensors], "level": "players", "steps": S,
        "features": "4 patches of 4 × 4 pixels", "curve_evaluations": 11, "order": order, "score": "softmax",
        "target": "predicted", "removal": "baseline", "insertion_baseline": "a blur", "deletion_baseline": "0",
        "segmentation": {"format": "pets: <trimaps>", "patch": 4},
    }  # fmt: skip
    manifest = {
        "kind": "evaluation", "method": "insertion-deletion", "n_items": n, "chunk_size": 4, "seed": 3, "rows": 64,
        "model": {"spec": "hf:some/model", "sha256": "a1" * 32}, "data": {"spec": "imagefolder:pets", "sha256": "b2"},
        "settings": settings, "versions": {"torch": "9.8.7"}, "threads": 2, "device": "cpu",
        "command": "xaifast evaluate 'a b'",
    }  # fmt: skip
    store = Store(path, manifest, {})
    for chunk in range(store.n_chunks) if finished is None else finished:
        start, stop = store.bounds(chunk)
        part = {name: x[start:stop].clone() for name, x in tensors.items()}
        for i in set(skipped) & set(range(start, stop)):
            for x in part.values():
                x[i - start] = torch.nan if x.is_floating_point() else -1
        reasons = {i: "broken" for i in skipped if start <= i < stop}
        store.write(chunk, part, [f"pets/{i}.png" for i in range(start, stop)], reasons)
    store.close()
    return store


def bootstrap(scores, larger, n_resamples, seed):
    """The same draws, one resample after the other."""
    rng, n = np.random.Generator(np.random.Philox(seed)), len(scores)
    means = np.array([scores[rng.integers(0, n, n)].mean(0) for _ in range(n_resamples)])
    best = scores.mean(0).argmax() if larger else scores.mean(0).argmin()
    winners = means.argmax(1) if larger else means.argmin(1)
    first = np.bincount(winners, minlength=scores.shape[1]) / n_resamples
    return first, np.quantile(means - means[:, [best]], (0.025, 0.975), axis=0), best


@pytest.mark.parametrize("larger", [True, False])
def test_ranking_is_a_paired_bootstrap(larger):
    scores = np.random.default_rng(0).normal(size=(17, 4)) + 2 * np.random.default_rng(1).normal(size=(17, 1))
    ranking = rank_methods(scores, larger_is_better=larger, n_resamples=300, seed=5)
    first, (low, high), best = bootstrap(scores, larger, 300, 5)
    assert ranking.best == best and ranking.n == 17
    assert np.allclose(ranking.first, first) and np.allclose(ranking.mean, scores.mean(0))
    assert np.allclose(ranking.low, low) and np.allclose(ranking.high, high)
    assert np.allclose(ranking.difference, scores.mean(0) - scores.mean(0)[best])


def test_ranking_does_not_depend_on_blocks(monkeypatch):
    scores = np.random.default_rng(0).normal(size=(9, 3))
    whole = rank_methods(scores, n_resamples=50)
    monkeypatch.setattr("xaifast.evaluation.bootstrap._BLOCK_COUNTS", 20)
    parts = rank_methods(scores, n_resamples=50)
    assert np.allclose(whole.low, parts.low, atol=1e-15) and np.array_equal(whole.first, parts.first)


def test_ranking_of_equal_missing_and_single_scores():
    scores = np.random.default_rng(0).normal(size=(9, 1))
    equal = rank_methods(np.hstack([scores, scores, scores - 1]))
    assert equal.first.tolist() == [0.5, 0.5, 0.0] and equal.low[1] == equal.high[1] == 0
    assert np.allclose(equal.low[2], -1)
    missing = np.hstack([scores, scores + 1])
    missing[3, 0] = np.nan
    ranking = rank_methods(missing)
    assert ranking.n == 8 and np.allclose(ranking.mean[1], np.delete(missing[:, 1], 3).mean())
    none = rank_methods(np.full((2, 2), np.nan))
    assert none.n == 0 and np.isnan([none.mean, none.first, none.high]).all()
    one = rank_methods(np.array([[1.0, 2.0]]))  # shows which is better there, but not how surely
    assert one.best == 1 and one.difference.tolist() == [-1, 0] and np.isnan([one.first, one.low, one.high]).all()
    with pytest.raises(ValueError, match=r"\[n, R\]"):
        rank_methods(np.zeros(3))


def test_reading_leaves_out_what_is_missing(tmp_path):
    store = make_evaluation(tmp_path, finished=[0, 2], skipped=[1, 9])
    scores = read_scores(store)
    assert scores.index.tolist() == [0, 2, 3, 8, 10, 11]
    every = store.tensor("deletion_auc", missing="nan")
    assert np.array_equal(scores.values["deletion_auc"], every[scores.index].numpy())
    mean, band = scores.means("deletion_auc")
    column = every[scores.index, 2].double().numpy()
    assert np.isclose(mean[2], column.mean()) and np.isclose(band[2], 1.96 * column.std(ddof=1) / np.sqrt(6))
    curves = read_curves(store)["rise"]
    assert torch.equal(curves.insertion, store.tensor("insertion", missing="nan")[scores.index, 2])
    assert curves.fractions.dim() == 1
    lines = write_scores(store, tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * 3 and lines[4].startswith("2,pets/2.png,2,2,2,kernel-shap,")
    assert [np.float32(x) for x in lines[4].split(",")[6:]] == [scores.values[name][1, 0] for name in scores.values]


def test_names_of_any_kind_are_written(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    store = make_evaluation(tmp_path / "e", n=1, methods=['a,"b'])
    tensors, notes = store.chunk(0), ['a "quoted",\nbroken \udcff name.png']
    store.chunk_path(0).unlink()
    store = Store(tmp_path / "e", {k: v for k, v in store.manifest.items() if k != "static"}, {})
    store.write(0, tensors, notes)
    store.close()
    text = write_scores(store, tmp_path / "scores.csv").read_text(errors="surrogateescape")
    assert '"a ""quoted"",\nbroken \udcff name.png"' in text and '"a,""b"' in text
    table = parquet.read_table(write_scores(store, tmp_path / "scores.parquet", "parquet"))
    assert table["name"].to_pylist() == ['a "quoted",\nbroken \\udcff name.png']  # Parquet holds valid UTF-8 alone


def report(tmp_path, evaluation, run=None):
    run = make_run(tmp_path / "run") if run is None else run
    path = write_report(run, tmp_path / "report.html", inputs=picture, evaluation=evaluation)
    return path.read_text()


def test_says_what_the_store_holds(tmp_path):
    store = make_evaluation(tmp_path / "evaluation", srg=True)
    html = report(tmp_path, store)
    text = parse(html).plain
    scores = read_scores(store)
    for name, larger in (("insertion_auc", True), ("deletion_auc", False), ("srg", True)):
        ranking = rank_methods(scores.values[name], larger_is_better=larger, seed=3)
        for m in range(3):
            assert f"{ranking.mean[m]:.3f}" in text
            if m != ranking.best:
                gap, low, high = (f"{x:+.3f}".replace("-", "−") for x in (
                    ranking.difference[m], ranking.low[m], ranking.high[m],
                ))  # fmt: skip
                assert f"{gap} [{low}, {high}]" in text
    for expected in (
        "12 inputs", "5 steps over 4 patches of 4 × 4 pixels", "highest attribution first, ties by index",
        "insertion into a blur, deletion to 0", "probability of the predicted class", "9.8.7",
        "xaifast evaluate 'a b'", "pets: <trimaps>", *METHODS,
    ):  # fmt: skip
        assert expected in text, expected
    parsed = parse(html)
    assert "script" not in parsed.tags and all(uri.startswith("data:") for uri in parsed.addresses)
    assert html == report(tmp_path, store, open_run(tmp_path / "run"))


def test_without_evaluation_nothing_is_said(tmp_path):
    assert "evaluation" not in page(make_run(tmp_path / "run"))
    unfinished = make_evaluation(tmp_path / "evaluation", finished=[])
    assert 'id="evaluation"' not in report(tmp_path, unfinished, make_run(tmp_path / "other"))


def part(store):
    return EvaluationPart(store, lambda index: None).content()


def points(path):
    return np.array([[float(x) for x in pair.split()] for pair in re.split("[ML]", path.rstrip("Z"))[1:]])


def test_curves_are_drawn_where_their_numbers_are(tmp_path):
    store = make_evaluation(tmp_path)
    content = part(store)
    left, top, right, bottom = content["frame"]
    for plot, kind in zip(content["plots"], ("insertion", "deletion"), strict=True):
        ticks = {float(text.replace("−", "-")): at for at, text in plot["y"]}
        low, high = min(ticks), max(ticks)
        assert ticks[low] == pytest.approx(bottom) and ticks[high] == pytest.approx(top)
        assert [line["name"] for line in plot["lines"]] == METHODS[::-1]  # the first is drawn last
        for line in plot["lines"]:
            values = store.tensor(kind)[:, METHODS.index(line["name"])].double()
            drawn = points(line["path"])
            assert np.allclose(drawn[:, 0], np.linspace(left, right, S + 1), atol=0.06)
            mean, error = values.mean(0), 1.96 * values.std(0) / np.sqrt(N)
            back = low + (bottom - drawn[:, 1]) / (bottom - top) * (high - low)
            assert np.allclose(back, mean, atol=1e-3)
            band = low + (bottom - points(line["band"])[:, 1]) / (bottom - top) * (high - low)
            assert np.allclose(band[: S + 1], mean + error, atol=1e-3)
            assert np.allclose(band[:S:-1], mean - error, atol=1e-3)


def test_ranks_and_cases_follow_the_order(tmp_path):
    auc = torch.stack([torch.arange(N) / N, 0.5 + torch.arange(N) / N, torch.zeros(N)], 1)
    most = part(make_evaluation(tmp_path / "most", insertion_auc=auc, deletion_auc=auc))
    least = part(make_evaluation(tmp_path / "least", insertion_auc=auc, deletion_auc=auc, order="least"))

    def names(content):
        return [[row["name"] for row in ranking["rows"]] for ranking in content["rankings"]]

    assert names(most) == [["random", "kernel-shap", "rise"], ["rise", "kernel-shap", "random"]]
    assert names(least) == names(most)[::-1]
    assert [ranking["better"] for ranking in least["rankings"]] == ["smaller", "larger"]
    for content in (most, least):  # of kernel-shap; in one by the insertion's area, in the other by the deletion's
        best, worst = ([tile["name"] for tile in group["tiles"]] for group in content["images"])
        assert best == [f"pets/{i}.png" for i in (11, 10, 9, 8)] and worst == [f"pets/{i}.png" for i in (0, 1, 2, 3)]


def test_methods_that_differ_little_are_told_apart(tmp_path):
    auc = torch.rand(N, 1) + torch.tensor([0.0, -2e-4, -3e-4])
    content = part(make_evaluation(tmp_path, insertion_auc=auc))
    rows = {row["name"]: row for row in content["rankings"][0]["rows"]}
    assert rows["random"]["difference"] == "−0.000200 [−0.000200, −0.000200]"
    assert rows["rise"]["mean"] == f"{auc[:, 2].double().mean():.6f}"


def test_one_input_is_no_ranking(tmp_path):
    content = part(make_evaluation(tmp_path, n=1))
    for ranking in content["rankings"]:
        assert "[" not in "".join(row["difference"] for row in ranking["rows"])
        assert all(np.isnan(row["first_share"]) and row["at"][0] is None for row in ranking["rows"])
    assert "100 %" not in parse(report(tmp_path / "r", open_run(tmp_path))).plain.split("ranked first")[1]


def test_curves_of_inputs_are_drawn_on_a_scale_that_holds_them(tmp_path):
    means = 0.5 + torch.rand(N, 3, S + 1) / 100
    insertion = means + torch.where(torch.arange(N) % 2 == 0, 0.4, -0.4)[:, None, None]
    content = part(make_evaluation(tmp_path, insertion=insertion, deletion=means))
    (best, worst) = content["images"]
    assert best["note"].endswith("from 0 to 1")
    for tile in best["tiles"] + worst["tiles"]:
        index = int(re.search(r"\d+", tile["name"])[0])
        drawn = points(tile["curves"]["insertion"])
        assert np.allclose(1 - drawn[:, 1] / 40, insertion[index, 0], atol=0.002)


def test_long_ticks_have_room(tmp_path):
    flat = 0.58 + torch.rand(N, 3, S + 1) / 1000
    content = part(make_evaluation(tmp_path, insertion=flat, deletion=flat))
    texts = [text for _, text in content["plots"][0]["y"]]
    assert max(map(len, texts)) >= 6 and content["frame"][0] >= 6 + 7 * max(map(len, texts))


def test_models_of_one_output_have_no_class(tmp_path):
    store = make_evaluation(tmp_path, target=torch.full((N,), -1))
    assert part(store)["plots"][0]["score"] == "output of the model"


def test_chance_is_grey_and_others_have_colours(tmp_path):
    styles = {method["name"]: method["style"] for method in part(make_evaluation(tmp_path))["methods"]}
    assert styles == {"kernel-shap": "m0", "random": "chance", "rise": "m1"}


def test_segmentations_of_some_images(tmp_path):
    iou = torch.rand(N, 3)
    iou[4] = torch.nan
    content = part(make_evaluation(tmp_path, macro_iou=iou))
    ranking = content["rankings"][-1]
    assert ranking["title"].startswith("Macro IoU") and ranking["n"] == 11
    means = {row["name"]: row["mean"] for row in ranking["rows"]}
    assert means["rise"] == f"{iou[:, 2].double().nanmean():.3f}"
    html = report(tmp_path / "r", open_run(tmp_path))
    assert "11 inputs that have it" in parse(html).plain


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"n": 1},
        {"macro_iou": torch.full((N, 3), torch.nan)},
        {"n": 2, "methods": ["kernel-shap"]}, {"skipped": range(12)}, {"finished": [1]},
        {"insertion": torch.zeros(N, 3, S + 1), "deletion": torch.zeros(N, 3, S + 1)},
        {"methods": [f"method {i}" for i in range(9)]},
        {"fractions": torch.rand(N, S + 1, dtype=torch.float64).sort(1).values},
    ],
)  # fmt: skip
def test_odd_evaluations(tmp_path, options):
    html = report(tmp_path, make_evaluation(tmp_path / "evaluation", **options))
    assert ('id="evaluation"' in html) == ("skipped" not in options) and not re.search(r"\bnan\b", html)


def test_names_are_escaped(tmp_path):
    assert "<b>bold" not in report(tmp_path, make_evaluation(tmp_path / "e", methods=["<b>bold", "random"]))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.07, 0.93, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3.2, 8.1, [-5, -2.5, 0, 2.5, 5, 7.5, 10]),
        (0.5, 0.5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1200, 1290, [1200, 1220, 1240, 1260, 1280, 1300]),
    ],
)
def test_axes(low, high, ticks):
    axis = _Axis.over(np.array([low, np.nan, high]))
    assert axis.ticks == pytest.approx(ticks) and axis.low <= low and axis.high >= high
