"""`Feed`: how the tasks of leases come to a GPU.

What a lease waits for is the copy of its tasks, and before it their sampling on the CPU. So data
that fits stays on the GPU, and the rest is sampled for the next lease while this one is computed.
On a CPU there is nothing to gain: a lease samples its tasks itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from metadist.task import (
    Packed,
    Resident,
    Stream,
    Task,
    TaskSampler,
    num_tasks_of,
    sample_task,
    tensors_of,
    to_device,
    with_tensors,
)

log = logging.getLogger("metadist.feed")


class Wanted(NamedTuple):
    """The tasks of a lease, at an outer step."""

    indices: tuple[int, ...]
    step: int


class Feed:
    """The tasks of one process, on its GPU.

    Three ways, each with the bytes of `sample_task`: the tasks of a fixed set are sent once and
    kept; a sampler that is `Resident` has its tables there, and a lease is sent the rows of all its
    tasks; any other tasks are packed into one buffer of pinned memory, which is sent.

    Args:
        sampler: The sampler.
        device: The GPU.
        dtype: That of x, which floating tensors are cast to.
        budget: The most bytes of data to keep there, see `Compute.data_budget`.
    """

    def __init__(
        self, sampler: TaskSampler, device: torch.device, dtype: torch.dtype, budget: int
    ) -> None:
        self._sampler = sampler
        self._device = device
        self._dtype = dtype
        self._pinned = device.type == "cuda"
        self._left = budget
        self._kept: dict[int, Task] = {}
        self._tables: tuple[Tensor, ...] = ()
        self._num_fixed = None if isinstance(sampler, Stream) else num_tasks_of(sampler)
        self._ahead: tuple[Wanted, Future[_Prepared]] | None = None
        self.next: Wanted | None = None
        """What is sampled ahead as soon as the tasks asked for are there; None: nothing."""
        name = type(sampler).__name__
        size = sampler.table_bytes if isinstance(sampler, Resident) else 0
        self.in_words = "sent with each lease"
        if self._num_fixed is not None:
            self.in_words = f"sent once, up to data_budget={budget:,} bytes"
        elif isinstance(sampler, Resident) and 0 < size <= budget:
            self._tables = tuple(Packed.of(sampler.tables(), self._pinned).there(device))
            self.in_words = f"{size:,} bytes stay on the device"
        elif size:
            self.in_words += f", since {size:,} bytes are more than data_budget={budget:,}"
        log.info("data of %s: %s", name, self.in_words)

    def tasks(self, wanted: Wanted) -> list[Task]:
        """These tasks on the device; then `next` is sampled in a thread.

        Raises what the sampler raises, also where a thread has met it: in the lease of that task.
        """
        if self._num_fixed is not None:
            return [self._fixed(index, self._num_fixed) for index in wanted.indices]
        if self._ahead is not None and self._ahead[0] == wanted:
            prepared, self._ahead = self._ahead[1].result, None
            found = prepared()
        else:
            found = self._prepare(wanted)
        following, self.next = self.next, None
        if following is not None and (self._ahead is None or self._ahead[0] != following):
            self._ahead = following, _in_thread(lambda: self._prepare(following))
        return self._there(found)

    def _prepare(self, wanted: Wanted) -> _Prepared:
        """What is to be sent for these tasks. In a thread, so that it may not ask anything of CUDA.

        Pinned memory is asked for by the thread that computes: it may be recording a graph, which
        a call of another thread would break.
        """
        if self._tables and isinstance(self._sampler, Resident):
            rows = [self._sampler.rows(index) for index in wanted.indices]
            return _Prepared(wanted.indices, rows, [])
        tasks = [sample_task(self._sampler, index, wanted.step) for index in wanted.indices]
        return _Prepared(wanted.indices, [], tasks)

    def _there(self, prepared: _Prepared) -> list[Task]:
        if not (self._tables and isinstance(self._sampler, Resident)):
            return send(prepared.tasks, self._device, self._dtype)
        rows_there = Packed.of(prepared.rows, self._pinned).there(self._device)
        tasks = [
            self._sampler.cut(self._tables, rows, index)
            for rows, index in zip(rows_there, prepared.indices, strict=True)
        ]
        return [to_device(task, self._device, self._dtype) for task in tasks]

    def _fixed(self, index: int, num_tasks: int) -> Task:
        """A task of a fixed set, sent the first time; later ones too where there is no room."""
        number = index % num_tasks
        task = self._kept.get(number)
        if task is None:
            (task,) = send([sample_task(self._sampler, number)], self._device, self._dtype)
            size = sum(tensor.nbytes for tensor in tensors_of(task))
            if size <= self._left:
                self._left -= size
                self._kept[number] = task
        return task._replace(id=index)


def send(tasks: list[Task], device: torch.device, dtype: torch.dtype) -> list[Task]:
    """The tasks on `device`, of a GPU after one copy; floating tensors in `dtype`."""
    if device.type == "cpu":
        return [to_device(task, device, dtype) for task in tasks]
    everything = [
        tensor.to(dtype) if tensor.is_floating_point() else tensor
        for task in tasks
        for tensor in tensors_of(task)
    ]
    there = iter(Packed.of(everything, device.type == "cuda").there(device))
    return [with_tensors(task, list(islice(there, len(tensors_of(task))))) for task in tasks]


class _Prepared(NamedTuple):
    """What is sent for tasks: rows of tables, or the tasks."""

    indices: Sequence[int]
    rows: list[Tensor]
    tasks: list[Task]


def _in_thread(work: Callable[[], _Prepared]) -> Future[_Prepared]:
    """The result of `work`, which ends with the process if that ends first."""
    future: Future[_Prepared] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, name="metadist-feed", daemon=True).start()
    return future
