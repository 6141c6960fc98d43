"""Numbers, times and settings as people read them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"


def number(x: float, signed: bool = False) -> str:
    """Three digits, thousands separated: ``0.0123``, ``1,230``, ``4.5e−09``; an en dash for NaN.

    Example:
        >>> number(1234.5), number(999.6), number(-0.01234), number(2.5, signed=True), number(4e-9)
        ('1,234', '1,000', '−0.0123', '+2.5', '4e−09')
    """
    if not math.isfinite(x):
        return "\N{EN DASH}"
    size = abs(x)
    if float(x).is_integer() and size < 1e15:
        text = f"{int(size):,}"
    else:
        text = f"{size:,.0f}" if 999.5 <= size < 1e15 else f"{size:.3g}".replace("-", MINUS)
    return (MINUS if x < 0 else "+" if signed and x > 0 else "") + text


def fixed(x: float, decimals: int = 3, signed: bool = False) -> str:
    """So many decimals; no sign where they are all zero, an en dash for NaN.

    Example:
        >>> fixed(-1.23456), fixed(0.5, 1, signed=True), fixed(-1e-9), fixed(float("nan"))
        ('−1.235', '+0.5', '0.000', '–')
    """
    if not math.isfinite(x):
        return "\N{EN DASH}"
    text = f"{abs(x):.{decimals}f}"
    return ("" if not float(text) else MINUS if x < 0 else "+" if signed else "") + text


def percent(x: float) -> str:
    """A share with two digits.

    Example:
        >>> percent(0.01234), percent(1), percent(float("nan"))
        ('1.2 %', '100 %', '–')
    """
    return f"{number(float(f'{100 * x:.2g}'))} %" if math.isfinite(x) else "\N{EN DASH}"


def duration(seconds: float) -> str:
    """Two units at most.

    Example:
        >>> duration(0.234), duration(75), duration(7322)
        ('0.23 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def count(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> count(1, "input"), count(1200, "input")
        ('1 input', '1,200 inputs')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def flatten(settings: object, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of (dotted name, text); what is empty is left out."""
    if isinstance(settings, dict):
        return [row for key, value in settings.items() for row in flatten(value, f"{name}.{key}" if name else str(key))]
    if settings is None or settings in ("", [], ()):
        return []
    text = ", ".join(map(str, settings)) if isinstance(settings, list | tuple) else str(settings)
    return [(name.replace("_", " "), text if len(text) <= 300 else text[:297] + "...")]
