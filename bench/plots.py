"""Pictures for docs/images and README's tables, drawn from the committed CSV in bench/results and from nothing else.

    python bench/plots.py [--check]

README holds markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; what lies between is replaced. `--check` writes
nothing and exits with 1 where README says something else than the CSV.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from results import read

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES, README = ROOT / "bench" / "results", ROOT / "docs" / "images", ROOT / "README.md"
COLOURS = {"wls": "#5e3c99", "adjusted": "#e66101", "permutation": "#999999", "shap": "#1b7837", "captum": "#2166ac"}
PEERS = ("shap", "captum")
OURS = ("curves", "pixels", "TokenSelect", "TokenDrop", "occlusion", "receptive fields", "rise")

Rows = Sequence[dict[str, str]]


def conditions(rows: Rows) -> str:
    """What the figures of one file were measured on, in a line."""
    one = rows[0]
    names = ("torch", "captum", "shap", "python")
    versions = ", ".join(f"{name} {one[name]}" for name in names if one.get(name, "-") != "-")
    return f"{one['device']}, {one['threads']} threads, commit {one['commit']}, {versions}"


def jobs_table(rows: Rows) -> str:
    """Multiples of the bare forward: a line a job, the package's contenders beside each peer's."""
    lines = ["| work | xaifast | Captum (default / batched) | shap |", "|---|---|---|---|"]
    for job in dict.fromkeys(row["job"] for row in rows):
        ours, captum, shap = [], [], []
        for row in (row for row in rows if row["job"] == job):
            name, ratio = row["contender"], _three(float(row["ratio_median"]))
            if name.startswith("Captum"):
                captum.append(ratio)
            elif name == "shap":
                shap.append(ratio)
            else:
                ours.append(f"{name.removesuffix(', wls')} **{ratio}**")
        lines.append(f"| {job} | {', '.join(ours)} | {' / '.join(captum) or '-'} | {' / '.join(shap) or '-'} |")
    return "\n".join([*lines, "", f"({conditions(rows)}; medians of {_rounds(rows)} rounds.)"])


def work_table(rows: Rows) -> str:
    """Multiples of the bare forward: a line a job, the package's contenders beside everyone else."""
    lines = ["| work | xaifast | others |", "|---|---|---|"]
    for job in dict.fromkeys(row["job"] for row in rows):
        ours, others = [], []
        for row in (row for row in rows if row["job"] == job):
            name, ratio = row["contender"], _three(float(row["ratio_median"]))
            if name in OURS:
                ours.append(f"{name} **{ratio}**")
            else:
                others.append(f"{name} {ratio}")
        lines.append(f"| {job} | {', '.join(ours)} | {'; '.join(others) or '-'} |")
    return "\n".join([*lines, "", f"({conditions(rows)}; medians of {_rounds(rows)} rounds.)"])


def estimators_table(rows: Rows) -> str:
    """Errors at n = 500, and the time to shap's error at n = 2000."""
    methods = {"wls": "`wls`", "adjusted": "`adjusted` (`auto`)", "captum": "Captum", "shap": "shap"}
    lines = [f"| n = 500 | {' | '.join(methods.values())} | time of `adjusted` to shap's error at n = 2000 |"]
    lines.append("|---" * (len(methods) + 2) + "|")
    for network in dict.fromkeys(row["network"] for row in rows):
        points = {(row["method"], int(row["n"])): row for row in rows if row["network"] == network}
        errors = [f"{float(points[method, 500]['error_median']):.3f}" for method in methods]
        errors[1] = f"**{errors[1]}**"
        lines.append(f"| {network} | {' | '.join(errors)} | {time_to_error(points)} of shap's |")
    return "\n".join([*lines, "", f"({conditions(rows)}.)"])


def time_to_error(points: dict[tuple[str, int], dict[str, str]]) -> str:
    """Time of `adjusted` at its first budget with shap's error at n = 2000, over shap's time."""
    goal = points["shap", 2000]
    for (method, _), row in sorted(points.items(), key=lambda item: item[0][1]):
        if method == "adjusted" and float(row["error_median"]) <= float(goal["error_median"]):
            return f"{float(row['seconds_median']) / float(goal['seconds_median']):.2f}"
    return "more than all"


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "jobs": ("jobs-cpu.csv", jobs_table),
    "estimators": ("estimators-cpu.csv", estimators_table),
    "curves": ("curves-cpu.csv", work_table),
    "occlusion": ("occlusion-cpu.csv", work_table),
}


