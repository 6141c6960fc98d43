"""``xaifast explain``: attributions for a whole data set, stored as they are made."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from ..attribution.dataset import DESIGN_BLOCK
from ..jobs import run_job
from ..models.loading import load_model
from ..run import StoreError
from ..store import Store
from .options import REMOVALS, JobSettings, add_job_options, choose_device, device_name, positive
from .shapley_job import ShapleyJob, prepare


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
    how.add_argument("--method", choices=["kernel-shap"], default="kernel-shap")
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


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 and not args.quiet else _say_nothing
    threads = args.threads or _recorded_threads(args.out)
    if threads:
        torch.set_num_threads(threads)
    device = choose_device(args.device)
    job = prepare(JobSettings.from_args(args), load_model(args.model, device=device), device)
    job.manifest["command"] = _command(args, world)
    store = Store(args.out, job.manifest, job.static, rank=rank, world=world)
    for line in _notes(args, job, store):
        say(f"note: {line}")
    for line in job.lines:
        say(line)
    try:
        if store.pending:
            floor = job.forward_rate(store.manifest["rows"])
            for line in _plan(job, store, floor):
                say(line, flush=True)
            store.note(
                "start",
                world=world,
                forward_rows_per_second=round(floor, 1),
                device_name=device_name(device),
                threads=torch.get_num_threads(),
                versions=job.manifest["versions"],
            )
        run_job(
            store,
            job.loader,
            job.compute,
            evaluations=job.n_samples,
            rows_per_evaluation=job.n_background,
            show_progress=rank == 0 and not args.quiet,
        )
        if store.complete:
            _finish(args, job, store)
        else:
            say(f"{len(store.finished)} of {store.n_chunks} chunks are finished, others are at work on the rest")
    except BaseException:
        if rank == 0:
            print(
                f"\n{len(store.finished)} of {store.n_chunks} chunks are finished and kept in {args.out}; to go on:\n  "
                f"{_command(args, world)}"
            )
        raise
    finally:
        store.close()
    return 0


def _finish(args: argparse.Namespace, job: ShapleyJob, store: Store) -> None:
    """Summary and report, by whichever process was last; two may be, so the report is moved into its place."""
    say = _say_nothing if args.quiet else print
    say(_summary(store))
    if not args.no_report and not _missing_for_report():
        from ..report import write_report

        path = store.directory / "report.html"
        part = path.with_name(f".report.html.{store.rank}.tmp")
        write_report(store, part, inputs=job.loader.picture)
        say(f"report: {part.replace(path)}")


def _notes(args: argparse.Namespace, job: ShapleyJob, store: Store) -> list[str]:
    """What the user may not expect."""
    notes = [
        f"{remark}; the last digits of further results may differ from an uninterrupted run's"
        for remark in store.remarks(job.manifest)
    ]
    for option, given, key in (
        ("--batch-size", args.batch_size, "rows"),
        ("--chunk-size", args.chunk_size, "chunk_size"),
    ):
        if given and given != store.manifest[key]:
            notes.append(f"{option} stays {store.manifest[key]}, as the run began")
    if not args.no_report and (missing := _missing_for_report()):
        notes.append(
            f"there will be no report.html: it needs {' and '.join(missing)}; pip install 'xaifast[report]' and run "
            "the same command again, now or later"
        )
    return notes


def _missing_for_report() -> list[str]:
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def _plan(job: ShapleyJob, store: Store, floor: float) -> list[str]:
    """How much work, time and room; refuses a disk that is too small."""
    pending = sum(stop - start for start, stop in map(store.bounds, set(range(store.n_chunks)) - set(store.finished)))
    rows = len(store) * job.n_samples * job.n_background
    background = f" × {job.n_background} background rows" if job.n_background > 1 else ""
    done = f", {len(store.finished)} finished" if store.finished else ""
    seconds = pending * job.n_samples * job.n_background / floor / store.world
    workers = f"{store.world} processes of " if store.world > 1 else ""
    needed, free = job.result_bytes(pending), shutil.disk_usage(store.directory).free
    if needed > free:
        raise StoreError(
            f"xaifast explain: the results need about {_size(needed)}, but {store.directory} has {_size(free)} free; "
            "free space, or choose another --out"
        )
    return [
        f"work:     {len(store):,} inputs × {job.n_samples:,} evaluations{background} = {rows:,} model rows",
        f"time:     about {_duration(seconds)} at the bare forward's {floor:,.0f} rows/s ({workers}"
        f"{torch.get_num_threads()} threads, {store.manifest['rows']} rows a call)",
        f"output:   {_size(job.result_bytes(len(store)))} in {store.directory}, chunks of "
        f"{store.manifest['chunk_size']} inputs ({store.n_chunks} in all{done})",
    ]


def _summary(store: Store) -> str:
    """What was done, by the log."""
    speed = store.speed
    text = f"finished {len(store.finished)} of {store.n_chunks} chunks"
    if speed.model_rows:
        text += (
            f": {speed.model_rows:,} model rows in {_duration(speed.seconds)} of work, {speed.ratio:.2f} times the "
            "bare forward"
        )
    if store.skipped:
        text += f"\nskipped, as they could not be read: {len(store.skipped)}; the report names them"
    return text


def _check(args: argparse.Namespace) -> None:
    if args.image_size and len(args.image_size) > 2:
        raise ValueError(f"xaifast explain: --image-size takes a side, or height and width, got {args.image_size}")
    if args.chunk_size and (args.chunk_size & (args.chunk_size - 1) or args.chunk_size > DESIGN_BLOCK):
        raise ValueError(
            f"xaifast explain: --chunk-size must be a power of two up to {DESIGN_BLOCK}, got {args.chunk_size}"
        )
    if args.patch and args.segments:
        raise ValueError("xaifast explain: --patch and --segments exclude each other; leave one out")


def _recorded_threads(directory: Path) -> int | None:
    """Threads a run that is there began with: other numbers change the last digits."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it, the store says so
        return json.loads((directory / "manifest.json").read_text())["threads"]
    return None


def _command(args: argparse.Namespace, world: int) -> str:
    program = f"torchrun --nproc-per-node {world} -m xaifast" if world > 1 else "xaifast"
    return f"{program} {shlex.join(args.arguments)}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(n_bytes: float) -> str:
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(n_bytes, 1)) // 3))
    return f"{n_bytes / 1000**power:.3g} {units[power]}"


def _say_nothing(*_: object, **__: object) -> None:
    pass
