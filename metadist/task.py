"""`Batch` and `Task`: what a sampler gives and an algorithm adapts to.

Shape letters: S support examples, Q query examples, B tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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
