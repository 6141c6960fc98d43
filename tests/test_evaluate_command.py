"""The command `xaifast evaluate`, called as a function, against direct calls of the metrics."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import xaifast
from xaifast import metrics
from xaifast.cli import main
from xaifast.data import open_data
from xaifast.data.segmentations import FORMS
from xaifast.evaluation import read_curves
from xaifast.evaluation.dataset import COMPARED, EvaluationChunks
from xaifast.evaluation.methods import gradient_x_input, random_map
from xaifast.evaluation.scores import SCORES
from xaifast.models import MLP, ConvNet, VisionTransformer, load_model, save_model
from xaifast.run import open_run

ROOT = Path(__file__).parents[1]
N = 20  # digits explained
PATCHES = xaifast.grid_mask((8, 8), 2)


def merged(x, n_segments):
    """Five to nine players, as the image has it."""
    return PATCHES.clamp(max=4 + int(x.sum()) % 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that knows some digits, twenty of them, and runs that explain these."""
    folder = tmp_path_factory.mktemp("trained")
    digits = open_data("digits").load(range(500))
    x, y = torch.stack(digits.items), digits.labels
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    save_model(model, folder / "model", class_names=list("0123456789"))
    np.savez(folder / "x.npz", x=x[:N].numpy(), y=y[:N].numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("xaifast.cli.inputs.superpixels", merged)
        common = ["explain", "--model", "xaifast:model", "--data", "npz:x.npz", "--quiet", "--no-report"]
        for out, *options in (
            ("run", "--patch", "2", "--n-samples", "60"),
            ("exact", "--patch", "2", "--n-samples", "200", "--estimator", "wls"),
            ("coarse", "--patch", "4", "--n-samples", "16"),
            ("all", "--patch", "2", "--n-samples", "60", "--target", "all"),
            ("labels", "--patch", "2", "--n-samples", "60", "--target", "label"),
            ("segments", "--segments", "slic", "--n-segments", "9", "--n-samples", "60"),
        ):
            assert main([*common, "--out", out, *options]) == 0
    return folder


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch, capsys):
    """Runs the command in a copy of that folder; returns exit status, what it printed and what it complained of."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, report=False):
        status = main(["evaluate", *([] if report else ["--no-report"]), *map(str, arguments)])
        said = capsys.readouterr()
        return namedtuple("Said", "status out err")(status, said.out, said.err)

    return run


def inputs():
    """Model, inputs, and what the run found."""
    run = open_run("run")
    model = load_model("xaifast:model").forward
    return model, torch.from_numpy(np.load("x.npz")["x"]), run.tensor("values"), run.tensor("target")


def rows_of(path="run/evaluation/scores.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows, method, name):
    return torch.tensor([float(row[name]) for row in rows if row["method"] == method])


def test_scores_are_those_of_direct_calls(evaluate):
    said = evaluate("run", "--compare", "random", "gradient-x-input", "occlusion", "rise", "--rise-masks", 50)
    assert said.status == 0, said.err
    model, x, values, target = inputs()
    stored = open_run("run/evaluation")
    size = dict(target=target, batch_size=stored.manifest["rows"])
    maps = {
        "kernel-shap": values,
        "random": random_map((N, 16), seed=0, first_index=0),
        "gradient-x-input": gradient_x_input(model, x, target=target),
        "occlusion": xaifast.occlusion(model, x, window=2, stride=1, **size),
        "rise": xaifast.rise(model, x, n_masks=50, **size),
    }
    rows = rows_of()
    assert [row["method"] for row in rows] == list(maps) * N
    assert [int(row["index"]) for row in rows] == np.repeat(np.arange(N), 5).tolist()
    assert [row["name"] for row in rows] == [row["index"] for row in rows]
    assert [int(row["label"]) for row in rows[::5]] == np.load("x.npz")["y"].tolist()
    assert [int(row["target"]) for row in rows[::5]] == target.tolist()
    first = metrics._features.resolve_features(values, x, PATCHES, "test").scores
    for m, (method, attributions) in enumerate(maps.items()):
        curves = xaifast.insertion_deletion(model, x, attributions, feature_mask=PATCHES, steps=16, **size)
        assert torch.equal(stored.tensor("insertion")[:, m], curves.insertion), method
        assert torch.equal(stored.tensor("deletion")[:, m], curves.deletion), method
        assert torch.equal(column(rows, method, "insertion_auc"), curves.insertion_auc)
        assert torch.equal(column(rows, method, "deletion_auc"), curves.deletion_auc)
        scores = metrics._features.resolve_features(attributions, x, PATCHES, "test").scores
        positive = scores.double().clamp(min=0)
        sparsity = (positive / positive.amax(1, keepdim=True)).mean(1)
        assert torch.allclose(column(rows, method, "sparsity").double(), sparsity, atol=1e-6)
        assert torch.equal(column(rows, method, "iou_top"), metrics.iou_at_k(scores, first, 2).float())
        expected = metrics.rank_correlation(scores, first).float()
        assert torch.allclose(column(rows, method, "rank_correlation"), expected, atol=1e-6)
    assert "srg" not in rows[0] and torch.equal(stored[3]["fractions"], torch.arange(17).double() / 16)
    assert read_curves(stored)["rise"].mean().insertion.shape == (17,)
    for fact in ("20 inputs × ", "kernel-shap, random", "most important first, in 16 steps", "score softmax"):
        assert fact in said.out


def test_work_announced_is_work_done(evaluate, monkeypatch):
    seen = []
    forward = ConvNet.forward
    monkeypatch.setattr(ConvNet, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    monkeypatch.setattr("xaifast.cli.job.DatasetJob.forward_rate", lambda self, rows: seen.clear() or 1.0)
    said = evaluate("run", "--limit", 7)
    assert said.status == 0, said.err
    assert open_run("run/evaluation").manifest["settings"]["methods"] == ["kernel-shap", "random", "gradient-x-input"]
    # The clean input, 16 deletions and 16 insertions a method; a gradient counts as three, and calls once.
    assert f"7 inputs × {3 * 33 + 3} evaluations" in said.out and sum(seen) == 7 * (3 * 33 + 1)
    arguments = ["run", "--limit", 7, "--compare", "occlusion", "rise", "--rise-masks", 30, "--out", "out"]
    assert f"7 inputs × {3 * 33 + 7 * 7 + 1 + 31} evaluations" in evaluate(*arguments).out
    assert sum(seen) == 7 * (3 * 33 + 7 * 7 + 1 + 31)


def test_parquet_holds_the_same(evaluate):
    assert evaluate("run", "--out", "a", "--limit", 6).status == 0
    assert evaluate("run", "--out", "b", "--limit", 6, "--format", "parquet").status == 0
    table, frame = pandas.read_csv("a/scores.csv"), pandas.read_parquet("b/scores.parquet")
    assert list(table.columns) == list(frame.columns) and len(table) == len(frame) == 18
    for name in table.columns:
        if table[name].dtype.kind == "f":
            assert np.array_equal(table[name].to_numpy(np.float32), frame[name].to_numpy(np.float32), equal_nan=True)
        else:
            assert table[name].astype(str).tolist() == frame[name].astype(str).tolist()


def files(folder):
    paths = [*sorted((folder / "chunks").iterdir()), folder / "scores.csv"]
    return {path.name: path.read_bytes() for path in paths}


def test_interrupted_and_taken_up_again(evaluate, tmp_path, monkeypatch):
    arguments = ["run", "--chunk-size", 4, "--insertion-baseline", "noise", "--seed", 3]
    assert evaluate(*arguments, "--out", "whole").status == 0
    compute, calls = EvaluationChunks.__call__, []

    def interrupted(self, chunk, loaded, rows):
        calls.append(chunk)
        if chunk == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return compute(self, chunk, loaded, rows)

    monkeypatch.setattr(EvaluationChunks, "__call__", interrupted)
    stopped = evaluate(*arguments, "--out", "parts")
    assert stopped.status == 130 and open_run("parts").finished == [0, 1]
    assert "2 of 5 chunks are finished and kept in parts" in stopped.out
    assert stopped.out.splitlines()[-1].strip().endswith("--seed 3 --out parts")
    again = evaluate(*arguments, "--out", "parts")
    assert again.status == 0 and "2 finished" in again.out
    assert calls == [0, 1, 2, 2, 3, 4]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    other = evaluate(*arguments, "--out", "parts", "--steps", 8)
    assert other.status == 2 and "settings.steps was 16, is 8" in other.err


def test_results_do_not_depend_on_chunks(evaluate):
    for size in (1, 8):
        assert evaluate("run", "--chunk-size", size, "--out", f"by{size}", "--deletion-baseline", "noise").status == 0
    for name in ("insertion", "deletion", "rank_correlation"):
        one, eight = (open_run(f"by{size}").tensor(name) for size in (1, 8))
        assert torch.allclose(one, eight, atol=1e-5), name


def test_another_model_or_data_is_refused_and_may_have_moved(evaluate, tmp_path):
    recorded = open_run("run").manifest
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "x.npz").rename(tmp_path / "there.npz")
    assert "no such directory: model" in (lost := evaluate("run")).err and "model now lies by --model" in lost.err
    assert "data now lies by --data" in evaluate("run", "--model", "xaifast:moved").err
    moved = evaluate("run", "--model", "xaifast:moved", "--data", "npz:there.npz", "--limit", 3)
    assert moved.status == 0, moved.err
    torch.manual_seed(1)
    save_model(ConvNet(), tmp_path / "other", class_names=list("0123456789"))
    other = evaluate("run", "--model", "xaifast:other", "--data", "npz:there.npz", "--out", "out")
    assert other.status == 2 and recorded["model"]["sha256"] in other.err and "--model" in other.err
    assert load_model("xaifast:other").fingerprint in other.err
    np.savez(tmp_path / "x.npz", x=np.zeros((N, 1, 8, 8), np.float32))
    data = evaluate("run", "--model", "xaifast:moved", "--out", "out")
    assert data.status == 2 and recorded["data"]["sha256"] in data.err and "--data" in data.err
    assert not (tmp_path / "out").exists()


def test_unfinished_run(evaluate, tmp_path):
    shutil.rmtree("run")
    arguments = ["--model", "xaifast:model", "--data", "npz:x.npz", "--n-samples", "60", "--patch", "2", "--quiet"]
    main(["explain", *arguments, "--no-report", "--out", "run", "--chunk-size", "4"])
    (tmp_path / "run" / "chunks" / "000003.safetensors").unlink()
    said = evaluate("run")
    assert said.status == 2 and "4 of 5 chunks" in said.err and "--limit 12" in said.err
    assert "xaifast explain --model xaifast:model" in said.err and not (tmp_path / "run" / "evaluation").exists()
    assert evaluate("run", "--limit", 13).status == 2
    assert evaluate("run", "--limit", 12).status == 0
    assert len(rows_of()) == 36


def test_a_corrupt_chunk_is_named(evaluate, tmp_path):
    path = tmp_path / "run" / "chunks" / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    assert "000000.safetensors is corrupt" in evaluate("run").err


def test_several_runs(evaluate):
    said = evaluate("run", "exact", "all", "--compare")
    assert said.status == 0, said.err
    stored = open_run("run/evaluation")
    assert stored.manifest["settings"]["methods"] == ["run", "exact", "all"]  # their methods do not tell them apart
    model, x, _, target = inputs()
    exact = open_run("exact").tensor("values")
    values = open_run("all").tensor("values")
    for m, attributions in ((1, exact), (2, values[torch.arange(N), :, target])):
        curves = xaifast.insertion_deletion(
            model, x, attributions, feature_mask=PATCHES, steps=16, target=target, batch_size=stored.manifest["rows"]
        )
        assert torch.equal(stored.tensor("insertion")[:, m], curves.insertion)


def test_runs_of_other_features_are_compared_by_pixel(evaluate):
    refused = evaluate("run", "coarse", "--level", "players")
    assert refused.status == 2 and "16 patches of 2 × 2 pixels and 4 patches" in refused.err
    said = evaluate("run", "coarse", "--compare", "random", "--limit", 5)
    assert said.status == 0, said.err
    stored = open_run("run/evaluation")
    assert stored.manifest["settings"]["level"] == "pixels" and stored.manifest["settings"]["steps"] == 50
    model, x, _, target = inputs()
    maps = [open_run(run).tensor("values")[:5, xaifast.grid_mask((8, 8), p)] for run, p in (("run", 2), ("coarse", 4))]
    maps.append(random_map((5, 8, 8), seed=0, first_index=0))
    for m, attributions in enumerate(maps):
        curves = xaifast.insertion_deletion(
            model, x[:5], attributions, steps=50, target=target[:5], batch_size=stored.manifest["rows"]
        )
        assert torch.equal(stored.tensor("deletion")[:, m], curves.deletion)
        assert torch.equal(stored.tensor("insertion_auc")[:, m], curves.insertion_auc)


def test_superpixels_beside_patches(evaluate):
    said = evaluate("run", "segments", "--compare", "--chunk-size", 8, "--steps", 9)
    assert said.status == 0, said.err
    stored, run = open_run("run/evaluation"), open_run("segments")
    model, x, _, target = inputs()
    for i in (0, 7, 19):
        attributions = run[i]["values"][run.segments(i)][None]
        curves = xaifast.insertion_deletion(model, x[i : i + 1], attributions, steps=9, target=target[i : i + 1])
        assert torch.allclose(stored[i]["deletion"][1], curves.deletion[0], atol=1e-5)


def test_runs_that_do_not_belong_together(evaluate, tmp_path):
    said = evaluate("run", "labels")
    assert said.status == 2 and "one target, got 'predicted' in run and 'label' in labels" in said.err
    assert "/run more than once; name it once" in evaluate("run", "run").err
    twice = evaluate("run", "--compare", "random", "random", "--out", "twice")
    assert twice.status == 0 and open_run("twice").manifest["settings"]["methods"] == ["kernel-shap", "random"]
    assert evaluate("run", "--limit", 3).status == 0
    assert "kind" not in (said := evaluate("run/evaluation")).out and "'evaluation'" in said.err
    assert "manifest.json" in evaluate("nothing").err
    np.savez("x.npz", x=np.zeros((N, 1, 8, 8), np.float32))
    main(["explain", "--model", "xaifast:model", "--data", "npz:x.npz", "--quiet", "--no-report", "--out", "zeros"])
    other = evaluate("run", "zeros")
    assert other.status == 2 and "one data" in other.err and open_run("zeros").manifest["data"]["sha256"] in other.err


@pytest.mark.parametrize("level", ["players", "pixels"])
def test_superpixels(evaluate, level):
    said = evaluate("segments", "--level", level, "--chunk-size", 8)
    assert said.status == 0, said.err
    run, stored = open_run("segments"), open_run("segments/evaluation")
    counts = [len(run[i]["values"]) for i in range(N)]
    steps = stored.manifest["settings"]["steps"]
    assert len(set(counts)) > 1 and steps == (min(counts) if level == "players" else 50)
    model, x, *_ = inputs()
    everyone = random_map((N, 9), seed=0, first_index=0)
    for i in range(N):
        item, n = run[i], counts[i]
        segments = run.segments(i)
        mask = segments[None, None] if level == "players" else None
        maps = [item["values"], everyone[i, :n]] if level == "players" else [item["values"][segments]]
        for m, attributions in enumerate(maps):
            curves = xaifast.insertion_deletion(
                model, x[i : i + 1], attributions[None], target=item["target"][None], feature_mask=mask, steps=steps
            )
            assert torch.allclose(stored[i]["insertion"][m], curves.insertion[0], atol=1e-5)
            assert torch.allclose(stored[i]["deletion"][m], curves.deletion[0], atol=1e-5)
            assert torch.allclose(stored[i]["insertion_auc"][m], curves.insertion_auc[0], atol=1e-5)
        scores = maps[1][None] if level == "players" else None
        if scores is not None:
            expected = metrics.rank_correlation(scores, maps[0][None])[0]
            assert torch.allclose(stored[i]["rank_correlation"][1], expected, atol=1e-6)


@pytest.fixture
def tables(evaluate, tmp_path):
    """Runs over a table of three columns, with a background and without."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(12, 4)), columns=["age", "height", "noise", "weight"])
    frame["sick"] = np.where(frame.age > 0, "yes", "no")
    frame.to_csv("people.csv", index=False)
    torch.manual_seed(0)
    save_model(MLP(3, 2, (8,)), tmp_path / "mlp", class_names=["no", "yes"])
    common = ["explain", "--model", "xaifast:mlp", "--data", "csv:people.csv", "--columns", "weight,age,height"]
    common += ["--label", "sick", "--n-samples", "8", "--quiet", "--no-report"]
    assert main([*common, "--out", "people", "--background", "5"]) == 0
    assert main([*common, "--out", "plain", "--baseline", "0.5"]) == 0
    return frame


