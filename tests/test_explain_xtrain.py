"""`xaifast explain --method xtrain|xstep|xtrain+`: what is stored, evaluated, reported and refused."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import scipy.stats
import torch

import xaifast
from xaifast.attribution.xtrain import xtrain
from xaifast.cli import main
from xaifast.cli.xtrain_job import MOMENTS
from xaifast.data import controlled, open_data
from xaifast.evaluation.clean import BESIDE, clean_scores, integrated_gradients
from xaifast.models import MLP, load_model, save_model
from xaifast.run import open_run

N = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Recorded trainings: of digits on noise, a checkpoint every nine steps, and of the made table."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for data, record, *options in (
            ("controlled:digits-noise", "digits", "--hidden", "16", "--epochs", "3", "--every", "6", "--lr", "0.01"),
            ("controlled:table", "table", "--hidden", "12", "8", "--epochs", "4", "--lr", "0.01"),
        ):
            assert main(["train", "mlp", "--data", data, "--record", record, "--quiet", *options]) == 0
    return folder


@pytest.fixture
def explain(trained, tmp_path, monkeypatch, capsys):
    """Runs the command on the digits or the table in a copy of that folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, method="xtrain", of="digits", out="out", report=False, trajectory=True):
        data = {"digits": "controlled:digits-noise", "table": "controlled:table"}[of]
        known = ["--trajectory", of] if trajectory else []
        extra = [] if report else ["--no-report"]
        status = main([
            "explain", "--method", method, "--model", f"xaifast:{of}/model", "--data", data, *known, "--out", out,
            "--limit", str(N), *extra, *map(str, arguments),
        ])  # fmt: skip
        said = capsys.readouterr()
        return namedtuple("Said", "status out err")(status, said.out, said.err)

    return run


def of_digits():
    made = controlled.digits("noise")
    return load_model("xaifast:digits/model").forward, xaifast.Trajectory("digits"), made.inputs[:N], made.labels[:N]


@pytest.mark.parametrize(
    ("method", "arguments", "options"),
    [
        ("xtrain", [], {}),
        ("xtrain", ["--mode", "linear"], {"mode": "linear"}),
        ("xstep", ["--checkpoints", "0,3,11"], {"checkpoints": [0, 3, 11]}),
        ("xstep", ["--direction", "reverse"], {"direction": "reverse"}),
        ("xtrain+", ["--gate", "step_feature"], {"gate": "step_feature"}),
        ("xtrain+", ["--checkpoints", "uniform"], {"checkpoints": "uniform"}),
    ],
)
def test_values_are_those_of_xtrain(explain, method, arguments, options):
    said = explain("--patch", 4, "--target", "label", *arguments, method=method)
    assert said.status == 0, said.err
    run = open_run("out")
    model, traj, x, labels = of_digits()
    mask = xaifast.grid_mask((28, 28), 4)
    expected = xtrain(model, traj, x, target=labels, variant=method, feature_mask=mask, per_step=True, **options)
    for name, values in {
        "values": expected.values,
        "residual": expected.residual,
        "base_values": expected.logits[0],
        "full_values": expected.logits[-1],
    }.items():
        assert torch.allclose(run.tensor(name), values.float(), rtol=1e-4, atol=1e-5), name
    assert run.tensor("target").tolist() == run.tensor("label").tolist() == labels.tolist()
    assert torch.equal(run.tensor("predicted"), model(x).argmax(1))
    assert run.tensor("std_errors").isnan().all()
    ends = [end for _, end in expected.steps]
    assert run.manifest["settings"]["checkpoints"] == [expected.steps[0][0], *ends]
    moments = run.manifest["formation"]["moments"]
    assert moments[-1] == ends[-1] and len(moments) == min(MOMENTS, len(ends)) and set(moments) <= set(ends)
    formed = expected.formed()[[ends.index(t) for t in moments]].transpose(0, 1)
    assert torch.allclose(run.tensor("formed"), formed, rtol=1e-4, atol=1e-5)
    assert torch.allclose(run.tensor("formed")[:, -1], run.tensor("values"), rtol=1e-4, atol=1e-5)
    opened = torch.ones(N) if expected.gates is None else expected.gates.float().mean(0)
    assert torch.allclose(run.tensor("gates_open"), opened)
    assert f"{len(ends) + 1} checkpoints" in said.out and "occluded rows" in said.out


