"""How a run reports while it lasts: TensorBoard events, and progress on the terminal."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from metadist.evaluation import EvaluationResult
from metadist.executor import StepReport
from metadist.task import Task

log = logging.getLogger("metadist.run.monitor")

MAX_IMAGES = 64
"""The largest number of images of a set that are shown."""


class Curves:
    """A TensorBoard writer whose failures do not end a run: they are reported once.

    After a failure (a full disk, a removed folder) the events until the next `flush` are missing;
    there a new file is begun.

    Args:
        folder: Where the event files go.
        version: Events of later steps, left by an interrupted run, are hidden.
        report: Called with the first failure.
    """

    def __init__(
        self, folder: Path, version: int, report: Callable[[OSError], None] | None = None
    ) -> None:
        self._folder = folder
        self._report = report or (lambda error: log.warning("curves are missing: %s", error))
        self._has_failed = False
        self._writer: Any = None
        self._open(version)

    def write(self, name: str, *arguments: Any) -> None:
        """Call the method `name` of the SummaryWriter."""
        if self._writer is not None:
            with self._tolerant():
                getattr(self._writer, name)(*arguments)

    def event(self, name: str, *arguments: Any) -> None:
        """Call the method `name` of the file writer."""
        if self._writer is not None:
            with self._tolerant():
                getattr(self._writer._get_file_writer(), name)(*arguments)

    def flush(self, version: int) -> None:
        """Have everything so far in the event file; begin another after a failure."""
        if self._writer is None:
            self._open(version)
        self.write("flush")

    def close(self) -> None:
        """Flush and close the event file."""
        self.write("close")

    def _open(self, version: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: no worker needs it

        with self._tolerant():
            # Often enough to watch a running experiment; the default is two minutes.
            self._writer = SummaryWriter(str(self._folder), purge_step=version + 1, flush_secs=5)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            broken, self._writer = self._writer, None
            with suppress(Exception):  # it writes what it has not written, in vain
                broken.close()
            if not self._has_failed:
                self._has_failed = True
                self._report(error)


class Monitor:
    """TensorBoard events of a run, written by the process that drives it.

    Args:
        folder: Where the event files go.
        version: Outer steps taken so far; events of later steps, left by an interrupted run, are
            hidden.
        report: Called with the first failure to write, after which training continues.
    """

    def __init__(
        self, folder: Path, version: int, report: Callable[[OSError], None] | None = None
    ) -> None:
        self._curves = Curves(folder, version, report)
        self._version = version
        self._staleness: list[int] = []
        self._since: Counter[str] = Counter()
        self._seconds = 0.0
        self._waiting_s = 0.0
        self._tasks = 0

    def start(self, settings: Mapping[str, Any], task: Task) -> None:
        """Write the settings, as text and as hyperparameters, and a sample task as images."""
        from torch.utils.tensorboard.summary import hparams

        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._curves.write("add_text", "settings", f"| | |\n|---|---|\n{rows}", 0)
        simple = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
        # As add_hparams does it, but in this run's own folder rather than in a new one below.
        for summary in hparams(simple, {"test/query_accuracy": 0.0, "val/query_accuracy": 0.0}):
            self._curves.event("add_summary", summary)
        self.task(task)
        self._curves.flush(self._version)

    def task(self, task: Task) -> None:
        """Write the support and the query set of a task as pictures, if they are images."""
        for name, batch in (("support", task.support), ("query", task.query)):
            images = batch.tensors[0]
            if images.ndim == 4 and images.shape[1] in (1, 3):
                self._curves.write("add_image", f"task/{name}", _grid(images), 0)

    def step(self, report: StepReport) -> dict[str, float]:
        """Write one outer step; returns the means of its reported metrics (may be empty).

        A step that comes again, because the server was lost, hides those from it on.
        """
        step = report.step
        if step.version <= self._version:
            self._hide_from(step.version)
        self._version = step.version
        self._staleness += step.staleness
        self._seconds += report.seconds
        self._waiting_s += report.waiting_s
        for result in report.results:
            self._since[result.worker] += result.num_tasks
            self._tasks += result.num_tasks
        means = mean_metrics(report)
        scalars = {"outer/hypergradient_norm": step.hypergradient_norm, "outer/lr": step.lr}
        losses = {
            "tasks/dropped": sum(len(result.dropped) for result in report.results),
            "cluster/lost_workers": report.lost_workers,
            "cluster/lost_servers": report.lost_servers,
            "cluster/reissued_leases": len(report.reissued),
            "cluster/user_errors": len(report.retried),
        }
        scalars |= {name: count for name, count in losses.items() if count}
        scalars |= {f"train/{name}": value for name, value in means.items()}
        if means:
            scalars |= {f"oracle/{name}": count for name, count in calls_of(report).items()}
            scalars |= self._rates(report.num_workers)
            staleness = torch.tensor(self._staleness or [0])
            self._curves.write("add_histogram", "cluster/staleness", staleness, step.version)
            scalars["cluster/staleness_mean"] = float(staleness.double().mean())
            self._staleness.clear()
        for name, value in scalars.items():
            self._curves.write("add_scalar", name, value, step.version)
        return means

    def _hide_from(self, version: int) -> None:
        """Have TensorBoard forget the events of that step and of later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._curves.event("add_event", Event(session_log=start), version)
        self._staleness.clear()

    def _rates(self, num_workers: int) -> dict[str, float]:
        """Speeds since they were last asked for."""
        seconds = max(self._seconds, 1e-9)
        rates = {
            "tasks_per_second/all": self._tasks / seconds,
            "cluster/waiting_share": self._waiting_s / (seconds * max(num_workers, 1)),
            "cluster/workers": float(num_workers),
        }
        for worker, num_tasks in self._since.items():
            rates[f"tasks_per_second/{worker}"] = num_tasks / seconds
        self._since.clear()
        self._seconds = self._waiting_s = 0.0
        self._tasks = 0
        return rates

    def evaluation(self, split: str, result: EvaluationResult, version: int) -> None:
        """Write the means and interval half widths of an evaluation."""
        for name, interval in result.metrics.items():
            self._curves.write("add_scalar", f"{split}/{name}", interval.mean, version)
            self._curves.write(
                "add_scalar", f"{split}/{name}_half_width", interval.half_width, version
            )
        if result.dropped:
            self._curves.write("add_scalar", f"{split}/num_dropped", result.num_dropped, version)
        self._curves.flush(self._version)

    def flush(self) -> None:
        """Have everything so far in the event file."""
        self._curves.flush(self._version)

    def close(self) -> None:
        """Flush and close the event file."""
        self._curves.close()


