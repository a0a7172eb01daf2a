"""The table of commands, and the exit code of a call."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from metadist import __version__
from metadist.cli.suggestions import one_of
from metadist.run.text import printable
from metadist.run.uris import check_no_secrets

COMMANDS = {
    "train": "Train on tasks; write checkpoints and curves; test.",
    "resume": "Continue a run from its newest good checkpoint.",
    "evaluate": "Adapt to tasks of another split and report the metrics.",
    "predict": "Adapt to images of classes, and say the class of others.",
    "export": "Adapt to one task, and write the model as plain torch.",
    "scores": "Write the learned weight of each source or example.",
    "inspect": "Show the checkpoints of a run and what one of them holds.",
    "status": "Show how a run stands, from its folder alone.",
    "report": "Write one HTML page about a run or a comparison.",
    "compare": "Train several methods on one problem, on equal budgets.",
    "tune": "Search for good hyperparameters with Ray Tune.",
    "data": "List the data sets, or download one of them.",
    "check-hypergradient": "Compare a hypergradient with exact derivatives.",
    "submit": "Run `metadist train` as a job of a Ray cluster.",
    "doctor": "Say what works of a machine, a cluster and a model.",
    "list": "List algorithms, problems, models, samplers, ... by name.",
}
"""One line of help for each command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one call of the command line."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command == "--version":
        print(f"metadist {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"metadist: error: {one_of('command', command, COMMANDS)}", file=sys.stderr)
        print("`metadist --help` says what each does", file=sys.stderr)
        return 2
    # Users' modules beside their script or in the folder they are in, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        check_no_secrets(rest)  # first of all, since many messages repeat arguments
    except ValueError as error:
        print(f"metadist {command}: error: {error}", file=sys.stderr)
        return 2
    module = import_module(f"metadist.cli.{command.replace('-', '_')}")
    config = module.parser().parse_args(rest)
    return _exit_code(command, lambda: module.run(config))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: metadist COMMAND [options]",
            "",
            "Distributed meta-learning and bilevel optimisation.",
            "",
            *lines,
            "",
            "`metadist COMMAND --help` shows the options of a command.",
        ]
    )


def _exit_code(command: str, run: Callable[[], int]) -> int:
    try:
        with _terminate_as_interrupt() as stopped_by:
            try:
                return run()
            except KeyboardInterrupt:
                return 128 + stopped_by()
            except SystemExit as error:
                if error.code in (0, None):
                    print(f"metadist {command}: failed: {_EXITED}", file=sys.stderr)
                    return 1
                raise
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"metadist {command}: error: {printable(error, lines=True)}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  # the last place; the user sees all of it
        if _is_failure(error):
            print(f"metadist {command}: failed: {printable(error, lines=True)}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


_EXITED = "somebody's code called sys.exit() before the work was done"


def _is_failure(error: Exception) -> bool:
    """Whether a message says all there is to say about it."""
    from metadist.cluster import ClusterError
    from metadist.run.fitting import TrainingDiverged

    return isinstance(error, (TrainingDiverged, ClusterError, FloatingPointError))


@contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], int]]:
    """Other signals stop a run as Ctrl-C does; gives the number of the one that came."""
    received: int = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        # Schedulers send SIGUSR1 some time before they stop a job.
        received = signal.SIGTERM if number == signal.SIGUSR1 else number
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        if signal.getsignal(number) is not signal.SIG_IGN  # as `nohup` has it for SIGHUP
    }
    try:
        yield lambda: int(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
