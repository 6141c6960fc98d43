"""``xaifast train``: a network trained from scratch, with every checkpoint of its training recorded."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch

from ..data import open_data
from ..models import MLP, save_model
from ..trajectory import Trajectory, TrajectoryError
from .job import say_nothing
from .options import choose_device, positive
from .train_job import Settings, accuracy, read_inputs, split, train_recorded

_CALLER = "xaifast train"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "train",
        help="train a network and record its training",
        description="Train a network and record the states it goes through, for xaifast explain --method xtrain. "
        "The same command and seed give the same weights; a recorded directory is never written over.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("network", choices=["mlp"], help="linear layers with ReLU between them")
    parser.add_argument(
        "--data", required=True, metavar="SPEC", help="digits, controlled:NAME, npz:FILE, csv:FILE, parquet:FILE"
    )
    parser.add_argument("--label", metavar="COLUMN", help="column of a table with the classes")
    parser.add_argument("--record", required=True, metavar="DIR", type=Path, help="where checkpoints go")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the model goes (default: model in --record)")
    how = parser.add_argument_group("how")
    how.add_argument("--hidden", type=positive, nargs="+", default=[256, 128], metavar="WIDTH", help="256 128")
    how.add_argument("--epochs", type=positive, default=20, help="20")
    how.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    how.add_argument("--lr", type=float, help="learning rate (adam 0.001, sgd 0.1)")
    how.add_argument("--batch-size", type=positive, default=64, metavar="N", help="64")
    how.add_argument("--test-share", type=float, default=0.25, metavar="SHARE", help="held out (0.25)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--every", type=_every, default="epoch", help='a checkpoint every "epoch" or so many steps')
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    how.add_argument("--threads", type=positive, metavar="N", help="of the CPU")
    how.add_argument("--quiet", action="store_true", help="no text and no progress bar")
    how.add_argument("--debug", action="store_true", help="show where an error came from")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.threads:
        torch.set_num_threads(args.threads)
    say = say_nothing if args.quiet else print
    out = args.out or args.record / "model"
    lr = args.lr if args.lr is not None else {"adam": 1e-3, "sgd": 0.1}[args.optimizer]
    settings = Settings(args.epochs, args.optimizer, lr, args.batch_size, args.test_share, args.seed, args.every)
    if (out / "config.json").exists():
        raise ValueError(f"{_CALLER}: {out} holds a model already; choose another --out")
    data = open_data(args.data, label=args.label)
    x, y = read_inputs(data, _CALLER)
    kept, held_out = split(y, args.test_share, args.seed, _CALLER)
    about = {"data": data.fingerprint(), "network": args.network, "hidden": args.hidden, **vars(settings)}
    try:
        traj = Trajectory(args.record, run=about)
        if len(traj):
            raise ValueError(
                f"{_CALLER}: {args.record} holds {len(traj)} checkpoints of an earlier training already; explain them, "
                "delete the directory, or choose another --record"
            )
        n_classes = int(y.max()) + 1
        torch.manual_seed(args.seed)
        model = MLP(x[0].numel(), n_classes, args.hidden).to(choose_device(args.device))
        widths = " - ".join(map(str, (x[0].numel(), *args.hidden, n_classes)))
        say(f"data:     {data.spec}, {len(kept):,} inputs to learn from, {len(held_out):,} held out")
        say(f"model:    {widths}, ReLU; {args.optimizer}, learning rate {lr:g}, {args.epochs} epochs")
        train_recorded(model, traj, x[kept], y[kept], settings, show_progress=not args.quiet)
    except TrajectoryError as error:
        raise ValueError(str(error)) from error
    save_model(model, out, class_names=data.class_names)
    say(f"accuracy: {accuracy(model, x[kept], y[kept]):.1%}, held out {accuracy(model, x[held_out], y[held_out]):.1%}")
    say(f"recorded: {len(traj)} checkpoints, {traj.nbytes / 1e6:.1f} MB in {args.record}; model in {out}")
    label = f" --label {shlex.quote(args.label)}" if args.label else ""
    say(
        f"explain it with\n  xaifast explain --method xtrain --model {shlex.quote(f'xaifast:{out}')} "
        f"--data {shlex.quote(data.spec)}{label} --trajectory {shlex.quote(str(args.record))} --out DIR"
    )
    return 0


def _every(text: str) -> str | int:
    return text if text == "epoch" else positive(text)
