"""``xaifast explain``: attributions for a whole data set, stored as they are made."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..attribution.dataset import DESIGN_BLOCK
from ..models.loading import load_model
from ..run import Run, StoreError, open_run
from ..store import Store
from . import xtrain_job
from .job import DatasetJob, carry_out, missing_for_report, say_nothing, set_threads, summary, write_in_place
from .options import REMOVALS, JobSettings, add_job_options, choose_device, positive
from .shapley_job import prepare


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "explain",
        help="attributions for a whole data set",
        description="Explain every input of a data set. Results are written as they are made; the same command takes "
        "up an interrupted run where it stopped. torchrun --nproc-per-node N -m xaifast explain ... shards the job.",
    )
    parser.set_defaults(run=run)
    add_job_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="where results go")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=["kernel-shap", *xtrain_job.METHODS], default="kernel-shap")
    how.add_argument("--n-samples", type=positive, default=512, metavar="N", help="evaluations an input (512)")
    how.add_argument("--removal", choices=list(REMOVALS), default="baseline", help="what absent features look like")
    how.add_argument("--segments", choices=["slic"], help="superpixels of each image instead of patches")
    how.add_argument("--n-segments", type=positive, default=50, metavar="N", help="superpixels at most (50)")
    how.add_argument("--link", choices=["identity", "logit"], default="identity", help="logit: explain probabilities")
    how.add_argument("--limit", type=positive, metavar="N", help="the first N inputs only")
    how.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="what to do with unreadable images")
    how.add_argument("--batch-size", type=positive, metavar="ROWS", help="model rows a call (default: automatic)")
    how.add_argument(
        "--chunk-size", type=positive, metavar="N", help="inputs stored together: a power of two up to 256 (automatic)"
    )
    how.add_argument("--no-report", action="store_true", help="do not write report.html")
    how.add_argument("--quiet", action="store_true", help="no plan and no progress bar")
    xtrain_job.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    set_threads(args)
    device = choose_device(args.device)
    settings, model = JobSettings.from_args(args), load_model(args.model, device=device)
    if args.method in xtrain_job.METHODS:
        job = xtrain_job.prepare(args, settings, model, device)
    else:
        job = prepare(settings, model, device)
    carry_out(args, job, lambda store: _finish(args, job, store), description="explain")
    return 0


def _finish(args: argparse.Namespace, job: DatasetJob, store: Store) -> None:
    """Summary and report."""
    say = say_nothing if args.quiet else print
    say(summary(store))
    if not args.no_report and not missing_for_report():
        from ..report import write_report

        def write(path: Path) -> None:
            write_report(store, path, inputs=job.loader.picture, evaluation=_evaluation(store.directory))

        say(f"report: {write_in_place(store.directory / 'report.html', write, store.rank)}")


def _evaluation(directory: Path) -> Run | None:
    """What an earlier ``xaifast evaluate`` left there."""
    try:
        found = open_run(directory / "evaluation")
    except StoreError:
        return None
    return found if found.manifest.get("kind") == "evaluation" else None


def _check(args: argparse.Namespace) -> None:
    if args.image_size and len(args.image_size) > 2:
        raise ValueError(f"xaifast explain: --image-size takes a side, or height and width, got {args.image_size}")
    if args.chunk_size and (args.chunk_size & (args.chunk_size - 1) or args.chunk_size > DESIGN_BLOCK):
        raise ValueError(
            f"xaifast explain: --chunk-size must be a power of two up to {DESIGN_BLOCK}, got {args.chunk_size}"
        )
    given = [name for name in xtrain_job.OPTIONS if getattr(args, name) is not None]
    if given and args.method not in xtrain_job.METHODS:
        raise ValueError(
            f"xaifast explain: --{given[0]} is for --method {', '.join(xtrain_job.METHODS)}, got {args.method}; leave "
            "it out or choose one of these"
        )
    if args.patch and args.segments:
        raise ValueError("xaifast explain: --patch and --segments exclude each other; leave one out")
