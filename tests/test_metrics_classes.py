"""The torchmetrics classes: batches add up to the whole, over updates and over processes; chance never merges two."""

from __future__ import annotations

import math
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from xaifast import metrics

torchmetrics = pytest.importorskip("torchmetrics")

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def pairs(n):
    """Predictions and references with ties, and constant maps that have no rank correlation."""
    torch.manual_seed(n)
    pred, ref = torch.randint(-3, 4, (n, 12)).float(), torch.randn(n, 12)
    pred[1] = 0
    return pred, ref


def maps(n):
    """Importance and segmentations, an input of them ignored as a whole."""
    torch.manual_seed(n)
    importance, seg = torch.rand(n, 12), (torch.rand(n, 12) < 0.4).float()
    seg[torch.rand(n, 12) < 0.2] = torch.nan
    seg[2] = torch.nan
    return importance, seg


def mean(function):
    return lambda *batch: function(*batch).nanmean()


# Name: the metric, its data and the value over all of them by the function.
CASES = {
    "e_rmse": (lambda: metrics.ERmse(), pairs, mean(metrics.e_rmse)),
    "e_rmse pooled": (lambda: metrics.ERmse(pooled=True), pairs, lambda *d: metrics.e_rmse(*d, pooled=True)),
    "iou_at_k": (lambda: metrics.IouAtK(4), pairs, mean(lambda *d: metrics.iou_at_k(*d, 4))),
    "rank_correlation": (lambda: metrics.RankCorrelation(), pairs, mean(metrics.rank_correlation)),
    "difference": (lambda: metrics.SegmentationDifference(), maps, mean(metrics.segmentation_difference)),
    "difference of objects": (
        lambda: metrics.SegmentationDifference(0), maps, mean(lambda *d: metrics.segmentation_difference(*d, 0)),
    ),
    "macro_iou": (lambda: metrics.MacroIou(0.4), maps, mean(lambda *d: metrics.macro_iou(*d, 0.4))),
    "macro_iou pooled": (
        lambda: metrics.MacroIou(0.4, 0, pooled=True), maps, lambda *d: metrics.macro_iou(*d, 0.4, 0, pooled=True),
    ),
    "sparsity": (lambda: metrics.Sparsity(), lambda n: maps(n)[:1], mean(metrics.sparsity)),
    "reproducibility": (
        lambda: metrics.Reproducibility(), lambda n: (torch.stack(maps(n)[:1] * 2 + pairs(n)[:1]),),
        mean(metrics.reproducibility),
    ),
}  # fmt: skip
UNEVEN = (3, 1, 4, 2)


def batches(name, data, sizes=UNEVEN):
    """The same data in batches of uneven sizes; runs are on axis 0 of Reproducibility's."""
    return zip(*(x.split(sizes, 1 if name == "reproducibility" else 0) for x in data), strict=True)


def close(got, wanted):
    assert got.dtype == torch.float64 and got.shape == ()
    torch.testing.assert_close(got, wanted.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_batches_add_up(name):
    make, data, function = CASES[name]
    data = data(sum(UNEVEN))
    metric, forwarded = make(), make()
    for batch in batches(name, data):
        metric.update(*batch)
        value, alone = forwarded(*batch), function(*batch)
        assert value.isnan() and alone.isnan() or torch.allclose(value, alone.double(), rtol=1e-6)
    close(metric.compute(), function(*data))
    close(forwarded.compute(), function(*data))
    close(pickle.loads(pickle.dumps(metric)).compute(), function(*data))
    metric.reset()
    first = next(iter(batches(name, data)))
    metric.update(*first)
    close(metric.compute(), function(*first))


@pytest.mark.parametrize("name", CASES)
def test_no_data_is_nan_with_a_warning(name):
    metric = CASES[name][0]()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()


def test_undefined_inputs_are_counted_and_left_out():
    metric = metrics.RankCorrelation()
    metric.update(*pairs(5))
    metric.update(torch.ones(3, 2), torch.ones(3, 2))
    assert metric.undefined == 4
    close(metric.compute(), metrics.rank_correlation(*pairs(5)).nanmean())
    segmented = metrics.SegmentationDifference()
    segmented.update(*maps(7))
    assert segmented.undefined == 1
    segmented.reset()
    segmented.update(torch.zeros(2, 1), torch.full((2, 1), torch.nan))
    assert segmented.undefined == 2 and segmented.compute().isnan()


def test_sums_are_float64():
    metric = metrics.Sparsity()
    metric.update(torch.full((1, 1), 2.0**30))
    for _ in range(100):
        metric.update(torch.full((1, 1), 1.0))  # lost beside 2^30 in float32
    assert float(metric.compute()) == (2**30 + 100) / 101


def test_a_collection_keeps_metrics_apart_that_agree_on_the_first_batch():
    collection = torchmetrics.MetricCollection(
        {
            "five": metrics.IouAtK(5), "six": metrics.IouAtK(6), "rank": metrics.RankCorrelation(),
            "mean": metrics.ERmse(), "pooled": metrics.ERmse(pooled=True),
        }
    )  # fmt: skip
    equal = torch.randn(4, 12)
    pred, ref = pairs(6)
    collection.update(equal, equal)
    collection.update(pred, ref)
    apart = {"five": metrics.IouAtK(5), "six": metrics.IouAtK(6), "rank": metrics.RankCorrelation(),
             "mean": metrics.ERmse(), "pooled": metrics.ERmse(pooled=True)}  # fmt: skip
    for name, metric in apart.items():
        metric.update(equal, equal)
        metric.update(pred, ref)
        assert torch.equal(collection.compute()[name], metric.compute()), name
    assert len({float(value) for value in collection.compute().values()}) == 5

    both = torchmetrics.MetricCollection([metrics.RankCorrelation(), metrics.Sparsity()])
    both.update(pred=equal, ref=equal, importance=torch.ones(4, 12))
    both.update(pred=equal, ref=-equal, importance=torch.ones(4, 12))
    assert {name: float(value) for name, value in both.compute().items()} == {"RankCorrelation": 0, "Sparsity": 1}


def test_a_collection_by_name_of_the_argument():
    importance, seg = torch.rand(3, 4), torch.eye(4)[:3]
    collection = torchmetrics.MetricCollection([metrics.MacroIou(), metrics.Sparsity()])
    collection.update(importance=importance, seg=seg)
    assert collection.compute().keys() == {"MacroIou", "Sparsity"}
    close(collection.compute()["Sparsity"], importance.mean())


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0]().is_differentiable])
def test_batch_values_are_differentiable(name):
    make, data, _ = CASES[name]
    first, *rest = (x.double() for x in data(4))
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: make()(x, *rest), first)
    metric = make()
    metric(first, *rest).backward()
    assert not metric.compute().requires_grad


