"""`simulate`: the scheduler's loop in simulated time, to predict how a cluster scales.

The policy and the ledger are those that schedule on Ray; the times of workers, links, the server
and the driver are sums of stated costs. The driver hands out leases, waits, and is blocked while
the server applies a step, as in `Scheduler`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metadist.cluster.parameter_server.ledger import Ledger
from metadist.cluster.parameter_server.policies import Policy

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """The times of everything except the computation.

    Args:
        size_bytes: The size of x, and of the sum of a lease.
        driver_s: The driver's time per lease, for handing it out and noting that it is done.
        worker_s: The time of a lease beside its computation, in transit and at the worker.
        worker_byte_s: The same per byte of x.
        step_s: The driver's and the server's time per step, whatever its size.
        add_byte_s: The server's time per byte and lease, for reading and adding.
        step_byte_s: The server's time per byte and step, for the optimiser and a copy of x.
        link_bytes_per_s: The rate of a node's link, in each direction.
        workers_per_node: The workers on a node, which share the x that the node has read.
        num_shards: The servers, each with an equal part of x, on nodes of their own.
        shard_s: The driver's time per step and shard after the first.
    """

    size_bytes: float = 0.0
    driver_s: float = 0.0
    worker_s: float = 0.0
    worker_byte_s: float = 0.0
    step_s: float = 0.0
    add_byte_s: float = 0.0
    step_byte_s: float = 0.0
    link_bytes_per_s: float = math.inf
    workers_per_node: int = 1
    num_shards: int = 1
    shard_s: float = 0.0

    @property
    def transfer_s(self) -> float:
        """The time of x, or a sum, through the link of a server; each shard has a link."""
        return self.size_bytes / self.num_shards / self.link_bytes_per_s

    def apply_s(self, num_leases: int) -> float:
        """The time of a step with so many leases, from the call to its answer."""
        per_byte = num_leases * self.add_byte_s + self.step_byte_s
        calls = self.step_s + (self.num_shards - 1) * self.shard_s
        return calls + num_leases * self.transfer_s + per_byte * self.size_bytes / self.num_shards


@dataclass(frozen=True)
class SimulatedWorkers:
    """The workers of a simulated cluster.

    Args:
        num: The number of workers.
        compute_s: The mean computing time of a lease.
        spread: The standard deviation of its logarithm from lease to lease; a lease takes the same
            time on every worker, and when it is computed again.
        slow_share: The share of workers that always take `slow_factor` times as long.
        slow_factor: See `slow_share`.
        failure_s: The mean computing time until a worker is lost; inf: never.
        replace_s: The time until a lost worker is replaced.
    """

    num: int
    compute_s: float
    spread: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    failure_s: float = math.inf
    replace_s: float = 0.0

    def durations(self, num_leases: int, seed: int) -> Floats:
        """The computing times of the first leases; their mean tends to `compute_s`."""
        normal = np.random.default_rng(seed).standard_normal(num_leases)
        # E exp(s n - s^2 / 2) = 1 for a standard normal n: the spread does not change the mean.
        scaled: Floats = self.compute_s * np.exp(self.spread * normal - self.spread**2 / 2)
        return scaled


class Step(NamedTuple):
    """An outer step that ended at `end_s`, and how many versions old its leases were."""

    end_s: float
    leases: tuple[int, ...]
    staleness: tuple[int, ...]


@dataclass
class Outcome:
    """The course of a simulated run.

    `computing_s` counts the seconds in which workers computed leases that were applied, `server_s`
    those in which the server was busy, `num_losses` lost workers.
    """

    num_workers: int
    steps: list[Step] = field(default_factory=list)
    computing_s: float = 0.0
    server_s: float = 0.0
    num_losses: int = 0

    @property
    def seconds(self) -> float:
        """The length of the run."""
        return self.steps[-1].end_s

    @property
    def leases_per_s(self) -> float:
        """Applied leases per second, without the first fifth and the end of the run.

        Near the end some workers are idle, because no leases are left.
        """
        counts = np.cumsum([len(step.leases) for step in self.steps])
        ends = [step.end_s for step in self.steps]
        first = int(np.searchsorted(counts, counts[-1] / 5))
        last = int(np.searchsorted(counts, counts[-1] - self.num_workers, side="right")) - 1
        if last <= first:
            return float(counts[-1]) / ends[-1]
        return float(counts[last] - counts[first]) / (ends[last] - ends[first])

    @property
    def staleness(self) -> NDArray[np.int64]:
        """The staleness of all leases, without those of the first fifth of the steps."""
        steps = self.steps[len(self.steps) // 5 :]
        return np.array([age for step in steps for age in step.staleness], dtype=np.int64)

    @property
    def waiting_share(self) -> float:
        """The share of the workers' time that was not spent on leases that were applied."""
        return 1 - self.computing_s / (self.num_workers * self.seconds)

    @property
    def server_share(self) -> float:
        """The share of the time in which the server was busy."""
        return self.server_s / self.seconds


def simulate(
    policy: Policy,
    leases_per_step: int,
    workers: SimulatedWorkers,
    costs: Costs,
    num_leases: int,
    seed: int = 0,
    prefetch: int = 0,
) -> Outcome:
    """A run of at least `num_leases` leases.

    Args:
        policy: When to step.
        leases_per_step: The number of leases in a meta-batch.
        workers: The workers and their computing times.
        costs: All other times.
        num_leases: The number of leases in the run; rounded up to whole steps.
        seed: The seed of durations, slow workers and failures.
        prefetch: As in `WorkerPool`, but a lease behind a slow one stays with its worker.
    """
    return _Simulation(policy, leases_per_step, workers, costs, num_leases, seed, prefetch).run()


