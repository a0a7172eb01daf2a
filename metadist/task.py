"""Tasks: what a sampler gives and an algorithm adapts to.

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

Shape letters: S support examples, Q query examples, B tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from metadist.checks.values import require_integer
from metadist.trees import Params

if TYPE_CHECKING:
    from metadist.problem import Problem


class Batch(NamedTuple):
    """Examples of one set of one task.

    Two tensors without names are inputs and targets. What has more than these two is named,
    `Batch.named(inputs=x, mask=m, targets=y)`, and a problem asks for what it takes by name:

        inputs, mask, targets = batch.fields("inputs", "mask", "targets")

    Args:
        tensors: Inputs, targets, ...; the leading axis of each is the example.
        index: int64, shape (examples,): positions in the full support or query set, so that
            per-example outer variables (sample weights) and per-example context (features)
            can be sliced.
        names: The names of the tensors as keys, in order; none: they have no names.
    """

    tensors: tuple[Tensor, ...]
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing here needs
    # Keys of a dict, since torch.func takes a batch apart: a string would be a leaf without an
    # axis of tasks, and an empty tuple has no leaves.
    names: dict[str, tuple[()]] = {}  # noqa: RUF012  # a field of a tuple, which is never changed

    @classmethod
    def of(cls, *tensors: Tensor) -> Batch:
        """A whole set, with `index = 0 .. examples-1`."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.ndim:
                raise ValueError(
                    "tensors of a batch must be torch tensors with an axis of examples, got "
                    f"{'a scalar' if isinstance(tensor, Tensor) else type(tensor).__name__}: "
                    "convert it with torch.as_tensor, and give a scalar an axis with [None]"
                )
        if not tensors:
            raise ValueError("a batch must have at least one tensor, got none")
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(
                "tensors of a batch must have one length along axis 0, got "
                f"{[tuple(tensor.shape) for tensor in tensors]}"
            )
        return cls(tensors, torch.arange(sizes.pop(), device=tensors[0].device))

    @classmethod
    def named(cls, **tensors: Tensor) -> Batch:
        """A whole set whose tensors have names; the targets are called `targets`."""
        return cls.of(*tensors.values())._replace(names=dict.fromkeys(tensors, ()))

    def fields(self, *names: str) -> tuple[Tensor, ...]:
        """The tensors of these names; without names, the tensors in the order of this call.

        Raises:
            ValueError: The batch has other names, or another number of tensors without names:
                it would be a guess which is which.
        """
        if not self.names and len(self.tensors) == len(names):
            return self.tensors
        by_name = dict(zip(self.names, self.tensors, strict=False))
        if by_name.keys() == set(names):
            return tuple(by_name[name] for name in names)
        found = ", ".join(self.names) or f"{len(self.tensors)} without names"
        example = "=..., ".join(names)
        raise ValueError(
            f"the tensors of a batch must be {', '.join(names)}, got {found}: build it with "
            f"Batch.named({example}=...), or use a problem whose losses read the others"
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of `function` of each tensor; its index stays."""
        return self._replace(tensors=tuple(map(function, self.tensors)))

    def take(self, positions: Tensor) -> Batch:
        """The examples at `positions` (int64, shape (n,)) of this batch, on their device."""

        def rows(tensor: Tensor) -> Tensor:
            if tensor.device == positions.device:
                # Several times as fast as tensor[positions], which is written for any number of
                # indices.
                return tensor.index_select(0, positions)
            return tensor.index_select(0, positions.to(tensor.device)).to(positions.device)

        return self.map(rows)._replace(index=self.index.index_select(0, positions))


def targets_of(batch: Batch) -> Tensor | None:
    """The targets: those named so, or the second of two tensors; None if there are none.

    Raises:
        ValueError: More than two tensors without names.
    """
    if batch.names:
        return dict(zip(batch.names, batch.tensors, strict=True)).get("targets")
    if len(batch.tensors) > 2:
        raise ValueError(
            "the targets must be named in a batch of more than two tensors, got "
            f"{len(batch.tensors)} without names: build it with "
            "Batch.named(inputs=..., ..., targets=...)"
        )
    return batch.tensors[1] if len(batch.tensors) == 2 else None


_staying: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The tensors that stay in the memory of the host, of this process."""


def stay_on_host(tensor: Tensor) -> Tensor:
    """The tensor, which `to_device` leaves where it is: data too large for a GPU, or for memory.

    `Batch.take` brings the rows that it takes to the device. Tasks of such tensors are computed one
    by one, since a stack of them would be a copy.
    """
    _staying[tensor] = True
    return tensor


def stays_on_host(tensor: Tensor) -> bool:
    """Whether the tensor was marked by `stay_on_host`."""
    return tensor in _staying


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


def to_device(task: Task, device: torch.device | str, dtype: torch.dtype | None = None) -> Task:
    """The task on `device`; floating tensors also cast to `dtype` if one is given."""

    def move(tensor: Tensor) -> Tensor:
        if stays_on_host(tensor):
            return tensor
        if dtype is not None and tensor.is_floating_point():
            return tensor.to(device=device, dtype=dtype)
        return tensor.to(device=device)

    def move_batch(batch: Batch) -> Batch:
        return batch.map(move)._replace(index=batch.index.to(device))

    return Task(move_batch(task.support), move_batch(task.query), task.id)


class Packed(NamedTuple):
    """Tensors one after another in the bytes of one, which a GPU receives in one piece.

    Args:
        buffer: uint8, in pinned memory where a GPU is to read it.
        layout: Where each tensor begins, its dtype and its shape.
    """

    buffer: Tensor
    layout: list[tuple[int, torch.dtype, torch.Size]]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], pinned: bool = False) -> Packed:
        """A copy of these tensors of the CPU."""
        layout = []
        end = 0
        for tensor in tensors:
            layout.append((end, tensor.dtype, tensor.shape))
            # As far apart as torch's own allocations, for kernels that read aligned words.
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        # torch keeps pinned memory for the next time, when no copy from it is under way any more.
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for view, tensor in zip(_views(buffer, layout), tensors, strict=True):
            view.copy_(tensor)
        return cls(buffer, layout)

    def there(self, device: torch.device | str) -> list[Tensor]:
        """The tensors on `device`, after one copy, which is not waited for if it is pinned."""
        return _views(self.buffer.to(device, non_blocking=True), self.layout)


