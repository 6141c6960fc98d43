"""One HTML file that says what a stored run found, how sure it is, how fast it was and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..run import Run
from . import formats
from .sections import Report

__all__ = ["write_report"]

_LIMIT = 4_500_000  # bytes; pictures shrink until the file fits
_SIDES = (224, 160, 112, 72)


def write_report(
    run: Run,
    path: str | Path,
    *,
    inputs: Callable[[int], object] | None = None,
    evaluation: Run | None = None,
) -> Path:
    """Write the report of a stored run, finished or not: one file that needs no network (extra ``report``).

    The same run gives the same bytes. The file stays below 5 MB whatever the number of inputs: pictures of a fixed
    selection, made smaller where they would not fit.

    Args:
        run: What `xaifast.open_run` returns.
        path: The file, usually ``report.html``.
        inputs: ``inputs(index)`` is an input as people see it: a picture ``[H, W]`` or ``[H, W, 3]`` in 0..1, or a row
            of a table ``[F]``. Called only for the inputs shown. None leaves pictures out.
        evaluation: What ``xaifast evaluate`` stored about the run, as `xaifast.open_run` returns it: curves, scores and
            the ranking of methods become a part of the report.

    Returns:
        The path.

    Raises:
        StoreError: a chunk is corrupt.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("xaifast.write_report needs jinja2; pip install 'xaifast[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        name: getattr(formats, name) for name in ("number", "fixed", "percent", "duration", "count")
    }
    template = environment.get_template("report.html")
    report = Report(run, inputs, evaluation)
    for side in _SIDES:
        page = template.render(report.content(side)).encode(
            errors="backslashreplace"
        )  # names of files may be any bytes
        if len(page) <= _LIMIT:
            break
    path = Path(path)
    path.write_bytes(page)
    return path
