"""`Callback`: somebody's own code that watches a training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

from metadist.evaluation import EvaluationResult
from metadist.executor import StepReport


class EvaluationReport(NamedTuple):
    """One evaluation of a run.

    Args:
        split: "val" for a validation during training, "test" for the test at its end.
        step: The outer steps that x has taken.
        result: Its means, intervals and protocol.
    """

    split: str
    step: int
    result: EvaluationResult


class Callback:
    """Watches a training: derive from it, and give it to `Trainer(callbacks=[...])`.

    It is called in the process that drives the run, also on Ray, after each outer step and
    evaluation. It cannot change the run: mappings of a step are read-only, an evaluation is a copy.
    An exception in it ends the run as one in any other code does: with a checkpoint, and named
    after the callback, since whoever counts on it would rather not train without it. A step that
    comes again, because x was lost, is reported again. `Trainer.log` adds scalars of its own.
    """

    def on_step(self, report: StepReport) -> None:
        """An outer step was taken; `report.metrics` has its losses every `log_every` steps."""

    def on_evaluation(self, report: EvaluationReport) -> None:
        """A validation or a test is done."""


class CallbackError(RuntimeError):
    """A callback has raised an exception, which is its `__cause__`."""


def call_on_step(callbacks: Sequence[Callback], report: StepReport) -> None:
    """Call `on_step` of each."""
    if not callbacks:
        return
    results = [
        result._replace(
            metrics=MappingProxyType(dict(result.metrics)),
            calls=MappingProxyType(dict(result.calls)),
        )
        for result in report.results
    ]
    seen = report._replace(results=tuple(results))
    for callback in callbacks:
        with _named(callback, "on_step", report.step.version):
            callback.on_step(seen)


def call_on_evaluation(callbacks: Sequence[Callback], report: EvaluationReport) -> None:
    """Call `on_evaluation` of each."""
    for callback in callbacks:
        with _named(callback, "on_evaluation", report.step):
            callback.on_evaluation(report._replace(result=copy.deepcopy(report.result)))


@contextmanager
def _named(callback: Callback, method: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallbackError(
            f"callback {type(callback).__name__}.{method} must not raise, got at step {step} "
            f"{type(error).__name__}: {error}"
        ) from error
