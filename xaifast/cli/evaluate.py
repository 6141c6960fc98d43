"""``xaifast evaluate``: do the attributions of stored runs say what the model goes by?"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ..data.base import require
from ..data.segmentations import FORMS
from ..evaluation.bootstrap import rank_methods
from ..evaluation.dataset import COMPARED
from ..evaluation.scores import Scores, read_scores, write_scores
from ..run import open_run
from ..store import Store
from .evaluation_job import EvaluationJob, prepare
from .job import carry_out, missing_for_report, say_nothing, set_threads, summary, write_in_place
from .options import REMOVALS, add_machine_options, choose_device, positive


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "evaluate",
        help="metrics of attributions that explain stored",
        description="Insertion and deletion curves and other metrics of finished runs of xaifast explain, beside "
        "methods made on the fly. Model, data and features are those of the runs. Results are written as they are "
        "made; the same command takes up an interrupted evaluation where it stopped.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="what explain wrote; several of one model")
    parser.add_argument("--model", metavar="SPEC", help="where the model lies now (default: where it was)")
    parser.add_argument("--data", metavar="SPEC", help="where the data lie now (default: where they were)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where results go (default: RUN/evaluation)")
    parser.add_argument(
        "--compare", choices=COMPARED, nargs="*", metavar="METHOD",
        help=f"beside the runs: any of {', '.join(COMPARED)} (default: the first two)",
    )  # fmt: skip
    curves = parser.add_argument_group("curves")
    curves.add_argument("--steps", type=positive, metavar="N", help="points less one (default: 50 or all features)")
    curves.add_argument("--order", choices=["most", "least"], default="most", help="important features that go first")
    curves.add_argument("--level", choices=["players", "pixels"], help="what is perturbed (default: the runs' players)")
    curves.add_argument("--score", choices=["softmax", "logit", "accuracy"], help="of the model (default: softmax)")
    curves.add_argument("--removal", choices=list(REMOVALS), default="baseline", help="how features are taken away")
    for name, default in (("insertion", "blur"), ("deletion", "0")):
        curves.add_argument(
            f"--{name}-baseline", metavar="VALUE",
            help=f"blur, zero, mean, noise, black or a number (images: {default}; tables: mean)",
        )  # fmt: skip
    curves.add_argument("--rise-masks", type=positive, default=1000, metavar="N", help="of --compare rise (1000)")
    curves.add_argument("--seed", type=int, default=0)
    masks = parser.add_argument_group("segmentations")
    masks.add_argument("--segmentation", metavar="DIR", type=Path, help="mask images, named as the images are")
    masks.add_argument(
        "--segmentation-format", choices=list(FORMS), default="binary",
        help="; ".join(f"{form}: {what.split(': ')[-1]}" for form, what in FORMS.items()),
    )  # fmt: skip
    masks.add_argument("--segmentation-patch", type=positive, metavar="PIXELS", help="side (default: the runs' patch)")
    how = parser.add_argument_group("how")
    how.add_argument("--limit", type=positive, metavar="N", help="the first N inputs only")
    how.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="unreadable images, missing masks")
    how.add_argument("--batch-size", type=positive, metavar="ROWS", help="model rows a call (default: automatic)")
    how.add_argument("--chunk-size", type=positive, metavar="N", help="inputs stored together (default: automatic)")
    how.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the scores of single inputs")
    how.add_argument("--no-report", action="store_true", help="do not write report.html")
    how.add_argument("--quiet", action="store_true", help="no plan, no progress bar, no table")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    args.out = args.out or args.runs[0] / "evaluation"
    if args.format == "parquet":  # said before the work
        require("pyarrow", "data", "xaifast evaluate --format parquet")
    set_threads(args)
    job = prepare(args, choose_device(args.device))
    carry_out(args, job, lambda store: _finish(args, job, store), description="evaluate")
    return 0


def _finish(args: argparse.Namespace, job: EvaluationJob, store: Store) -> None:
    """Scores, table and report."""
    say = say_nothing if args.quiet else print
    path = store.directory / f"scores.{args.format}"
    write_in_place(path, lambda part: write_scores(store, part, args.format), store.rank)
    if not args.quiet:
        print(f"{summary(store)}\n{table(read_scores(store), store.manifest['seed'])}\nscores: {path}")
    if not args.no_report and not missing_for_report():
        from ..report import write_report

        explained = args.runs[0]
        inside = store.directory.resolve().parent == explained.resolve()

        def write(part: Path) -> None:
            write_report(open_run(explained), part, inputs=job.loader.picture, evaluation=store)

        place = (explained if inside else store.directory) / "report.html"
        say(f"report: {write_in_place(place, write, store.rank)}")


def table(scores: Scores, seed: int) -> str:
    """Means of all scores with half of their 95 % intervals, and the share of resamples that put a method first.

    Arrows say which end of a score is better; a count in brackets, how many inputs have it if not all do.
    """
    width = max(map(len, scores.methods))
    lines = []
    for name, values in scores.values.items():
        better = scores.larger_is_better(name)
        mean, band = scores.means(name)
        title = scores.title(name) + {True: " ↑", False: " ↓", None: ""}[better]
        first = np.full(len(mean), np.nan)
        if better is not None and len(mean) > 1:
            ranking = rank_methods(values, larger_is_better=better, seed=seed)
            first = ranking.first
            if ranking.n < len(values):
                title += f" ({ranking.n:,} of {len(values):,} inputs)"
        lines.append(title)
        for method, m, b, share in zip(scores.methods, mean, band, first, strict=True):
            line = f"  {method:{width}}  {m:8.4f}"
            line += f" ± {b:.4f}" if np.isfinite(b) else ""
            lines.append(line + (f"   ranked first {share:.1%}" if np.isfinite(share) else ""))
    return "\n".join(lines)
