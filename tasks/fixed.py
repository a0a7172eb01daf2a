"""Tasks that are given as they are: a single problem, or a fixed set of them."""

from __future__ import annotations

from collections.abc import Sequence

from metadist.draws import in_parts
from metadist.metrics import mean_over
from metadist.problem import Problem
from metadist.task import Batch, Task, to_device
from metadist.tasks.data.sets import Data, batch_of
from metadist.trees import Params


class FixedTasks:
    """A sampler of the given tasks: every outer step has all of them, with kept states.

        Trainer(problem, FixedTasks([task]), algorithm)

    Indices beyond the last task begin again with the first.

    Args:
        tasks: The tasks, at least one; their ids are set to their positions.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = [] if isinstance(tasks, Task) else list(tasks)
        if isinstance(tasks, Task) or not all(isinstance(task, Task) for task in self.tasks):
            raise ValueError(
                f"tasks must be a list of tasks, got {type(tasks).__name__} of other things: "
                "FixedTasks([Task(support, query, 0)])"
            )
        if not self.tasks:
            raise ValueError("tasks must hold at least one task, got none")

    def sample(self, index: int) -> Task:
        """The task at `index`, modulo their number."""
        return self.tasks[index % len(self.tasks)]._replace(id=index)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.tasks)

    def __repr__(self) -> str:
        return f"FixedTasks({self.num_tasks} tasks)"


class OneTask:
    """A sampler of one task, the same at every index; its id is the index.

        OneTask((x, y), (x_val, y_val), test=(x_test, y_test))

    Each set is a `Batch`; tensors or arrays (inputs, targets), or a mapping of them by name; a
    map-style data set of (input, target); or a DataLoader of one, whose data set is read once.
    All of it is copied into memory, and travels to workers. Sets with names are brought into the
    order of the support set. Targets that are integers or booleans become int64.

    Args:
        support: Training data.
        query: Validation data.
        test: Data on which `solution_metrics` judges a solution; None: it has no metrics.

    Raises:
        ValueError: A set of another kind, an iterable or empty one, examples of several shapes, or
            other names than those of the support set.
    """

    num_tasks = 1

    def __init__(self, support: Data, query: Data, test: Data | None = None) -> None:
        self.support = _own(support, "support")
        self.query = _named_as(self.support, query, "query")
        self.test_set = None if test is None else _named_as(self.support, test, "test")

    def sample(self, index: int) -> Task:
        """The task."""
        return Task(self.support, self.query, index)

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """`test_loss` and `test_` metrics of the problem; empty without test data."""
        if self.test_set is None:
            return {}
        return metrics_on(problem, outer, inner, self.test_set)


def _own(data: Data, field: str) -> Batch:
    """A copy of all examples, which nobody else can change."""
    batch = batch_of(data, field)
    if not len(batch.index):
        raise ValueError(f"{field} must hold an example, got none: check how the set was selected")
    return batch.map(lambda tensor: tensor.detach().clone())


def _named_as(support: Batch, data: Data, field: str) -> Batch:
    """A copy of all examples, whose tensors are in the order of the names of `support`."""
    batch = _own(data, field)
    if isinstance(data, Batch) and not batch.names:
        return batch  # of a problem with examples of two kinds
    if support.names.keys() != batch.names.keys():
        wanted, got = (", ".join(names) or "no names" for names in (support.names, batch.names))
        raise ValueError(
            f"{field} must have the names of support ({wanted}), got {got}: rename its tensors"
        )
    if not batch.names:
        return batch
    return batch._replace(tensors=batch.fields(*support.names), names=support.names)


AT_ONCE = 1000
"""The most examples of which test metrics are computed together."""


def metrics_on(
    problem: Problem, outer: Params, inner: Params, examples: Batch, part: str = "test"
) -> dict[str, float]:
    """`PART_loss` and, for each metric of the problem, `PART_METRIC` of `inner` on `examples`.

    `outer` is the context; the data is brought to the device and precision of `inner`.
    """
    like = next(iter(inner.values()))
    batch = to_device(Task(examples, examples, 0), like.device, like.dtype).query
    metrics = mean_over(
        in_parts(Task(batch, batch, 0), "query", AT_ONCE, 0),
        lambda some: {
            **problem.metrics(outer, inner, some),
            "loss": problem.outer_loss(outer, inner, some),
        },
    )
    return {f"{part}_{name}": float(value) for name, value in metrics.items()}
