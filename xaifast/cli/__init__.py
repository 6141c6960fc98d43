"""The ``xaifast`` command."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from types import FrameType

from .. import __version__
from ..run import StoreError
from . import bench, evaluate, explain, info, train

_EXPECTED = (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError, StoreError)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Default ``sys.argv[1:]``.

    Returns:
        Exit status: 0 done, 1 a check failed, 2 an error that the message explains, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="xaifast",
        description="Perturbation-based explanation of neural networks at the speed of the forward pass.",
    )
    parser.add_argument("--version", action="version", version=f"xaifast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (explain, evaluate, train, bench, info):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    args.arguments = sys.argv[1:] if arguments is None else arguments
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _Warn()
            return args.run(args)
    except KeyboardInterrupt:
        return 130
    except _EXPECTED as error:
        if getattr(args, "debug", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}\n(--debug shows where)", file=sys.stderr)
        if getattr(args, "debug", False):
            raise
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Warn:
    """Prints each warning once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: Warning, *_: object) -> None:
        if str(message) not in self._said:
            print(f"warning: {message}", file=sys.stderr)
        self._said.add(str(message))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
