"""The report says what a run holds, escapes what comes from data, needs no network and stays small."""

from __future__ import annotations

import base64
import io
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import xaifast
from xaifast.store import Store

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from PIL import Image

from xaifast import figures
from xaifast.report import formats, write_report
from xaifast.report.results import read_results

MASK = xaifast.grid_mask((8, 8), 4)


def make_run(
    path, n=12, players=4, *, outputs=None, mask=MASK, segments=None, chunk=4, finished=None, skipped=None,
    classes=("cat", "dog", "bird"), **changes,
):  # fmt: skip
    """A run with random values; ``changes`` replaces its tensors."""
    generator = torch.Generator().manual_seed(0)
    axis = () if outputs is None else (outputs,)
    tensors = {
        "values": torch.randn(n, players, *axis, generator=generator),
        "std_errors": 0.1 * torch.rand(n, players, *axis, generator=generator),
        "base_values": torch.randn(n, *axis, generator=generator),
        "full_values": torch.randn(n, *axis, generator=generator),
        "target": torch.arange(n) % 3 if outputs is None else torch.full((n,), -1),
        "label": torch.arange(n) % 3,
        "predicted": torch.arange(n) % 3,
    } | changes
    if segments is not None:
        tensors |= {"segments": segments.to(torch.int16), "n_players": segments.flatten(1).amax(1) + 1}
    table = mask is not None and mask.dim() == 1
    names = [f"column {i}" for i in range(players)] if table else None
    manifest = {
        "kind": "attributions", "method": "kernel-shap", "n_items": n, "chunk_size": chunk, "seed": 3, "rows": 64,
        "model": {"spec": "hf:some/model", "sha256": "a1" * 32, "class_names": list(classes)},
        "data": {"spec": "imagefolder:pets", "sha256": "b2" * 32, "class_names": list(classes), "feature_names": names},
        "settings": {"target": "predicted", "n_samples": 10, "features": "4 patches of 4 × 4 pixels", "baseline": "0"},
        "versions": {"torch": "9.8.7"}, "threads": 2, "device": "cpu", "command": "xaifast explain --out 'a b'",
    }  # fmt: skip
    store = Store(path, manifest, {} if mask is None else {"feature_mask": mask})
    store.note("start", world=1, forward_rows_per_second=2000.0, device_name="a processor", threads=2)
    for number in range(store.n_chunks) if finished is None else finished:
        start, stop = store.bounds(number)
        reasons = {i: why for i, why in (skipped or {}).items() if start <= i < stop}
        part = {name: x[start:stop].clone() for name, x in tensors.items()}
        for i in reasons:
            part["values"][i - start] = torch.nan
            part["std_errors"][i - start] = torch.nan
        store.write(number, part, [f"pets/{i}.png" for i in range(start, stop)], reasons)
        rows = stop - start - len(reasons)
        store.note("chunk", chunk=number, inputs=rows, model_rows=10 * rows, rows=64, seconds=rows * 0.01)
    store.close()
    return store


def picture(i):
    return np.random.default_rng(i).random((8, 8))


def page(run, inputs=picture):
    return write_report(run, run.directory / "report.html", inputs=inputs).read_text()


