"""Tables of figures: as CSV and for people."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, object]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Store rows that have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """What `write` stored, every value as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Print some columns, aligned: text to the left, numbers to the right."""
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (list(columns), *cells):
        shown = (
            text.rjust(width) if text.replace(".", "", 1).isdigit() else text.ljust(width)
            for text, width in zip(line, widths, strict=True)
        )
        print("  ".join(shown).rstrip())
