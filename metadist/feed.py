"""`Feed`: how the tasks of leases come to a GPU.

What a lease waits for is the copy of its tasks, and before it their sampling on the CPU. So data
that fits stays on the GPU, and the rest is sampled for the next lease while this one is computed.
One process on a CPU has nothing to gain from that, but a worker on Ray has: it waits for x.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.sampler import Resident, Stream, TaskSampler, num_tasks_of, one_at_a_time, sample_task
from metadist.task import Task, stays_on_host, tensors_of, to_device, with_tensors

log = logging.getLogger("metadist.feed")


WORTH_S = 2e-3
"""On a CPU: the time of sampling a lease from which on the next one is sampled in a thread."""


class Wanted(NamedTuple):
    """The tasks of a lease, at an outer step."""

    indices: tuple[int, ...]
    step: int


class Feed:
    """The tasks of one process, on its device.

    A GPU has them in one of three ways, each with the bytes of `sample_task`: the tasks of a fixed
    set are sent once and kept; a sampler that is `Resident` has its tables there, and a lease is
    sent the rows of all its tasks; any other tasks are packed into one buffer of pinned memory,
    which is sent.

    Whatever is not kept may be sampled ahead, in a thread. One thing is sampled at a time, so a
    sampler need not know of threads, but must not borrow torch's global generator, from which the
    computation must not be disturbed: this is seen, and nothing is then sampled ahead. An error
    there is one of the lease of that task. One that may come of the thread, as every one but an
    OSError may, is the last.

    Args:
        sampler: The sampler.
        device: The device.
        dtype: That of x, which floating tensors are cast to.
        budget: The most bytes of data to keep on a GPU, and of a lease that is sampled ahead, see
            `Compute.data_budget`.
        num_threads: Intra-op threads of torch for what is sampled ahead.
    """

    def __init__(
        self,
        sampler: TaskSampler,
        device: torch.device,
        dtype: torch.dtype,
        budget: int,
        num_threads: int | None = None,
    ) -> None:
        self._sampler = sampler
        self._device = device
        self._dtype = dtype
        self._pinned = device.type == "cuda"
        self._num_threads = num_threads
        self._budget = self._left = budget
        self._kept: dict[int, Task] = {}
        self._tables: tuple[Tensor, ...] = ()
        self._num_fixed: int | None = None
        self._ahead: _Ahead | None = None
        self._may_be_ahead: bool | None = None  # None: nothing was sampled yet
        self.next: Wanted | None = None
        """What is sampled ahead as soon as the tasks asked for are there; None: nothing."""
        self.in_words = "sent with each lease"
        if device.type == "cpu":
            self.in_words = "sampled for each lease"
            return
        name = type(sampler).__name__
        size = sampler.table_bytes if isinstance(sampler, Resident) else 0
        self._num_fixed = None if isinstance(sampler, Stream) else num_tasks_of(sampler)
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
        wanted, following = self._exact(wanted), self.next and self._exact(self.next)
        ahead = self._ahead
        if ahead is not None and ahead.wanted not in (wanted, following):
            ahead.is_wanted = False  # it ends after the task that it is at
            self._ahead = None
        if ahead is not None and ahead.wanted == wanted:
            self._ahead = None
            found = self._result(ahead)
        elif self._may_be_ahead is None:
            with _watched() as borrowed:
                found = self._prepare(wanted)
            self._may_be_ahead = not borrowed
            if borrowed:
                log.info("%s is not sampled ahead: %s", type(self._sampler).__name__, borrowed[0])
        else:
            found = self._prepare(wanted)
        self.next = None
        is_worth_it = self._device.type != "cpu" or found.seconds >= WORTH_S
        has_room = found.num_bytes <= self._budget
        if following and self._ahead is None and self._may_be_ahead and is_worth_it and has_room:
            self._ahead = _Ahead(following, self._prepare, self._num_threads)
        return self._there(found)

    def settle(self) -> None:
        """Wait until nothing is sampled ahead any more; what was, stays."""
        if self._ahead is not None:
            self._ahead.thread.join()

    def _exact(self, wanted: Wanted) -> Wanted:
        """The same for all steps at which the tasks are the same."""
        return wanted if isinstance(self._sampler, Stream) else wanted._replace(step=0)

    def _result(self, ahead: _Ahead) -> _Prepared:
        try:
            return ahead.result()
        except OSError:
            raise
        except BaseException:
            name = type(self._sampler).__name__
            log.warning("%s raised in a thread: nothing is sampled ahead from now on", name)
            self._may_be_ahead = False
            raise

    def _prepare(self, wanted: Wanted, is_wanted: Callable[[], bool] = lambda: True) -> _Prepared:
        """What is to be sent for these tasks. In a thread, so that it may not ask anything of CUDA.

        Pinned memory is asked for by the thread that computes: it may be recording a graph, which
        a call of another thread would break.
        """
        began = time.perf_counter()
        rows: list[Tensor] = []
        tasks: list[Task] = []
        for index in wanted.indices:
            if not is_wanted():
                break
            if self._tables and isinstance(self._sampler, Resident):
                with one_at_a_time:
                    rows.append(self._sampler.rows(index))
            else:
                tasks.append(sample_task(self._sampler, index, wanted.step))
        return _Prepared(wanted.indices, rows, tasks, time.perf_counter() - began)

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


class _Prepared(NamedTuple):
    """What is sent for tasks: rows of tables, or the tasks; and the seconds that it took."""

    indices: Sequence[int]
    rows: list[Tensor]
    tasks: list[Task]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        tensors = [tensor for task in self.tasks for tensor in tensors_of(task)]
        return sum(tensor.nbytes for tensor in tensors if not stays_on_host(tensor))


class _Ahead:
    """What a thread prepares, which ends with the process if that ends first."""

    def __init__(
        self, wanted: Wanted, prepare: Callable[..., _Prepared], num_threads: int | None
    ) -> None:
        self.wanted = wanted
        self.is_wanted = True
        self._prepare = prepare
        self._num_threads = num_threads
        self._found: _Prepared | BaseException | None = None
        self.thread = Thread(target=self._run, name="metadist-feed", daemon=True)
        self.thread.start()

    def result(self) -> _Prepared:
        """What it has prepared; raises what was raised there."""
        self.thread.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found

    def _run(self) -> None:
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)  # of this thread
            self._found = self._prepare(self.wanted, lambda: self.is_wanted)
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            self._found = error


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Gives why what runs within the block should not run beside a computation; empty: it may.

    It should not where it uses torch's global generator, even if it gives that back as it was.
    """
    found: list[str] = []
    if sys.getprofile() is not None:
        yield ["this process is profiled"]
        return

    def note(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is torch.default_generator:
            found[:] = ["it borrows torch's global generator"]

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