def test_the_predicted_class_is_explained_and_chunks_do_not_matter(explain):
    assert explain("--patch", 7, out="a").status == 0
    assert explain("--patch", 7, "--chunk-size", 4, "--batch-size", 5, out="b").status == 0
    a, b = open_run("a"), open_run("b")
    assert b.n_chunks == N // 4 and a.n_chunks == 1
    model, traj, x, _ = of_digits()
    assert torch.equal(a.tensor("target"), model(x).argmax(1))
    for name in ("values", "residual", "formed", "clean_score"):
        assert torch.allclose(a.tensor(name), b.tensor(name), rtol=1e-4, atol=1e-5), name


def test_the_same_command_goes_on_and_another_training_is_refused(explain):
    assert explain("--patch", 7).status == 0
    assert "finished 1 of 1" in explain("--patch", 7).out
    traj = xaifast.Trajectory("shorter")
    states, model = list(xaifast.Trajectory("digits")), load_model("xaifast:digits/model").forward
    for state in (states[0], states[5], states[-1]):
        model.load_state_dict(state)
        traj.record(model)
    other = explain("--patch", 7, "--trajectory", "shorter")
    assert other.status == 2 and "settings.trajectory.n_checkpoints was" in other.err


def test_evaluate_judges_such_runs(explain, capsys):
    assert explain("--patch", 4).status == 0
    assert main(["evaluate", "out", "--no-report", "--quiet"]) == 0
    scores = open_run("out/evaluation")
    assert scores.manifest["settings"]["methods"] == ["xtrain", "random", "gradient-x-input"]
    model, _, x, _ = of_digits()
    run = open_run("out")
    expected = xaifast.insertion_deletion(
        model, x, run.tensor("values"), target=run.tensor("target"), feature_mask=run.static["feature_mask"], steps=49
    )
    assert torch.allclose(scores.tensor("deletion_auc")[:, 0], expected.deletion_auc, atol=1e-6)


