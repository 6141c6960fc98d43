"""A job over a data set as commands carry it out: notes, plan, chunks, and the command that goes on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..jobs import Chunk, run_job
from ..run import StoreError
from ..store import Store
from ..stream import is_out_of_memory
from .options import device_name

PROBE = 8  # inputs the model is tried on


@dataclass
class DatasetJob(ABC):
    """What a run over a data set needs.

    Attributes:
        loader: Inputs by index.
        compute: Batches to chunks; has the ``forward`` it calls, and its ``options``.
        manifest, static: Of the store.
        example: A few inputs, on the model's device.
        n_samples: Evaluations an input.
        n_background: Model rows an evaluation.
        lines: What is to be done, for people.
    """

    loader: Callable[[int, int], object]
    compute: Callable[[int, object, int], Chunk]
    manifest: dict
    static: dict[str, Tensor]
    example: Tensor
    n_samples: int
    n_background: int
    lines: list[str]
    counted: ClassVar[tuple[str, str]] = ("evaluations", "background rows")  # what n_samples and n_background count

    @abstractmethod
    def result_bytes(self, n_inputs: int) -> int:
        """Roughly what results take on disk."""

    def forward_rate(self, rows: int) -> float:
        """Rows a second of the bare model in calls of ``rows``, or of fewer where such a call takes long or much.

        Takes about a tenth of a second, or some calls of a slow model.
        """
        n, rate = min(rows, PROBE), 0.0
        while True:
            try:
                seconds = self._forward_seconds(n, at_least=0.1 if n == rows else 0.0)
            except Exception as error:
                if not is_out_of_memory(error) or n == 1:
                    raise
                if rate:
                    return rate
                n //= 2
                continue
            rate = n / seconds
            if n == rows or seconds > 0.1:
                return rate
            n = min(rows, 4 * n)

    def _forward_seconds(self, n: int, at_least: float) -> float:
        """Median of calls that together take so many seconds."""
        batch = self.example.repeat(-(-n // len(self.example)), *(1,) * (self.example.dim() - 1))[:n].contiguous()
        dtype = self.compute.options["autocast"]
        seconds: list[float] = []
        with torch.inference_mode(), torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
            self.compute.forward(batch)  # allocates
            while not seconds or sum(seconds) < at_least:
                start = time.perf_counter()
                self.compute.forward(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize(batch.device)
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def set_threads(args: argparse.Namespace) -> None:
    """As asked for, or as the run that is there began with: other numbers change the last digits."""
    threads = args.threads
    if not threads:
        with suppress(OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it, the store says so
            threads = json.loads((args.out / "manifest.json").read_text())["threads"]
    if threads:
        torch.set_num_threads(threads)


def carry_out(args: argparse.Namespace, job: DatasetJob, finish: Callable[[Store], None], *, description: str) -> None:
    """Make or take up the run in ``args.out`` and compute what is missing.

    Args:
        args: With ``out``, ``arguments``, ``batch_size``, ``chunk_size``, ``no_report`` and ``quiet``.
        job: What is to be done.
        finish: Called by whichever process was last, with the complete store.
        description: What the bar says.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 and not args.quiet else say_nothing
    job.manifest["command"] = command = _command(args, world)
    store = Store(args.out, job.manifest, job.static, rank=rank, world=world)
    for line in _notes(args, job, store):
        say(f"note: {line}")
    for line in job.lines:
        say(line)
    try:
        if store.pending:
            floor = job.forward_rate(store.manifest["rows"])
            for line in _plan(job, store, floor, description):
                say(line, flush=True)
            store.note(
                "start",
                world=world,
                forward_rows_per_second=round(floor, 1),
                device_name=device_name(str(job.example.device)),
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
            description=description,
        )
        if store.complete:
            finish(store)
        else:
            say(f"{len(store.finished)} of {store.n_chunks} chunks are finished, others are at work on the rest")
    except BaseException:
        if rank == 0:
            print(
                f"\n{len(store.finished)} of {store.n_chunks} chunks are finished and kept in {args.out}; to go on:\n  "
                f"{command}"
            )
        raise
    finally:
        store.close()


def missing_for_report() -> list[str]:
    """Packages that a report needs and that are not installed."""
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def write_in_place(path: Path, write: Callable[[Path], object], rank: int = 0) -> Path:
    """Have a file written beside its place and moved there: two processes may be the last one."""
    part = path.with_name(f".{path.name}.{rank}.tmp")
    write(part)
    return part.replace(path)


def summary(store: Store) -> str:
    """What was done, by the log."""
    speed = store.speed
    text = f"finished {len(store.finished)} of {store.n_chunks} chunks"
    if speed.model_rows:
        text += (
            f": {speed.model_rows:,} model rows in {duration(speed.seconds)} of work, {speed.ratio:.2f} times the "
            "bare forward"
        )
    if store.skipped:
        text += f"\nskipped, as they could not be read: {len(store.skipped)}; the report names them"
    return text


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def say_nothing(*_: object, **__: object) -> None:
    """In the place of ``print``."""


def _notes(args: argparse.Namespace, job: DatasetJob, store: Store) -> list[str]:
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
    if not args.no_report and (missing := missing_for_report()):
        notes.append(
            f"there will be no report.html: it needs {' and '.join(missing)}; pip install 'xaifast[report]' and run "
            "the same command again, now or later"
        )
    return notes


def _plan(job: DatasetJob, store: Store, floor: float, description: str) -> list[str]:
    """How much work, time and room; refuses a disk that is too small."""
    pending = sum(stop - start for start, stop in map(store.bounds, set(range(store.n_chunks)) - set(store.finished)))
    rows = len(store) * job.n_samples * job.n_background
    evaluations, background_rows = job.counted
    background = f" × {job.n_background} {background_rows}" if job.n_background > 1 else ""
    done = f", {len(store.finished)} finished" if store.finished else ""
    seconds = pending * job.n_samples * job.n_background / floor / store.world
    workers = f"{store.world} processes of " if store.world > 1 else ""
    needed, free = job.result_bytes(pending), shutil.disk_usage(store.directory).free
    if needed > free:
        raise StoreError(
            f"xaifast {description}: the results need about {_size(needed)}, but {store.directory} has {_size(free)} "
            "free; free space, or choose another --out"
        )
    return [
        f"work:     {len(store):,} inputs × {job.n_samples:,} {evaluations}{background} = {rows:,} model rows",
        f"time:     about {duration(seconds)} at the bare forward's {floor:,.0f} rows/s ({workers}"
        f"{torch.get_num_threads()} threads, {store.manifest['rows']} rows a call)",
        f"output:   {_size(job.result_bytes(len(store)))} in {store.directory}, chunks of "
        f"{store.manifest['chunk_size']} inputs ({store.n_chunks} in all{done})",
    ]


def _command(args: argparse.Namespace, world: int) -> str:
    program = f"torchrun --nproc-per-node {world} -m xaifast" if world > 1 else "xaifast"
    return f"{program} {shlex.join(args.arguments)}"


def _size(n_bytes: float) -> str:
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(n_bytes, 1)) // 3))
    return f"{n_bytes / 1000**power:.3g} {units[power]}"