@pytest.mark.parametrize("run", ["people", "plain"])
def test_tables(evaluate, tables, run):
    said = evaluate(run, "--compare", "random", "occlusion")
    assert said.status == 0, said.err
    stored, explained = open_run(f"{run}/evaluation"), open_run(run)
    x = torch.tensor(tables[["weight", "age", "height"]].to_numpy(), dtype=torch.float32)
    rows = explained.static["background"] if run == "people" else x
    mean = rows.double().mean(0).float()
    assert torch.equal(stored.static["baseline"], mean)
    model, target = load_model("xaifast:mlp").forward, explained.tensor("target")
    maps = [explained.tensor("values"), random_map((12, 3), seed=0, first_index=0)]
    maps.append(xaifast.occlusion(model, x, window=1, baselines=mean, target=target))
    for m, attributions in enumerate(maps):
        curves = xaifast.insertion_deletion(
            model, x, attributions, target=target, steps=3, insertion_baseline=mean, deletion_baseline=mean
        )
        assert torch.allclose(stored.tensor("deletion")[:, m], curves.deletion, atol=1e-6)
        assert torch.allclose(stored.tensor("srg")[:, m], curves.srg, atol=1e-6)
    assert [row["label"] for row in rows_of(f"{run}/evaluation/scores.csv")[::3]] == [
        str(int(sick == "yes")) for sick in tables.sick
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--segmentation", "masks"], "for images"),
        (["--level", "pixels"], "for images"),
        (["--compare", "rise"], "for images"),
        (["--steps", 4], "at most the number of features, got 4 for 3"),
        (["--insertion-baseline", "blur"], "needs floating images"),
    ],
)
def test_what_tables_have_not(evaluate, tables, tmp_path, arguments, said):
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "masks" / "0.png")
    result = evaluate("people", *arguments)
    assert result.status == 2 and said in result.err, result.err
    assert not (tmp_path / "people" / "evaluation").exists()


