"""Instructions of the CPU kernels, counted by callgrind; the same on a busy machine as on a calm one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DRIVER = Path(__file__).with_name("kernel_calls.py")
ISAS = ("baseline", "v3")  # valgrind knows no AVX-512


@dataclass(frozen=True)
class Counts:
    """Instructions a call, by case; reasons for the cases that could not be counted."""

    per_call: dict[str, float]
    missing: dict[str, str]


@dataclass(frozen=True)
class Change:
    """One case on one instruction set, before and after."""

    isa: str
    case: str
    base: float | None
    head: float | None
    note: str = ""

    @property
    def percent(self) -> float | None:
        """Growth, or None where there is nothing to compare."""
        if not self.base or self.head is None:
            return None
        return 100 * (self.head / self.base - 1)

    def worse(self, threshold: float) -> bool:
        """Whether it grew by more than `threshold` percent."""
        return self.percent is not None and self.percent > threshold


def total(profile: str) -> int:
    """Instructions of one part of callgrind's output.

    Raises:
        ValueError: There is no total, as in a file that was cut off.
    """
    match = re.search(r"^totals: (\d+)$", profile, re.MULTILINE)
    if match is None:
        raise ValueError("instructions: a callgrind profile must end with a line of totals; run it again")
    return int(match[1])


def count(module: Path, isa: str, cases: Sequence[str] = ()) -> Counts:
    """Run the driver under callgrind.

    Args:
        module: The `_cpu` to load.
        isa: "baseline" or "v3".
        cases: Names in `kernel_calls.CASES`; all if empty.

    Raises:
        RuntimeError: The driver failed, with what it said: a processor without the instructions, for example.
    """
    with tempfile.TemporaryDirectory() as folder:
        profile, report = Path(folder) / "profile", Path(folder) / "report.json"
        command = ["valgrind", "-q", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={profile}"]
        command += [sys.executable, "-S", "-E", str(DRIVER), str(module), "count", str(report), *cases]
        environment = {**os.environ, "XAIFAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines()
            raise RuntimeError(f"instructions: {isa} was not counted: {said[-1] if said else result.returncode}")
        done = json.loads(report.read_text())
        # Part 1 ends at the first mark; the second mark of case i ends part 2 i.
        parts = [profile.with_name(f"profile.{2 * (i + 1)}") for i in range(len(done["measured"]))]
        totals = [total(part.read_text()) for part in parts]
    per_call = {name: n / done["repeats"][name] for name, n in zip(done["measured"], totals, strict=True)}
    return Counts(per_call, done["missing"])


def compare(isa: str, base: Counts, head: Counts) -> list[Change]:
    """Line up two counts, in the order of the head's cases."""
    changes = []
    for case in dict.fromkeys([*head.per_call, *base.per_call, *head.missing, *base.missing]):
        sides = (("base", base), ("head", head))
        note = "; ".join(f"{side}: {counts.missing[case]}" for side, counts in sides if case in counts.missing)
        changes.append(Change(isa, case, base.per_call.get(case), head.per_call.get(case), note))
    return changes


def table(changes: Sequence[Change], threshold: float) -> str:
    """One line a change."""
    lines = [f"{'kernel':28} {'set':8} {'base':>12} {'head':>12} {'change':>9}"]
    for c in changes:
        base, head = ("-" if n is None else f"{n:,.0f}" for n in (c.base, c.head))
        percent = "-" if c.percent is None else f"{c.percent:+.2f} %"
        note = "  <- more" if c.worse(threshold) else f"  ({c.note})" if c.note else ""
        lines.append(f"{c.case:28} {c.isa:8} {base:>12} {head:>12} {percent:>9}{note}")
    return "\n".join(lines)
