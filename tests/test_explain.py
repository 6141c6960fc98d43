"""The command `xaifast explain`, called as a function."""

import importlib.util
import json
import shutil
from collections import namedtuple

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import xaifast
from xaifast.cli import main
from xaifast.models import MLP, ConvNet, VisionTransformer, save_model
from xaifast.run import open_run

NAMES = ["cat", "coffee", "rocket"]


@pytest.fixture
def explain(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own; returns exit status, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, out="out", report=False):
        extra = [] if report else ["--no-report"]
        status = main(["explain", "--n-samples", "60", "--out", out, *extra, *map(str, arguments)])
        said = capsys.readouterr()
        return namedtuple("Said", "status out err")(status, said.out, said.err)

    return run


@pytest.fixture
def digits(tmp_path):
    """A digits network and images of its size."""
    torch.manual_seed(0)
    save_model(ConvNet(), tmp_path / "digits", class_names=list("0123456789"))
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((5, 1, 8, 8), np.float32), y=np.arange(5))
    return ["--model", "xaifast:digits", "--data", "npz:x.npz"]


@pytest.fixture
def photos(tmp_path):
    """Photographs in folders by class, a Hugging Face model with its processor, the arguments that name them."""
    for name, image in (
        ("cat", photographs.chelsea()),
        ("coffee", photographs.coffee()),
        ("rocket", photographs.rocket()),
    ):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(image[: 200 + 40 * i]).save(tmp_path / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        id2label=dict(enumerate(NAMES[::-1])), label2id={name: i for i, name in enumerate(NAMES[::-1])},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return ["--model", "hf:./vit", "--data", "imagefolder:images"]


@pytest.fixture
def table(tmp_path):
    """A table of four columns and a label, and a model of three of them."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(30, 4)), columns=["age", "height", "noise", "weight"])
    frame["sick"] = np.where(frame.age > 0, "yes", "no")
    frame.to_csv(tmp_path / "people.csv", index=False)
    frame.to_parquet(tmp_path / "people.parquet")
    frame[:7].to_csv(tmp_path / "few.csv", index=False)
    torch.manual_seed(0)
    save_model(MLP(3, 2, (8,)), tmp_path / "mlp", class_names=["no", "yes"])
    return ["--model", "xaifast:mlp", "--columns", "weight,age,height", "--label", "sick"]


def test_values_are_those_of_kernel_shap(explain, digits, tmp_path):
    said = explain(*digits, "--patch", 2, report=True)
    assert said.status == 0, said.err
    run = open_run("out")
    model = xaifast.models.load_model("xaifast:digits").forward
    x = torch.from_numpy(np.load("x.npz")["x"])
    expected = xaifast.kernel_shap(
        model, x, feature_mask=xaifast.grid_mask((8, 8), 2), target="predicted", n_samples=60,
        batch_size=run.manifest["rows"],
    )  # fmt: skip
    for name in ("values", "std_errors", "base_values", "full_values"):
        assert torch.equal(run.tensor(name), getattr(expected, name)), name
    assert (
        run.tensor("label").tolist() == list(range(5)) and run.tensor("predicted").tolist() == expected.targets.tolist()
    )
    assert (tmp_path / "out" / "report.html").stat().st_size > 5000
    for fact in ("5 inputs × 60 evaluations = 300 model rows", "16 patches of 2 × 2 pixels", "times the bare forward"):
        assert fact in said.out


def test_the_same_command_goes_on_and_another_is_refused(explain, digits):
    assert explain(*digits).status == 0
    again = explain(*digits)
    assert again.status == 0 and "finished 1 of 1 chunks" in again.out
    other = explain(*digits, "--seed", 1)
    assert other.status == 2 and "seed was 0, is 1" in other.err
    before = open_run("out").manifest
    save_model(ConvNet(), "digits", class_names=list("0123456789"))
    swapped = explain(*digits)
    assert swapped.status == 2 and before["model"]["sha256"] in swapped.err
    now = xaifast.models.load_model("xaifast:digits").fingerprint
    assert now in swapped.err and now != before["model"]["sha256"]


def test_other_data_are_refused(explain, digits):
    assert explain(*digits).status == 0
    before = open_run("out").manifest["data"]["sha256"]
    np.savez("x.npz", x=np.zeros((5, 1, 8, 8), np.float32))
    said = explain(*digits)
    assert said.status == 2 and "another data" in said.err and before in said.err


@pytest.mark.parametrize(
    ("target", "expected"), [("label", [0, 1, 2, 3, 4]), ("3", [3] * 5), ("7", [7] * 5), ("all", [-1] * 5)]
)
def test_targets(explain, digits, target, expected):
    assert explain(*digits, "--target", target).status == 0
    run = open_run("out")
    assert run.tensor("target").tolist() == expected
    assert run.tensor("values").shape == ((5, 64, 10) if target == "all" else (5, 64))


@pytest.mark.parametrize(
    ("target", "said"), [("12", r"0..9"), ("-1", "0..9"), ("zero", "nearest known: 0, 1, 2"), ("1.5", "class name")]
)
def test_unknown_class(explain, digits, target, said, tmp_path):
    result = explain(*digits, f"--target={target}")
    assert result.status == 2 and said in result.err
    assert not (tmp_path / "out").exists()


def test_hugging_face_model_on_a_folder_of_images(explain, photos):
    said = explain(*photos, "--target", "label", report=True)
    assert said.status == 0, said.err
    run = open_run("out")
    assert [run.name(i) for i in range(6)] == [f"{name}/{i}.png" for name in NAMES for i in range(2)]
    assert run.tensor("label").tolist() == [0, 0, 1, 1, 2, 2]  # by folder
    assert run.tensor("target").tolist() == [2, 2, 1, 1, 0, 0]  # by name, as the model numbers them
    assert run.manifest["settings"]["preprocessing"]["size"] == {"height": 32, "width": 32}
    assert run[0]["values"].shape == (16,)


@pytest.mark.parametrize("removal", ["token-drop", "token-select", "blur"])
def test_removals(explain, photos, removal):
    assert explain(*photos, "--removal", removal, "--target", "coffee").status == 0
    assert torch.isfinite(open_run("out").tensor("values")).all()
    refused = explain(*photos, "--removal", removal, "--baseline", "0.5", out="other")
    assert (refused.status == 2) == (removal != "token-select")


def test_superpixels(explain, photos):
    said = explain(*photos, "--segments", "slic", "--n-segments", 12, report=True)
    assert said.status == 0, said.err
    run = open_run("out")
    for i in range(6):
        segments = run.segments(i)
        players = segments.unique()
        assert segments.shape == (32, 32) and torch.equal(players, torch.arange(len(players)))
        assert run[i]["values"].shape == (len(players),) and len(players) <= 12
        assert torch.isfinite(run[i]["values"]).all()


@pytest.mark.parametrize("damage", ["torn", "text"])
def test_unreadable_image_is_named_skipped_or_fatal(explain, photos, tmp_path, damage):
    path = tmp_path / "images" / "coffee" / "1.png"
    path.write_bytes(path.read_bytes()[:300] if damage == "torn" else b"not an image")
    fatal = explain(*photos)
    assert fatal.status == 2 and "coffee/1.png" in fatal.err and "--on-error skip" in fatal.err
    skipped = explain(*photos, "--on-error", "skip", report=True, out="skipped")
    assert skipped.status == 0, skipped.err
    assert (
        "could not be read: 1" in skipped.out and "coffee/1.png" in (tmp_path / "skipped" / "report.html").read_text()
    )
    run = open_run("skipped")
    assert list(run.skipped) == [3] and torch.isnan(run[3]["values"]).all()
    assert torch.isfinite(run.tensor("values")[[0, 1, 2, 4, 5]]).all()


def test_skipping_may_be_decided_later(explain, photos, tmp_path):
    for i in range(2, 6):
        shutil.copy(tmp_path / "images" / "rocket" / "0.png", tmp_path / "images" / "rocket" / f"{i}.png")
    (tmp_path / "images" / "rocket" / "5.png").write_bytes(b"not an image")  # beyond the first eight
    stopped = explain(*photos, "--chunk-size", 1)
    assert stopped.status == 2 and "rocket/5.png" in stopped.err and open_run("out").finished == list(range(9))
    again = explain(*photos, "--chunk-size", 1, "--on-error", "skip")
    assert again.status == 0 and "9 finished" in again.out, again.err
    assert list(open_run("out").skipped) == [9]


def test_nothing_readable(explain, photos, tmp_path):
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"")
    assert "no input" in explain(*photos, "--on-error", "skip").err


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_table_with_a_background(explain, table, form):
    said = explain(*table, "--data", f"{form}:people.{form}", "--background", 20, "--n-samples", 8, report=True)
    assert said.status == 0, said.err
    run = open_run("out")
    frame = pandas.read_csv("people.csv")
    columns = torch.tensor(frame[["weight", "age", "height"]].to_numpy(), dtype=torch.float32)
    background = run.static["background"]
    assert background.shape == (20, 3) and all((row == columns).all(1).any() for row in background)
    assert len(background.unique(dim=0)) == 20
    model = xaifast.models.load_model("xaifast:mlp").forward
    exact = xaifast.kernel_shap(
        model, columns, baselines=xaifast.Background(background), target="predicted", n_samples=8
    )  # fmt: skip
    assert torch.allclose(run.tensor("values"), exact.values, atol=1e-5)
    assert "8 evaluations × 20 background rows = 4,800 model rows" in said.out
    assert run.manifest["data"]["feature_names"] == ["weight", "age", "height"]


def test_background_of_another_file(explain, table):
    assert explain(*table, "--data", "csv:people.csv", "--background", "csv:few.csv", "--n-samples", 8).status == 0
    few = pandas.read_csv("few.csv")[["weight", "age", "height"]].to_numpy()
    assert np.array_equal(open_run("out").static["background"].numpy(), few.astype(np.float32))


def test_missing_column(explain, table):
    del table[table.index("--columns") : table.index("--columns") + 2]
    said = explain(*table, "--data", "csv:people.csv", "--columns", "wieght,age,height")
    assert said.status == 2 and "wieght" in said.err and "weight" in said.err
    wide = explain(*table, "--data", "csv:people.csv", "--drop", "age")
    assert wide.status == 0  # three columns are left
    wrong = explain(*table, "--data", "csv:people.csv", out="wide")
    assert wrong.status == 2 and "shape [8, 4]" in wrong.err and "--columns" in wrong.err


def test_wrong_processor(explain, photos, tmp_path):
    path = tmp_path / "vit" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 16, "width": 16}}))
    said = explain(*photos)
    assert said.status == 2 and "16" in said.err and "32" in said.err
    path.unlink()
    assert "processor" in explain(*photos).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--patch", 2, "--segments", "slic"], "exclude each other"),
        (["--chunk-size", 3], "power of two"),
        (["--chunk-size", 512], "power of two"),
        (["--background", 10], "for tables"),
        (["--baseline", "black"], 'a number or "mean"'),
        (["--estimator", "exact"], "2**64"),
        (["--n-samples", 3], "at least 4"),
        (["--removal", "token-drop"], "patch embedding"),
        (["--device", "cuda"], "cuda"),
        (["--columns", "a,b"], "tables"),
        (["--image-size", 1, 2, 3], "--image-size"),
        (["--mean", 0.5], "for images"),
    ],
)
def test_bad_arguments_write_nothing(explain, digits, tmp_path, arguments, said):
    if said == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = explain(*digits, *arguments)
    assert result.status == 2 and said in result.err, result.err
    assert "Traceback" not in result.err and not (tmp_path / "out").exists()


def test_arguments_that_do_not_parse(explain, digits):
    for wrong in (["--n-samples", "many"], ["--n-samples", 0], ["--method", "magic"]):
        with pytest.raises(SystemExit) as stop:
            explain(*digits, *wrong)
        assert stop.value.code == 2


def test_labels_that_are_no_classes_of_the_model(explain, digits, tmp_path):
    np.savez("x.npz", x=np.zeros((5, 1, 8, 8), np.float32), y=[3, 9, 10, 4, 11])
    wrong = explain(*digits, "--target", "label")
    assert wrong.status == 2 and "2 of 5 have none, the first is 2" in wrong.err
    np.savez("x.npz", x=np.zeros((5, 1, 8, 8), np.float32))
    assert "5 of 5 have none" in explain(*digits, "--target", "label").err
    assert explain(*digits, "--target", "label", "--limit", 2).status == 2 and not (tmp_path / "out").exists()


ODD_MODELS = """
import torch

def number():
    return lambda x: x.flatten(1).sum(1)

def column():
    return lambda x: x.flatten(1).sum(1, keepdim=True)

def several():
    return lambda x: (x, x)

def maps():
    return lambda x: x

def small():  # memory for ten rows
    def forward(x):
        if len(x) > 10:
            raise MemoryError
        return x.flatten(1)[:, :3].square()
    return forward
"""


def test_models_of_one_output(explain, digits, tmp_path):
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    x = torch.from_numpy(np.load("x.npz")["x"])
    sums = x.reshape(5, 4, 2, 4, 2).sum((2, 4)).flatten(1)  # of the patches: the model is additive
    for model, target in (("number", "predicted"), ("column", "predicted"), ("column", 0), ("column", "all")):
        out = f"{model}{target}"
        said = explain("--model", f"py:odd:{model}", *digits[2:], "--patch", 2, "--target", target, out=out)
        assert said.status == 0, said.err
        assert torch.allclose(open_run(out).tensor("values").reshape(5, 16), sums, atol=1e-4)
    refused = explain("--model", "py:odd:number", *digits[2:], "--target", 1)
    assert refused.status == 2 and "one number an input" in refused.err
    logit = explain("--model", "py:odd:number", *digits[2:], "--link", "logit")
    assert logit.status == 2 and "probabilities" in logit.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "said"), [("several", "got tuple"), ("maps", "got [5, 1, 8, 8]")])
def test_models_of_another_kind(explain, digits, tmp_path, model, said):
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    result = explain("--model", f"py:odd:{model}", *digits[2:])
    assert result.status == 2 and "[b] or [b, K]" in result.err and said in result.err


def test_memory_runs_out(explain, digits, table, tmp_path):
    (tmp_path / "odd.py").write_text(ODD_MODELS)
    model = ["--model", "py:odd:small", "--target", 0]
    assert explain(*model, *digits[2:], "--patch", 2, "--batch-size", 64).status == 0
    assert open_run("out").notes(0)["rows"] == 8
    rows = ["--data", "csv:few.csv", *table[2:], "--n-samples", 8]
    assert explain(*model, *rows, "--background", 20, "--batch-size", 16, out="pieces").status == 0
    assert open_run("pieces").notes(0)["rows"] == 8  # fewer than one coalition with its background
    assert torch.isfinite(open_run("pieces").tensor("values")).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(explain, digits, photos, table):
    for arguments in (
        [*digits, "--baseline", "mean"],
        [*digits, "--autocast", "bf16"],
        [*table, "--data", "csv:people.csv", "--background", 5],
        [*photos, "--segments", "slic", "--n-segments", 9, "--target", "label"],
        [*photos, "--removal", "token-drop"],
    ):
        values = []
        for device in ("cpu", "cuda"):
            said = explain(*arguments, "--device", device, out=f"{device}{arguments[-3:]}")
            assert said.status == 0, said.err
            values.append(open_run(f"{device}{arguments[-3:]}").tensor("values").nan_to_num())
        assert torch.allclose(*values, atol=0.05 if "bf16" in arguments else 1e-3)


def test_without_the_report_extra(explain, digits, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find(name, *a))
    said = explain(*digits, "--patch", 2, report=True)
    assert said.status == 0 and open_run("out").complete and not (tmp_path / "out" / "report.html").exists()
    assert said.out.index("no report.html: it needs jinja2") < said.out.index("model:")


def test_full_disk_is_said_before_the_work(explain, digits, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    said = explain(*digits)
    assert said.status == 2 and "free space" in said.err


def test_model_that_fails_on_the_data(explain, digits):
    np.savez("x.npz", x=np.zeros((5, 1, 7, 7), np.float32))
    said = explain(*digits)
    assert said.status == 2 and "shape [5, 1, 7, 7]" in said.err


def test_images_through_the_default_preprocessing(explain, tmp_path):
    """A model of your own without preprocessing: scaled to 0..1, resized, normalised."""
    (tmp_path / "mine.py").write_text(
        "import torch\ndef model():\n    return lambda x: torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1)\n"
    )
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.fromarray(np.full((12, 20, 3), 51 * (i + 1), np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    arguments = ["--model", "py:mine:model", "--data", "imagefolder:flat", "--target", 0, "--patch", 4]
    sized = explain(*arguments, "--image-size", 8, 16, "--mean", 0.1, "--std", 0.5)
    assert sized.status == 0, sized.err
    run = open_run("out")
    assert run.static["feature_mask"].shape == (8, 16)
    full = [(0.2 * (i + 1) - 0.1) / 0.5 for i in range(3)]
    assert torch.allclose(run.tensor("full_values"), torch.tensor(full), atol=1e-5)
    assert torch.allclose(run.tensor("values"), (torch.tensor(full) / 8)[:, None].expand(3, 8), atol=1e-5)
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "flat" / "9.png")
    mixed = explain(*arguments, out="mixed")
    assert mixed.status == 2 and "one size" in mixed.err and "--image-size" in mixed.err


def test_baseline_mean(explain, digits):
    assert explain(*digits, "--baseline", "mean").status == 0
    assert np.allclose(open_run("out").static["baseline"].numpy(), np.load("x.npz")["x"].mean(0), atol=1e-6)


def test_limit_seed_and_threads(explain, digits):
    before = torch.get_num_threads()
    try:
        assert explain(*digits, "--limit", 2, "--seed", 5, "--threads", 1, "--chunk-size", 1).status == 0
        run = open_run("out")
        assert len(run) == 2 and run.n_chunks == 2 and run.manifest["threads"] == 1 and run.manifest["seed"] == 5
        torch.set_num_threads(2)
        again = explain(*digits, "--limit", 2, "--seed", 5, "--chunk-size", 1)
        assert "note" not in again.out and torch.get_num_threads() == 1  # as the run began
        other = explain(*digits, "--limit", 2, "--seed", 5, "--chunk-size", 2, "--batch-size", 7)
        assert other.status == 0 and "note: --chunk-size stays 1" in other.out and "--batch-size stays" in other.out
    finally:
        torch.set_num_threads(before)


def test_own_vision_transformer_takes_whole_patches(explain, tmp_path):
    torch.manual_seed(0)
    save_model(VisionTransformer(16, 4, 3, channels=1, dim=16, depth=1, heads=2), tmp_path / "own")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((3, 1, 16, 16), np.float32))
    said = explain("--model", "xaifast:own", "--data", "npz:x.npz", "--removal", "token-drop")
    assert said.status == 0, said.err
    assert "16 patches of 4 × 4" in said.out and "dropped" in said.out


def test_few_evaluations_are_warned_of_once(explain, digits):
    said = explain(*digits, "--chunk-size", 1)
    assert said.err.count("warning:") == 1 and "n_samples=60 is below the number of players (64)" in said.err


def test_quiet_says_nothing(explain, digits):
    said = explain(*digits, "--quiet", "--patch", 2)
    assert said.status == 0 and said.out == "" and said.err == ""