@pytest.fixture
def masks(evaluate, tmp_path):
    """A mask for every digit: where it has ink; values above 0.9 are of neither side."""
    (tmp_path / "masks").mkdir()
    x = np.load("x.npz")["x"][:, 0]
    trimap = np.where(x > 0.9, 3, np.where(x > 0, 1, 2)).astype(np.uint8)
    for i, mask in enumerate(trimap):
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    return torch.from_numpy(np.where(trimap == 3, np.nan, trimap == 1)).float()


def test_segmentation(evaluate, masks):
    said = evaluate("run", "--segmentation", "masks", "--segmentation-format", "pets")
    assert said.status == 0, said.err
    model, x, values, target = inputs()
    rows = rows_of()
    seg = metrics.to_patches(masks, 2, ignore=np.nan, normalise=False)
    maps = {
        "kernel-shap": values[:, PATCHES],
        "random": random_map((N, 16), seed=0, first_index=0)[:, PATCHES],
        "gradient-x-input": gradient_x_input(model, x, target=target)[:, 0],
    }
    for method, attributions in maps.items():
        importance = metrics.to_patches(attributions, 2)
        expected = metrics.segmentation_difference(importance, seg)
        assert torch.allclose(column(rows, method, "segmentation_difference"), expected, atol=1e-6)
        assert torch.allclose(column(rows, method, "macro_iou"), metrics.macro_iou(importance, seg), atol=1e-6)
    binary = evaluate("run", "--segmentation", "masks", "--out", "binary")
    assert binary.status == 0 and rows_of("binary/scores.csv")[0]["macro_iou"] != rows[0]["macro_iou"]
    coarse = evaluate("run", "--segmentation", "masks", "--segmentation-patch", 4, "--out", "coarse4")
    assert coarse.status == 0 and open_run("coarse4").manifest["settings"]["segmentation"]["patch"] == 4


