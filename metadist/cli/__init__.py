"""`metadist train | submit | resume | evaluate | inspect | status | compare | ...`.

The one package that knows all layers. Everything that is trained is named by class path and built
by jsonargparse from YAML and flags; the config is kept in the run folder.

Exit codes: 0 done; 1 the run or the check failed; 2 the input was refused, nothing was started;
130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint written.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from metadist import __version__
from metadist.cli.checking import check, check_parser
from metadist.cli.comparing import compare, compare_parser
from metadist.cli.fetching import data, data_parser
from metadist.cli.listing import list_names, list_parser
from metadist.cli.names import NAMES, expand_names
from metadist.cli.runs import (
    evaluate_parser,
    evaluate_run,
    inspect_parser,
    inspect_run,
    resume,
    resume_parser,
    show_status,
    status_parser,
)
from metadist.cli.submission import submit, submit_parser
from metadist.cli.training import train, train_parser
from metadist.cli.tuning import tune, tune_parser
from metadist.cluster import ClusterError
from metadist.trainer import TrainingDiverged

__all__ = ["COMMANDS", "NAMES", "main", "train_parser"]


COMMANDS: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
    "train": (train_parser, train),
    "resume": (resume_parser, resume),
    "evaluate": (evaluate_parser, evaluate_run),
    "inspect": (inspect_parser, inspect_run),
    "status": (status_parser, show_status),
    "compare": (compare_parser, compare),
    "tune": (tune_parser, tune),
    "data": (data_parser, data),
    "check-hypergradient": (check_parser, check),
    "submit": (submit_parser, submit),
    "list": (list_parser, list_names),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one call of the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Users' modules beside their script or in the folder they are in, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    top = argparse.ArgumentParser(
        prog="metadist",
        description="Distributed meta-learning and bilevel optimisation.",
        epilog="`metadist COMMAND --help` tells the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"metadist {__version__}")
    top.add_argument("command", choices=list(COMMANDS), help="what to do")
    command = top.parse_args(arguments[:1]).command
    make_parser, run = COMMANDS[command]
    config = make_parser().parse_args(expand_names(arguments[1:]))
    try:
        with _terminate_as_interrupt() as stopped_by:
            try:
                return run(config)
            except KeyboardInterrupt:
                return 128 + stopped_by()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"metadist {command}: error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, ClusterError, FloatingPointError) as error:
        print(f"metadist {command}: failed: {error}", file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001  # the last place; the user sees all of it
        traceback.print_exc()
        return 1


@contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], int]]:
    """SIGTERM stops a run as Ctrl-C does; gives the number of the signal that came."""
    received = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield lambda: int(received)
    finally:
        signal.signal(signal.SIGTERM, before)
