import numpy as np
import pytest
import torch
from test_store import MANIFEST, STATIC

from xaifast.attribution.dataset import DESIGN_BLOCK, Batch, ShapleyChunks, chunk_size
from xaifast.attribution.kernel_shap import kernel_shap
from xaifast.jobs import Chunk, run_job
from xaifast.players import grid_mask
from xaifast.run import open_run
from xaifast.store import Store
from xaifast.stream import Stream, part_of_job


class Worker:
    """Adds 1/3 as often as a chunk has rows a call, so that bytes tell the rows; remembers what it was asked."""

    def __init__(self, most_rows=10**9):
        self.most_rows, self.loaded, self.computed = most_rows, [], []

    def load(self, start, stop):
        self.loaded.append((start, stop))
        return torch.arange(start, stop, dtype=torch.float32)

    def compute(self, chunk, index, rows):
        self.computed.append((chunk, rows))
        stream = Stream(len(index), rows, show_progress=False, description="")
        values = index.clone()

        def step(start, stop):
            if min(rows, stop - start) > self.most_rows:
                raise MemoryError("too many rows")
            values[start:stop] += 1 / rows

        with stream:
            stream.run(len(index), step)
        return Chunk({"values": values}, [str(int(i)) for i in index])


def run(folder, worker, *, rank=0, world=1, manifest=MANIFEST):
    store = Store(folder, manifest, STATIC, rank=rank, world=world)
    try:
        run_job(store, worker.load, worker.compute, evaluations=3)
    finally:
        store.close()


