"""Options that more than one command takes, and what they come to."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..removal import TokenDrop, TokenSelect

REMOVALS = {"baseline": None, "blur": "blur", "token-drop": TokenDrop(), "token-select": TokenSelect()}
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class JobSettings:
    """What is explained and how, under the names of the options; docs/explain.md says what each means."""

    data: str
    target: str = "predicted"
    limit: int | None = None
    link: str = "identity"
    patch: int | None = None
    segments: str | None = None
    n_segments: int = 50
    removal: str = "baseline"
    baseline: str | None = None
    background: str | None = None
    n_samples: int = 512
    estimator: str = "auto"
    seed: int = 0
    on_error: str = "stop"
    image_size: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    columns: list[str] | None = None
    label: str | None = None
    drop: list[str] | None = None
    autocast: str = "none"
    batch_size: int | None = None
    chunk_size: int | None = None
    method: str = "kernel-shap"

    @classmethod
    def from_args(cls, args: argparse.Namespace, **changed: object) -> JobSettings:
        """Those a command has; defaults for the others."""
        given = {name: getattr(args, name) for name in _FIELDS if hasattr(args, name)}
        return cls(**{**given, **changed})


_FIELDS = [field.name for field in dataclasses.fields(JobSettings)]


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Model, data, what is explained and on which machine."""
    parser.add_argument(
        "--model", required=True, metavar="SPEC", help="hf:DIR_OR_ID, py:MODULE:CALLABLE (runs your code), xaifast:DIR"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="digits, controlled:NAME, imagefolder:DIR, hf:DIR_OR_NAME[:SPLIT], npz:FILE, csv:FILE, parquet:FILE",
    )

    what = parser.add_argument_group("what is explained")
    what.add_argument(
        "--target", default="predicted", help='"predicted" (default), "label", "all", a class number or a class name'
    )
    what.add_argument(
        "--patch", type=positive, metavar="PIXELS", help="side of square patches (default: about 49 in all)"
    )
    what.add_argument("--baseline", metavar="VALUE", help='a number (default 0), or "mean" of the first 256 inputs')
    what.add_argument(
        "--background",
        metavar="ROWS",
        help="tables: so many rows of the data, or csv:FILE / parquet:FILE (default 100)",
    )
    what.add_argument("--estimator", choices=["auto", "wls", "adjusted", "permutation", "exact"], default="auto")
    what.add_argument("--seed", type=int, default=0)

    reading = parser.add_argument_group("reading the data")
    reading.add_argument("--image-size", type=positive, nargs="+", metavar="PIXELS", help="side, or height and width")
    reading.add_argument("--mean", type=float, nargs="+", help="per channel, subtracted after scaling to 0..1")
    reading.add_argument("--std", type=float, nargs="+", help="per channel, divided by")
    reading.add_argument("--columns", type=_names, metavar="A,B,...", help="features of a table, in the model's order")
    reading.add_argument("--label", metavar="COLUMN", help="column of a table with the classes")
    reading.add_argument("--drop", type=_names, metavar="A,B,...", help="columns of a table to leave out")

    add_machine_options(parser)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Where a job runs."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    machine.add_argument("--autocast", choices=list(AUTOCAST), default="none")
    machine.add_argument("--threads", type=positive, metavar="N", help="of the CPU")
    machine.add_argument("--debug", action="store_true", help="show where an error came from")


def choose_device(name: str) -> str:
    """The device that ``--device`` means to this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"
    return name


def device_name(device: str) -> str:
    """What the maker calls it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line for line in file if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.machine()


def positive(text: str) -> int:
    """An integer of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
