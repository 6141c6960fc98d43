"""Data sources: what they read, in which order, what they refuse, and when they are the same."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from xaifast.data import open_data
from xaifast.data.base import class_ids
from xaifast.data.fingerprint import hash_files, hash_values

datasets = pytest.importorskip("datasets")


def picture(seed=0, size=(9, 7), channels=3):
    """uint8 ``[H, W(, C)]``, all values different from their neighbours."""
    height, width = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


@pytest.fixture
def folder(tmp_path):
    """Two classes with three images, one of them in a sub-folder, beside files that are no images."""
    root = tmp_path / "set"
    for i, name in enumerate(("b/2.png", "a/10.PNG", "b/deep/1.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(root / name, format="PNG")
    (root / "a/notes.txt").write_text("no image")
    (root / "a/.hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    Image.fromarray(picture(9)).save(root / ".cache/x.png")
    return root


# ---- images


def test_imagefolder(folder):
    data = open_data(f"imagefolder:{folder}")
    assert (data.kind, len(data), data.class_names) == ("images", 3, ["a", "b"])
    loaded = data.load([2, 0, 1])
    assert loaded.names == ["b/deep/1.png", "a/10.PNG", "b/2.png"]
    assert loaded.labels.dtype == torch.int64 and loaded.labels.tolist() == [1, 0, 1]
    assert not loaded.failures
    for item, seed in zip(loaded.items, (2, 1, 0), strict=True):
        assert item.mode == "RGB" and np.array_equal(np.asarray(item), picture(seed))


def test_imagefolder_order_is_by_parts(tmp_path):
    for name in ("a/x.png", "a-b/x.png", "B/x.png", "a/b/x.png", "empty/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / name, format="PNG")
    data = open_data(f"imagefolder:{tmp_path}")
    assert data.names == ["B/x.png", "a/b/x.png", "a/x.png", "a-b/x.png"]
    assert data.class_names == ["B", "a", "a-b", "empty"]  # an empty class keeps the numbers of the others
    assert data.load(range(4)).labels.tolist() == [0, 1, 1, 2]


def test_flat_folder_has_no_labels(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.png")
    data = open_data(f"imagefolder:{tmp_path}")
    assert data.class_names is None and data.load([0]).labels is None and data.load([0]).names == ["x.png"]


def test_folder_that_links_to_itself(folder):
    (folder / "a/again").symlink_to(folder)
    assert len(open_data(f"imagefolder:{folder}")) == 3


def truncated():
    file = io.BytesIO()
    Image.fromarray(picture(size=(60, 60))).save(file, "JPEG")
    return file.getvalue()[:900]


def bomb():
    """A PNG that says it is 60000 x 60000."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BROKEN = {
    "empty.png": (b"", "not an image"),
    "text.png": (b"this is no image", "not an image"),
    "truncated.jpg": (truncated(), "truncated"),
    "bomb.png": (bomb(), "exceeds limit"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_images_are_reported(tmp_path, name):
    content, reason = BROKEN[name]
    Image.fromarray(picture()).save(tmp_path / "a_good.png")
    (tmp_path / name).write_bytes(content)
    loaded = open_data(f"imagefolder:{tmp_path}").load([1, 0])
    assert loaded.items[0] is None and loaded.items[1].size == (7, 9)
    assert list(loaded.failures) == [0] and reason in loaded.failures[0]
    assert loaded.names[0] == name
    assert "0x" not in loaded.failures[0] and str(tmp_path) not in loaded.failures[0]  # the same in every run


def test_vanished_image_is_reported(folder):
    data = open_data(f"imagefolder:{folder}")
    (folder / "b/2.png").unlink()
    assert data.load([1]).failures == {0: "No such file or directory"}


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    loaded = open_data(f"imagefolder:{tmp_path}").load([0])
    assert not loaded.failures and loaded.items[0].mode == "RGB"
    return np.asarray(loaded.items[0])


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 257, 255 * 128], [65535, 65535 - 257, 300]], dtype=np.uint16)
    got = saved(tmp_path, Image.fromarray(values))
    assert got[..., 0].tolist() == [[0, 1, 127], [255, 254, 1]]
    assert (got == got[..., :1]).all()
    (tmp_path / "x.png").unlink()
    assert np.array_equal(saved(tmp_path, Image.fromarray(values), "x.pgm"), got)


