"""Streaming: chunks, out-of-memory back-off and progress, for every long loop of the package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

import torch

logger = logging.getLogger("xaifast")

_CPU_CHUNK_BYTES = 2**20  # a chunk's input, so that it is still in the caches when the model reads it
_MIN_ROWS, _MAX_ROWS = 32, 4096
_MAX_ROWS_MAPS = 256  # inputs with channels or space grow several times inside a model


@dataclass(frozen=True)
class _Outer:
    """What surrounds a stream: whom it tells about progress, and whether running out of memory is decided there."""

    advance: Callable[[int], None]
    owns_memory: bool


_outer: ContextVar[_Outer | None] = ContextVar("xaifast_outer", default=None)


@contextmanager
def _surrounded(outer: _Outer) -> Iterator[None]:
    token = _outer.set(outer)
    try:
        yield
    finally:
        _outer.reset(token)


@contextmanager
def part_of_job(advance: Callable[[int], None]) -> Iterator[None]:
    """Streams inside belong to a data-set job: they tell ``advance`` how many units are done instead of drawing bars of
    their own, and pass an out-of-memory error on instead of halving their chunk, which is the job's to decide and to
    record (`xaifast.jobs`).
    """
    with _surrounded(_Outer(advance, owns_memory=True)):
        yield


@contextmanager
def shared_progress(total: int, *, show_progress: bool, description: str, unit: str = "row") -> Iterator[None]:
    """Streams inside move one bar of ``total`` units; inside of a data-set job its bar, as without this."""
    if _outer.get() is not None or not show_progress:
        yield
        return
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True)
    with bar, _surrounded(_Outer(bar.update, owns_memory=False)):
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's refusal, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def too_large(error: Exception, what: str) -> Exception:
    """What to raise where nothing smaller can be tried; the kind a caller expects, with advice."""
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
    return kind(
        f"xaifast: out of memory with {what}; free memory, or use a smaller model, input or background ({error})"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 2**33


def auto_rows(row_bytes: int, device: torch.device, *, flat: bool, peak_row_bytes: int | None = None) -> int:
    """Model rows a call for ``batch_size="auto"``, from the size of a row and the free memory.

    On the CPU a power of two that keeps a chunk's input near 1 MiB, at least 32 rows, at most 4096 of ``flat``
    (tabular) inputs and 256 of others. On a GPU as many rows, up to 4096, as fit into half of the free memory at
    ``peak_row_bytes``, what a row of the first chunk took.
    """
    free = _free_bytes(device)
    if device.type == "cuda":
        rows = int(0.5 * free) // max(peak_row_bytes or 64 * row_bytes, 1)
        return max(1, min(_MAX_ROWS, 1 << max(rows, 1).bit_length() - 1))
    rows = 1 << max(_CPU_CHUNK_BYTES // max(row_bytes, 1), 1).bit_length() - 1
    rows = max(_MIN_ROWS, min(_MAX_ROWS if flat else _MAX_ROWS_MAPS, rows))
    return max(1, min(rows, free // (4 * max(row_bytes, 1))))


class Stream:
    """Runs ``step(start, stop)`` over ranges in chunks, halving the chunk when memory runs out.

    Used as a context manager around all ranges of a job, so that one progress bar covers them and a chunk size that
    once proved too large stays small.

    Args:
        total: Units of the whole job, for the bar.
        rows: Units a chunk to start with.
        show_progress: Whether to draw a bar with rate and time left.
        description: What the bar says.
        unit: What a unit is called in the bar.
    """

    def __init__(self, total: int, rows: int, *, show_progress: bool, description: str, unit: str = "row") -> None:
        self.rows = max(1, rows)
        self._total, self._description, self._unit = total, description, unit
        self._show = show_progress
        self._bar = None
        self._advance: Callable[[int], None] | None = None

    def __enter__(self) -> Stream:
        outer = _outer.get()
        if outer is not None:
            self._advance = outer.advance
        elif self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, desc=self._description, unit=self._unit, unit_scale=True)
            self._advance = self._bar.update
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def run(self, n_units: int, step: Callable[[int, int], None], *, scale: float = 1.0) -> None:
        """Cover ``[0, n_units)``; chunks hold ``rows * scale`` units (cheaper units may come in larger chunks)."""
        start, limit = 0, n_units
        while start < n_units:
            stop = min(n_units, start + max(1, min(limit, int(self.rows * scale))))
            try:
                step(start, stop)
                fits = True
            except Exception as error:
                if not is_out_of_memory(error) or str(error).startswith("xaifast:"):
                    raise
                outer = _outer.get()
                if outer is not None and outer.owns_memory:
                    raise
                if stop - start == 1:
                    raise too_large(error, "a single unit of work in flight") from error
                fits = False
            if not fits:  # outside the handler, so that the failed frames and their tensors are gone
                limit = (stop - start) // 2
                self.rows = max(1, min(self.rows, int((stop - start) / scale)) // 2)
                logger.warning("xaifast: out of memory, going on with chunks of %d", limit)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            if self._advance is not None:
                self._advance(stop - start)
            start = stop
