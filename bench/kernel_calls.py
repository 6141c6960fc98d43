"""Calls of the CPU kernels by the standard library alone: starts in a moment under valgrind and under a sanitizer.

    python kernel_calls.py MODULE count REPORT.json [case ...]
    python kernel_calls.py MODULE edges [kernel ...]

`count` makes fixed calls of every kernel between marks (a call of `getppid`) at which callgrind writes a part of its
profile, and lists in REPORT.json what lies between them. `edges` calls with odd sizes, in memory that ends where the
data end and, for bytes, begins at any address.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import random
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

_libc = ctypes.CDLL(None)
_libc.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
_libc.free.argtypes = (ctypes.c_void_p,)


class Buffer:
    """Memory on the heap that ends where the data end; begins `shift` bytes after a multiple of 64."""

    def __init__(self, data: bytes | array, shift: int = 0) -> None:
        content = bytes(data)
        self._block = ctypes.c_void_p()
        if _libc.posix_memalign(ctypes.byref(self._block), 64, shift + len(content)):
            raise MemoryError(f"kernel_calls: {shift + len(content)} bytes could not be allocated")
        self.address = self._block.value + shift
        ctypes.memmove(self.address, content, len(content))

    def __del__(self) -> None:
        _libc.free(self._block)


@dataclass
class Call:
    """Arguments of a kernel and the memory they point to."""

    kernel: str
    arguments: tuple[Buffer | int | bool, ...]

    def bind(self, module: ModuleType) -> Callable[[], object]:
        """A function that makes the call, and keeps the memory.

        Raises:
            LookupError: The module has no such kernel.
            TypeError: On the call, where the kernel takes other arguments.
            ValueError: On the call, where it refuses a value.
        """
        kernel = getattr(module, self.kernel, None)
        if kernel is None:
            raise LookupError(f"{self.kernel} is missing")
        plain = tuple(a.address if isinstance(a, Buffer) else a for a in self.arguments)
        return lambda _memory=self: kernel(*plain)


def select_rows(
    rng: random.Random, index: Iterable[int], *, n_players: int, rep: int = 1, unit: int = 1, itemsize: int = 4,
    n_background: int = 1, n_coalitions: int = 2, shift: int = 0,
) -> Call:  # fmt: skip
    """One input, its coalitions, bytes of an item's size."""
    index = array("i", index)
    row, words = rep * len(index) * unit * itemsize, -(-n_players // 64)
    buffers = [bytes(n_coalitions * n_background * row), rng.randbytes(row), rng.randbytes(n_background * row)]
    return Call(
        "select_rows",
        (
            *(Buffer(b, shift) for b in buffers), Buffer(rng.randbytes(8 * n_coalitions * words)), Buffer(index),
            itemsize, 1, n_coalitions, n_background, rep, len(index), unit, words, False, False, False, 0,
            n_coalitions, 1,
        ),
    )  # fmt: skip


def compact_rows(
    rng: random.Random, n_tokens: int, length: int, row_bytes: int, *, n_coalitions: int = 4, shift: int = 0
) -> Call:
    """One input, a player a token; about half of the tokens are present."""
    words = -(-n_tokens // 64)
    out, x = bytes(n_coalitions * length * row_bytes), rng.randbytes(n_tokens * row_bytes)
    return Call(
        "compact_rows",
        (
            Buffer(out, shift), Buffer(x, shift), Buffer(rng.randbytes(8 * n_coalitions * words)),
            Buffer(array("i", range(n_tokens))), row_bytes, 1, n_coalitions, n_tokens, length, words, False, False, 0,
            n_coalitions, 1,
        ),
    )  # fmt: skip


def cubic_regression(
    rng: random.Random, n_rows: int, n_players: int, *, n_sizes: int = 3, n_probes: int = 0, n_outputs: int = 2
) -> Call:
    """Random signs; the inverse's diagonal exactly, or by probes."""

    def signs(n: int) -> Buffer:
        return Buffer(array("d", rng.choices((-1.0, 1.0), k=n)))

    def between(low: float, high: float, n: int) -> Buffer:
        return Buffer(array("d", (rng.uniform(low, high) for _ in range(n))))

    each = n_outputs * n_rows
    inputs = (
        signs(n_rows * (n_players + n_sizes)), between(0, 1 / n_players, n_outputs * n_players),
        between(0, 1, n_outputs), between(0.1, 1, each), between(-1, 1, each), signs(n_probes * n_rows),
    )  # fmt: skip
    results = [Buffer(bytes(8 * n)) for n in (each, n_outputs, n_outputs, each)]
    sizes = (n_outputs, n_rows, n_players, n_sizes, n_probes, 1)
    return Call("cubic_regression", (*inputs, *results, Buffer(bytes(4 * n_outputs)), *sizes))


def perturb_rows(
    rng: random.Random, period: int, *, rep: int = 1, unit: int = 1, itemsize: int = 4, n_points: int = 4,
    n_inputs: int = 1, shift: int = 0,
) -> Call:  # fmt: skip
    """Ranks of each input, an insertion row each, one deletion row; half of the points insert, half delete."""
    row = rep * period * unit * itemsize
    ranks = [rank for _ in range(n_inputs) for rank in rng.sample(range(-1, period - 1), period)]
    points = [n for k in range(n_points) for n in (k * period // max(n_points - 1, 1), k % 2)]
    sizes = (n_inputs * n_points * row, n_inputs * row, n_inputs * row, row)
    return Call(
        "perturb_rows",
        (
            *(Buffer(rng.randbytes(size), shift) for size in sizes), Buffer(array("i", ranks)),
            Buffer(array("q", points)), itemsize, n_inputs, n_points, rep, period, unit, True, False, True, 0,
            n_inputs * n_points, 1,
        ),
    )  # fmt: skip


def rank_features(
    rng: random.Random, n_features: int, *, itemsize: int = 4, infinity: int = 0x7F800000, ties: int = 0,
    n_inputs: int = 2,
) -> Call:  # fmt: skip
    """Random bytes: every kind of value."""
    n = n_inputs * n_features
    buffers = (Buffer(bytes(4 * n)), Buffer(rng.randbytes(itemsize * n)))
    return Call("rank_features", (*buffers, n_inputs, n_features, itemsize, infinity, ties, False, 1))


def sample_coalitions(n_players: int, n_samples: int, design: int) -> Call:
    """Design 0 leverage, 1 kernel, 2 chain, 3 grouped."""
    bits = Buffer(bytes(8 * n_samples * -(-n_players // 64)))
    return Call("sample_coalitions", (n_players, n_samples, design, 7, 0, bits, Buffer(bytes(8 * n_samples))))


def philox_words(n_calls: int) -> Call:
    """A counter that wraps around."""
    return Call("philox_words", (Buffer(bytes(16 * n_calls)), n_calls, (2**32 - 3, 1, 2, 3), (4, 5)))


def pack_bits(rng: random.Random, n_rows: int, n_players: int, *, shift: int = 0) -> Call:
    """Bytes of any value."""
    bits = Buffer(bytes(8 * n_rows * -(-n_players // 64)))
    return Call("pack_bits", (bits, Buffer(rng.randbytes(n_rows * n_players), shift), n_rows, n_players))


def unpack_bits(rng: random.Random, n_rows: int, n_players: int, *, shift: int = 0) -> Call:
    """Bits beyond the last player too."""
    bits = Buffer(rng.randbytes(8 * n_rows * -(-n_players // 64)))
    return Call("unpack_bits", (Buffer(bytes(n_rows * n_players), shift), bits, n_rows, n_players))


def _patches(size: int, patch: int) -> Iterator[int]:
    return (y // patch * -(-size // patch) + x // patch for y in range(size) for x in range(size))


# Name -> the call and how often it is made between two marks.
CASES: dict[str, tuple[Callable[[random.Random], Call], int]] = {
    "select_rows patches": (lambda r: select_rows(r, _patches(224, 16), n_players=196, rep=3, n_coalitions=8), 2),
    "select_rows superpixels": (lambda r: select_rows(r, r.choices(range(70), k=10000), n_players=70, rep=3), 4),
    "select_rows columns": (lambda r: select_rows(r, range(5003), n_players=5003, itemsize=8), 8),
    "select_rows background": (lambda r: select_rows(r, range(30), n_players=30, n_background=100), 20),
    "select_rows vectors": (lambda r: select_rows(r, r.choices(range(70), k=2000), n_players=70, unit=16), 10),
    "select_rows 1 byte": (lambda r: select_rows(r, [0], n_players=1, itemsize=1, n_coalitions=1), 500),
    "compact_rows": (lambda r: compact_rows(r, 197, 120, 768, n_coalitions=16), 10),
    "cubic_regression": (lambda r: cubic_regression(r, 130, 49), 1),
    "cubic_regression probes": (lambda r: cubic_regression(r, 130, 49, n_probes=16), 1),
    "perturb_rows pixels": (lambda r: perturb_rows(r, 224 * 224, rep=3), 2),
    "perturb_rows pieces": (lambda r: perturb_rows(r, 3136, rep=3, unit=16), 2),
    "rank_features radix": (lambda r: rank_features(r, 10000), 4),
    "rank_features few": (lambda r: rank_features(r, 49, n_inputs=40), 10),
    "pack_bits": (lambda r: pack_bits(r, 1000, 196), 10),
    "unpack_bits": (lambda r: unpack_bits(r, 1000, 196), 10),
    "philox_words": (lambda r: philox_words(4096), 10),
    "sample_coalitions leverage": (lambda r: sample_coalitions(49, 500, 0), 2),
    "sample_coalitions chain": (lambda r: sample_coalitions(49, 482, 2), 4),
    "sample_coalitions grouped": (lambda r: sample_coalitions(196, 500, 3), 2),
}


def count(module: ModuleType, names: Iterable[str]) -> dict[str, object]:
    """Make the calls between marks; return the cases in order, those missing with the reason, and repetitions."""
    measured: list[str] = []
    missing: dict[str, str] = {}
    for name in names:
        make, repeats = CASES[name]
        try:
            work = make(random.Random(0)).bind(module)
            work()  # symbols are looked up on a first call
        except TypeError:
            missing[name] = "takes other arguments"
            continue
        except (LookupError, ValueError) as error:
            missing[name] = str(error)
            continue
        os.getppid()
        for _ in range(repeats):
            work()
        os.getppid()
        measured.append(name)
    return {"measured": measured, "missing": missing, "repeats": {name: CASES[name][1] for name in measured}}


def edge_calls() -> Iterator[Call]:
    """Sizes around every block, word and vector; rows, columns and players that end in the middle of one."""
    rng = random.Random(1)
    layouts = [(1, 1, 1), (3, 7, 1), (1, 63, 1), (2, 64, 1), (1, 65, 3), (2, 1000, 1), (1, 5, 37), (1, 5003, 1)]
    layouts += [(1, 9, 1025), (2, 65, 16), (1, 3, 8)]
    for (rep, period, unit), itemsize in itertools.product(layouts, (1, 2, 4, 8)):
        maps = (range(period), range(3, period + 3), sorted(rng.choices(range(-1, 70), k=period)),
                rng.choices(range(-1, 70), k=period), [2**31 - 1, *[-9] * (period - 1)])  # fmt: skip
        for index, n_background, shift in itertools.product(maps, (1, 2, 9), (0, 1)):
            n_players = min(max(index) + 1, 6000)
            yield select_rows(
                rng, index, n_players=max(n_players, 1), rep=rep, unit=unit, itemsize=itemsize,
                n_background=n_background, shift=shift,
            )  # fmt: skip
    sizes = itertools.product([(1, 1), (31, 31), (33, 20), (64, 70), (197, 100), (5, 0)], (0, 1, 6, 48, 3072), (0, 1))
    for (n_tokens, length), row_bytes, shift in sizes:
        yield compact_rows(rng, n_tokens, length, row_bytes, shift=shift)
    for n_rows, n_players, n_probes in itertools.product((1, 7, 8, 9, 65), (1, 3, 49), (0, 1, 9)):
        yield cubic_regression(rng, n_rows, n_players, n_probes=n_probes)
    for (rep, period, unit), itemsize in itertools.product([*layouts, (3, 4097, 1), (1, 2, 700)], (1, 2, 4, 8)):
        for n_inputs, shift in itertools.product((1, 2), (0, 1)):
            yield perturb_rows(rng, period, rep=rep, unit=unit, itemsize=itemsize, n_inputs=n_inputs, shift=shift)
    formats = ((2, 0x7C00), (2, 0), (4, 0x7F800000), (4, 0), (8, 0x7FF0000000000000), (8, 0))
    for (itemsize, infinity), n_features in itertools.product(formats, (1, 2, 63, 65, 129, 257, 3000)):
        for ties in range(3):
            yield rank_features(rng, n_features, itemsize=itemsize, infinity=infinity, ties=ties)
    yield from (philox_words(n_calls) for n_calls in (8, 16, 72))
    for n_rows, n_players, shift in itertools.product((1, 2, 5), (1, 7, 63, 64, 65, 130, 196), (0, 1)):
        yield pack_bits(rng, n_rows, n_players, shift=shift)
        yield unpack_bits(rng, n_rows, n_players, shift=shift)
    for n_players, design in itertools.product((2, 3, 5, 63, 64, 65, 130, 4096), range(4)):
        pairs = min(n_players - 1, 40) if n_players < 6 else 40
        yield sample_coalitions(n_players, 4 if n_players == 2 else 2 + 2 * min(pairs, n_players - 1), design)


def load(path: str) -> ModuleType:
    """Load a module by its file."""
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    path, what, *rest = sys.argv[1:]
    module = load(path)
    if what == "count":
        report, *names = rest
        with open(report, "w") as file:
            json.dump(count(module, names or CASES), file)
        return
    made = 0
    for call in edge_calls():
        if not rest or call.kernel in rest:
            call.bind(module)()
            made += 1
    print(f"{made} calls by {module.build_info()['isa']}")


if __name__ == "__main__":
    main()