def test_float_images_have_no_known_range(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
    assert "8 or 16 bits" in open_data(f"imagefolder:{tmp_path}").load([0]).failures[0]


def test_grey_palette_and_alpha(tmp_path):
    grey = picture(channels=1)
    assert np.array_equal(saved(tmp_path, Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(picture() // 64 * 64).quantize(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = saved(tmp_path, palette, transparency=bytes(range(200)))
    assert np.array_equal(got, np.asarray(palette.convert("RGB")))
    rgba = np.concatenate([picture(), picture(1, channels=1)[..., None]], 2)
    assert np.array_equal(saved(tmp_path, Image.fromarray(rgba)), picture())


def test_cmyk(tmp_path):
    ink = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = saved(tmp_path, ink, "x.tiff")
    assert red[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarter_turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # counter-clockwise, as np.rot90
    got = saved(tmp_path, Image.fromarray(picture()), exif=exif)
    assert np.array_equal(got, np.rot90(picture(), quarter_turns))


def test_imagefolder_fingerprint(folder, tmp_path):
    data = open_data(f"imagefolder:{folder}")
    first = data.fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere/a/notes.txt").write_text("other")
    assert open_data(f"imagefolder:{tmp_path / 'elsewhere'}").fingerprint() == first == data.fingerprint()
    (folder / "a/10.PNG").rename(folder / "a/11.PNG")
    assert open_data(f"imagefolder:{folder}").fingerprint() != first
    (folder / "a/11.PNG").rename(folder / "a/10.PNG")
    content = bytearray((folder / "a/10.PNG").read_bytes())
    content[-20] ^= 1
    (folder / "a/10.PNG").write_bytes(content)
    assert open_data(f"imagefolder:{folder}").fingerprint() != first


def test_large_sets_are_sampled_evenly():
    contents = [bytes([i]) * 100 for i in range(50)]
    opened = []

    def open_file(i):
        opened.append(i)
        return io.BytesIO(contents[i])

    def digest(limit):
        opened.clear()
        return hash_files([str(i) for i in range(50)], [100] * 50, open_file, limit=limit)

    assert digest(5000) == digest(10**6) and opened == list(range(50))
    first = digest(1000)
    assert opened == list(range(0, 50, 5)) and first != digest(5000)
    contents[1] = b"x" * 100
    assert digest(1000) == first and digest(5000) != digest(1000)
    contents[5] = b"x" * 100
    assert digest(1000) != first
    before = digest(30)  # less than one file: its first bytes
    assert opened == [0]
    contents[0] = contents[0][:30] + b"x" * 70
    assert digest(30) == before


# ---- Hugging Face datasets


def make_dataset(n=4, label=None, column="image"):
    label = datasets.ClassLabel(names=["cat", "dog"]) if label is None else label
    features = datasets.Features({"text": datasets.Value("string"), column: datasets.Image(), "label": label})
    columns = {"text": ["x"] * n, column: [Image.fromarray(picture(i)) for i in range(n)], "label": [0, 1, -1, 1][:n]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_hub_from_disk(tmp_path):
    make_dataset(column="img").save_to_disk(tmp_path / "ds")
    data = open_data(f"hf:{tmp_path / 'ds'}")
    assert (data.kind, len(data), data.class_names) == ("images", 4, ["cat", "dog"])
    loaded = data.load([3, 2])
    assert loaded.names == ["3", "2"] and loaded.labels.tolist() == [1, -1]
    for item, seed in zip(loaded.items, (3, 2), strict=True):
        assert item.mode == "RGB" and np.array_equal(np.asarray(item), picture(seed))


def test_hub_splits(tmp_path):
    parts = {"train": make_dataset(2), "test": make_dataset(3)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train=parts["train"]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(a=parts["train"], b=parts["train"]).save_to_disk(tmp_path / "two")
    parts["train"].save_to_disk(tmp_path / "none")
    assert len(open_data(f"hf:{tmp_path / 'both'}")) == 3
    assert len(open_data(f"hf:{tmp_path / 'both'}:train")) == 2
    assert len(open_data(f"hf:{tmp_path / 'one'}")) == 2
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*append"):
        open_data(f"hf:{tmp_path / 'two'}")
    with pytest.raises(ValueError, match=r"\['test', 'train'\].*'val'"):
        open_data(f"hf:{tmp_path / 'both'}:val")
    with pytest.raises(ValueError, match="without splits"):
        open_data(f"hf:{tmp_path / 'none'}:test")


def test_hub_directory_of_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "b/deep/1.png").rename(folder / "b/1.png")  # datasets takes no classes from folders of different depth
    data = open_data(f"hf:{folder}:train")
    assert data.class_names == ["a", "b"] and len(data) == 3
    assert np.array_equal(np.asarray(data.load([0]).items[0]), picture(1))
    assert data.fingerprint() == open_data(f"hf:{folder}:train").fingerprint()


def test_hub_broken_and_missing_images(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": b"broken", "path": None}, None, {"bytes": b"", "path": "x.png"}]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "ds")
    loaded = open_data(f"hf:{tmp_path / 'ds'}").load([0, 1, 2])
    assert loaded.items == [None] * 3 and set(loaded.failures) == {0, 1, 2} and loaded.labels is None


def test_missing_files_do_not_stop_the_fingerprint(folder, tmp_path):
    (folder / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    data = open_data(f"imagefolder:{folder}")
    assert len(data.fingerprint()) == 64 and len(data.load(range(len(data))).failures) == 1
    features = datasets.Features({"image": datasets.Image()}).arrow_schema
    (tmp_path / "hub").mkdir()
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "nothing.png")}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=features), tmp_path / "hub" / "test.parquet")
    data = open_data(f"hf:{tmp_path / 'hub'}")
    assert len(data.fingerprint()) == 64 and data.load([0]).failures == {0: "No such file or directory"}


def test_hub_without_rows(tmp_path):
    make_dataset().select([]).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="xaifast.open_data: .* must be a directory"):
        open_data(f"hf:{tmp_path / 'disk'}")


def test_hub_directory_named_like_a_reader_of_the_library(folder, monkeypatch):
    folder.rename(folder.parent / "imagefolder")
    monkeypatch.chdir(folder.parent)
    Image.fromarray(picture()).save("beside.png")
    assert len(open_data("hf:imagefolder:train")) == 3


def test_hub_labels_as_text(tmp_path):
    images = [Image.fromarray(picture())] * 3
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": images, "kind": ["dog", None, "cat"]}, features=features)
    made.save_to_disk(tmp_path / "ds")
    data = open_data(f"hf:{tmp_path / 'ds'}", label="kind")
    assert data.class_names == ["cat", "dog"] and data.load([0, 1, 2]).labels.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="'knd' .*none of that name"):
        open_data(f"hf:{tmp_path / 'ds'}", label="knd")
    with pytest.raises(ValueError, match="integers or text"):
        open_data(f"hf:{tmp_path / 'ds'}", label="image")


def test_hub_fingerprint(tmp_path):
    make_dataset().save_to_disk(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_data(f"hf:{tmp_path / 'a'}").fingerprint()
    assert open_data(f"hf:{tmp_path / 'b'}").fingerprint() == first
    make_dataset(3).save_to_disk(tmp_path / "c")
    made = make_dataset()
    flipped = made.map(lambda row: {"label": 1 - abs(row["label"])}, input_columns=None)
    flipped.save_to_disk(tmp_path / "d")
    others = {open_data(f"hf:{tmp_path / name}").fingerprint() for name in "cd"}
    assert len(others | {first}) == 3


def test_hub_columns(tmp_path):
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "ds")
    with pytest.raises(ValueError, match="one image column.*'a': 'int64'"):
        open_data(f"hf:{tmp_path / 'ds'}")


# ---- arrays


def test_digits():
    data = open_data("digits")
    loaded = data.load([5, 1796])
    images, labels = load_digits(return_X_y=True)
    assert data.kind == "arrays" and data.class_names == list("0123456789")
    assert loaded.items[1].dtype == torch.float32 and loaded.items[1].shape == (1, 8, 8)
    assert torch.equal(loaded.items[0].flatten() * 16, torch.tensor(images[5], dtype=torch.float32))
    assert loaded.labels.tolist() == labels[[5, 1796]].tolist() and loaded.names == ["5", "1796"]


@pytest.mark.parametrize("dtype, wanted", [("f2", "float32"), ("f4", "float32"), (">f8", "float64")])
def test_npz_arrays(tmp_path, dtype, wanted):
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(dtype)
    np.savez(tmp_path / "x.npz", x=x, other=np.ones(3), y=np.array([3, 0, 1, -1, 2.0]))
    data = open_data(f"npz:{tmp_path / 'x.npz'}")
    assert data.kind == "arrays" and len(data) == 5 and data.class_names is None
    loaded = data.load([4, 0])
    assert str(loaded.items[0].dtype) == f"torch.{wanted}"
    assert np.array_equal(torch.stack(loaded.items).numpy(), x[[4, 0]].astype(wanted))
    assert loaded.labels.tolist() == [2, 3]


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3)])
def test_npz_images(tmp_path, shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", pictures=x, labels=np.array(["b", "a", "b", "c"]))
    data = open_data(f"npz:{tmp_path / 'x.npz'}")
    assert data.kind == "images" and data.class_names == ["a", "b", "c"]
    loaded = data.load([1, 3])
    assert np.array_equal(np.stack(loaded.items), x[[1, 3]]) and loaded.labels.tolist() == [0, 2]


def test_npz_never_unpickles(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    monkeypatch.setattr(pickle, "load", refuse)
    with pytest.raises(ValueError, match="'x' holds Python objects"):
        open_data(f"npz:{tmp_path / 'x.npz'}")


NPZ = {
    "no inputs": (dict(a=np.ones((2, 2)), b=np.ones((2, 2))), r"got the arrays \['a', 'b'\]"),
    "integers": (dict(x=np.ones((2, 2), int)), "float32"),
    "channels first": (dict(x=np.ones((2, 3, 8, 8), np.uint8)), "transpose"),
    "no rows": (dict(x=np.ones((0, 2))), "at least one"),
    "no batch axis": (dict(x=np.ones(3)), "reshape"),
    "labels too few": (dict(x=np.ones((2, 2)), y=np.ones(3, int)), r"\(2,\), got \(3,\)"),
    "labels continuous": (dict(x=np.ones((2, 2)), y=np.array([0.5, 1])), "classes"),
    "labels infinite": (dict(x=np.ones((2, 2)), y=np.array([np.inf, 1])), "classes"),
}


@pytest.mark.parametrize("name", NPZ)
def test_npz_refusals(tmp_path, name):
    arrays, message = NPZ[name]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=f"xaifast.open_data.*{message}"):
        open_data(f"npz:{tmp_path / 'x.npz'}")


def test_npz_corrupt(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones((100, 100)))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read.*CRC"):
        open_data(f"npz:{path}")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "text")
    with pytest.raises(ValueError, match="'x' is no array"):
        open_data(f"npz:{path}")
    path.write_bytes(b"something")
    with pytest.raises(ValueError, match="np.savez"):
        open_data(f"npz:{path}")


