"""`Fitting`: the counters of one call of `Trainer.fit`, and the end of a training that diverges."""

from __future__ import annotations

from collections import Counter

from metadist.executor import StepReport
from metadist.loggers.base import Logger
from metadist.loggers.tensor_board import TensorBoardLogger
from metadist.run.events import EventLog
from metadist.run.monitor import calls_of
from metadist.run.progress import TerminalProgress

TASKS, DROPPED = "tasks", "dropped"  # beside the names of oracle calls


class TrainingDiverged(RuntimeError):
    """Too many tasks in a row had no finite hypergradient."""


class Fitting:
    """One call of `Trainer.fit`: what it shows on the terminal, and its counters."""

    def __init__(self, num_steps: int, log_every: int, quiet: bool, events: EventLog) -> None:
        self.progress = TerminalProgress(num_steps, log_every, quiet)
        self._settled: Counter[str] = Counter()
        self._recent: dict[int, Counter[str]] = {}
        self._in_a_row: list[int] = []
        self._events = events

    def logger_failed(self, logger: Logger, error: Exception) -> None:
        """Say that training continues without a logger."""
        what = (
            "TensorBoard events"
            if isinstance(logger, TensorBoardLogger)
            else f"rows of {type(logger).__name__}"
        )
        self.progress.say(f"{what} are missing from here, training continues: {error}")
        self._events.logger_failed(logger, error)

    @property
    def num_tasks(self) -> int:
        """Tasks whose hypergradient went into the steps."""
        return self._total()[TASKS]

    @property
    def num_dropped(self) -> int:
        """Tasks left out because theirs was not finite."""
        return self._total()[DROPPED]

    @property
    def calls(self) -> dict[str, int]:
        """What the algorithm asked of the oracle, see `CountingOracle`."""
        return {name: n for name, n in self._total().items() if name not in (TASKS, DROPPED)}

    def _total(self) -> Counter[str]:
        return sum(self._recent.values(), self._settled)

    def settle(self) -> None:
        """Make final the counts so far: their steps will not be reported again."""
        self._settled, self._recent = self._total(), {}

    def count(self, report: StepReport, max_dropped: int) -> None:
        """Count an outer step; raises TrainingDiverged for so many dropped tasks in a row."""
        if report.step.version in self._recent:
            self._in_a_row = []  # the server was lost: repeated steps replace the first ones
        self._recent[report.step.version] = calls_of(report) + Counter(
            {
                TASKS: sum(result.num_tasks for result in report.results),
                DROPPED: sum(len(result.dropped) for result in report.results),
            }
        )
        for result in report.results:
            self._in_a_row = [*(() if result.num_tasks else self._in_a_row), *result.dropped]
        if len(self._in_a_row) >= max_dropped:
            raise TrainingDiverged(
                f"the last {len(self._in_a_row)} tasks in a row had no finite hypergradient (ids "
                f"{', '.join(map(str, self._in_a_row[:8]))} ...), max_dropped={max_dropped}: try a "
                "smaller inner_lr or outer lr, or clip_norm"
            )
