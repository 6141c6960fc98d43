"""Recording of training loops: the right states at the right steps, in plain loops and frameworks; class parts."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from xaifast import training
from xaifast.training import Recorder, frameworks, recording
from xaifast.trajectory import Trajectory, TrajectoryError, class_gradients


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.randn(20, 6), torch.randint(3, (20,))


def one_step(model, optimizer, x, y):
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


def copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def check(traj, states, steps):
    """The trajectory holds the states after these steps."""
    assert traj.steps == steps
    for state, step in zip(traj, steps, strict=True):
        for name, value in states[step].items():
            assert torch.equal(state[name], value), (step, name)


@pytest.mark.parametrize("every, steps", [
    (1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7]), (7, [0, 7]), (9, [0, 7]), ("epoch", [0, 4, 7])
])  # fmt: skip
def test_plain_loop(every, steps):
    model, x, y = problem()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reference, _, _ = problem()
    twin = torch.optim.Adam(reference.parameters(), 1e-2)
    states = [copy(reference)]
    for _ in range(7):
        one_step(reference, twin, x, y)
        states.append(copy(reference))
    traj = Trajectory()
    with recording(model, traj, every=every) as loop:
        for step in range(7):
            one_step(model, optimizer, x, y)
            if step in (3, 6):
                loop.end_epoch()
        assert loop.n_steps == 7
    check(traj, states, steps)
    one_step(model, optimizer, x, y)
    assert len(traj) == len(steps)  # the hook is gone


def test_only_optimizers_of_the_model_count():
    model, x, y = problem()
    other = nn.Linear(2, 2)
    ours = [torch.optim.SGD(model[i].parameters(), 0.1) for i in (0, 2)]
    foreign = torch.optim.SGD(other.parameters(), 0.1)
    traj = Trajectory()
    with recording(model, traj, every=1):
        for _ in range(2):
            other(torch.ones(1, 2)).sum().backward()
            foreign.step()
            for optimizer in ours:
                one_step(model, optimizer, x, y)
    assert traj.steps == [0, 1, 2, 3, 4]
    assert traj.update_norms("0")[1::2].tolist() == [0, 0] and traj.update_norms("2")[::2].tolist() == [0, 0]


def test_after_an_error_nothing_more_is_recorded():
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    traj = Trajectory()
    with pytest.raises(ZeroDivisionError), recording(model, traj, every=2):
        for step in range(5):
            one_step(model, optimizer, x, y)
            if step == 2:
                1 / 0  # noqa: B018
    assert traj.steps == [0, 2]
    one_step(model, optimizer, x, y)
    assert len(traj) == 2


def test_divergence_stops_the_loop_and_names_the_weight():
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), torch.inf)
    traj = Trajectory()
    with (
        pytest.raises(ValueError, match=r"weights must be finite, got (nan|-?inf) in 0\.weight"),
        recording(model, traj, 1),
    ):
        one_step(model, optimizer, x, y)
    assert traj.steps == [0]


def test_a_loop_goes_on_in_the_same_directory(tmp_path):
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = [copy(model)]
    for _ in range(2):
        traj = Trajectory(tmp_path / "run")
        if len(traj):
            model, _, _ = problem(9)
            model.load_state_dict(traj[-1])
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with recording(model, traj, every=2) as loop:
            for _ in range(3):
                one_step(model, optimizer, x, y)
                states.append(copy(model))
    assert loop.n_steps == 6
    check(Trajectory(tmp_path / "run"), states, [0, 2, 3, 4, 6])


def test_two_loops_in_memory_do_not_repeat_a_state():
    model, x, y = problem()
    optimizer, traj = torch.optim.SGD(model.parameters(), 0.1), Trajectory()
    for _ in range(2):
        with recording(model, traj, every="epoch"):
            one_step(model, optimizer, x, y)
    assert traj.steps == [0, 1, 2]


def test_training_that_begins_anew_is_refused(tmp_path):
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with recording(model, Trajectory(tmp_path / "run"), every=1):
        for _ in range(4):
            one_step(model, optimizer, x, y)
    again, _, _ = problem()
    with (
        pytest.raises(TrajectoryError, match="does not seem to continue"),
        recording(again, Trajectory(tmp_path / "run"), every=1),
    ):
        one_step(again, optimizer, x, y)
    assert len(Trajectory(tmp_path / "run")) == 5


@pytest.mark.parametrize("call, kind, said", [
    (lambda: Recorder("runs/x"), TypeError, "must be a xaifast.Trajectory, got str"),
    (lambda: Recorder(Trajectory(), every=0), ValueError, 'must be "epoch" or a positive number'),
    (lambda: Recorder(Trajectory(), every="step"), ValueError, "got 'step'"),
])  # fmt: skip
def test_bad_input(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


class Frame:
    """What a framework tells its callbacks, for either."""

    def __init__(self, name, trajectory, model, **settings):
        self.name, self.model = name, model
        self.state = types.SimpleNamespace(
            global_step=0, is_world_process_zero=True, is_global_zero=True
        )  # of the Trainer of either
        self.callback = getattr(training, name)(trajectory, **settings)

    def tell(self, hugging_face, lightning, *more):
        if self.name == "HuggingFaceRecorder":
            getattr(self.callback, hugging_face)(None, self.state, None, model=self.model)
        else:
            getattr(self.callback, lightning)(self.state, self.model, *more)

    def begin(self):
        self.tell("on_train_begin", "on_train_start")

    def step(self):
        self.state.global_step += 1
        self.tell("on_step_end", "on_train_batch_end", None, None, 0)

    def epoch(self):
        self.tell("on_epoch_end", "on_train_epoch_end")

    def end(self):
        self.tell("on_train_end", "on_train_end")


@pytest.fixture
def frame(request, monkeypatch):
    """A callback and its framework; Lightning's base class is stood in for where it is not installed."""
    if request.param == "HuggingFaceRecorder":
        pytest.importorskip("transformers")
    elif not any(importlib.util.find_spec(module) for module in ("lightning", "pytorch_lightning")):
        monkeypatch.setitem(sys.modules, "pytorch_lightning", types.SimpleNamespace(Callback=object))
        frameworks.lightning_recorder.cache_clear()
        request.addfinalizer(frameworks.lightning_recorder.cache_clear)
    return lambda *args, **settings: Frame(request.param, *args, **settings)


