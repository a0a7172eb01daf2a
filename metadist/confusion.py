"""Which classes an evaluation has taken for which.

Counts travel among the metrics of a task, by names of their own: so whoever computes metrics
(a worker, a stack of tasks under vmap) needs to know nothing of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metadist.problem import HasModel, Problem
from metadist.sampler import NamesTasks, TaskSampler
from metadist.task import Task, targets_of
from metadist.trees import Params

COUNTED = "confusion/"
"""Before TRUE/PREDICTED: how many query examples of a task were that."""


def counts_of(problem: Problem, context: Params, inner: Params, task: Task) -> dict[str, Tensor]:
    """How many query examples of each class are taken for each; nothing but of classes."""
    targets = targets_of(task.query)
    if not isinstance(problem, HasModel) or targets is None or targets.is_floating_point():
        return {}
    with torch.no_grad():
        outputs = problem.predict(context, inner, task.query)
    if outputs.ndim != 2 or targets.ndim != 1:
        return {}
    classes = torch.arange(outputs.shape[1], device=targets.device)
    is_of = (targets[:, None] == classes).double()
    counts = is_of.T @ (outputs.argmax(1)[:, None] == classes).double()
    size = range(len(classes))
    return {
        f"{COUNTED}{true}/{predicted}": counts[true, predicted]
        for true in size
        for predicted in size
    }


def take_counts(of_task: dict[str, float]) -> dict[str, float]:
    """The counts of a task, which are taken out of its metrics."""
    names = [name for name in of_task if name.startswith(COUNTED)]
    return {name: of_task.pop(name) for name in names}


def confusion_of(
    sampler: TaskSampler, counts: list[dict[str, float]], diverged: list[int]
) -> dict[str, dict[str, int]]:
    """The sum of the counts of the tasks, by the names of their classes."""
    total: dict[str, dict[str, int]] = {}
    for index, of_task in enumerate(counts):
        if not of_task or index in diverged:
            continue
        names = sampler.classes_of(index) if isinstance(sampler, NamesTasks) else []
        for name, count in of_task.items():
            # A model may have more outputs than the task has classes.
            true, predicted = (
                names[int(part)] if int(part) < len(names) else part
                for part in name.removeprefix(COUNTED).split("/")
            )
            if count:
                row = total.setdefault(true, {})
                row[predicted] = row.get(predicted, 0) + int(count)
    return total