class TerminalProgress:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        num_steps: The version of x at which training ends.
        lines_every: Outer steps between plain lines.
        quiet: Say nothing.
    """

    def __init__(self, num_steps: int, lines_every: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, soft_wrap=True, quiet=quiet)
        self._lines_every = lines_every
        self._num_steps = num_steps
        self._latest: dict[str, float] = {}
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=num_steps)
            self._bar.start()

    def step(self, report: StepReport, means: Mapping[str, float]) -> None:
        """Show one outer step."""
        self._latest.update(means)
        version = report.step.version
        shown = " ".join(
            f"{label} {self._latest[name]:.3f}"
            for label, name in (
                ("loss", "query_loss"),
                ("accuracy before", "query_accuracy_before"),
                ("after", "query_accuracy"),
            )
            if name in self._latest
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=version, description=shown)
        elif version % self._lines_every == 0 or version == self._num_steps:
            self._console.print(
                f"step {version}/{self._num_steps} {shown} "
                f"workers {report.num_workers} {_per_second(report):.1f} tasks/s",
                highlight=False,
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()


def mean_metrics(report: StepReport) -> dict[str, float]:
    """Means over tasks of what the leases of a step report; empty if they report nothing."""
    sums: dict[str, float] = defaultdict(float)
    num_tasks = 0
    for result in report.results:
        if result.metrics:
            num_tasks += result.num_tasks
            for name, value in result.metrics.items():
                sums[name] += value
    return {name: value / num_tasks for name, value in sums.items() if num_tasks}


def calls_of(report: StepReport) -> Counter[str]:
    """The oracle calls of the leases of a step, by name."""
    calls: Counter[str] = Counter()
    for result in report.results:
        calls.update(result.calls)
    return calls


def _per_second(report: StepReport) -> float:
    num_tasks = sum(result.num_tasks for result in report.results)
    return num_tasks / report.seconds if report.seconds > 0 else math.nan


def _grid(images_BCHW: Tensor) -> Tensor:
    """The images in rows, scaled to [0, 1], with a grey line around each."""
    images_BCHW = images_BCHW[:MAX_IMAGES].detach().float().cpu()
    num_images = len(images_BCHW)
    columns = min(10, num_images, max(1, round(math.sqrt(num_images) * 1.5)))
    rows = math.ceil(num_images / columns)
    low, high = images_BCHW.min(), images_BCHW.max()
    scaled = (images_BCHW - low) / (high - low).clamp(min=1e-5)
    blank = rows * columns - num_images
    tiles = functional.pad(scaled, (1, 0, 1, 0, 0, 0, 0, blank), value=0.5)
    image_CHW = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return functional.pad(image_CHW, (0, 1, 0, 1), value=0.5)
