"""`Executor`: who computes the leases of a run. `LocalExecutor` does it in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from metadist.checks.values import check
from metadist.compute import Compute, intra_op_threads, pick_device, wants_gpu
from metadist.feed import Feed
from metadist.memory import device_memory
from metadist.optimizer import OuterOptimizer
from metadist.outer import Contribution, LeaseResult, OuterState, OuterVariable, StepResult
from metadist.retry import Retries, Watchdog
from metadist.sampler import TaskSampler
from metadist.signals import signals_held
from metadist.trees import Params
from metadist.workload import Lease, Workload

T = TypeVar("T")


class StepReport(NamedTuple):
    """One outer step, as an executor reports it.

    Args:
        step: What was applied.
        results: The applied leases, in lease order.
        seconds: The seconds since the step before it ended.
        waiting_s: The seconds times workers, within these, in which a worker had no work.
        num_workers: The number of workers alive.
        lost_workers: The number of workers whose loss was noticed during this step.
        reissued: The ids of leases handed out again because they, or their worker, were lost.
        lost_servers: The number of times the parameter server was lost since the step before.
        retried: The errors of user code, in words, after which the same lease was tried again.
        is_draining: Whether it was announced, since the step before, that the node of x or of this
            process will stop, so that a checkpoint is due.
    """

    step: StepResult
    results: tuple[LeaseResult, ...]
    seconds: float
    waiting_s: float
    num_workers: int = 1
    lost_workers: int = 0
    reissued: tuple[int, ...] = ()
    lost_servers: int = 0
    retried: tuple[str, ...] = ()
    is_draining: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the tasks whose leases report losses and metrics; empty if none does."""
        sums: dict[str, float] = {}
        num_tasks = 0
        for result in self.results:
            if result.metrics:
                num_tasks += result.num_tasks
                for name, value in result.metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
        return {name: value / num_tasks for name, value in sums.items() if num_tasks}


class Judge(Protocol):
    """Measures tasks at x; a pure function that can be pickled, see `metadist.evaluation`."""

    @property
    def compute(self) -> Compute:
        """How it computes."""
        ...

    def __call__(self, outer: Params, indices: range) -> list[dict[str, float]]:
        """The metrics of each of these tasks, computed on the device of `outer`."""
        ...


def chunk_in_words(chunk: range) -> str:
    """Which chunk of an evaluation it is, for messages."""
    return f"tasks {chunk.start} to {chunk.stop - 1} of an evaluation"


