"""The compiled modules: element by element against plain loops, on every instruction set; and life without them."""

import hashlib
import random
import re

import numpy as np
import pytest

from xaifast import _native

native = _native.cpu()
pytestmark = pytest.mark.skipif(native is None, reason=f"no native module: {_native.why_missing()}")


def random_bytes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def pack(present):
    """bool [..., M] -> int64 [..., W]."""
    padded = np.zeros((*present.shape[:-1], -(-present.shape[-1] // 64) * 64), dtype=bool)
    padded[..., : present.shape[-1]] = present
    return np.packbits(padded, axis=-1, bitorder="little").view(np.int64)


# (rep, P, unit): rows shorter than a vector, odd tails, several blocks of mask and of runs, long runs, entries that are
# vectors.
LAYOUTS = [(1, 1, 1), (3, 7, 1), (1, 63, 1), (2, 64, 1), (1, 65, 3), (2, 1000, 1), (1, 5, 37), (1, 5003, 1)]
LAYOUTS += [(1, 9, 1025), (2, 65, 16)]


def player_map(rng, kind, n_entries, n_players):
    if kind == "own":
        return np.arange(n_entries)
    if kind == "shifted":
        return np.arange(n_entries) + 3
    if kind == "runs":
        return np.sort(rng.integers(-1, n_players, n_entries))
    return rng.integers(-1, n_players, n_entries)


def select_case(rng, layout, kind, itemsize, n_background, threads=1, whole=False):
    """Random arguments of select_rows, its output and the output of a plain loop."""
    rep, n_entries, unit = layout
    n_players = {"own": n_entries, "shifted": n_entries + 3}.get(kind, 70)
    n_inputs, n_coalitions, row = 2, 3, rep * n_entries * unit * itemsize
    bits_per_input, index_per_input, baseline_per_input = (bool(flag) for flag in rng.integers(0, 2, 3))
    x = random_bytes(rng, n_inputs, row)
    baseline = random_bytes(rng, n_inputs if baseline_per_input else 1, n_background, row)
    present = rng.random((n_inputs if bits_per_input else 1, n_coalitions, n_players)) < rng.random()
    bits = pack(present)
    maps = [player_map(rng, kind, n_entries, n_players) for _ in range(n_inputs if index_per_input else 1)]
    index = np.stack(maps).astype(np.int32)
    start = 0 if whole else int(rng.integers(0, 6))
    stop = 6 if whole else int(rng.integers(start, 7))

    n_bytes = (stop - start) * n_background * row
    out = np.full(n_bytes + 64, 0xA5, dtype=np.uint8)
    native.select_rows(
        out.ctypes.data, x.ctypes.data, baseline.ctypes.data, bits.ctypes.data, index.ctypes.data, itemsize, n_inputs,
        n_coalitions, n_background, rep, n_entries, unit, bits.shape[-1], bits_per_input, index_per_input,
        baseline_per_input, start, stop, threads,
    )  # fmt: skip
    assert (out[n_bytes:] == 0xA5).all(), "wrote beyond the end"

    expected = []
    for u in range(start, stop):
        b, c = divmod(u, n_coalitions)
        players = index[b if index_per_input else 0]
        states = present[b if bits_per_input else 0, c]
        entries = np.array([player < 0 or states[player] for player in players])
        elements = np.tile(np.repeat(entries, unit * itemsize), rep)
        expected += [np.where(elements, x[b], rows) for rows in baseline[b if baseline_per_input else 0]]
    return out[:n_bytes], np.concatenate(expected) if expected else np.empty(0, np.uint8)


@pytest.mark.parametrize("kind", ["own", "shifted", "runs", "random"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_select_rows(layout, kind):
    rng = np.random.default_rng(hash((layout, kind == "own", kind == "runs")) % 2**32)
    for itemsize in (1, 2, 4, 8):
        for n_background in (1, 2, 9):
            got, expected = select_case(rng, layout, kind, itemsize, n_background)
            assert np.array_equal(got, expected), (itemsize, n_background)


def compact_case(rng, row_bytes, n_tokens, length, threads=1, whole=False):
    """Random arguments of compact_rows, its outputs and those of a plain loop."""
    n_inputs, n_coalitions, n_players = 2, 4, 67
    bits_per_input, index_per_input = (bool(flag) for flag in rng.integers(0, 2, 2))
    x = random_bytes(rng, n_inputs, n_tokens, row_bytes)
    present = rng.random((n_inputs if bits_per_input else 1, n_coalitions, n_players)) < rng.random()
    bits = pack(present)
    index = rng.integers(-1, n_players, (n_inputs if index_per_input else 1, n_tokens)).astype(np.int32)
    start = 0 if whole else int(rng.integers(0, 8))
    stop = 8 if whole else int(rng.integers(start, 9))
    out = np.full((stop - start) * length * row_bytes + 64, 0xA5, dtype=np.uint8)
    overflows = native.compact_rows(
        out.ctypes.data, x.ctypes.data, bits.ctypes.data, index.ctypes.data, row_bytes, n_inputs, n_coalitions,
        n_tokens, length, bits.shape[-1], bits_per_input, index_per_input, start, stop, threads,
    )  # fmt: skip
    n_bytes = len(out) - 64
    assert (out[n_bytes:] == 0xA5).all(), "wrote beyond the end"
    expected = np.zeros((stop - start, length, row_bytes), dtype=np.uint8)
    expected_overflows = 0
    for i, u in enumerate(range(start, stop)):
        b, c = divmod(u, n_coalitions)
        players = index[b if index_per_input else 0]
        states = present[b if bits_per_input else 0, c]
        kept = [t for t, player in enumerate(players) if player < 0 or states[player]]
        expected_overflows += len(kept) > length
        for place, t in enumerate(kept[:length]):
            expected[i, place] = x[b, t]
    return out[:n_bytes], overflows, expected.reshape(-1), expected_overflows


@pytest.mark.parametrize("row_bytes", [1, 6, 48, 3072])
@pytest.mark.parametrize(("n_tokens", "length"), [(1, 1), (31, 31), (33, 20), (197, 197), (197, 100), (64, 70), (5, 0)])
def test_compact_rows(row_bytes, n_tokens, length):
    rng = np.random.default_rng(row_bytes * n_tokens + length)
    for _ in range(6):
        got, overflows, expected, expected_overflows = compact_case(rng, row_bytes, n_tokens, length)
        assert overflows == expected_overflows
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("words", [0, 1, 2, 65])
@pytest.mark.parametrize(("unit", "n_background"), [(1, 1), (1, 3), (5, 1), (16, 1), (40, 1)])
def test_players_beyond_the_words_are_absent(words, unit, n_background):
    # Runs of bytes, tables of states, stretches of bits, patterns, and tokens; bits beyond the words would say present.
    memory = np.full(2 * words + 200, -1)
    memory[:words] = 0x5A5A5A5A5A5A5A5A
    last = 64 * words
    odd = [0, last - 1, last, last + 1, 2**31 - 1, -1, -(2**31), last + 64]
    for players in (odd, list(range(last - 40, last + 90))):
        index = np.array([max(p, -(2**31)) for p in players], dtype=np.int32)
        present = [p < 0 or (p < last and bool(0x5A5A5A5A5A5A5A5A >> (p & 63) & 1)) for p in index.tolist()]
        x, baseline = np.full(len(index) * unit, 1, np.uint8), np.zeros(n_background * len(index) * unit, np.uint8)
        out = np.full(n_background * len(x), 2, dtype=np.uint8)
        native.select_rows(
            out.ctypes.data, x.ctypes.data, baseline.ctypes.data, memory.ctypes.data, index.ctypes.data, 1, 1, 1,
            n_background, 1, len(index), unit, words, False, False, False, 0, 1, 1,
        )  # fmt: skip
        assert out.tolist() == np.tile(np.repeat(present, unit), n_background).astype(int).tolist()

        tokens = np.arange(1, len(index) + 1, dtype=np.uint8)
        out = np.full(len(index), 0, dtype=np.uint8)
        overflows = native.compact_rows(
            out.ctypes.data, tokens.ctypes.data, memory.ctypes.data, index.ctypes.data, 1, 1, 1, len(index),
            len(index), words, False, False, 0, 1, 1,
        )  # fmt: skip
        assert overflows == 0
        assert out[: sum(present)].tolist() == tokens[present].tolist()
        assert not out[sum(present) :].any()


def test_threads_change_nothing():
    # Above the sizes from which the kernels use threads.
    for threads in (1, 2, 5):
        rng = np.random.default_rng(8)
        got, expected = select_case(rng, (3, 224 * 224, 1), "runs", 4, 2, threads, whole=True)
        assert len(got) > 2**22
        assert np.array_equal(got, expected)
        rng = np.random.default_rng(1)
        got, overflows, expected, expected_overflows = compact_case(rng, 16384, 200, 190, threads, whole=True)
        assert len(got) > 2**22
        assert np.array_equal(got, expected)
        assert overflows == expected_overflows


DIGEST = """
import hashlib, numpy, test_native
rng = numpy.random.default_rng(7)
digest = hashlib.sha256()
for layout in test_native.LAYOUTS:
    for kind in ("own", "shifted", "runs", "random"):
        for itemsize in (1, 2, 4, 8):
            got, expected = test_native.select_case(rng, layout, kind, itemsize, 2)
            assert numpy.array_equal(got, expected)
            digest.update(got.tobytes())
digest.update(test_native.compact_case(rng, 48, 197, 100)[0].tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bytes(run_on_every_isa):
    digests = run_on_every_isa(DIGEST)
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest() + "\n"}


def test_an_instruction_set_can_be_forced(run_python):
    for isa in native.build_info()["isas"]:
        try:
            printed = run_python("import torch, xaifast._cpu as c; print(c.build_info()['isa'])", XAIFAST_CPU_ISA=isa)
        except AssertionError as error:
            assert "this processor lacks" in str(error)
        else:
            assert printed == isa + "\n"


def test_an_unknown_instruction_set_is_refused(run_python):
    text = run_python("import xaifast._cpu", fails=True, XAIFAST_CPU_ISA="avx9")
    assert re.search(r"ImportError: XAIFAST_CPU_ISA must be one of baseline.*, got 'avx9'", text)


def test_nth_set_bit():
    draw = random.Random(0)
    words = [0, 1, 2**31, 2**32 - 1, 0x80000001] + [draw.getrandbits(32) & draw.getrandbits(32) for _ in range(300)]
    for word in words:
        positions = [bit for bit in range(32) if word >> bit & 1]
        for k in range(-1, 34):
            expected = positions[k] if 0 <= k < len(positions) else -1
            assert native.nth_set_bit(word, k) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"itemsize": 3}, "itemsize must be 1, 2, 4 or 8"),
        ({"period": -1}, "sizes must not be negative"),
        ({"stop": 7}, "0 <= start <= stop"),
        ({"start": 5, "stop": 4}, "0 <= start <= stop"),
        ({"x": 0}, "null pointer"),
    ],
)
def test_select_rows_refuses_nonsense(change, text):
    buffer = np.zeros(64, dtype=np.int64)
    arguments = dict.fromkeys(("out", "x", "baseline", "bits", "index"), buffer.ctypes.data)
    arguments |= {"itemsize": 4, "n_inputs": 2, "n_coalitions": 3, "n_background": 1, "rep": 1, "period": 2, "unit": 1}
    arguments |= {"words": 1, "bits_per_input": False, "index_per_input": False, "baseline_per_input": False}
    arguments |= {"start": 0, "stop": 6, "threads": 1}
    native.select_rows(*arguments.values())
    with pytest.raises(ValueError, match=text):
        native.select_rows(*(arguments | change).values())


def test_sample_coalitions_refuses_nonsense():
    buffer = np.zeros(1000, dtype=np.int64)
    pointer = buffer.ctypes.data
    for arguments in [(5, 7, 0), (5, 2, 0), (3, 10, 0), (0, 4, 0), (5000, 4, 0), (5, 8, 4), (6, 18, 2)]:
        with pytest.raises(ValueError, match="sample_coalitions: "):
            native.sample_coalitions(*arguments, 0, 0, pointer, pointer)


def test_build_info():
    info = native.build_info()
    assert info["isa"] in info["isas"]
    assert info["isas"][0] == "baseline"
    assert isinstance(info["openmp"], bool)


@pytest.mark.skipif(_native.cuda() is None, reason=f"no CUDA module: {_native.why_missing()}")
def test_the_cuda_module_imports_without_a_device(run_python):
    code = "from xaifast import _native; print(_native.cuda().build_info())"
    info = _native.cuda().build_info()
    assert info["archs"]
    assert run_python(code, CUDA_VISIBLE_DEVICES="").strip() == str(info)


@pytest.mark.skipif(_native.cuda() is None, reason=f"no CUDA module: {_native.why_missing()}")
def test_a_cuda_failure_is_an_error_with_its_reason(run_python):
    code = "import xaifast._cuda as c; c.compact_rows(64, 64, 64, 64, 4, 1, 1, 1, 1, 1, False, False, 0, 1, 0, 0)"
    text = run_python(code, fails=True, CUDA_VISIBLE_DEVICES="")
    assert re.search(r"RuntimeError: compact_rows: .*(device|driver)", text)


WITHOUT_NATIVE = """
import logging, sys
logging.basicConfig(format="%(message)s")
sys.modules["xaifast._cpu"] = None
sys.modules["xaifast._cuda"] = None
import torch, xaifast
from xaifast import _native
from xaifast.ops import sample_coalitions
assert set(_native.why_missing()) == {"_cpu", "_cuda"}
bits, weights = sample_coalitions(10, 50)
sample_coalitions(10, 60)
print(bits.flatten().tolist())
"""


def test_without_native_modules_the_reference_serves_and_says_so_once(run_python):
    from xaifast.ops import sample_coalitions

    printed = run_python(WITHOUT_NATIVE)
    assert printed.strip() == str(sample_coalitions(10, 50)[0].flatten().tolist())
    log = run_python(WITHOUT_NATIVE + "\nraise SystemExit(3)", fails=True)
    assert log.count("xaifast.sample_coalitions: the native backend is not used") == 1