class Visible(HTMLParser):
    """Text outside style and script, and every address."""

    def __init__(self):
        super().__init__()
        self.text, self.addresses, self.tags, self._inside = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag in ("style", "script"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text.append(data)


def parse(html):
    parser = Visible()
    parser.feed(html)
    parser.plain = " ".join(" ".join(parser.text).split())
    return parser


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_says_what_was_run(tmp_path):
    html = page(make_run(tmp_path))
    text = parse(html).plain
    for expected in (
        "Kernel SHAP of 12 inputs", "hf:some/model", "imagefolder:pets", "4 patches of 4 × 4 pixels", "a1" * 32,
        "b2" * 32, "9.8.7", "a processor", "xaifast explain --out 'a b'", "cat 4 inputs", "pets/0.png",
        "Most uncertain", "120 model rows in 0.12 s", "this job 1,000 rows/s", "bare forward 2,000 rows/s",
        "ran at 50 %",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Incomplete" not in text and "skipped" not in text and "misclassified" in text


def test_numbers(tmp_path):
    run = make_run(tmp_path)
    values, errors = run.tensor("values"), run.tensor("std_errors")
    results = read_results(run)
    relative = errors.norm(dim=1) / values.norm(dim=1)
    assert np.allclose(results.relative_error, relative)
    assert np.allclose(results.total, values.abs().sum(1))
    text = parse(page(run)).plain
    median = float(np.median(relative))
    assert f"relative standard error, median {float(f'{100 * median:.2g}'):g} %" in text
    worst, largest = int(relative.argmax()), int(values.abs().sum(1).argmax())
    after = {title: text.split(title)[1] for title in ("Most uncertain", "Largest attributions")}
    assert re.search(r"pets/(\d+)\.png", after["Most uncertain"]).group(1) == str(worst)
    assert re.search(r"pets/(\d+)\.png", after["Largest attributions"]).group(1) == str(largest)


def test_pictures_show_the_values(tmp_path):
    run = make_run(tmp_path)
    overlays = [decode(a) for a in parse(page(run)).addresses]
    values = run.tensor("values")
    mean = values[0::3].mean(0)
    means = torch.stack([values[k::3].mean(0) for k in range(3)])
    assert np.array_equal(overlays[0], figures.signed_rgba(mean[MASK], figures.signed_limit(means)))
    assert np.array_equal(overlays[1], np.rint(255 * picture(0)))
    assert np.array_equal(overlays[2], figures.signed_rgba(values[0][MASK], figures.signed_limit(values)))


def test_names_are_escaped(tmp_path):
    evil = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b")
    run = make_run(tmp_path, classes=evil, skipped={1: "<b>broken</b>"}, label=torch.zeros(12, dtype=torch.long))
    html = page(run)
    parsed = parse(html)
    assert "script" not in parsed.tags and "<b>broken" not in html and "<img src=x" not in html
    assert evil[0] in parsed.plain and evil[1] in parsed.plain and "<b>broken</b>" in parsed.plain
    assert all(address.startswith("data:image/") for address in parsed.addresses)


def test_names_that_are_not_text(tmp_path):
    """A file name is bytes; Python decodes what is not UTF-8 to lone surrogates."""
    text = page(make_run(tmp_path, classes=("caf\udce9", "dog", "bird")))
    assert "caf\\udce9" in text


def test_needs_no_network(tmp_path):
    html = page(make_run(tmp_path))
    parsed = parse(html)
    assert parsed.addresses and all(address.startswith("data:image/") for address in parsed.addresses)
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)


def test_same_run_same_bytes(tmp_path):
    run = make_run(tmp_path)
    first = page(run)
    assert page(xaifast.open_run(tmp_path)) == first


def test_incomplete_run(tmp_path):
    text = parse(page(make_run(tmp_path, finished=[1]))).plain
    assert "Incomplete: 1 of 3 chunks are finished" in text and "4 inputs done" in text and "4 of 12" in text
    assert "pets/4.png" in text and "pets/0.png" not in text


def test_nothing_finished(tmp_path):
    text = parse(page(make_run(tmp_path, finished=[]))).plain
    assert "Incomplete: 0 of 3 chunks" in text and "no finished chunk" in text


def test_skipped_inputs(tmp_path):
    asked = []

    def inputs(i):
        asked.append(i)
        return picture(i)

    text = parse(page(make_run(tmp_path, skipped={2: "image file is truncated", 5: "no such file"}), inputs)).plain
    assert "2 inputs were skipped" in text and "pets/2.png image file is truncated" in text
    assert "10 of 12" in text and not {2, 5} & set(asked) and asked


def test_unknown_standard_errors(tmp_path):
    errors = torch.full((12, 4), torch.nan)
    text = parse(page(make_run(tmp_path, std_errors=errors))).plain
    assert (
        "12 inputs have no standard error" in text and "2.4 evaluations" in text and "at least 12 are advised" in text
    )
    assert "Most uncertain" not in text and "relative standard error, median –" in text


def test_exact_values(tmp_path):
    text = parse(page(make_run(tmp_path, std_errors=torch.zeros(12, 4)))).plain
    assert "Values are exact" in text and "Most uncertain" not in text


def test_all_zero_values(tmp_path):
    zero = torch.zeros(12, 4)
    parsed = parse(page(make_run(tmp_path, values=zero, std_errors=zero)))
    assert "All values are zero" in parsed.plain
    assert all((decode(a)[..., 3] == 0).all() for a in parsed.addresses if decode(a).ndim == 3)


def test_misclassified(tmp_path):
    labels = torch.arange(12) % 3
    labels[0] = 2
    text = parse(page(make_run(tmp_path, label=labels))).plain
    assert "cat 4 inputs, 1 misclassified" in text and "predicted cat, labelled bird" in text
    text = parse(page(make_run(tmp_path / "unknown", label=torch.full((12,), -1)))).plain
    assert "misclassified" not in text and "labelled" not in text


@pytest.mark.parametrize(("names", "wrong"), [(("n01", "n02", "n03"), 0), (("dog", "cat", "bird"), 8)])
def test_labels_of_other_names(tmp_path, names, wrong):
    """Compared by name where some are common, else by number, as `--target label` does."""
    run = make_run(tmp_path)
    run.manifest["data"]["class_names"] = list(names)
    counts = re.findall(r"inputs, (\d+) misclassified", parse(page(run)).plain)
    assert sum(map(int, counts)) == wrong


def test_table(tmp_path):
    run = make_run(tmp_path, mask=torch.arange(4))
    row = torch.tensor([1.5, 2.5, 3.5, 4.5])
    parsed = parse(page(run, lambda i: row))
    size = run.tensor("values")[0::3].abs().mean(0)
    order = [f"column {i}" for i in size.argsort(descending=True).tolist()]
    section = parsed.plain.split("cat 4 inputs")[1]
    assert re.findall(r"column \d", section)[:4] == order
    assert "column 2 = 3.5" in parsed.plain and not parsed.addresses
    at = int(read_results(run).total.argmax())
    value, error = (run.tensor(name)[at].tolist() for name in ("values", "std_errors"))
    top = max(range(4), key=lambda i: abs(value[i]))
    assert f"{formats.number(value[top], signed=True)} ± {formats.number(error[top])}" in parsed.plain


def test_all_outputs_show_the_predicted_one(tmp_path):
    predicted = torch.tensor([2, 0] * 6)
    run = make_run(tmp_path, outputs=3, predicted=predicted)
    results = read_results(run)
    assert np.allclose(results.values[0], run.tensor("values")[0, :, 2])
    assert np.allclose(results.full[1], run.tensor("full_values")[1, 0])
    text = parse(page(run)).plain
    assert "The run holds all outputs" in text and "bird 6 inputs" in text and "dog 4" not in text


def test_one_output_model(tmp_path):
    none = torch.full((12,), -1)
    text = parse(page(make_run(tmp_path, target=none, predicted=none, label=none))).plain
    assert "What each feature adds to the output" in text and "class -1" not in text and "misclassified" not in text


def test_superpixels(tmp_path):
    segments = torch.stack([MASK if i % 2 else MASK // 2 for i in range(12)])
    values = torch.ones(12, 4)
    values[0::2, 2:] = torch.nan
    errors = torch.where(values.isnan(), torch.nan, 0.1)
    run = make_run(tmp_path, mask=None, segments=segments, values=values, std_errors=errors)
    parsed = parse(page(run))
    assert "no mean maps" in parsed.plain and "2–4 players an input" not in parsed.plain
    assert "players an input 2–4" in parsed.plain and "no standard error" not in parsed.plain
    assert np.allclose(read_results(run).total, [2, 4] * 6)
    assert all((decode(a)[..., 3] == 255).all() for a in parsed.addresses if decode(a).ndim == 3)


def test_one_input_without_pictures(tmp_path):
    parsed = parse(page(make_run(tmp_path, n=1), inputs=None))
    assert "Kernel SHAP of 1 input " in parsed.plain and "pets/0.png" in parsed.plain
    assert all(decode(a).ndim == 3 for a in parsed.addresses)


def test_small_and_quick_with_many_large_pictures(tmp_path):
    n = 2000
    mask = xaifast.grid_mask((224, 224), 16)
    classes = [f"class {i}" for i in range(25)]
    target = torch.arange(n) % 25
    run = make_run(
        tmp_path, n, 196, mask=mask, chunk=256, classes=classes, target=target, predicted=target, label=target
    )
    noise = np.random.default_rng(0).random((224, 224, 3))  # the worst case for compression
    start = time.perf_counter()
    path = write_report(run, tmp_path / "report.html", inputs=lambda i: np.roll(noise, i, 0))
    assert time.perf_counter() - start < 60  # about 5 s on an idle machine
    assert path.stat().st_size < 5_000_000
    assert "The 20 most frequent of 25" in parse(path.read_text()).plain


def test_corrupt_chunk_is_named(tmp_path):
    run = make_run(tmp_path)
    run.chunk_path(1).write_bytes(b"nonsense")
    with pytest.raises(xaifast.run.StoreError, match=r"000001\.safetensors"):
        page(xaifast.open_run(tmp_path))