class Executor(Protocol):
    """Runs outer steps: hands out leases, applies their sums to the outer variable.

    Derive from it: `probe`, `call`, `judge`, `retries` and `last_state` have a body, others none.
    """

    shares_leases: bool = True
    """Whether several processes share the leases of a step; one process gains nothing from
    leases of fewer tasks than go through vmap together."""

    statistics_of: str = "whole batches"
    """What a batch norm sees; a run keeps to it, since the losses depend on it."""

    def num_on_gpus(self, compute: Compute) -> int:
        """How many processes share a step and compute on a GPU; 0: none, or it is not known yet."""
        return int(wants_gpu(compute.device))

    def probe(self, sampler: TaskSampler) -> TaskSampler:
        """The sampler that is checked before a run; `sampler` itself, or parts of its tasks.

        An executor whose workers read a part of a task each returns a sampler of such parts, so
        that no machine needs to hold all data.
        """
        return sampler

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns for these arguments; needs no `start`.

        A trainer has its checks made here, which need the memory of a lease: an executor whose
        workers alone have that memory asks one of them. This body calls it in this process.
        """
        return function(*arguments)

    def notify(self, event: str, **fields: Any) -> None:
        """Called with what must be known before a step ends; a trainer puts its events here."""
        return

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        """Make ready to continue from `state`; raises before any work if it cannot run."""
        ...

    def run(self, until_version: int) -> Iterator[StepReport]:
        """Train until x has that version; yields after every outer step.

        An executor that loses x resumes from an earlier state of it, never one before the last
        that `state` returned: the steps since are made and reported again, and replace the first.

        Leases that are not in x (`OuterState.applied`) are handed out in the order of their
        numbers, so that continuing after an interruption loses and repeats none; those of a step,
        or of an asynchronous run, in any order.
        """
        ...

    def judge(self, judge: Judge, outer: Params, chunks: Sequence[range]) -> list[dict[str, float]]:
        """The metrics of the tasks of all chunks at `outer`, in order; needs no `start`.

        An executor with workers has them compute it, also between two steps of `run`. This body
        computes in this process, and treats errors of user code as in a lease.
        """
        device = pick_device(judge.compute.device)
        here = {name: leaf.detach().to(device) for name, leaf in outer.items()}
        retries = self.retries()
        found: list[dict[str, float]] = []
        with judge.compute.applied(), Watchdog(self.notify) as watchdog:
            for chunk in chunks:
                found += retries.run(watchdog, chunk_in_words(chunk), judge, here, chunk)
        if retried := retries.take():
            self.notify("user_error", errors=[*retried])
        return found

    def retries(self) -> Retries:
        """How work that raises an exception of user code is tried again in this process."""
        return Retries()

    def state(self) -> OuterState:
        """A copy of everything that must persist, on the CPU."""
        ...

    def last_state(self) -> OuterState:
        """The newest state that is known, for the end of a run; starts nothing that was lost."""
        return self.state()

    def describe(self) -> dict[str, str]:
        """The policy, number of workers, device and precision, for readers of a result."""
        ...

    def close(self) -> None:
        """Stop everything that `start` started; may be called twice."""
        ...


class LocalExecutor(Executor):
    """Computes the leases one after another in this process, synchronously.

    Args:
        max_user_errors: How often the same lease, or the same tasks of an evaluation, are tried
            again after your own code has raised an exception there, such as an OSError of a network
            disk. An exception of a type that was raised there before ends the run at once, since it
            would come for ever; an OSError does so only after all tries. 0: every exception ends
            the run.
        backoff_s: The pause before another try; it doubles with each, to 10 s at the most.
    """

    shares_leases = False

    def __init__(self, max_user_errors: int = 3, backoff_s: float = 0.5) -> None:
        self._max_user_errors = check("max_user_errors", max_user_errors, is_integer=True, ge=0)
        self._backoff_s = check("backoff_s", backoff_s, ge=0)
        self._retries = self.retries()
        self._variable: OuterVariable | None = None
        self._device: torch.device | None = None
        self._feed: Feed | None = None

    def start(self, workload: Workload, optimizer: OuterOptimizer, state: OuterState) -> None:
        self._device = pick_device(workload.compute.device)
        self._workload = workload
        self._retries = self.retries()
        # With all that belongs to it: a GPU keeps x, the optimiser and the states of tasks.
        self._variable = OuterVariable.from_state(
            state, optimizer, workload.stepping_rules(), self._device
        )
        is_on_cpu = self._device.type == "cpu"
        self._feed = None if is_on_cpu else workload.feed(self._variable.params)

    def run(self, until_version: int) -> Iterator[StepReport]:
        variable = self._started()
        with Watchdog(self.notify) as watchdog:
            while variable.version < until_version:
                yield self._step(variable, watchdog, is_last=variable.version + 1 == until_version)

    def _step(self, variable: OuterVariable, watchdog: Watchdog, is_last: bool) -> StepReport:
        began = time.perf_counter()
        outer = variable.params
        before = variable.previous
        previous = None if before is None else variable.unflatten(before)
        contributions: list[Contribution] = []
        size = self._workload.leases_per_step
        leases = [self._workload.lease(n, variable.version) for n in variable.next_leases(size)]
        for lease, following in itertools.zip_longest(leases, leases[1:]):
            if following is None and not is_last:
                first_of_next = variable.next_leases(size + 1)[-1]
                following = self._workload.lease(first_of_next, variable.version + 1)
            if self._feed is not None and following is not None:
                self._feed.next = following.wanted
            states = {
                index: variable.states[index] for index in lease.indices if index in variable.states
            }
            computed = self._retries.run(
                watchdog, lease.in_words, self._compute, lease, outer, previous, states
            )
            contributions.append(computed)
        # The last bits of a norm depend on the threads. And a signal may not stop a step half
        # done, since what is saved afterwards would be neither this version of x nor the next.
        # The sums of all leases are there until then.
        sizes = {"meta_batch_size": self._workload.meta_batch_size}
        with (
            intra_op_threads(self._workload.compute.num_threads),
            signals_held(),
            device_memory(f"outer step {variable.version + 1}", **sizes),
        ):
            step = variable.apply(contributions)
        seconds = time.perf_counter() - began
        results = tuple(computed.result for computed in contributions)
        computing_s = sum(result.seconds for result in results)
        return StepReport(
            step=step,
            results=results,
            seconds=seconds,
            waiting_s=seconds - computing_s,
            retried=self._retries.take(),
        )

    def retries(self) -> Retries:
        return Retries(self._max_user_errors, self._backoff_s)

    def _compute(
        self, lease: Lease, outer: Params, previous: Params | None, states: dict[int, Tensor]
    ) -> Contribution:
        with self._workload.compute.applied():
            computed = self._workload.compute_lease(lease, outer, previous, states, self._feed)
            if self._feed is not None:
                # What is sampled ahead has the settings of a lease, and nothing of the caller
                # beside it.
                self._feed.settle()
        return computed

    def state(self) -> OuterState:
        return self._started().state()

    def describe(self) -> dict[str, str]:
        ours = {"executor": "local", "policy": "bsp"}
        if self._device is None:
            return ours
        data = {} if self._feed is None else {"data": self._feed.in_words}
        return {**ours, "device": str(self._device), **data, **self._workload.compute.arithmetic}

    def close(self) -> None:
        self._variable = self._feed = None

    def _started(self) -> OuterVariable:
        if self._variable is None:
            raise RuntimeError("the executor must be started with start(...) before it is used")
        return self._variable
