"""Means over seeds with their intervals, and who is better where, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product

_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, n - 1


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, Student's t; NaN below two values."""
    n = len(values)
    return _T.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def interval(values: Sequence[float]) -> str:
    """Mean ± half of its interval, over the values that are there."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    return f"{statistics.fmean(known):.3f} ± {half_width(known):.3f}" if len(known) > 1 else f"{known[0]:.3f}"


def verdict(ours: Sequence[float], theirs: Sequence[float], better: int) -> int:
    """1 where ours are better in paired differences over seeds, -1 where they are worse, 0 where 0 lies inside."""
    differences = [better * (a - b) for a, b in zip(ours, theirs, strict=True)]
    mean, half = statistics.fmean(differences), half_width(differences)
    return 0 if not abs(mean) > half else (1 if mean > 0 else -1)


def gains_table(
    cells: Mapping[tuple[str, str, str, str], Sequence[float]],
    part: str,
    ours: Sequence[str],
    others: Sequence[str],
    metrics: Mapping[str, int],
    data: Sequence[str],
) -> None:
    """Of ours against each other method, for each metric: data sets better / worse / not told apart."""
    rows = []
    for mine, other in product(ours, others):
        row = [mine, other]
        for metric, better in metrics.items():
            pairs = [(cells[part, name, mine, metric], cells[part, name, other, metric]) for name in data]
            found = [verdict(first, second, better) for first, second in pairs]
            row.append(f"{found.count(1)} / {found.count(-1)} / {found.count(0)}")
        rows.append(row)
    table(["method", "against", *metrics], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