BOTH = pytest.mark.parametrize("frame", ["HuggingFaceRecorder", "LightningRecorder"], indirect=True)


@BOTH
@pytest.mark.parametrize("every, steps", [(2, [0, 2, 4, 5]), ("epoch", [0, 3, 5])])
def test_callbacks(frame, every, steps):
    model, x, y = problem()
    wrapped = nn.ModuleDict({"net": model})
    optimizer, traj = torch.optim.SGD(model.parameters(), 0.1), Trajectory()
    run = frame(traj, wrapped, every=every, part="net")
    run.begin()
    states = [copy(model)]
    for step in range(1, 6):
        one_step(model, optimizer, x, y)
        states.append(copy(model))
        run.step()
        if run.name == "LightningRecorder":
            run.tell(None, "on_train_batch_end", None, None, 1)  # a batch whose gradients are accumulated
        if step == 3:
            run.epoch()
    run.epoch()
    run.end()
    check(traj, states, steps)


@BOTH
def test_callbacks_drop_what_will_be_trained_again(frame, tmp_path):
    model, x, y = problem()
    optimizer, traj = torch.optim.SGD(model.parameters(), 0.1), Trajectory(tmp_path / "run")
    run = frame(traj, model, every=1)
    run.begin()
    states = [copy(model)]
    for _ in range(5):
        one_step(model, optimizer, x, y)
        states.append(copy(model))
        run.step()
    model.load_state_dict(states[3])  # killed at 5, the framework's checkpoint is of step 3
    run = frame(Trajectory(tmp_path / "run"), model, every=1)
    run.state.global_step = 3
    run.begin()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    one_step(model, optimizer, x, y)
    run.step()
    run.end()
    check(Trajectory(tmp_path / "run"), [*states[:4], copy(model)], [0, 1, 2, 3, 4])


@BOTH
def test_other_processes_do_not_record(frame):
    model, _, _ = problem()
    traj = Trajectory()
    run = frame(traj, model, every=1)
    run.state.is_world_process_zero = run.state.is_global_zero = False
    run.begin()
    run.step()
    run.epoch()
    run.end()
    assert len(traj) == 0