@pytest.mark.parametrize(
    "call", [lambda: metrics.IouAtK(0), lambda: metrics.IouAtK(2.0), lambda: metrics.MacroIou(1.5)]
)
def test_bad_settings_are_refused_at_once(call):
    with pytest.raises((ValueError, TypeError), match=r"xaifast\.metrics\.(iou_at_k: k|macro_iou: threshold) must be"):
        call()


def test_a_refused_batch_changes_nothing():
    metric = metrics.ERmse()
    metric.update(*pairs(3))
    before = metric.compute()
    with pytest.raises(ValueError, match="one shape"):
        metric.update(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="must not be empty"):
        metric.update(torch.ones(0, 3), torch.ones(0, 3))
    assert torch.equal(metric.compute(), before)


def test_plot():
    pytest.importorskip("matplotlib")
    metric = metrics.MacroIou()
    _, axes = metric.plot([metric(*maps(3)), metric(*maps(4))])
    drawn = axes.lines[0].get_ydata()
    assert [float(v) for v in drawn] == [float(metrics.MacroIou()(*maps(n))) for n in (3, 4)]


def _one_rank(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values = {}
    for name, (make, data, _) in CASES.items():
        metric = make()
        for i, batch in enumerate(batches(name, data(sum(UNEVEN)))):
            if (i == 1) == (rank == 1):  # three batches against one
                metric.update(*batch)
        values[name] = metric.compute()
    idle = metrics.ERmse()
    if rank == 0:
        idle.update(*pairs(3))
    values["idle"] = idle.compute()
    torch.save(values, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_one_rank, (tmp_path / "store", tmp_path), nprocs=2)
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (_, data, function) in CASES.items():
            close(values[name], function(*data(sum(UNEVEN))))
        close(values["idle"], metrics.e_rmse(*pairs(3)).mean())


def test_torchmetrics_is_imported_on_first_use(run_python):
    code = "import sys, xaifast; xaifast.metrics.to_patches; print('torchmetrics' in sys.modules)\n\
xaifast.metrics.ERmse(); print('torchmetrics' in sys.modules)"
    assert run_python(code).split() == ["False", "True"]


def test_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(
        ImportError, match=r"xaifast\.metrics\.ERmse needs torchmetrics; pip install 'xaifast\[metrics\]'"
    ):
        metrics.ERmse  # noqa: B018
    assert "ERmse" in dir(metrics) and not hasattr(metrics, "Ermse")


def test_every_function_has_a_class_and_every_class_a_line_in_the_docs():
    names = {re.sub("(?<!^)([A-Z])", r"_\1", name).lower() for name in metrics._CLASSES}
    assert names | {"to_patches"} <= set(metrics.__all__)
    if not DOCS.exists():
        pytest.skip("needs the source tree")
    missing = [name for name in (*names, *metrics._CLASSES) if f"`{name}" not in DOCS.read_text()]
    assert not missing


def test_the_example_of_the_docs_shows_what_is_written():
    if not DOCS.exists():
        pytest.skip("needs the source tree")
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    names, shown = {}, 0
    for statement in code.splitlines():
        expression, _, said = statement.partition("  # ")
        if said:
            assert repr(eval(expression, names)) == said
            shown += 1
        else:
            exec(statement, names)
    assert shown >= 5 and math.isfinite(float(names["metric"].compute()))
