"""`EventLog`: one line for every event of a run that matters, in the run folder and the log."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metadist.executor import StepReport
from metadist.run.processes import this_process

log = logging.getLogger("metadist.run")
# Configure logging to see these lines; on the terminal a failure shows as its exception.
log.addHandler(logging.NullHandler())

USUAL = (
    *("run_started", "run_finished", "lease_reissued", "worker_moved", "states_held"),
    "checkpoint_written",
)
"""Events at the level INFO of the log; that of run_failed is ERROR, of the others WARNING."""


class EventLog:
    """Appends events to a file of JSON lines, and to the logger `metadist.run`.

    Each has `time` (UTC), `event`, `step` (outer steps taken) and what belongs to it:

        run_started            until_step, what `Executor.describe` returns, and of the process
                               host, boot, pid and started; software: what it runs on
        run_finished
        run_interrupted        by Ctrl-C or SIGTERM
        run_failed             error
        worker_lost            num_lost, num_workers (alive now)
        worker_moved           worker, node, which Ray announced to stop; it is started elsewhere
        states_held            workers, each with the tasks whose states it holds from now on
        node_draining          the node of x or of the driver will stop; a checkpoint is written
        server_recovered       num_lost; x went back to an earlier state where it had to
        lease_reissued         leases
        contribution_repeated  leases, which were in x before and are not added again
        lease_slow             leases, worker, seconds, median_s; it takes ten times the median
        user_error             errors; the same lease was tried again after each
        task_dropped           tasks, whose hypergradient was not finite
        validation_dropped     metrics: which tasks are in no mean, or not in that of a metric
        validation_failed      error; the losses were finite in less than two tasks
        checkpoint_written     checkpoint, score
        checkpoint_skipped     checkpoint, reason
        logger_failed          logger, error; its rows are missing from here to a checkpoint
        branch_abandoned       checkpoints, where they are now

    Records of the logger carry the object as their attribute `run_event`.

    Args:
        path: The file; what it holds stays. None: only the logger gets them.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._has_failed = False
        self._alone = threading.Lock()  # threads write too: of the watchdog, of checkpoints
        self.step = 0
        """The outer steps taken, as the next event states them."""

    def write(self, event: str, **fields: Any) -> None:
        """Add one event; a `step` among the fields takes the place of this object's."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "step": self.step}
        line |= {name: _finite(value) for name, value in fields.items()}
        text = json.dumps(line)
        level = logging.INFO if event in USUAL else logging.WARNING
        level = logging.ERROR if event == "run_failed" else level
        log.log(level, "%s", text, extra={"run_event": line})
        if self._path is None:
            return
        try:
            with self._alone:
                _append(self._path, text)
        except OSError as error:
            # A full disk must not stop the training that the line is about.
            if not self._has_failed:
                log.warning("cannot write to %s, lines are missing: %s", self._path, error)
            self._has_failed = True

    def report(self, report: StepReport) -> None:
        """Add what happened during an outer step."""
        self.step = report.step.version
        if report.lost_workers:
            self.write("worker_lost", num_lost=report.lost_workers, num_workers=report.num_workers)
        if report.lost_servers:
            self.write("server_recovered", num_lost=report.lost_servers)
        if report.is_draining:
            self.write("node_draining")
        dropped = [task for result in report.results for task in result.dropped]
        for event, name, ids in (
            ("lease_reissued", "leases", report.reissued),
            ("contribution_repeated", "leases", report.step.repeated),
            ("user_error", "errors", report.retried),
            ("task_dropped", "tasks", dropped),
        ):
            if ids:
                self.write(event, **{name: list(ids)})

    def logger_failed(self, logger: object, error: Exception) -> None:
        """Add that a logger has failed."""
        error_text = f"{type(error).__name__}: {error}"
        self.write("logger_failed", logger=type(logger).__name__, error=error_text)

    @contextmanager
    def run(self, step: int, **fields: Any) -> Iterator[None]:
        """Within the block a run continues from `step`; adds its start and how it ended."""
        self.step = step
        self.write("run_started", **fields, **this_process())
        try:
            yield
        except KeyboardInterrupt:
            self.write("run_interrupted")
            raise
        except BaseException as error:
            self.write("run_failed", error=f"{type(error).__name__}: {error}")
            raise
        self.write("run_finished")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, text: str) -> None:
    with path.open("a+b") as stream:
        # A process that was killed may have left half a line.
        if stream.tell() and not _ends_line(stream):
            text = "\n" + text
        stream.write(text.encode() + b"\n")


def _ends_line(stream: Any) -> bool:
    stream.seek(-1, 2)
    return bool(stream.read(1) == b"\n")