def with_tables(text: str, results: Path = RESULTS) -> str:
    """README's text with every table made anew.

    Raises:
        ValueError: a marker is missing.
    """
    for name, (file, make) in TABLES.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README must hold {begin} and {end} once each; add them where the table belongs")
        made = f"{begin}\n\n{make(read(results / file))}\n\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, made=made: made, text, flags=re.S)
    return text


def error_curves(rows: Rows) -> Figure:
    """Error against seconds an image, logarithmic, a panel a network, a line an estimator or peer."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = _figure(len(networks))
    for axis, network in zip(axes, networks, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [row for row in rows if row["network"] == network and row["method"] == method]
            if method not in COLOURS or not points:
                continue
            seconds = [float(row["seconds_median"]) / int(row["images"]) for row in points]
            style = "--" if method in PEERS else "-"
            errors = [float(row["error_median"]) for row in points]
            axis.loglog(seconds, errors, style, marker="o", markersize=3, color=COLOURS[method], label=method)
        axis.set_title(network)
        axis.set_xlabel("seconds an image")
        _label(axis.xaxis)
        _label(axis.yaxis)
    axes[0].set_ylabel("relative error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def job_points(rows: Rows) -> Figure:
    """Multiples of the bare forward, logarithmic, a panel a job, a point a contender."""
    names = list(dict.fromkeys(row["job"] for row in rows))
    figure, axes = _figure(len(names))
    for axis, job in zip(axes, names, strict=True):
        mine = [row for row in rows if row["job"] == job][::-1]
        peer = [row["contender"].lower().startswith(PEERS) for row in mine]
        colours = [COLOURS["captum"] if other else COLOURS["adjusted"] for other in peer]
        ratios = [float(row["ratio_median"]) for row in mine]
        axis.scatter(ratios, [row["contender"] for row in mine], color=colours, zorder=2)
        axis.axvline(1, color="black", linewidth=0.8, zorder=1)
        axis.set_xscale("log")
        axis.set_xlim(min(0.3, 0.8 * min(ratios)), max(3.0, 1.3 * max(ratios)))
        _label(axis.xaxis)
        axis.set_xlabel("multiples of the bare forward")
        axis.set_title(job.replace(", ", ",\n", 1), fontsize=8)
    return figure


def operator_bars(rows: Rows) -> Figure:
    """Share of the ceiling: the package beside torch.compile of its reference."""
    kernels = [row for row in rows if row["kind"] == "kernel"]
    cases = list(dict.fromkeys((row["operator"], row["case"]) for row in kernels))[::-1]
    figure, (axis,) = _figure(1, height=0.45 * len(cases) + 1)
    for provider, colour, shift in (("xaifast", COLOURS["adjusted"], 0.2), ("torch.compile", "#999999", -0.2)):
        share = {(r["operator"], r["case"]): float(r["share"]) for r in kernels if r["provider"] == provider}
        places = [i + shift for i, case in enumerate(cases) if case in share]
        values = [share[case] for case in cases if case in share]
        axis.barh(places, values, height=0.38, color=colour, label=provider)
    axis.set_yticks(range(len(cases)), [f"{operator}\n{case}" for operator, case in cases], fontsize=6)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("share of the ceiling")
    axis.legend(frameon=False, loc="lower right")
    return figure


PICTURES: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "bench-estimators.svg": ("estimators-cpu.csv", error_curves),
    "bench-jobs.svg": ("jobs-cpu.csv", job_points),
    "bench-operators.svg": ("operators-cpu.csv", operator_bars),
}


def _figure(panels: int, height: float = 3.2) -> tuple[Figure, list]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(4 * panels if panels > 1 else 7, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _label(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def draw(results: Path, images: Path) -> list[Path]:
    """Draw every picture whose CSV is there; the same CSV gives the same bytes."""
    from matplotlib import rc_context

    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (file, make) in PICTURES.items():
        if (results / file).exists():
            with rc_context({"svg.hashsalt": "xaifast"}):
                make(read(results / file)).savefig(images / name, metadata={"Date": None})
            drawn.append(images / name)
    return drawn


def _three(ratio: float) -> str:
    """Three significant figures at most."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _rounds(rows: Rows) -> str:
    counts = sorted({int(row["rounds"]) for row in rows})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def main() -> int:
    """Draw, or look whether README is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text()
    made = with_tables(text)
    if arguments.check:
        if made != text:
            print("README.md's tables are not those of bench/results; run python bench/plots.py", file=sys.stderr)
        return int(made != text)
    README.write_text(made)
    for path in (README, *draw(RESULTS, IMAGES)):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
