import errno
import json
import os
import pickle

import numpy as np
import pytest
import torch

import xaifast.store
from xaifast.run import StoreError, open_run
from xaifast.store import Store

MANIFEST = {
    "kind": "attributions",
    "method": "kernel-shap",
    "n_items": 10,
    "seed": 0,
    "chunk_size": 4,
    "rows": 32,
    "model": {"spec": "py:mine:model", "sha256": "aa"},
    "data": {"spec": "digits", "sha256": "bb"},
    "settings": {"n_samples": 8, "features": {"patch": 2}},
    "versions": {"torch": "2.13"},
    "threads": 2,
    "device": "cpu",
}
STATIC = {"feature_mask": torch.arange(6).reshape(2, 3)}


def results(store, chunk):
    start, stop = store.bounds(chunk)
    index = torch.arange(start, stop)
    return {"values": index[:, None] + torch.arange(6) / 10, "target": index % 3}


def fill(store, chunks=None):
    for chunk in store.pending if chunks is None else chunks:
        start, stop = store.bounds(chunk)
        store.write(chunk, results(store, chunk), [f"{i}.png" for i in range(start, stop)], {start: "torn"})


@pytest.fixture
def complete(tmp_path):
    store = Store(tmp_path / "run", MANIFEST, STATIC)
    fill(store)
    store.close()
    return tmp_path / "run"


def test_every_result_comes_back_by_index(complete):
    run = open_run(complete)
    assert len(run) == 10 and run.complete and run.finished == [0, 1, 2]
    for i in range(10):
        assert torch.equal(run[i]["values"], i + torch.arange(6) / 10)
        assert int(run[i]["target"]) == i % 3
        assert run.name(i) == f"{i}.png"
    assert torch.equal(run.tensor("values"), torch.arange(10)[:, None] + torch.arange(6) / 10)
    assert run.skipped == {0: "torn", 4: "torn", 8: "torn"}
    assert torch.equal(run.chunk(1)["values"], run.tensor("values")[4:8]) and set(run.chunk(1, ["target"])) == {
        "target"
    }
    assert torch.equal(run.segments(3), STATIC["feature_mask"])
    assert "complete" in repr(run)


def test_samplers_and_workers_of_data_loaders(complete):
    run = open_run(complete)
    assert torch.equal(run[np.int64(7)]["values"], run[7]["values"]) and run.name(torch.tensor(7)) == "7.png"
    assert torch.equal(pickle.loads(pickle.dumps(run))[7]["values"], run[7]["values"])


@pytest.mark.parametrize("index", [-1, 10, 1.0])
def test_index_out_of_range(complete, index):
    with pytest.raises(IndexError, match=r"0\.\.9"):
        open_run(complete)[index]


def test_unfinished_run_reads_as_far_as_it_got(tmp_path):
    store = Store(tmp_path, MANIFEST, STATIC)
    fill(store, [2])
    run = open_run(tmp_path)
    assert not run.complete and run.finished == [2]
    assert torch.equal(run[9]["values"], 9 + torch.arange(6) / 10)
    with pytest.raises(StoreError, match=r"inputs 0\.\.3 .* not finished"):
        run[0]
    with pytest.raises(StoreError, match="1 of 3 chunks"):
        run.tensor("values")
    partial = run.tensor("values", missing="nan")
    assert torch.isnan(partial[:8]).all() and torch.equal(partial[8:], run.tensor("values", missing="nan")[8:])
    assert (run.tensor("target", missing="nan")[:8] == -1).all()


def test_ragged_players_are_cut_and_filled(tmp_path):
    store = Store(tmp_path, {**MANIFEST, "n_items": 3, "chunk_size": 2}, {})
    for chunk, (width, players) in enumerate([(3, [3, 2]), (5, [5])]):
        rows = len(players)
        store.write(
            chunk,
            {"values": torch.ones(rows, width), "n_players": torch.tensor(players)},
            ["x"] * rows,
        )
    assert [len(store[i]["values"]) for i in range(3)] == [3, 2, 5]
    assert torch.isfinite(store.tensor("values")).sum(1).tolist() == [3, 3, 5]


def test_bytes_do_not_depend_on_time_order_or_interruption(tmp_path):
    def files(folder):
        paths = (p for p in folder.rglob("*") if p.is_file() and "log" not in p.parts and not p.name.endswith(".lock"))
        return {p.relative_to(folder): p.read_bytes() for p in paths}

    store = Store(tmp_path / "a", MANIFEST, STATIC)
    fill(store)
    store.close()
    for chunks in ([2], [0], None):
        store = Store(tmp_path / "b", MANIFEST, STATIC)
        fill(store, chunks)
        store.note("anything", seconds=chunks)
        store.close()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 5


