"""Wall times of a job in two checkouts by turns, A B B A: what slows the machine slows both.

python ratios.py CHECKOUT JOB CONTENDER     (a runner: a line on stdin, the seconds of a run on stdout)
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ratio:
    """Head's seconds over base's: the median over rounds and an interval around it."""

    median: float
    low: float
    high: float
    coverage: float
    base_seconds: float
    head_seconds: float
    rounds: int


def sign_interval(values: Sequence[float], wanted: float = 0.95) -> tuple[float, float, float]:
    """An interval for the median that supposes independence and nothing else, by the sign test.

    Returns:
        Low, high and the probability that such an interval covers the median: the smallest there is of at least
        `wanted`, else that of the whole range.
    """
    ordered, n = sorted(values), len(values)
    cut, coverage = 0, 1 - 2 * 0.5**n
    outside = 0.5**n  # P(fewer than cut + 1 of n values lie below the median)
    while cut + 1 < (n + 1) // 2:
        outside += math.comb(n, cut + 1) * 0.5**n
        if 1 - 2 * outside < wanted:
            break
        cut, coverage = cut + 1, 1 - 2 * outside
    return ordered[cut], ordered[n - 1 - cut], coverage


def summarise(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Ratios within each round."""
    ratios = [h / b for b, h in zip(base, head, strict=True)]
    low, high, coverage = sign_interval(ratios)
    middle = statistics.median
    return Ratio(middle(ratios), low, high, coverage, middle(base), middle(head), len(ratios))


class Runner:
    """A process that has imported one checkout's xaifast and made the job."""

    def __init__(self, checkout: Path, job: str, contender: str) -> None:
        command = [sys.executable, __file__, str(checkout), job, contender]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def seconds(self) -> float:
        """Wall time of one run.

        Raises:
            RuntimeError: The checkout cannot do the job; with its last line.
        """
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (ValueError, BrokenPipeError):
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else "it stopped without a word") from None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def interleave(base: Path, head: Path, job: str, contender: str, rounds: int) -> Ratio:
    """Run a job in both checkouts, `rounds` times in each after a warm-up.

    Raises:
        RuntimeError: One of them cannot do it; says which and why.
    """
    times: dict[str, list[float]] = {"base": [], "head": []}
    with Runner(base, job, contender) as first, Runner(head, job, contender) as second:
        runners = {"base": first, "head": second}
        for i in range(rounds + 1):
            for side in ("base", "head") if i % 2 == 0 else ("head", "base"):
                try:
                    taken = runners[side].seconds()
                except RuntimeError as error:
                    raise RuntimeError(f"{side} does not run {job}, {contender}: {error}") from None
                if i > 0:
                    times[side].append(taken)
    return summarise(times["base"], times["head"])


def _serve(checkout: str, job: str, contender: str) -> None:
    # An editable install's finder would answer for xaifast before the path does.
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, checkout)
    from jobs import JOBS  # beside this file: both checkouts do the same work

    import xaifast

    if Path(xaifast.__file__).parent.parent != Path(checkout):
        raise ImportError(f"xaifast must come from {checkout}, came from {xaifast.__file__}")
    work = JOBS[job]().contenders[contender]
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