def shown(path):
    """Visible text of a report."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", path.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("&#39;", "'").split())


def test_the_report_shows_how_attributions_formed(explain, tmp_path):
    assert explain("--patch", 4, method="xtrain+", report=True).status == 0
    run, text = open_run("out"), shown(tmp_path / "out" / "report.html")
    moments, n_classes = run.manifest["formation"]["moments"], len(run.tensor("target").unique())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<div class="moments">') == n_classes + 4
    assert page.count('<div class="moments"><figure>') == n_classes + 4
    section = page[page.index('<section id="formation">') :].partition("</section>")[0]
    assert section.count("<figure>") == len(moments) * (n_classes + 4)
    assert f"checkpoints {', '.join(map(str, moments))} of 11" in text
    assert "XtrAIn+ of 24 inputs" in text and "What training did for each feature's part" in text
    rows = (run.tensor("target") == run.tensor("target")[0]).nonzero().flatten()
    mass = run.tensor("values")[rows].abs().sum(1).mean()
    assert f"{float(mass):.3g}" in text
    assert "Preprocessing: ink in 0..1 on uniform noise in 0..0.5" in text
    for method in ("XtrAIn+", *BESIDE):
        assert re.search(rf"{re.escape(method)} 0\.\d+ ± 0\.\d+ 0", text), method
    assert "Standard errors" not in text and "std. error" not in text and "Shapley" not in text


def test_the_report_of_a_table_draws_lines(explain, tmp_path):
    assert explain(of="table", report=True).status == 0
    page = (tmp_path / "out" / "report.html").read_text()
    section = page[page.index('<section id="formation">') :].partition("</section>")[0]
    n_classes = len(open_run("out").tensor("target").unique())
    assert section.count('aria-label="Values over checkpoints"') == n_classes and "NaN" not in section
    assert "columns of mean 0 and standard deviation 1" in section


def test_classes_without_mass_are_named(explain, tmp_path):
    made = controlled.made_table(200)
    model, traj = MLP(50, 5, (12,)), xaifast.Trajectory("few")
    learned = made.labels < 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    traj.record(model)
    for _ in range(8):
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(made.inputs[learned]), made.labels[learned]).backward()
            optimizer.step()
        traj.record(model)
    save_model(model, "few-model", class_names=["ada", "bob", "cyd", "dan", "eve"])
    status = explain(
        "--model", "xaifast:few-model", "--trajectory", "few", "--target", "label", "--limit", 100,
        method="xtrain+", of="table", report=True,
    ).status  # fmt: skip
    assert status == 0
    run = open_run("out")
    mass = torch.stack([run.tensor("values")[run.tensor("target") == c].abs().sum(1).mean() for c in range(5)])
    assert mass[4] < 0.01 * mass.max() and mass[:4].min() > 0.01 * mass.max()
    text = shown(tmp_path / "out" / "report.html")
    assert "Possibly never learned: eve." in text
    shutil.rmtree("out")
    assert explain(
        "--model", "xaifast:few-model", "--trajectory", "few", method="xtrain", of="table", report=True
    ).status == 0  # fmt: skip
    text = shown(tmp_path / "out" / "report.html")
    assert "Possibly never learned" not in text and "No input explained has eve as its target" in text


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {"trajectory": False}, "needs the recorded training"),
        ([], {"method": "kernel-shap"}, "--trajectory is for --method"),
        (["--trajectory", "table"], {}, "must end in the model"),
        (["--trajectory", "empty"], {}, "two checkpoints or more"),
        (["--baseline", "1"], {}, "--baseline says how inputs are occluded"),
        (["--n-samples", "100"], {}, "--n-samples says how"),
        (["--target", "all"], {}, "explains one of several outputs"),
        (["--checkpoints", "endpoints"], {}, "adds up all steps"),
        (["--checkpoints", "some"], {"method": "xstep"}, "or numbers like"),
        (["--checkpoints", "0,99"], {"method": "xstep"}, "0..11"),
        (["--gate", "step_feature"], {}, "gate belongs to"),
        (["--gate", "class_update"], {"method": "xtrain+"}, "needs the part of each class"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(explain, tmp_path, arguments, changes, message):
    said = explain(*arguments, **changes)
    assert said.status == 2 and message in said.err, said.err
    assert not (tmp_path / "out").exists()


def test_known_signal_as_a_data_source():
    for name in ("zero", "normalised", "noise", "textured"):
        source, made = open_data(f"controlled:digits-{name}"), controlled.digits(name)
        assert torch.equal(torch.stack(source.load([3, 0]).items), made.inputs[[3, 0]])
        assert torch.equal(source.signal, made.signal) and torch.equal(source.labels, made.labels)
    table = open_data("controlled:table")
    assert table.signal.shape == (1000, 50) and table.signal[7].sum() == 10 and len(table.class_names) == 5
    with pytest.raises(ValueError, match="must name one of"):
        open_data("controlled:digits")
    with pytest.raises(ValueError, match="a data set is one of"):
        open_data("controlled")


def test_integrated_gradients_of_a_cubic():
    weights = torch.tensor([1.0, -2.0, 3.0])

    def model(x):
        return torch.stack([(x**3 * weights).sum(1), x.sum(1)], 1)

    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    found = integrated_gradients(model, x, target=torch.tensor([0, 1]), baseline=0.25, steps=400)
    expected = torch.stack([weights * (x[0] ** 3 - 0.25**3), x[1] - 0.25])
    assert torch.allclose(found, expected.double(), atol=1e-4)
    coarse = integrated_gradients(model, x, target=torch.tensor([0, 0]), steps=1)
    assert torch.allclose(coarse, x * 3 * (x / 2) ** 2 * weights)


def test_clean_scores_of_a_linear_model():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, bias=False)).double()
    x, target = torch.rand(3, 1, 4, 4, dtype=torch.float64) + 0.1, torch.tensor([0, 2, 1])
    signal = torch.rand(3, 1, 4, 4) < 0.4
    mask = xaifast.grid_mask((4, 4), 2)
    values = torch.randn(3, 4)
    found = clean_scores(model, x, signal, values, mask, target=target, n_samples=16)
    parts = (x.flatten(1) * model[1].weight[target]).detach().view(3, 2, 2, 2, 2).sum((2, 4)).flatten(1)  # [3, 4]
    sizes = x.view(3, 2, 2, 2, 2).sum((2, 4)).flatten(1)

    def score(players):
        spread = players.abs()[:, mask.flatten()].view(3, 1, 4, 4)
        return torch.stack([spread[b][signal[b]].sum() / spread[b].sum() for b in range(3)]).float()

    expected = torch.stack([score(values), *[score(parts)] * 4, score(sizes)], 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_tables_of_the_evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from evidence_tables import half_width, interval, verdict

    values = [1.0, 2.0, 4.0, 4.5, 6.0]
    low, high = scipy.stats.t.interval(0.95, 4, loc=3.5, scale=scipy.stats.sem(values))
    assert abs(half_width(values) - (high - low) / 2) < 1e-3 and interval(values).startswith("3.500 ±")
    paired = [0.9, 1.9, 3.9, 4.4, 5.8]  # always less, by about 0.1
    assert verdict(values, paired, 1) == 1 and verdict(values, paired, -1) == -1 and verdict(paired, values, 1) == -1
    assert verdict(values, values[::-1], 1) == 0 and verdict(values, values, 1) == 0