def test_metadata_order_is_the_same_in_every_process(run_python):
    code = f"""
import torch, tempfile, hashlib, pathlib
from xaifast.store import Store
store = Store(tempfile.mkdtemp(), {MANIFEST!r}, {{}})
store.write(0, {{n: torch.ones(4, 2) for n in "dcba"}}, list("wxyz"), {{3: "c", 0: "a", 2: "b"}})
print(hashlib.sha256(store.chunk_path(0).read_bytes()).hexdigest())
"""
    assert len({run_python(code, PYTHONHASHSEED=str(seed)) for seed in range(3)}) == 1


def test_ranks_share_the_chunks(tmp_path):
    stores = [Store(tmp_path, MANIFEST, STATIC, rank=rank, world=2) for rank in range(2)]
    assert [store.pending for store in stores] == [[0, 2], [1]]
    fill(stores[1])
    assert stores[0].finished == [1] and stores[0].pending == [0, 2]
    fill(stores[0])
    assert open_run(tmp_path).complete


def test_two_processes_of_one_rank_exclude_each_other(tmp_path, run_python):
    store = Store(tmp_path, MANIFEST, STATIC)
    code = f"""
from xaifast.store import Store
Store({str(tmp_path)!r}, {MANIFEST!r}, {{}})
"""
    assert "another process (rank 0) is working" in run_python(code, fails=True)
    store.close()
    assert "static" in run_python(code, fails=True)  # only the lock was in the way before


def test_less_rows_hold_for_this_ranks_later_chunks(tmp_path):
    manifest = {**MANIFEST, "n_items": 40}
    store = Store(tmp_path, manifest, STATIC, rank=1, world=2)
    store.shrink(3, 16)
    store.shrink(7, 8)
    store.close()
    other, again = Store(tmp_path, manifest, STATIC, world=2), Store(tmp_path, manifest, STATIC, rank=1, world=2)
    assert [again.rows(chunk) for chunk in (1, 3, 5, 7, 9)] == [32, 16, 16, 8, 8]
    assert [other.rows(chunk) for chunk in (0, 2, 4, 6, 8)] == [32] * 5


@pytest.mark.parametrize("what", ["model", "data"])
def test_another_model_or_data_shows_both_hashes(complete, what):
    changed = {**MANIFEST, what: {"spec": "npz:other", "sha256": "cc"}}
    with pytest.raises(StoreError, match=f"(?s)another {what}.*{MANIFEST[what]['sha256']}.*sha256 cc"):
        Store(complete, changed, STATIC)
    assert open_run(complete).complete


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"n_samples": 9, "features": {"patch": 2}}}, "settings.n_samples was 8, is 9"),
        ({"settings": {"n_samples": 8, "features": {"patch": 3}}}, "settings.features.patch was 2, is 3"),
        ({"settings": {"n_samples": 8, "features": {"patch": 2}, "new": 1}}, "settings.new was null, is 1"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"n_items": 11}, "n_items was 10, is 11"),
        ({"data": {**MANIFEST["data"], "kind": "table"}}, "data.kind was null"),
    ],
)
def test_other_settings_are_named(complete, change, said):
    with pytest.raises(StoreError, match="other settings") as caught:
        Store(complete, {**MANIFEST, **change}, STATIC)
    assert said in str(caught.value)


def test_other_static_tensors_are_refused(complete):
    with pytest.raises(StoreError, match="static was"):
        Store(complete, MANIFEST, {"feature_mask": STATIC["feature_mask"] + 1})


def test_model_and_data_may_have_moved(complete):
    moved = {what: {**MANIFEST[what], "spec": "npz:/elsewhere"} for what in ("model", "data")}
    assert Store(complete, {**MANIFEST, **moved}, STATIC).complete


def test_chunks_of_who_knows_what_are_not_taken_over(complete):
    (complete / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"chunks without the manifest\.json"):
        Store(complete, {**MANIFEST, "seed": 1}, STATIC)
    assert not (complete / "manifest.json").exists()


def test_chunking_and_versions_are_the_first_runs(complete):
    store = Store(complete, {**MANIFEST, "chunk_size": 2, "rows": 8, "threads": 1}, STATIC)
    assert store.n_chunks == 3 and store.rows(0) == 32
    assert store.remarks({**MANIFEST, "threads": 1}) == ["threads were 2 and are 1"]