def test_the_hugging_face_callback_is_one_of_its_callbacks_and_pickles():
    transformers = pytest.importorskip("transformers")
    callback = training.HuggingFaceRecorder(Trajectory(), every=3)
    assert isinstance(callback, transformers.TrainerCallback)
    assert pickle.loads(pickle.dumps(callback))._recorder.every == 3


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_the_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.x, self.y = problem()

        def forward(self, inputs, labels):
            logits = self.net(inputs)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    model, states = Model(), []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            states.append(copy(model.net))

        on_step_end = on_train_begin

    data = [{"inputs": a, "labels": b} for a, b in zip(model.x, model.y, strict=True)]
    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=5, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", gradient_accumulation_steps=2, logging_strategy="no",
    )  # fmt: skip
    traj, by_epoch = Trajectory(), Trajectory()
    recorders = [
        training.HuggingFaceRecorder(traj, every=1, part="net"), training.HuggingFaceRecorder(by_epoch, part="net")
    ]  # fmt: skip
    transformers.Trainer(model, args, train_dataset=data, callbacks=[Watch(), *recorders]).train()
    check(traj, states, [0, 1, 2, 3, 4])
    check(by_epoch, states, [0, 2, 4])


def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.x, self.y = problem()
            self.states = [copy(self.net)]

        def training_step(self, batch):
            x, y = batch
            return cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

        def on_train_batch_end(self, *args):
            if len(self.states) == self.trainer.global_step:
                self.states.append(copy(self.net))

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(module.x, module.y), 5)
    traj, by_epoch = Trajectory(), Trajectory()
    recorders = [
        training.LightningRecorder(traj, every=1, part="net"), training.LightningRecorder(by_epoch, part="net")
    ]  # fmt: skip
    lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, callbacks=recorders, default_root_dir=tmp_path,
    ).fit(module, data)  # fmt: skip
    check(traj, module.states, [0, 1, 2, 3, 4])
    check(by_epoch, module.states, [0, 2, 4])


def test_a_missing_framework_is_named(monkeypatch):
    for module in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    frameworks.lightning_recorder.cache_clear()
    frameworks.hugging_face_recorder.cache_clear()
    with pytest.raises(ImportError, match="LightningRecorder needs Lightning; pip install"):
        training.LightningRecorder  # noqa: B018
    with pytest.raises(ImportError, match="HuggingFaceRecorder needs transformers; pip install"):
        training.HuggingFaceRecorder  # noqa: B018
    assert {"LightningRecorder", "HuggingFaceRecorder"} <= set(dir(training)) and not hasattr(training, "Nothing")


def test_no_framework_is_imported_before_it_is_asked_for(run_python):
    code = "import sys, xaifast.training\nprint([m for m in ('transformers', 'lightning') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def by_hand(model, x, y, n_classes):
    """Gradient of the first layer from the samples of each class alone."""
    parts = torch.zeros(n_classes, *model[0].weight.shape)
    for c in range(n_classes):
        mine = y == c
        if mine.any():
            model.zero_grad()
            (cross_entropy(model(x[mine]), y[mine], reduction="sum") / len(y)).backward()
            parts[c] = model[0].weight.grad
    model.zero_grad()
    return parts


def test_class_gradients_are_those_of_the_classes_samples():
    model, x, y = problem()
    y[y == 1] = 2  # class 1 has no sample, class 3 never any
    parts = class_gradients(cross_entropy(model(x), y, reduction="none"), y, model[0].weight, 4)
    torch.testing.assert_close(parts, by_hand(model, x, y, 4))
    assert parts[1].count_nonzero() == parts[3].count_nonzero() == 0 and not parts.requires_grad
    assert model[0].weight.grad is None


def test_class_gradients_see_the_dropout_and_batch_statistics_of_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    losses = cross_entropy(model(x), y, reduction="none")
    parts = class_gradients(losses, y, model[0].weight)
    losses.mean().backward()
    torch.testing.assert_close(parts.sum(0), model[0].weight.grad)
    assert int(model[1].num_batches_tracked) == 1