_ALIGNED = 512


def _views(buffer: Tensor, layout: list[tuple[int, torch.dtype, torch.Size]]) -> list[Tensor]:
    views = []
    for start, dtype, shape in layout:
        size = shape.numel() * dtype.itemsize
        views.append(buffer[start : start + size].view(dtype).view(shape))
    return views


def tensors_of(task: Task) -> tuple[Tensor, ...]:
    """Every tensor of a task: those of the support set and its index, then of the query set."""
    support, query = task.support, task.query
    return *support.tensors, support.index, *query.tensors, query.index


def with_tensors(task: Task, tensors: Sequence[Tensor]) -> Task:
    """The task with other tensors, in the order of `tensors_of`."""
    cut = len(task.support.tensors) + 1
    support = task.support._replace(tensors=tuple(tensors[: cut - 1]), index=tensors[cut - 1])
    query = task.query._replace(tensors=tuple(tensors[cut:-1]), index=tensors[-1])
    return Task(support, query, task.id)


def shape_signature(task: Task) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors: tasks with equal signatures can be stacked."""
    return tuple(tuple(t.shape) for t in (*task.support.tensors, *task.query.tensors))


def stack_tasks(tasks: list[Task]) -> Task:
    """One Task whose tensors have a new leading axis B; all must have the same shapes."""
    signatures = {shape_signature(task) for task in tasks}
    names = {(*task.support.names, *task.query.names) for task in tasks}
    if len(names) != 1:
        raise ValueError(f"tasks of one stack must have the same names, got {sorted(names)}")
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
            batches[0].names,
        )

    device = tasks[0].support.index.device
    ids = [int(task.id) for task in tasks]
    # Counted there where they can be: what is copied to a GPU is waited for.
    in_order = ids == list(range(ids[0], ids[0] + len(ids)))
    stacked_ids = (
        torch.arange(ids[0], ids[0] + len(ids), device=device)
        if in_order
        else torch.tensor(ids, device=device)
    )
    return Task(
        stack([task.support for task in tasks]),
        stack([task.query for task in tasks]),
        stacked_ids,
    )