def damage_tail(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [damage_tail, lambda path: path.write_bytes(path.read_bytes()[:-5]), lambda path: path.write_bytes(b"")],
    ids=["bit", "truncated", "empty"],
)
def test_corrupt_chunk_is_named_and_can_be_redone(complete, damage):
    path = open_run(complete).chunk_path(1)
    before = path.read_bytes()
    damage(path)
    with pytest.raises(StoreError, match=r"000001\.safetensors is corrupt .* delete it"):
        open_run(complete).verify()
    with pytest.raises(StoreError, match=r"000001\.safetensors is corrupt"):
        Store(complete, MANIFEST, STATIC)
    path.unlink()
    store = Store(complete, MANIFEST, STATIC)
    assert store.pending == [1]
    fill(store)
    assert path.read_bytes() == before


def test_every_changed_byte_is_noticed(complete):
    path = open_run(complete).chunk_path(1)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(StoreError, match=r"000001\.safetensors is corrupt"):
            open_run(complete).verify()


def test_corrupt_static_tensors_and_manifest(complete):
    damage_tail(complete / "static.safetensors")
    with pytest.raises(StoreError, match="static"):
        open_run(complete).static  # noqa: B018
    manifest = complete / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(StoreError, match="format 1, got 99"):
        open_run(complete)
    manifest.write_text("[]")
    with pytest.raises(StoreError, match="format 1, got None"):
        open_run(complete)
    manifest.write_text("{")
    with pytest.raises(StoreError, match="cannot read"):
        open_run(complete)
    with pytest.raises(StoreError, match="has none"):
        open_run(complete / "chunks")


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "free space and run the same command again"), (errno.EROFS, "writable")]
)
def test_full_disk_keeps_what_is_finished(tmp_path, monkeypatch, code, remedy):
    store = Store(tmp_path, MANIFEST, STATIC)
    fill(store, [0])

    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(xaifast.store.os, "fsync", refuse)
    with pytest.raises(StoreError, match=f"finished chunks are kept: .*{remedy}"):
        fill(store, [1])
    monkeypatch.undo()
    assert store.finished == [0] and not list(tmp_path.rglob("*.tmp"))
    fill(store)
    assert open_run(tmp_path).complete


def test_what_a_kill_left_goes_away(tmp_path):
    first, second = (Store(tmp_path, MANIFEST, STATIC, rank=rank, world=2) for rank in range(2))
    first.close()
    left = [tmp_path / f".static.safetensors.{rank}.tmp" for rank in range(2)]
    left += [tmp_path / "chunks" / f".000000.safetensors.{rank}.tmp" for rank in range(2)]
    for path in left:
        path.write_bytes(b"half")
    Store(tmp_path, MANIFEST, STATIC, rank=0, world=2)
    assert [path.exists() for path in left] == [False, True] * 2  # the other process may be writing
    second.close()


def test_another_run_inside_is_left_alone(tmp_path):
    inner = Store(tmp_path / "run" / "evaluation", MANIFEST, STATIC)
    writing = inner.chunk_path(0).with_name(".000000.safetensors.0.tmp")
    writing.write_bytes(b"half")
    Store(tmp_path / "run", MANIFEST, STATIC).close()
    assert writing.exists()
    inner.close()


def test_runs_without_the_name_of_the_label_are_taken_up(tmp_path):
    Store(tmp_path, MANIFEST, STATIC).close()
    Store(tmp_path, {**MANIFEST, "data": {**MANIFEST["data"], "label": "sick"}}, STATIC).close()


def test_wrong_lengths_are_refused(tmp_path):
    store = Store(tmp_path, MANIFEST, STATIC)
    with pytest.raises(ValueError, match=r"chunk 2 holds 2 inputs.*values"):
        store.write(2, {"values": torch.ones(3, 1)}, ["a", "b"])
    with pytest.raises(ValueError, match="1 names"):
        store.write(2, {"values": torch.ones(2, 1)}, ["a"])


def test_a_torn_log_line_is_passed_over(complete):
    store = Store(complete, MANIFEST, STATIC)
    store.note("chunk", chunk=1)
    with open(complete / "log" / "rank0.jsonl", "a") as file:
        file.write('{"time": 1, "eve')
    assert [event["event"] for event in open_run(complete).log] == ["chunk"]
