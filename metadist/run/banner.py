"""What a run says of itself before its first step, and how long it will take."""

from __future__ import annotations

from collections.abc import Mapping

from metadist.algorithm import Algorithm
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, num_elements

WORTH_SAYING_S = 10.0
"""A run that takes less needs no estimate."""


def banner(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    inner: Params,
    task: Task,
    num_tasks: int,
    place: Mapping[str, str],
) -> list[str]:
    """Two lines: what is trained by which method, and what each step is computed from and where.

    Args:
        problem: What is trained.
        algorithm: By which method.
        outer: x, for its size.
        inner: y at the start of adaptation, for its size.
        task: A task, for the shapes of its sets.
        num_tasks: Tasks of an outer step.
        place: What the executor says of itself, see `Executor.describe`.
    """
    model = problem.describe().get("model")
    what = type(problem).__name__ + (f" of {model}" if model else "")
    tasks = "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
    sets = f"support {_shape(task.support)}, query {_shape(task.query)}"
    return [
        f"{what}, by {type(algorithm).__name__}: {num_elements(outer):,} numbers in x, "
        f"{num_elements(inner):,} in y",
        f"{tasks} a step on {place.get('device', 'cpu')}: {sets}",
    ]


def _shape(batch: Batch) -> str:
    """The number of examples, and the shape of the inputs of each."""
    if not batch.tensors:
        return f"{len(batch.index)} examples"
    each = "x".join(map(str, batch.tensors[0].shape[1:]))
    return f"{len(batch.index)} examples" + (f" of {each}" if each else "")


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
