"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Mapping

from metadist.algorithm import Algorithm
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, num_elements


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
