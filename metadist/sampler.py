"""`TaskSampler`: the whole contract of a source of tasks, and what else a source may offer.

A class with a method `sample` is a sampler (`TaskSampler`). What else a sampler may offer is
declared below, one protocol for each member; the code asks for it with `isinstance`:

    FixedSet       num_tasks         every step of the Trainer has these tasks and keeps states
    Repeatable     repeats           a step may have each of these tasks several times
    Stream         sample_at         the data of a task changes from outer step to outer step
    EndingStream   num_steps         it does so for that many outer steps, and then it ends
    Shardable      shard             workers read their part of a task without the rest of it
    Resident       tables, ...       a GPU keeps the data, and is sent what each task takes of it
    Labelled       num_classes       the targets of a batch are the numbers of classes
    NamedClasses   class_names       two splits can be checked for a class that is in both
    NamesTasks     classes_of        predictions can be counted by the classes of each task
    ReadsImages    read_images       image files can be predicted, `metadist predict`
    Measured       solution_metrics  solutions are also judged on data that only the sampler has
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from metadist.checks.values import require_integer
from metadist.task import Task
from metadist.trees import Params

if TYPE_CHECKING:
    from metadist.problem import Problem


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
class Repeatable(FixedSet, Protocol):
    """A fixed set whose tasks an outer step may have several times, with other draws each time."""

    @property
    def repeats(self) -> bool:
        """Whether `meta_batch_size` may be a multiple of `num_tasks`."""
        ...


@runtime_checkable
class Stream(TaskSampler, Protocol):
    """A sampler whose tasks have other data at other outer steps; `sample` is that of step 0.

    The outer step is the number of steps that x has taken: a lease has the data of the version of
    x that it is computed at, which under an asynchronous policy several leases may share, and which
    is a later one where a lost lease is handed out again. Validation, test and metrics have the
    step that x has taken last.
    """

    def sample_at(self, index: int, step: int) -> Task:
        """The task number `index` at the outer step `step` >= 0: a pure function of both.

        What went before, such as a memory of examples, is computed from `step` too.
        """
        ...


@runtime_checkable
class EndingStream(Stream, Protocol):
    """A stream that has data for the outer steps 0 .. num_steps-1 only."""

    @property
    def num_steps(self) -> int:
        """How many outer steps there are; `Trainer.fit` refuses more."""
        ...


@runtime_checkable
class Shardable(TaskSampler, Protocol):
    """A sampler that can give a part of a task without reading all its data."""

    def shard(self, index: int, part: int, num_parts: int) -> Task:
        """Shard `part` of `num_parts` of a task; `Batch.index` are positions in the full sets."""
        ...


@runtime_checkable
class Resident(TaskSampler, Protocol):
    """A sampler whose data can stay on a GPU, where tasks are cut from it.

    `sample(index)` remains the truth: `cut(tables, rows(index), index)` has its bytes, on every
    device. So `cut` may copy and look up numbers, and computes nothing that a GPU rounds
    differently (a product, a division). See `metadist.feed.Feed`; `check_sampler` checks it.
    """

    @property
    def table_bytes(self) -> int:
        """The size of the tables, without making them; 0: this sampler has none."""
        ...

    def tables(self) -> tuple[Tensor, ...]:
        """The data that all tasks are cut from, on the CPU; the same at every call."""
        ...

    def rows(self, index: int) -> Tensor:
        """What the task number `index` takes of the tables: int64, drawn on the CPU."""
        ...

    def cut(self, tables: tuple[Tensor, ...], rows: Tensor, index: int) -> Task:
        """The task number `index` on the device of `tables` and `rows`."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A sampler whose targets, where they are int64 of shape (n,), are the numbers of classes."""

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
class NamesTasks(Protocol):
    """A sampler that names the classes of each of its tasks."""

    def classes_of(self, index: int) -> Sequence[str]:
        """The names of the classes 0 .. N-1 of a task."""
        ...


@runtime_checkable
class ReadsImages(Protocol):
    """A sampler of images that also reads files as it reads its own."""

    def read_images(self, files: Sequence[Path]) -> Tensor:
        """The inputs that a task has for these image files, float32 (n, C, H, W)."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A sampler that can judge solutions of its task 0, for example on test data."""

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Metrics of the solution (outer, inner) by name."""
        ...


def num_tasks_of(sampler: TaskSampler) -> int | None:
    """The number of tasks of a fixed set; None for any other sampler.

    Raises:
        ValueError: It is no integer >= 1.
    """
    return _count(sampler, "num_tasks") if isinstance(sampler, FixedSet) else None


def num_steps_of(sampler: TaskSampler) -> int | None:
    """The number of outer steps a stream has data for; None for any other sampler.

    Raises:
        ValueError: It is no integer >= 1.
    """
    return _count(sampler, "num_steps") if isinstance(sampler, EndingStream) else None


def _count(sampler: TaskSampler, field: str) -> int:
    name, value = f"{field} of {type(sampler).__name__}", getattr(sampler, field)
    if callable(value):
        raise ValueError(f"{name} must be an integer >= 1, got a method: make it a property")
    require_integer(name, value, 1)
    return int(value)


def last_step(version: int) -> int:
    """The outer step that was taken last where x has taken `version` steps, at the start the first.

    A `Stream` is asked for its data there in validation and test, and for metrics of a solution.
    """
    return max(version - 1, 0)


def require_steps(field: str, num_steps: int, sampler: TaskSampler) -> None:
    """Raise ValueError if a stream has data for fewer than `num_steps` outer steps."""
    limit = num_steps_of(sampler)
    if limit is not None and num_steps > limit:
        raise ValueError(
            f"{field} must be <= {limit}, the num_steps of {type(sampler).__name__}, got "
            f"{num_steps}: the stream has no data after that. Ask for fewer steps, or give it more"
        )


one_at_a_time = RLock()
"""Held while something is sampled: a sampler need not bear two threads (`metadist.feed`), nor need
two samplers that draw from the same global generator."""


def sample_task(sampler: TaskSampler, index: int, step: int = 0) -> Task:
    """The task number `index`; those of a fixed set begin again after the last.

    A stream gives its data at the outer step `step`.
    """

    def sample(index: int) -> Task:
        with one_at_a_time:
            if isinstance(sampler, Stream):
                return sampler.sample_at(index, step)
            return sampler.sample(index)

    num_tasks = num_tasks_of(sampler)
    if num_tasks is not None and index >= num_tasks:
        return sample(index % num_tasks)._replace(id=index)
    task = sample(index)
    # What is drawn for a task depends on its id, whose arithmetic must be that of Python.
    is_counted = isinstance(task, Task) and isinstance(task.id, np.integer)
    return task._replace(id=int(task.id)) if is_counted else task


def require_sampler(field: str, value: Any) -> None:
    """Raise ValueError, with a way out, unless `value` has a method `sample`."""
    if isinstance(value, type):
        name = value.__name__
        raise ValueError(f"{field} must be an object, got the class {name}: make one, {name}(...)")
    if callable(getattr(value, "sample", None)):
        return
    raise ValueError(
        f"{field} must have a method sample(index) -> Task, got {type(value).__name__} without "
        "one: for few-shot tasks of a labelled data set use FewShotDataset(dataset, splits), for "
        "one problem on all its data FixedTasks([Task(Batch.of(x, y), Batch.of(x_val, y_val), 0)])"
    )
