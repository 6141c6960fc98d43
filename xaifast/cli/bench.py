"""``xaifast bench``: what explanations of the user's own model cost, as multiples of its bare forward."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..models.loading import LoadedModel, load_model
from ..stream import is_out_of_memory
from .options import REMOVALS, JobSettings, add_job_options, choose_device, device_name
from .peers import peers_of
from .shapley_job import ShapleyJob, prepare

_TRIED = ("baseline", "token-select", "token-drop")  # where nobody says
_BATCHES, _TABLE_BATCHES = (1, 4, 16, 64, 256), (1, 64, 1024, 4096, 16384)
_PEER_ROUNDS = 2  # they take long

Row = dict[str, object]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "bench",
        help="how fast explanations of your model are",
        description="Measure the bare forward of a model by batch size, and Kernel SHAP with each removal that applies "
        "as a multiple of the same number of bare evaluations. Rounds are interleaved; medians are shown.",
    )
    add_job_options(parser)
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--inputs", type=int, default=2, metavar="N", help="inputs explained together (2)")
    what.add_argument("--n-samples", type=int, nargs="+", default=[128, 512], metavar="N", help="budgets (128 512)")
    what.add_argument(
        "--removal", choices=list(REMOVALS), nargs="+", help=f"default: those of {', '.join(_TRIED)} that apply"
    )
    what.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="of the bare forward (1 to 256; tables: 1 to 16384)",
    )
    what.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (5)")
    what.add_argument("--peers", action="store_true", help="Captum and shap beside, where they are installed")
    what.add_argument("--csv", type=Path, metavar="FILE", help="store the table")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for name in ("inputs", "rounds", "n_samples", "batch_sizes"):
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise ValueError(f"xaifast bench: --{name.replace('_', '-')} must be at least 1, got {given}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    jobs = _jobs(args, load_model(args.model, device=device), device)
    first = next(iter(jobs.values()))
    conditions = _conditions(device)
    print("\n".join([*first.lines, "machine:  " + ", ".join(f"{k} {v}" for k, v in conditions.items())]))

    forward = _bare(first)
    sizes = args.batch_sizes or (_TABLE_BATCHES if first.example.dim() == 2 else _BATCHES)
    rates = forward_rates(forward, first.example, sizes)
    print("\nbare forward\n" + _table([{"batch": b, "rows/s": f"{rate:,.1f}"} for b, rate in rates.items()]))
    rows = [{"contender": "bare forward", "batch": b, "rows_per_second": round(rate, 1)} for b, rate in rates.items()]

    batch = max(rates, key=rates.get)
    measured = []
    for n in args.n_samples:
        measured += measure(jobs, forward, batch, n, args.inputs, args.rounds, peers=args.peers)
    print(f"\nkernel_shap of {args.inputs} inputs; the floor is the bare forward at batch {batch}")
    shown = ("contender", "n_samples", "seconds", "floor_seconds", "ratio", "ratio_min", "ratio_max")
    print(_table([{name: row[name] for name in shown} for row in measured]))
    if args.csv:
        _write(args.csv, [{**row, **conditions} for row in [*rows, *measured]])
    return 0


def _jobs(args: argparse.Namespace, model: LoadedModel, device: str) -> dict[str, ShapleyJob]:
    """A job for each removal that applies; what was asked for by name must apply."""
    jobs: dict[str, ShapleyJob] = {}
    for removal in args.removal or _TRIED:
        if jobs and not args.removal and next(iter(jobs.values())).example.dim() != 4:
            break  # only images have tokens
        settings = JobSettings.from_args(args, removal=removal, n_samples=max(args.n_samples), limit=args.inputs)
        try:
            jobs[removal] = prepare(settings, model, device)
        except (ValueError, TypeError) as error:
            if args.removal or removal == _TRIED[0]:
                raise
            print(f"note: {removal} is left out: {str(error).partition(': ')[2] or error}")
    return jobs


def _bare(job: ShapleyJob) -> Callable[[Tensor], Tensor]:
    """The model as the job runs it, one tensor to another, without anything around it."""
    dtype, model = job.compute.options["autocast"], job.compute.forward

    def forward(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = model(rows)
        return getattr(outputs, "logits", outputs)

    return forward


def forward_rates(forward: Callable[[Tensor], Tensor], example: Tensor, batch_sizes: Sequence[int]) -> dict[int, float]:
    """Rows a second of the bare model by batch size, up to what memory holds.

    Args:
        forward: The model.
        example: Some inputs ``[b, ...]``, repeated to fill a batch.
        batch_sizes: In any order.

    Raises:
        RuntimeError: not even the smallest batch fits into memory.

    Example:
        >>> list(forward_rates(torch.nn.Linear(3, 2), torch.ones(1, 3), [4, 1]))
        [1, 4]
    """
    rates: dict[int, float] = {}
    for n in sorted(set(batch_sizes)):
        rows = _repeat(example, n)
        try:
            floor_seconds(forward, rows, n)
            calls = 3 if floor_seconds(forward, rows, n) > 0.1 else 10
            rates[n] = n / min(floor_seconds(forward, rows, n) for _ in range(calls))
        except Exception as error:
            if not is_out_of_memory(error) or not rates:
                raise
            print(f"note: a batch of {n} does not fit into memory")
            break
    return rates


def floor_seconds(forward: Callable[[Tensor], Tensor], rows: Tensor, n_rows: int) -> float:
    """Time of ``n_rows`` bare evaluations, ``rows`` (one batch) again and again."""

    def work() -> None:
        for start in range(0, n_rows, len(rows)):
            forward(rows[: n_rows - start])

    with torch.inference_mode():
        return _seconds(work, rows.device)


def measure(
    jobs: dict[str, ShapleyJob],
    forward: Callable[[Tensor], Tensor],
    batch: int,
    n_samples: int,
    n_inputs: int,
    rounds: int,
    *,
    peers: bool,
) -> list[Row]:
    """One budget: a row for each removal and peer, floor and contenders in turn in every round.

    Args:
        jobs: By removal.
        forward: The bare model.
        batch: Of the floor.
        n_samples, n_inputs: Evaluations an input, and inputs.
        rounds: Repetitions; of peers two at most.
        peers: Whether others run beside.
    """
    first = next(iter(jobs.values()))
    n = min(n_samples - n_samples % 2, 2 ** min(first.manifest["n_players"], 62))
    loaded = first.loader(0, min(n_inputs, len(first.loader.data)))
    contenders = {}
    for removal, job in jobs.items():
        compute = dataclasses.replace(job.compute, options={**job.compute.options, "n_samples": n_samples})
        contenders[removal] = lambda c=compute, j=job: c(0, loaded, j.manifest["rows"])
    others = peers_of(first, forward, loaded.inputs.to(first.example.device), n, batch) if peers else {}
    rows = _repeat(first.example, batch)
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in (*contenders, *others)}
    for work in (*contenders.values(), *others.values()):
        work()
    for number in range(rounds):
        floors.append(floor_seconds(forward, rows, len(loaded.inputs) * n * first.n_background))
        for name, work in {**contenders, **(others if number < _PEER_ROUNDS else {})}.items():
            times[name].append(_seconds(work, rows.device))
    measured = []
    for name, taken in times.items():
        ratios = [t / f for t, f in zip(taken, floors, strict=False)]
        measured.append({
            "contender": name, "n_samples": n, "inputs": len(loaded.inputs), "batch": batch,
            "seconds": round(statistics.median(taken), 4), "floor_seconds": round(statistics.median(floors), 4),
            "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3), "rounds": len(taken),
        })  # fmt: skip
    return measured


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _repeat(example: Tensor, n: int) -> Tensor:
    return example.repeat(-(-n // len(example)), *(1,) * (example.dim() - 1))[:n].contiguous()


def _conditions(device: str) -> Row:
    versions = {name: importlib.metadata.version(name) for name in ("captum", "shap") if importlib.util.find_spec(name)}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "xaifast": __version__,
        "torch": torch.__version__,
        **versions,
    }


def _table(rows: list[Row]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([f"  {line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
