"""One training on a budget, evaluated on the way; after an interruption it resumes exactly."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter
from typing import Any, NamedTuple

from metadist.executor import StepReport
from metadist.oracle import in_gradients
from metadist.run.checkpoint import CheckpointError, CheckpointStore, name_of
from metadist.run.files import CHECKPOINTS
from metadist.run.monitor import calls_of
from metadist.run.storage import Folder
from metadist.sampler import Stream, sample_task
from metadist.trainer import Trainer

RECORDS = "records.jsonl"
TRAINING = "run"
MAX_STEPS = 10**9
"""The number of steps of a training whose budget is not in steps."""
TRAFFIC = ("rounds", "bytes_sent", "bytes_received")
"""Names under which an executor may report the traffic of a step."""
REPORTED = "adjoint_residual"
"""The residual |H v - b| / |b| that implicit methods report; the solution does not show it."""


@dataclass(frozen=True)
class Budget:
    """The budget of a run; exactly one of the three.

    Args:
        seconds: Seconds of training, without drawing of tasks, evaluations and checkpoints.
        steps: Outer steps.
        calls: Calls of the oracle, in gradients on whole sets, see `in_gradients`.
    """

    seconds: float | None = None
    steps: int | None = None
    calls: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "budget must have exactly one of seconds, steps and calls, got "
                f"{', '.join(given) or 'none'}"
            )
        ((name, value),) = given.items()
        kinds = int if name == "steps" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            what = "an integer" if name == "steps" else "a number"
            raise ValueError(f"budget.{name} must be {what} > 0, got {value!r}")

    @classmethod
    def of(cls, tree: Any) -> Budget:
        """The budget that a mapping describes, as in `{seconds: 60}`."""
        names = [field.name for field in fields(cls)]
        if not isinstance(tree, Mapping) or not set(tree) <= set(names):
            raise ValueError(
                f"budget must be a mapping with one of {', '.join(names)}, got {tree!r}"
            )
        return cls(**tree)

    def share(self, spent: Spent) -> float:
        """The share of the budget that is spent; 1 is all of it."""
        if self.steps is not None:
            return spent.step / self.steps
        if self.seconds is not None:
            return spent.seconds / self.seconds
        assert self.calls is not None
        return spent.gradients / self.calls


class Spent(NamedTuple):
    """The part of its budget that a run has spent so far.

    Args:
        step, seconds, gradients: As `steps`, `seconds` and `calls` of `Budget`.
        calls: Oracle calls by kind, see `CountingOracle`.
    """

    step: int = 0
    seconds: float = 0.0
    gradients: float = 0.0
    calls: Mapping[str, int] = {}  # never changed


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Args:
        spent: The budget spent until then.
        metrics: The metrics by name; NaN and infinite ones are kept.
        traffic: The traffic of an outer step that the executor last reported, see `TRAFFIC`.
    """

    spent: Spent
    metrics: dict[str, float]
    traffic: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON data; a metric that is not finite is a string, as in "nan"."""
        metrics = {
            name: value if math.isfinite(value) else str(value)
            for name, value in self.metrics.items()
        }
        return {**self.spent._asdict(), "metrics": metrics, "traffic": self.traffic}

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`."""
        metrics = {name: float(value) for name, value in tree["metrics"].items()}
        spent = Spent(**{name: tree[name] for name in Spent._fields})
        return cls(spent, metrics, dict(tree["traffic"]))


class Contender(NamedTuple):
    """A training and its metrics.

    Args:
        trainer: The trainer; its `run_dir` is the folder `TRAINING` of the run.
        metrics: Returns the metrics of the trainer's current x.
        last_metrics: Returns further metrics, for the end of the budget only.
    """

    trainer: Trainer
    metrics: Callable[[], dict[str, float]]
    last_metrics: Callable[[], dict[str, float]] = dict


def run_on_budget(
    make: Callable[[str], Contender],
    folder: Folder,
    budget: Budget,
    evaluations: int,
    metric: str = "query_loss",
) -> list[Record]:
    """The evaluations of a training on a budget; `folder` keeps them.

    A checkpoint is written with every evaluation. An interrupted run resumes exactly, from its last
    evaluation; a finished run is not touched.

    Args:
        make: Returns the contender with the given `run_dir`.
        folder: A folder for this run alone.
        budget: The budget of the training.
        evaluations: The number of evaluations, at equal parts of the budget; one more follows the
            first step.
        metric: The name of a metric that must exist.

    Raises:
        ValueError: there is no such metric; noticed at the first evaluation.
    """
    records = read_records(folder)
    if is_finished(records, budget):
        return records
    contender = make((folder / TRAINING).uri)
    trainer = contender.trainer
    records = _restore(trainer, folder, records)
    before = records[-1].spent if records else Spent()
    meter = _Meter(trainer, before)

    def on_step(report: StepReport) -> bool:
        spent = meter.add(report)
        if budget.calls is not None and not spent.gradients:
            raise ValueError(
                "budget must not be of calls with an executor that does not count them, got none "
                "after a step: give seconds or steps"
            )
        share = budget.share(spent)
        done = budget.share(records[-1].spent) if records else -1.0
        # 1e-9: in floating point 1 / 49 * 49 is less than 1.
        due, last = (math.floor(part * evaluations + 1e-9) for part in (share, done))
        # After a loss of the server the saved step is an earlier one, and this one is repeated.
        if (due > last or share >= 1) and trainer.save() == spent.step:
            metrics = {**contender.metrics(), **meter.reported}
            if metric not in metrics:
                raise ValueError(f"metric must be one of {', '.join(metrics)}, got {metric!r}")
            if share >= 1:
                metrics |= contender.last_metrics()
            records.append(Record(spent, metrics, dict(meter.traffic)))
            _write_records(folder, records)
            trainer.log(metrics, "evaluation")
            meter.forget_before(spent.step)
        meter.resume()
        return share < 1

    trainer.fit(budget.steps or MAX_STEPS, on_step)
    return records