def test_array_fingerprint(tmp_path):
    def of(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return open_data(f"npz:{tmp_path / name}").fingerprint()

    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    first = of("a.npz", x=x, y=y)
    assert of("b.npz", y=y, x=np.asfortranarray(x)) == first
    changed = [of("c.npz", x=x), of("d.npz", x=x, y=y[::-1]), of("e.npz", x=x.astype("f4"), y=y)]
    changed += [of("f.npz", x=x.reshape(3, 1, 2), y=y), of("g.npz", x=np.nextafter(x, 9), y=y)]
    assert len({first, *changed}) == 6


def test_hash_values_takes_any_tensor():
    values = [torch.tensor(1.5), torch.ones(0), torch.ones(2, 2).T, torch.ones(2).bfloat16(), torch.tensor([True])]
    assert len({hash_values({"x": value}) for value in values}) == 5
    assert hash_values({"x": torch.arange(4).view(2, 2).T}) == hash_values({"x": torch.tensor([[0, 2], [1, 3]])})


# ---- tables


@pytest.fixture(params=["csv", "parquet"])
def table(request, tmp_path):
    """Writes a frame and opens it."""

    def open_table(frame, **options):
        path = tmp_path / f"t.{request.param}"
        frame.to_csv(path, index=False) if request.param == "csv" else frame.to_parquet(path)
        return open_data(f"{request.param}:{path}", **options)

    return open_table


FRAME = pd.DataFrame({"a": [1.5, 2.5, -3.0], "b": [True, False, True], "c": [7, 8, 9], "y": ["dog", "cat", "dog"]})


def test_table(table):
    data = table(FRAME, label="y")
    assert data.kind == "table" and data.feature_names == ["a", "b", "c"] and data.class_names == ["cat", "dog"]
    loaded = data.load([2, 0])
    assert torch.equal(torch.stack(loaded.items), torch.tensor([[-3.0, 1, 9], [1.5, 1, 7]]))
    assert loaded.items[0].dtype == torch.float32
    assert loaded.labels.tolist() == [1, 1] and loaded.names == ["2", "0"]


def test_table_columns_and_drop(table):
    data = table(FRAME, columns=["c", "a"])
    assert data.feature_names == ["c", "a"] and data.load([0]).items[0].tolist() == [7, 1.5]
    assert data.load([0]).labels is None
    assert table(FRAME, drop=["y", "a"]).feature_names == ["b", "c"]


LABELS = {
    "integers": ([3, 1, 3], [1, 0, 1], ["1", "3"]),
    "integers, one missing": ([3, None, 1], [1, -1, 0], ["1", "3"]),
    "text, one missing": (["b", None, "a"], [1, -1, 0], ["a", "b"]),
    "truth": ([True, False, True], [1, 0, 1], ["False", "True"]),
    "two digits": ([10, 9, 2], [2, 1, 0], ["2", "9", "10"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_table_labels(table, name):
    values, ids, names = LABELS[name]
    data = table(pd.DataFrame({"a": [1.0, 2, 3], "y": values}, index=[5, 5, 6]).reset_index(drop=True), label="y")
    assert data.class_names == names and data.load(range(3)).labels.tolist() == ids


TABLES = {
    "missing column": (FRAME, dict(columns=["A", "b"]), r"no column 'A'.*nearest are \['a'\]|no column 'A'"),
    "missing label": (FRAME, dict(label="yy"), r"no column 'yy'.*\['y'\]"),
    "missing drop": (FRAME, dict(drop=["z"]), r"no column 'z'.*'a', 'b'"),
    "label as feature": (FRAME, dict(columns=["a", "y"], label="y"), "'y' in two"),
    "feature twice": (FRAME, dict(columns=["a", "a"]), "'a' in two"),
    "text": (FRAME, {}, "numbers.*'y'.*'dog'.*--drop y"),
    "no features": (FRAME, dict(columns=None, drop=["a", "b", "c"], label="y"), "at least one row and one feature"),
    "no rows": (FRAME[:0], dict(label="y"), "at least one row"),
    "gaps": (FRAME.assign(a=[1, None, None], c=[np.inf, 1, 2]), dict(label="y"), r"'a' \(2 of 3 rows\), 'c' \(1 of"),
    "too large": (FRAME.assign(a=[1e39, 0, 0]), dict(label="y"), r"finite in float32.*'a' \(1"),
    "continuous label": (FRAME[["a", "c"]], dict(label="a"), "1.5.*--drop a"),
    "infinite label": (FRAME.assign(a=[0, np.inf, 1]), dict(label="a", drop=["y"]), "like inf.*--drop a"),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_refusals(table, name):
    frame, options, message = TABLES[name]
    with pytest.raises(ValueError, match=f"(?s)xaifast.open_data.*{message}"):
        table(frame, **options)


def test_table_fingerprint(table):
    frames = [FRAME, FRAME.assign(c=[7, 8, 10]), FRAME.rename(columns={"a": "A"}), FRAME.assign(y=["a", "b", "a"])]
    assert len({table(frame, label="y").fingerprint() for frame in frames}) == 4
    assert table(FRAME, label="y").fingerprint() == table(FRAME, label="y").fingerprint()


def test_unreadable_tables(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.csv").write_bytes(b"")
    for kind in ("parquet", "csv"):
        with pytest.raises(ValueError, match="cannot be read as"):
            open_data(f"{kind}:{tmp_path / 'x'}.{kind}")


# ---- all of them


def test_indices(folder):
    for data in (open_data("digits"), open_data(f"imagefolder:{folder}")):
        for index in (len(data), -1):
            with pytest.raises(IndexError, match=f"got {index}"):
                data.load([0, index])
        assert data.load([]).items == [] and data.load(np.array([1])).names == [data.load([1]).names[0]]


def test_class_ids_are_total():
    assert class_ids([])[1] == []


SPECS = {
    "unknown form": ("folder:x", ValueError, "imagefolder:DIR.*parquet:FILE"),
    "no path": ("npz:", ValueError, "npz:FILE"),
    "digits with path": ("digits:x", ValueError, "got 'digits:x'"),
    "bare file": ("x.csv", ValueError, "did you mean csv:x.csv"),
    "bare folder": ("/tmp", ValueError, "did you mean imagefolder:/tmp"),
    "no file": ("npz:/nowhere.npz", FileNotFoundError, "/nowhere.npz"),
    "no folder": ("imagefolder:/nowhere", FileNotFoundError, "/nowhere"),
    "no data set": ("hf:./nowhere:test", FileNotFoundError, "./nowhere"),
    "folder for file": ("csv:/tmp", ValueError, "must be a file"),
    "no text": (3, TypeError, "text"),
}


@pytest.mark.parametrize("name", SPECS)
def test_specs(name):
    spec, error, message = SPECS[name]
    with pytest.raises(error, match=f"(?s)xaifast.open_data.*{message}"):
        open_data(spec)


def test_options_where_they_mean_nothing(folder):
    with pytest.raises(ValueError, match="for tables"):
        open_data("digits", drop=["a"])
    with pytest.raises(ValueError, match="for tables"):
        open_data(f"imagefolder:{folder}", label="y")
    with pytest.raises(TypeError, match=r"pass \['a'\]"):
        open_data("csv:x", columns="a")


def test_folder_refusals(tmp_path):
    with pytest.raises(ValueError, match="must hold images"):
        open_data(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    Image.fromarray(picture()).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png beside the folder cat"):
        open_data(f"imagefolder:{tmp_path}")


def test_missing_package_names_the_extra(run_python, tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n")
    code = "import sys\nsys.modules['pandas'] = None\nimport xaifast.data\nxaifast.data.open_data('csv:x.csv')"
    assert "pip install 'xaifast[data]'" in run_python(code, fails=True)


def test_import_is_cheap(run_python):
    heavy = {"PIL", "pandas", "sklearn", "datasets", "pyarrow", "transformers"}
    assert run_python(f"import sys, xaifast.data; print({heavy} & set(sys.modules))").strip() == "set()"