def files(folder):
    """Everything but what tells the time."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "log" not in p.parts and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_all_chunks_once_and_in_order(tmp_path):
    worker = Worker()
    run(tmp_path, worker)
    assert worker.computed == [(0, 32), (1, 32), (2, 32)] and worker.loaded == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(open_run(tmp_path).tensor("values"), torch.arange(10) + 1 / 32)
    again = Worker()
    run(tmp_path, again)
    assert again.computed == [] and again.loaded == []


def test_log_tells_what_was_done(tmp_path):
    run(tmp_path, Worker())
    events = open_run(tmp_path).log
    assert [event["chunk"] for event in events] == [0, 1, 2]
    assert [event["inputs"] for event in events] == [4, 4, 2]
    assert sum(event["model_rows"] for event in events) == 30 == open_run(tmp_path).speed.model_rows


def test_out_of_memory_is_recorded_and_replayed(tmp_path):
    """Chunk 1 runs out of memory; an interruption after that changes nothing, even with memory again."""
    manifest = {**MANIFEST, "rows": 4}
    first = Worker()
    small = Worker(most_rows=2)

    def compute(chunk, index, rows):
        return (small if chunk == 1 else first).compute(chunk, index, rows)

    for folder in ("whole", "cut"):
        store = Store(tmp_path / folder, manifest, STATIC)

        def stopping(chunk, index, rows, folder=folder):
            result = compute(chunk, index, rows)
            if folder == "cut" and chunk == 1:
                raise KeyboardInterrupt  # computed, but not written
            return result

        if folder == "cut":
            with pytest.raises(KeyboardInterrupt):
                run_job(store, first.load, stopping, evaluations=1)
        else:
            run_job(store, first.load, stopping, evaluations=1)
        store.close()
    assert open_run(tmp_path / "cut").finished == [0]
    plenty = Worker()
    run(tmp_path / "cut", plenty, manifest=manifest)
    assert plenty.computed == [(1, 2), (2, 2)]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert [open_run(tmp_path / "cut").notes(chunk)["rows"] for chunk in range(3)] == [4, 2, 2]
    assert open_run(tmp_path / "whole").tensor("values").tolist() == pytest.approx(
        [i + 1 / (4 if i < 4 else 2) for i in range(10)]
    )


def test_one_row_that_does_not_fit_ends_the_job(tmp_path):
    worker = Worker(most_rows=0)
    with pytest.raises(MemoryError, match="xaifast: out of memory with one model row .*too many rows"):
        run(tmp_path, worker, manifest={**MANIFEST, "rows": 4})
    assert [rows for _, rows in worker.computed] == [4, 2, 1]
    later = Worker()
    run(tmp_path, later, manifest={**MANIFEST, "rows": 4})
    assert later.computed[0] == (0, 4)  # memory may be free another day


def test_an_allocator_of_any_kind_ends_the_job_with_advice(tmp_path):
    def compute(chunk, loaded, rows):
        np.empty(2**50)  # NumPy's own error takes a shape and a dtype

    store = Store(tmp_path, {**MANIFEST, "rows": 2}, STATIC)
    with pytest.raises(MemoryError, match="one model row"):
        run_job(store, lambda start, stop: None, compute, evaluations=1)


@pytest.mark.parametrize("stage", ["load", "compute"])
def test_an_error_keeps_finished_chunks(tmp_path, stage):
    worker = Worker()
    original = getattr(worker, stage)

    def failing(*args):
        if args[0] == (8 if stage == "load" else 2):
            raise ValueError("no such luck")
        return original(*args)

    setattr(worker, stage, failing)
    with pytest.raises(ValueError, match="no such luck"):
        run(tmp_path, worker)
    assert open_run(tmp_path).finished == [0, 1]


def test_ranks_together_do_what_one_does(tmp_path):
    for world in (1, 2, 3):
        for rank in range(world):
            run(tmp_path / str(world), Worker(), rank=rank, world=world)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")


def test_streams_of_a_job_count_and_do_not_halve():
    done = []

    def step(start, stop):
        if stop - start > 2:
            raise MemoryError

    stream = Stream(8, 4, show_progress=True, description="")
    with part_of_job(done.append):
        with stream, pytest.raises(MemoryError):
            stream.run(8, step)
        with Stream(8, 2, show_progress=False, description="") as inner:
            inner.run(8, step)
        with Stream(1, 1, show_progress=False, description="") as outer, pytest.raises(MemoryError, match="^$"):
            outer.run(1, lambda start, stop: step(0, 3))  # a background in pieces: the job decides there too
    assert sum(done) == 8
    with stream:  # outside a job it goes on with less
        stream.run(8, step)
    assert stream.rows == 2


def linear(x):
    weights = torch.arange(1.0, 65).reshape(8, 8)
    return torch.stack([(x[:, 0] * weights).sum((1, 2)), (x[:, 0] ** 2).flatten(1).sum(1)], 1)


def batch(inputs, start=0, **more):
    n = len(inputs)
    names = [f"i{start + i}" for i in range(n)]
    return Batch(start, inputs, list(range(n)), names, torch.arange(n) % 2, **more)


def chunks(**more):
    options = {"n_samples": 60, **more.pop("options", {})}
    values = {"target": "predicted", "n_outputs": None, "feature_mask": grid_mask((8, 8), 2), **more}
    return ShapleyChunks(linear, 3, options=options, **values)


def test_a_chunk_holds_what_kernel_shap_says():
    x = torch.rand(5, 1, 8, 8)
    start = 3 * DESIGN_BLOCK
    tensors = chunks()(0, batch(x, start), 16).tensors
    expected = kernel_shap(
        linear, x, target="predicted", feature_mask=grid_mask((8, 8), 2), n_samples=60, seed=3, block=3, batch_size=16
    )
    for name in ("values", "std_errors", "base_values", "full_values"):
        assert torch.equal(tensors[name], getattr(expected, name)), name
    assert torch.equal(tensors["predicted"], linear(x).argmax(1)) and torch.equal(
        tensors["target"], linear(x).argmax(1)
    )
    other = kernel_shap(linear, x, target="predicted", feature_mask=grid_mask((8, 8), 2), n_samples=60, seed=3)
    assert not torch.equal(tensors["std_errors"], other.std_errors)  # another block is another design


def test_an_input_does_not_depend_on_its_chunk():
    x = torch.rand(8, 1, 8, 8)
    whole = chunks()(0, batch(x), 16).tensors
    for start in (0, 4):
        part = chunks()(0, batch(x[start : start + 4], start), 16).tensors
        assert torch.equal(part["values"], whole["values"][start : start + 4])


def test_all_outputs_and_an_output_for_each_input():
    x = torch.rand(4, 1, 8, 8)
    every = chunks(target=None, n_outputs=2)(0, batch(x), 16).tensors
    assert every["values"].shape == (4, 16, 2) and every["target"].tolist() == [-1] * 4
    chosen = torch.tensor([-1, -1, -1, -1, 1, 1, 0, 1])  # of the data set; the batch is its second half
    torn = Batch(4, x[:3], [0, 2, 3], list("abcd"), torch.arange(4) % 2, None, {5: "truncated"})
    result = chunks(target=chosen)(1, torn, 16).tensors
    assert result["target"].tolist() == [1, -1, 0, 1] and result["label"].tolist() == [0, 1, 0, 1]
    assert torch.allclose(result["values"][2], every["values"][1, :, 0], atol=1e-5)
    with pytest.raises(ValueError, match=r"0\.\.1 .*0 = i0"):
        chunks(target=chosen)(0, batch(x), 16)


def test_superpixels_are_explained_by_their_own_number():
    x = torch.rand(3, 1, 8, 8)
    segments = torch.stack([grid_mask((8, 8), patch) for patch in (2, 4, 2)])
    tensors = chunks(feature_mask=None)(0, batch(x, segments=segments), 16).tensors
    assert tensors["n_players"].tolist() == [16, 4, 16] and tensors["values"].shape == (3, 16)
    assert torch.isfinite(tensors["values"]).sum(1).tolist() == [16, 4, 16]
    alone = chunks(feature_mask=None)(0, batch(x[1:2], segments=segments[1:2]), 16).tensors
    assert torch.equal(alone["values"][0], tensors["values"][1, :4])
    brute = [(x[1, 0] ** 2 if int(tensors["target"][1]) else x[1, 0] * torch.arange(1.0, 65).reshape(8, 8))]
    expected = torch.stack([brute[0][segments[1] == i].sum() for i in range(4)])  # the game is additive
    assert torch.allclose(tensors["values"][1, :4], expected, atol=1e-4)


def test_skipped_inputs_are_nan_and_named():
    x = torch.rand(2, 1, 8, 8)
    torn = Batch(4, x, [0, 2], ["a", "b", "c"], torch.tensor([0, -1, 1]), None, {5: "truncated"})
    result = chunks()(1, torn, 16)
    assert result.skipped == {5: "truncated"}
    assert torch.isnan(result.tensors["values"][1]).all() and torch.isfinite(result.tensors["values"][[0, 2]]).all()
    nothing = Batch(4, torch.empty(0), [], ["a"], torch.tensor([-1]), None, {4: "truncated"})
    assert chunks()(1, nothing, 16).tensors["values"].shape == (1, 16)
    both = chunks(target=None, n_outputs=2)(1, nothing, 16).tensors
    assert both["values"].shape == (1, 16, 2) and both["full_values"].shape == (1, 2)


def test_errors_name_the_inputs():
    x = torch.rand(2, 1, 8, 8)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite.*input 1.*1 = i5"):
        chunks()(1, batch(x, 4), 16)


def test_chunk_size_is_a_power_of_two_within_bounds():
    sizes = [chunk_size(512, 512, flop, 1) for flop in (0, 1e5, 7e5, 1e7, 1e9, 1e12)]
    assert sizes[0] == DESIGN_BLOCK and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)
    assert all(DESIGN_BLOCK % size == 0 for size in sizes)
    assert chunk_size(512, 512, 0, 1000) == 64  # coalition values of all outputs are held at once
