"""What a run says on the terminal while it lasts."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metadist.executor import StepReport

WORTH_SAYING_S = 10.0
"""A run that takes less needs no estimate."""


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
        self._forecast = Forecast(num_steps)
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

    def step(self, report: StepReport) -> None:
        """Show one outer step."""
        self._latest.update(report.metrics)
        version = report.step.version
        if forecast := self._forecast.after(version, time.monotonic()):
            self.say(forecast)
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
            speed = f"workers {report.num_workers} {_per_second(report):.1f} tasks/s"
            parts = [f"step {version}/{self._num_steps}", shown, speed]
            self._console.print(" ".join(filter(None, parts)), highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()


def _per_second(report: StepReport) -> float:
    num_tasks = sum(result.num_tasks for result in report.results)
    return num_tasks / report.seconds if report.seconds > 0 else math.nan


class Forecast:
    """Says once how long a run will take, after three steps or more; the first is left out.

    Args:
        num_steps: The step at which the run ends.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None
        self._is_said = False

    def after(self, step: int, now: float) -> str | None:
        """What to say after a step at the time `now` in seconds; None: nothing, or it was said."""
        if self._first is None:  # the first has compilers and caches to wait for
            self._first = (step, now)
        began, since = self._first
        if self._is_said or step < began + 2:
            return None
        per_step = (now - since) / (step - began)
        remaining = self._num_steps - step
        if per_step * remaining < WORTH_SAYING_S:
            return None
        self._is_said = True
        return (
            f"{per_step:.2g} s a step: about {duration(per_step * remaining)} for the remaining "
            f"{remaining} steps, validation apart"
        )


def duration(seconds: float) -> str:
    """A duration in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
