"""Values of coalitions for a model that is a function of NumPy arrays, averaged over weighted background rows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..ops import SelectPlan, plan_selection
from ..stream import Stream

_FIRST_ROWS = 8192
_LARGEST_KEPT = 2**25 - 2**16  # glibc's limit is 32 MiB
_MAX_BYTES = 2**26
_MAX_ROWS = 2**17
_GAIN, _TRIALS = 0.9, 5


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch in one thread: its others would wait in a loop for work, on the cores where NumPy's threads do the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Pace:
    """Model rows a call: doubled while that makes a row cheaper.

    An array program is fastest while its rows stay in the caches, a forest in its own threads wants tens of thousands
    of rows. Which it is shows in the time of the calls that are made anyway: both sizes in turn, and the best of
    five of each counts.

    Args:
        rows: Rows a call, or None to find out.
        row_bytes: Bytes of one row; a call gets 64 MiB at most.
    """

    def __init__(self, rows: int | None, row_bytes: int) -> None:
        self._limit = rows or min(_MAX_ROWS, _MAX_BYTES // max(row_bytes, 1))
        self.rows = self._settled = max(1, min(rows or _FIRST_ROWS, self._limit))
        self._costs: dict[int, list[float]] = defaultdict(list)

    def observe(self, seconds: float) -> None:
        """Learn from the time of a call with as many rows as asked for."""
        if 2 * self._settled > self._limit:
            return
        self._costs[self.rows].append(seconds / self.rows)
        costs, trial = self._costs[self._settled], self._costs[2 * self._settled]
        if len(trial) < _TRIALS:
            self.rows = self._settled * (2 if len(trial) < len(costs) else 1)
            return
        if min(trial) > _GAIN * min(costs):
            self._limit = self._settled
        else:
            self._settled *= 2
        self.rows = self._settled
        self._costs.clear()


class ArrayGame:
    """The value of a coalition: the weighted mean of a model over the background, present players shown.

    Args:
        call: ``call(rows [b, P], units) -> float64 [b, K]``; the rows are units blocks of the background's R rows, and
            are written again by the next call.
        background: ``[R, P]``, any dtype.
        weights: float64 ``[R]`` of sum one.
        n_outputs: K.
        pace: Sizes of the calls.
    """

    def __init__(self, call: Callable, background: np.ndarray, weights: np.ndarray, n_outputs: int, pace: Pace) -> None:
        self._call, self._background, self._weights = call, background, weights
        self._n_outputs, self._pace = n_outputs, pace
        self._buffer = torch.empty(0)
        # glibc returns freed memory beyond a threshold to the system, and raises that to the largest block that was
        # freed: without this a model's intermediate arrays are mapped anew in each call, up to 2.7 times its time.
        np.empty(_LARGEST_KEPT, dtype=np.uint8)

    def __call__(
        self, x: np.ndarray, players: np.ndarray, bits: Tensor, advance: Callable[[int], object]
    ) -> np.ndarray:
        """Evaluate coalitions of inputs.

        Args:
            x: ``[B, P]``.
            players: int64 ``[P]`` or ``[B, P]``, player of each column; -1 is always shown.
            bits: int64 ``[n, W]``, packed coalitions.
            advance: Told how many inputs are done.

        Returns:
            float64 ``[B, n, K]``.

        Raises:
            ValueError: a model output is not finite; names input and coalition.
        """
        plan, decode = self._plan(x, players)
        n, n_background = len(bits), plan.n_background
        values = np.empty((len(x) * n, self._n_outputs))
        with Stream(len(values), self._units(n_background), show_progress=False, description="") as stream:

            def step(start: int, stop: int) -> None:
                began = time.perf_counter()
                units = stop - start
                rows = decode(self._rows(plan, bits, start, stop))
                outputs = self._call(rows, units).reshape(units, n_background, self._n_outputs)
                values[start:stop] = self._weights @ outputs
                if units == self._units(n_background):
                    self._pace.observe(time.perf_counter() - began)
                    stream.rows = self._units(n_background)
                advance(stop // n - start // n)

            stream.run(len(values), step)
        values = values.reshape(len(x), n, self._n_outputs)
        if not np.isfinite(values).all():
            b, c, k = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"xaifast.KernelExplainer: model outputs must be finite, got {values[b, c, k]} for input {b}, "
                f"coalition {c}, output {k}; check the model on rows mixed from an input and the background"
            )
        return values

    def _units(self, n_background: int) -> int:
        return max(1, self._pace.rows // n_background)

    def _plan(self, x: np.ndarray, players: np.ndarray) -> tuple[SelectPlan, Callable[[Tensor], np.ndarray]]:
        """What writes rows, and what turns them into the model's; dtypes torch does not know travel as row numbers."""
        background = self._background
        dtype = np.result_type(x, background)
        shown, hidden = (np.ascontiguousarray(part.astype(dtype, copy=False)) for part in (x, background))
        mask = torch.from_numpy(players)
        try:
            tensors = torch.from_numpy(shown), torch.from_numpy(hidden)
        except TypeError:
            table, columns = np.concatenate([hidden, shown]), np.arange(x.shape[1])
            numbers = torch.arange(len(table), dtype=torch.int32)[:, None].expand(-1, x.shape[1])
            plan = plan_selection(numbers[len(hidden) :], mask, background=numbers[: len(hidden)])
            return plan, lambda rows: table[rows.numpy(), columns]
        return plan_selection(tensors[0], mask, background=tensors[1]), Tensor.numpy

    def _rows(self, plan: SelectPlan, bits: Tensor, start: int, stop: int) -> Tensor:
        n_rows = (stop - start) * plan.n_background
        if self._buffer.dtype != plan.x.dtype or len(self._buffer) < n_rows or self._buffer.shape[1:] != plan.shape:
            self._buffer = torch.empty(n_rows, *plan.shape, dtype=plan.x.dtype)
        with one_thread():
            return plan.rows(bits, start, stop, out=self._buffer[:n_rows])