def test_missing_segmentations(evaluate, masks, tmp_path):
    (tmp_path / "masks" / "3.png").unlink()
    (tmp_path / "masks" / "more").mkdir()
    shutil.copy(tmp_path / "masks" / "5.png", tmp_path / "masks" / "5.bmp")
    arguments = ["run", "--segmentation", "masks", "--segmentation-format", "pets", "--compare"]
    fatal = evaluate(*arguments)
    assert fatal.status == 2 and "2 of 20 images" in fatal.err and "3 has no mask" in fatal.err
    assert "5 has 2 masks" in fatal.err and "--on-error skip" in fatal.err
    assert not (tmp_path / "run" / "evaluation").exists()
    skipped = evaluate(*arguments, "--on-error", "skip")
    assert skipped.status == 0 and "note: 2 of 20 images" in skipped.out
    rows = rows_of()
    assert [i for i, row in enumerate(rows) if not row["macro_iou"]] == [3, 5]
    assert all(row["insertion_auc"] for row in rows)
    shutil.rmtree("masks")
    assert "no such directory" in evaluate(*arguments).err
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "masks" / "x.png")
    assert "20 of 20 images" in evaluate(*arguments, "--on-error", "skip", "--out", "none").err


def test_masks_that_do_not_fit_stop_or_are_left_out(evaluate, masks, tmp_path):
    Image.fromarray(np.ones((3, 8), np.uint8)).save(tmp_path / "masks" / "11.png")
    arguments = ["run", "--segmentation", "masks", "--segmentation-format", "pets", "--compare", "random"]
    fatal = evaluate(*arguments)
    assert fatal.status == 2 and "mask 11.png of 11 must have the image's size" in fatal.err
    skipped = evaluate(*arguments, "--on-error", "skip")
    assert skipped.status == 0 and "macro IoU with segmentation ↑ (19 of 20 inputs)" in skipped.out
    assert [row["index"] for row in rows_of() if not row["macro_iou"]] == ["11", "11"]


