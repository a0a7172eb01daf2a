"""Tasks: what a sampler gives and an algorithm adapts to.

A class with a method `sample` is a sampler (`TaskSampler`). What else a sampler may offer is
declared below, one protocol for each member; the code asks for it with `isinstance`:

    FixedSet       num_tasks         every step of the Trainer has these tasks and keeps states
    Shardable      shard             workers read their part of a task without the rest of it
    Labelled       num_classes       the last tensor of a batch may be labels
    NamedClasses   class_names       two splits can be checked for a class that is in both
    Measured       solution_metrics  solutions are also judged on data that only the sampler has

Shape letters: S support examples, Q query examples, B tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metadist.trees import Params

if TYPE_CHECKING:
    from metadist.problem import Problem


class Batch(NamedTuple):
    """Examples of one set of one task.

    Args:
        tensors: Inputs, targets, ...; the leading axis of each is the example.
        index: int64, shape (examples,): positions in the full support or query set, so that
            per-example outer variables (sample weights) and per-example context (features)
            can be sliced.
    """

    tensors: tuple[Tensor, ...]
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing here needs

    @classmethod
    def of(cls, *tensors: Tensor) -> Batch:
        """A whole set, with `index = 0 .. examples-1`."""
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(
                "tensors of a batch must have one length along axis 0, got "
                f"{[tuple(tensor.shape) for tensor in tensors]}"
            )
        return cls(tensors, torch.arange(sizes.pop(), device=tensors[0].device))

    def take(self, positions: Tensor) -> Batch:
        """The examples at `positions` (int64, shape (n,)) of this batch."""
        return Batch(tuple(tensor[positions] for tensor in self.tensors), self.index[positions])


class Task(NamedTuple):
    """One task: adapt on `support`, be judged on `query`.

    `id` is the index it was sampled with: an int, or int64 of shape (B,) in a stack of tasks.
    """

    support: Batch
    query: Batch
    id: int | Tensor


@runtime_checkable
class TaskSampler(Protocol):
    """A pure function of an integer; the whole contract of a task source.

    `sample(index)` must give the same task for the same index in every process: seed all
    randomness with (your seed, your split, index). Then the state of sampling is one integer,
    any worker can draw any task, a lost task is drawn again identically, and resuming is exact.
    `metadist.tasks.check_sampler` tests a sampler for all of that.
    """

    def sample(self, index: int) -> Task:
        """The task number `index`, index >= 0."""
        ...


@runtime_checkable
class FixedSet(TaskSampler, Protocol):
    """A sampler of a fixed set of tasks, which have the indices 0 .. num_tasks-1."""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        ...


@runtime_checkable
class Shardable(TaskSampler, Protocol):
    """A sampler that can give a part of a task without reading all its data."""

    def shard(self, index: int, part: int, num_parts: int) -> Task:
        """Shard `part` of `num_parts` of a task; `Batch.index` are positions in the full sets."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A sampler whose last tensor of a batch, where it is int64 of shape (n,), holds classes."""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        ...


@runtime_checkable
class NamedClasses(Protocol):
    """A sampler that names the classes it draws from."""

    @property
    def class_names(self) -> Iterable[str]:
        """The name of each class, the same in every split."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A sampler that can judge solutions of its task 0, for example on test data."""

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Metrics of the solution (outer, inner) by name."""
        ...


def to_device(task: Task, device: torch.device | str, dtype: torch.dtype | None = None) -> Task:
    """The task on `device`; floating tensors also cast to `dtype` if one is given."""

    def move(tensor: Tensor) -> Tensor:
        if dtype is not None and tensor.is_floating_point():
            return tensor.to(device=device, dtype=dtype)
        return tensor.to(device=device)

    def move_batch(batch: Batch) -> Batch:
        return Batch(tuple(map(move, batch.tensors)), batch.index.to(device))

    return Task(move_batch(task.support), move_batch(task.query), task.id)


def shape_signature(task: Task) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors: tasks with equal signatures can be stacked."""
    return tuple(tuple(t.shape) for t in (*task.support.tensors, *task.query.tensors))


def stack_tasks(tasks: list[Task]) -> Task:
    """One Task whose tensors have a new leading axis B; all must have the same shapes."""
    signatures = {shape_signature(task) for task in tasks}
    if len(signatures) != 1:
        raise ValueError(
            f"tasks of one stack must have equal shapes, got {sorted(signatures)}: "
            "use vectorize=False for tasks of unequal size"
        )

    def stack(batches: list[Batch]) -> Batch:
        columns = zip(*(batch.tensors for batch in batches), strict=True)
        return Batch(
            tuple(torch.stack(column) for column in columns),
            torch.stack([batch.index for batch in batches]),
        )

    device = tasks[0].support.index.device
    return Task(
        stack([task.support for task in tasks]),
        stack([task.query for task in tasks]),
        torch.tensor([int(task.id) for task in tasks], device=device),
    )