def is_finished(records: list[Record], budget: Budget) -> bool:
    """Whether the last of the evaluations is at the end of the budget."""
    return bool(records) and budget.share(records[-1].spent) >= 1


def read_records(folder: Folder) -> list[Record]:
    """The evaluations of a run so far."""
    try:
        lines = folder.read(RECORDS, at_most=1 << 28).splitlines()
    except FileNotFoundError:
        return []
    return [Record.of(json.loads(line)) for line in lines]


def _write_records(folder: Folder, records: list[Record]) -> None:
    lines = [json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records]
    folder.write(RECORDS, "".join(lines).encode())


def _restore(trainer: Trainer, folder: Folder, records: list[Record]) -> list[Record]:
    """Restore the newest evaluated step with a good checkpoint; the evaluations up to it."""
    store = CheckpointStore((folder / TRAINING / CHECKPOINTS).uri)
    names = store.names()
    for number, record in reversed(list(enumerate(records))):
        name = name_of(record.spent.step)
        if name in names:
            try:
                trainer.restore(name)
            except CheckpointError:
                continue
            store.remove_newer(record.spent.step)  # steps that the run will take again
            return records[: number + 1]
    folder.remove(TRAINING)  # steps without an evaluation cannot be counted: start again
    return []


class _Meter:
    """Adds up what a training spends, step by step."""

    def __init__(self, trainer: Trainer, spent: Spent) -> None:
        self._sampler = trainer.sampler
        self._batch_sizes = trainer.workload.compute.batch_sizes
        self._shares = self._shares_at(0)
        self._spent = {spent.step: spent}
        self._resumed: float | None = None
        self.traffic: dict[str, float] = {}
        self.reported: dict[str, float] = {}

    def _shares_at(self, step: int) -> list[float]:
        """As what share of a gradient on whole sets a call on a mini-batch counts."""
        if self._batch_sizes == (None, None):
            return [1.0, 1.0]
        sets = sample_task(self._sampler, 0, step)[:2]
        return [
            1.0 if size is None else min(1.0, size / len(batch.index))
            for size, batch in zip(self._batch_sizes, sets, strict=True)
        ]

    def add(self, report: StepReport) -> Spent:
        """The budget spent after this step; a step that is repeated replaces itself."""
        calls = calls_of(report)
        sampling: dict[str, float] = defaultdict(float)
        for result in report.results:
            sampling[result.worker] += result.sampling_s
            for name in TRAFFIC:
                if name in result.metrics:
                    self.traffic[name] = result.metrics[name] / max(1, result.num_tasks)
        residuals = [r.metrics[REPORTED] for r in report.results if REPORTED in r.metrics]
        num_tasks = max(1, sum(result.num_tasks for result in report.results))
        self.reported = {REPORTED: sum(residuals) / num_tasks} if residuals else {}
        seconds = report.seconds
        if self._resumed is not None:
            # The executor measures from step to step, an evaluation between them included.
            seconds = min(seconds, perf_counter() - self._resumed)
        # Workers draw their tasks at the same time, so the slowest of them counts.
        training_s = max(0.0, seconds - max(sampling.values(), default=0.0))
        before = self._spent[report.step.version - 1]
        if isinstance(self._sampler, Stream):
            self._shares = self._shares_at(before.step)
        spent = Spent(
            step=report.step.version,
            seconds=before.seconds + training_s,
            gradients=before.gradients + in_gradients(calls, *self._shares),
            calls=dict(calls + Counter(before.calls)),
        )
        self._spent[spent.step] = spent
        return spent

    def forget_before(self, step: int) -> None:
        """Forget the steps before this one, which is saved: none of them can be repeated."""
        self._spent = {number: spent for number, spent in self._spent.items() if number >= step}

    def resume(self) -> None:
        """Training continues now: the time until here was spent on an evaluation."""
        self._resumed = perf_counter()