@pytest.mark.parametrize(("form", "side"), [("binary", "object"), ("cub", "background")])
def test_masks_read_in_the_wrong_way_are_noted(evaluate, masks, form, side):
    arguments = ["run", "--segmentation", "masks", "--compare", "--limit", 9, "--segmentation-format"]
    said = evaluate(*arguments, form)
    assert f"note: the first segmentations hold nothing but {side}, read as {form}" in said.out
    assert "nothing but" not in evaluate(*arguments, "pets", "--out", "right").out


@pytest.fixture
def photos(evaluate, tmp_path):
    """Images, one of which cannot be read, and a model of one's own."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "2.png").write_bytes(b"nothing")
    (tmp_path / "evaluated_images.py").write_text(
        "import torch\n\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()\n"
    )
    arguments = ["explain", "--model", "py:evaluated_images:model", "--data", "imagefolder:images", "--image-size", "8"]
    arguments += ["--mean", "0.5", "--std", "0.25", "--patch", "4", "--n-samples", "16", "--quiet", "--no-report"]
    assert main([*arguments, "--on-error", "skip", "--out", "photos"]) == 0


def test_preprocessing_is_that_of_the_run_and_skipped_images_stay_out(evaluate, photos, tmp_path):
    said = evaluate("photos", "--insertion-baseline", "noise", "--compare", "random", "--seed", 5)
    assert said.status == 0, said.err
    stored, explained = open_run("photos/evaluation"), open_run("photos")
    assert list(stored.skipped) == [2] and "could not be read: 1" in said.out
    assert [int(row["index"]) for row in rows_of("photos/evaluation/scores.csv")[::2]] == [0, 1, 3, 4, 5]
    kept = [0, 1, 3, 4, 5]
    paths = [tmp_path / "images" / f"{i if i in kept else 0}.png" for i in range(6)]
    images = [Image.open(path).resize((8, 8), Image.Resampling.BILINEAR) for path in paths]
    x = (torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    maps = [explained.tensor("values").nan_to_num(), random_map((6, 4), seed=5, first_index=0)]
    for m, attributions in enumerate(maps):
        curves = xaifast.insertion_deletion(
            load_model("py:evaluated_images:model").forward, x, attributions, steps=4,
            target=explained.tensor("target").clamp(0), insertion_baseline="noise", seed=5,
            feature_mask=xaifast.grid_mask((8, 8), 4),
        )  # fmt: skip
        assert torch.allclose(stored.tensor("insertion")[kept, m], curves.insertion[kept], atol=1e-5)
    (tmp_path / "images" / "4.png").write_bytes(b"damaged since")
    lost = evaluate("photos", "--out", "lost")
    assert lost.status == 2 and ("4.png" in lost.err or "another data" in lost.err)


@pytest.mark.parametrize("removal", ["blur", "token-drop", "token-select"])
def test_removals(evaluate, tmp_path, removal):
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 3, channels=1, dim=16, depth=1, heads=2)
    save_model(model, tmp_path / "vit")
    x = torch.rand(3, 1, 16, 16)
    np.savez(tmp_path / "v.npz", x=x.numpy())
    arguments = ["--model", "xaifast:vit", "--data", "npz:v.npz", "--n-samples", "40", "--quiet", "--no-report"]
    assert main(["explain", *arguments, "--out", "v"]) == 0
    said = evaluate("v", "--removal", removal, "--compare", "random", "--steps", 5)
    assert said.status == 0, said.err
    stored, run = open_run("v/evaluation"), open_run("v")
    tokens = {"token-drop": xaifast.removal.TokenDrop(), "token-select": xaifast.removal.TokenSelect()}
    curves = xaifast.insertion_deletion(
        load_model("xaifast:vit").forward, x, run.tensor("values"), target=run.tensor("target"), steps=5,
        feature_mask=run.static["feature_mask"], removal=tokens.get(removal, removal),
    )  # fmt: skip
    assert torch.allclose(stored.tensor("deletion")[:, 0], curves.deletion, atol=1e-6)
    assert ("srg" in stored.manifest["settings"]["scores"]) == (removal != "token-select")
    assert f"{2 * curves.n_evaluations} evaluations" in said.out
    refused = evaluate("v", "--removal", removal, "--deletion-baseline", "0", "--out", "o")
    assert (refused.status == 2) == (removal != "token-select")


def test_orders_scores_and_baselines(evaluate):
    options = ["--order", "least", "--score", "accuracy", "--insertion-baseline", "0.5", "--deletion-baseline", "0.5"]
    said = evaluate("run", *options)
    assert said.status == 0, said.err
    model, x, values, target = inputs()
    curves = xaifast.insertion_deletion(
        model, x, values, target=target, feature_mask=PATCHES, steps=16, order="least", score="accuracy",
        insertion_baseline=0.5, deletion_baseline=0.5,
    )  # fmt: skip
    stored = open_run("run/evaluation")
    assert torch.equal(stored.tensor("insertion")[:, 0], curves.insertion)
    assert torch.equal(stored.tensor("srg")[:, 0], curves.srg)
    assert "insertion area ↓" in said.out and "deletion area ↑" in said.out


ODD = """
import numpy
import torch