class _Event(NamedTuple):
    """The order of events of the same time is that of the workers, as in `WorkerPool.wait`."""

    time_s: float
    worker: int
    what: str
    lease: int


class _Simulation:
    def __init__(
        self,
        policy: Policy,
        leases_per_step: int,
        workers: SimulatedWorkers,
        costs: Costs,
        num_leases: int,
        seed: int,
        prefetch: int,
    ) -> None:
        if min(leases_per_step, workers.num, num_leases, costs.num_shards) < 1:
            raise ValueError(
                "leases_per_step, workers.num, num_leases and costs.num_shards must be >= 1, got "
                f"{leases_per_step}, {workers.num}, {num_leases} and {costs.num_shards}"
            )
        self._workers, self._costs = workers, costs
        self._until = math.ceil(num_leases / policy.leases_per_step(leases_per_step))
        self._ledger = Ledger(policy, leases_per_step, 0, 0, (), self._until)
        self._durations = workers.durations(4096, seed)
        self._random = np.random.default_rng([seed, 1])
        num_slow = round(workers.slow_share * workers.num)
        slow = self._random.permutation(workers.num) < num_slow
        self._factors = np.where(slow, workers.slow_factor, 1.0)
        self._now = 0.0
        self._prefetch = prefetch
        self._idle = deque(range(workers.num))
        self._half_done: dict[int, None] = {}
        """Busy workers with room for another lease, first come first."""
        self._has: list[list[tuple[int, float]]] = [[] for _ in range(workers.num)]
        """By worker: (lease, when x is there), the one it computes first."""
        self._last_s = [math.inf] * workers.num
        self._events: list[_Event] = []
        self._link_free_at = 0.0
        self._held: dict[int, tuple[int, float]] = {}  # node -> (version of x, when it is there)
        self._computing: dict[int, float] = {}
        self._outcome = Outcome(workers.num)

    def run(self) -> Outcome:
        while self._ledger.version < self._until:
            if weights := self._ledger.next_step():
                self._apply(tuple(weights))
                self._hand_out()
            else:
                self._hand_out()
                self._wait()
        return self._outcome

    def _apply(self, leases: tuple[int, ...]) -> None:
        ledger = self._ledger
        staleness = tuple(ledger.version - ledger.arrived[lease] for lease in leases)
        seconds = self._costs.apply_s(len(leases))
        self._now += seconds
        ledger.apply(leases, ledger.version + 1)
        self._outcome.server_s += seconds
        self._outcome.computing_s += sum(self._computing.pop(lease) for lease in leases)
        self._outcome.steps.append(Step(self._now, leases, staleness))

    def _hand_out(self) -> None:
        while (self._idle or self._half_done) and (lease := self._ledger.issue()) is not None:
            self._now += self._costs.driver_s
            if self._idle:
                worker = self._idle.popleft()
            else:
                worker = next(iter(self._half_done))
            x_at = self._pull(worker // self._costs.workers_per_node)
            self._has[worker].append((lease, x_at))
            if len(self._has[worker]) > self._prefetch:
                self._half_done.pop(worker, None)
            if len(self._has[worker]) == 1:
                self._start(worker, self._now)

    def _start(self, worker: int, now: float) -> None:
        """Start the first lease of `worker` as soon as its x is there."""
        costs, workers = self._costs, self._workers
        lease, x_at = self._has[worker][0]
        begin = max(now, x_at)
        duration = float(self._durations[lease % len(self._durations)] * self._factors[worker])
        whole = duration + costs.worker_s + costs.worker_byte_s * costs.size_bytes
        lost_after = (
            self._random.exponential(workers.failure_s)
            if workers.failure_s < math.inf
            else math.inf
        )
        if lost_after < whole:
            self._add(begin + lost_after, worker, "lost", lease)
        else:
            self._computing[lease] = duration
            self._add(begin + whole, worker, "done", lease)
        if len(self._has[worker]) <= self._prefetch and self._last_s[worker] < math.inf:
            self._add(now + self._last_s[worker] / 2, worker, "half done", lease)
        self._last_s[worker] = begin + whole - now

    def _pull(self, node: int) -> float:
        """The time at which the node has the current x; the server's link sends one at a time."""
        version = self._ledger.version
        if node not in self._held or self._held[node][0] != version:
            self._link_free_at = max(self._link_free_at, self._now) + self._costs.transfer_s
            self._held[node] = version, self._link_free_at
        return max(self._now, self._held[node][1])

    def _wait(self) -> None:
        """Advance to the next event, and handle all events that have happened by then."""
        self._now = max(self._now, self._events[0].time_s)
        ready = []
        while self._events and self._events[0].time_s <= self._now:
            ready.append(heapq.heappop(self._events))
        for event in sorted(ready, key=lambda event: event.worker):
            has = self._has[event.worker]
            if event.what == "done":
                self._ledger.arrive(event.lease)
                del has[0]
                self._half_done.pop(event.worker, None)
                if has:
                    self._start(event.worker, event.time_s)
                else:
                    self._idle.append(event.worker)
            elif event.what == "half done":
                # It may have ended, or been lost, since this was planned.
                if has and has[0][0] == event.lease:
                    self._half_done[event.worker] = None
            elif event.what == "lost":
                for lease, _ in has:
                    self._ledger.lose(lease)
                has.clear()
                self._half_done.pop(event.worker, None)
                self._last_s[event.worker] = math.inf
                self._outcome.num_losses += 1
                self._add(event.time_s + self._workers.replace_s, event.worker, "back", -1)
            else:
                self._idle.append(event.worker)

    def _add(self, time_s: float, worker: int, what: str, lease: int) -> None:
        heapq.heappush(self._events, _Event(time_s, worker, what, lease))
