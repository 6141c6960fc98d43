"""Jobs over a whole data set: chunk after chunk into a store, with progress, until it is complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from .store import Store
from .stream import is_out_of_memory, part_of_job, too_large

logger = logging.getLogger("xaifast")


@dataclass
class Chunk:
    """Results of one chunk.

    Attributes:
        tensors: ``[inputs of the chunk, ...]`` each.
        names: Of its inputs.
        skipped: Reason by data-set index of inputs that could not be read.
    """

    tensors: Mapping[str, Tensor]
    names: list[str]
    skipped: dict[int, str] = field(default_factory=dict)


def run_job(
    store: Store,
    load: Callable[[int, int], object],
    compute: Callable[[int, object, int], Chunk],
    *,
    evaluations: int,
    rows_per_evaluation: int = 1,
    show_progress: bool = False,
    description: str = "explain",
) -> None:
    """Compute and write every chunk of this rank that is not finished.

    A chunk that is finished is never computed again; one that was interrupted is computed anew, with the same bytes.
    Where memory runs out the chunk begins anew with half of the model rows a call, which is recorded before it is used
    and so holds after an interruption too. The next chunk loads while one is computed.

    Args:
        store: Where results go.
        load: ``load(start, stop)``: what ``compute`` needs of the inputs ``[start, stop)``; runs in a thread.
        compute: ``compute(chunk, loaded, rows) -> Chunk`` with ``rows`` model rows a call.
        evaluations: Coalitions an input, for bar and log.
        rows_per_evaluation: Model rows of each, for the log.
        show_progress: Draw a bar over this rank's inputs, with rate and time left.
        description: What the bar says.

    Raises:
        StoreError: the disk is full, or not writable. MemoryError, torch.OutOfMemoryError: one model row does not fit.
    """
    pending = store.pending
    own = range(store.rank, store.n_chunks, store.world)
    sizes = {chunk: store.bounds(chunk)[1] - store.bounds(chunk)[0] for chunk in own}
    done = sum(sizes[chunk] for chunk in own) - sum(sizes[chunk] for chunk in pending)
    bar = _Bar(sum(sizes.values()) * evaluations, done * evaluations, show_progress, description)
    with bar, ThreadPoolExecutor(1, "xaifast-load") as loader:
        following = loader.submit(load, *store.bounds(pending[0])) if pending else None
        try:
            for position, chunk in enumerate(pending):
                loaded = following.result()
                if position + 1 < len(pending):
                    following = loader.submit(load, *store.bounds(pending[position + 1]))
                start = time.perf_counter()
                result, rows = _compute(store, chunk, loaded, compute, bar)
                store.write(chunk, result.tensors, result.names, result.skipped)
                inputs = sizes[chunk] - len(result.skipped)
                store.note(
                    "chunk",
                    chunk=chunk,
                    inputs=inputs,
                    model_rows=inputs * evaluations * rows_per_evaluation,
                    rows=rows,
                    seconds=round(time.perf_counter() - start, 6),
                )
                done += sizes[chunk]
                bar.settle(done * evaluations, f"{done} of {sum(sizes.values())} inputs")
        finally:
            if following is not None:
                following.cancel()


def _compute(
    store: Store, chunk: int, loaded: object, compute: Callable[[int, object, int], Chunk], bar: _Bar
) -> tuple[Chunk, int]:
    while True:
        rows = store.rows(chunk)
        try:
            with part_of_job(bar.advance):
                return compute(chunk, loaded, rows), rows
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                store.shrink(chunk, None)  # nothing was made with fewer rows, and memory may be free another day
                raise too_large(error, "one model row a call") from error
        # Outside the handler, so that the failed frames and their tensors are gone.
        store.shrink(chunk, rows // 2)
        store.note("out of memory", chunk=chunk, rows=rows // 2)
        logger.warning("xaifast: out of memory, chunk %d begins anew with %d rows a call", chunk, rows // 2)
        bar.restart()


class _Bar:
    """A progress bar in evaluations that follows the streams of a chunk and is put right at its end."""

    def __init__(self, total: int, initial: int, show: bool, description: str) -> None:
        from tqdm.auto import tqdm

        # unit_scale, or a bar over millions of evaluations is all digits
        self._bar = tqdm(
            total=total, initial=initial, desc=description, unit="evaluation", unit_scale=True, disable=not show
        )
        self._settled = initial

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, units: int) -> None:
        self._bar.update(min(units, self._bar.total - self._bar.n))

    def settle(self, at: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(at - self._bar.n)
        self._settled = at

    def restart(self) -> None:
        self._bar.update(self._settled - self._bar.n)