def number():
    return lambda x: x.flatten(1).sum(1)

def without_gradient():
    return lambda x: torch.from_numpy(x.flatten(1)[:, :3].detach().numpy().copy())
"""


def test_models_of_one_output_and_without_gradient(evaluate, tmp_path):
    (tmp_path / "evaluated_odd.py").write_text(ODD)
    for model, compared in (("number", ["random", "gradient-x-input"]), ("without_gradient", ["random"])):
        arguments = ["--model", f"py:evaluated_odd:{model}", "--data", "npz:x.npz", "--n-samples", "60", "--quiet"]
        assert main(["explain", *arguments, "--patch", "4", "--no-report", "--out", model]) == 0
        said = evaluate(model)
        assert said.status == 0, said.err
        assert open_run(f"{model}/evaluation").manifest["settings"]["methods"] == ["kernel-shap", *compared]
    stored = open_run("number/evaluation")
    assert (
        stored.manifest["settings"]["score"] == "logit" and rows_of("number/evaluation/scores.csv")[0]["target"] == ""
    )
    x, mask = inputs()[1], xaifast.grid_mask((8, 8), 4)
    sums = x.reshape(N, 2, 4, 2, 4).sum((2, 4)).flatten(1).sort(1, descending=True).values  # an additive model
    left = x.flatten(1).sum(1, keepdim=True) - F.pad(sums.cumsum(1), (1, 0))
    assert mask.max() == 3 and torch.allclose(stored.tensor("deletion")[:, 0], left, atol=1e-4)
    refused = evaluate("without_gradient", "--compare", "gradient-x-input", "--out", "o")
    assert refused.status == 2 and "no gradient" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", 17], "at most the number of features, got 17 for 16"),
        (["--insertion-baseline", "grey"], "--insertion-baseline must be a number, zero, blur, mean, noise, black"),
        (["--removal", "blur", "--deletion-baseline", "0"], "knows no baseline"),
        (["--removal", "token-drop"], "patch embedding"),
        (["--segmentation", "nowhere"], "no such directory"),
        (["--device", "nothing"], "device"),
    ],
)
def test_bad_arguments_write_nothing(evaluate, tmp_path, arguments, said):
    result = evaluate("run", *arguments)
    assert result.status == 2 and said in result.err, result.err
    assert "Traceback" not in result.err and not (tmp_path / "run" / "evaluation").exists()


def test_arguments_that_do_not_parse(evaluate):
    for wrong in ([], ["run", "--compare", "magic"], ["run", "--order", "random"], ["run", "--steps", 0]):
        with pytest.raises(SystemExit) as stop:
            evaluate(*wrong)
        assert stop.value.code == 2


def test_one_input(evaluate):
    said = evaluate("run", "--limit", 1, report=True)
    assert said.status == 0 and not re.search(r"\bnan\b|ranked|±", said.out)


def test_missing_packages_are_said_before_the_work(evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = evaluate("run", "--format", "parquet")
    assert said.status == 2 and "needs pyarrow; pip install 'xaifast[data]'" in said.err
    assert not (tmp_path / "run" / "evaluation").exists()


def test_quiet_says_nothing(evaluate):
    said = evaluate("run", "--quiet")
    assert said.status == 0 and said.out == "" and said.err == ""


def test_report_becomes_part_of_the_run_and_stays_there(evaluate, tmp_path):
    said = evaluate("run", report=True)
    assert said.status == 0 and "report: run/report.html" in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="evaluation"' in page and "Kernel SHAP of 20 inputs" in page
    before = open_run("run").manifest["command"].split()[1:]
    assert main(before[: before.index("--no-report")] + before[before.index("--no-report") + 1 :]) == 0
    assert 'id="evaluation"' in (tmp_path / "run" / "report.html").read_text()
    elsewhere = evaluate("run", "--out", "elsewhere", report=True)
    assert "report: elsewhere/report.html" in elsewhere.out and (tmp_path / "elsewhere" / "report.html").exists()


@pytest.mark.slow
def test_documentation_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "evaluate.md").read_text()
    commands, _, *_ = re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
    (python,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert 'id="evaluation"' in (tmp_path / "runs" / "digits" / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python, names)
    assert names["run"][3]["insertion"].shape == (3, 17) and (tmp_path / "curves.png").stat().st_size > 5000
    insertion = dict(zip(names["curves"], names["scores"].means("insertion_auc")[0], strict=True))
    assert insertion["kernel-shap"] > insertion["random"] + 0.1  # a trained network, and no accident


def test_documentation_names_every_score_and_format():
    text = (ROOT / "docs" / "evaluate.md").read_text()
    assert all(f"`{name}`" in text for name in [*SCORES, *FORMS, *COMPARED])


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(evaluate, tmp_path):
    arguments = ["evaluate", "run", "--no-report", "--chunk-size", "4", "--threads", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "xaifast"]
    for start, out in (([sys.executable, "-m", "xaifast"], "alone"), (torchrun, "both")):
        done = subprocess.run([*start, *arguments, "--out", out], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "alone") == files(tmp_path / "both")
    assert {event["rank"] for event in open_run("both").log if event["event"] == "chunk"} == {0, 1}