def trained(make, n_steps=3, every=1, where=None, **settings):
    """A recorded run with its class parts, -lr times the gradients of the classes."""
    model, x, y = problem()
    optimizer, traj = make(model.parameters()), Trajectory(where, **settings)
    lr = optimizer.param_groups[0]["lr"]
    traj.record(model)
    parts, given = 0, []
    for step in range(1, n_steps + 1):
        losses = cross_entropy(model(x), y, reduction="none")
        parts = parts - lr * class_gradients(losses, y, model[0].weight)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if step % every == 0:
            traj.record(model, class_updates={"0.weight": parts})
            given.append(parts)
            parts = 0
    return traj, given


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("settings", [{}, dict(deltas="bf16", tolerance=1e-3)])
def test_class_parts_are_exact_under_plain_gradient_descent(tmp_path, every, settings):
    traj, given = trained(lambda p: torch.optim.SGD(p, 0.1), 6, every, tmp_path / "run", **settings)
    traj = Trajectory(tmp_path / "run")
    states = list(traj)
    for t, wanted in enumerate(given):
        (name, (parts, residual, exact)), = traj.class_updates(t).items()  # fmt: skip
        assert name == "0.weight" and torch.equal(parts, wanted) and exact
        update = states[t + 1]["0.weight"] - states[t]["0.weight"]
        moved = sum((states[s]["0.weight"] - states[0]["0.weight"]).norm() for s in (t, t + 1))
        bound = 1e-5 * update.norm() + settings.get("tolerance", 0) * moved
        assert (parts.sum(0) - update).norm() <= bound and residual <= bound / update.norm()


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.Adam(p, 0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-2),
])  # fmt: skip
def test_class_parts_of_other_optimizers_are_called_approximate(make):
    traj, given = trained(make)
    parts, residual, exact = traj.class_updates(2)["0.weight"]
    first, second = traj.states([2, 3])
    update = second["0.weight"] - first["0.weight"]
    assert not exact
    assert residual == pytest.approx(float((parts.sum(0) - update).norm() / update.norm()), rel=1e-5)


def test_class_parts_are_kept_apart_and_only_where_given():
    model, _, _ = problem()
    traj = Trajectory()
    traj.record(model)
    traj.record(model)
    parts = torch.zeros(2, *model[0].weight.shape)
    traj.record(model, class_updates={"0.weight": parts})
    parts.fill_(7)
    assert traj.class_updates(0) == {} and len(traj[2]) == 4
    kept = traj.class_updates(-1)["0.weight"]
    assert kept.parts.count_nonzero() == 0 and kept.residual == 0 and kept.exact
    kept.parts.fill_(3)
    assert traj.class_updates(1)["0.weight"].parts.count_nonzero() == 0
    with pytest.raises(IndexError):
        traj.class_updates(2)


def refuse(**parts):
    model, _, _ = problem()
    traj = Trajectory()
    traj.record(model)
    try:
        traj.record(model, class_updates={name.replace("_", "."): value for name, value in parts.items()})
    finally:
        assert len(traj) == 1


def losses(model, x, y):
    return cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("call, kind, said", [
    (lambda m, x, y: refuse(**{"9_weight": torch.ones(1)}), ValueError, "name parameters of the model"),
    (lambda m, x, y: refuse(**{"0_weight": torch.ones(3, 6, 8)}), ValueError, r"tensor \[K, 8, 6\], got \[3, 6, 8\]"),
    (lambda m, x, y: refuse(**{"0_weight": torch.full((3, 8, 6), torch.nan)}), ValueError, "must be finite"),
    (lambda m, x, y: Trajectory().record(m, class_updates={"0.weight": 1}), ValueError, "the first checkpoint has"),
    (lambda m, x, y: Trajectory().record(m, class_updates=[1]), TypeError, "must map parameter names"),
    (lambda m, x, y: class_gradients(cross_entropy(m(x), y), y, m[0].weight), ValueError, 'reduction="none"'),
    (lambda m, x, y: class_gradients(losses(m, x, y), y, m[0].weight, 2), ValueError, "must lie in 0..1, got 2"),
    (lambda m, x, y: class_gradients(losses(m, x, y), y - 1, m[0].weight), ValueError, "got -1"),
    (lambda m, x, y: class_gradients(losses(m, x, y), y.float(), m[0].weight), TypeError, "must be integers"),
    (lambda m, x, y: class_gradients(losses(m, x, y).detach(), y, m[0].weight), ValueError, "gradients on"),
    (lambda m, x, y: class_gradients(losses(m, x, y), y, nn.Linear(2, 2).weight), ValueError, "took no part"),
])  # fmt: skip
def test_bad_class_parts(call, kind, said):
    with pytest.raises(kind, match=said):
        call(*problem())


def test_the_examples_of_the_docs_show_what_is_written(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    docs = Path(__file__).parents[1] / "docs" / "trajectory.md"
    if not docs.exists():
        pytest.skip("needs the source tree")
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for block in re.findall(r"^```python\n(.*?)^```", docs.read_text(), flags=re.M | re.S):
        exec(block, names)
        # Each block binds `traj` anew, so what it says is asked right after it.
        for expression, said in re.findall(r"^(\S.*?) +# (\(4.*|True)$", block, flags=re.M):
            assert repr(eval(expression, names)) == said
            shown.append(said)
    assert len(shown) == 2 and len(Trajectory("runs/digits-mlp")) == 4
    assert names["shift"].tolist() == [0] * 8 and names["score"].shape == names["alone"].shape == (8,)
