"""The actors of a run in this process: the real pool, supervisor and scheduler without Ray.

Calls wait in the queue of their actor, and one of any actor is made whenever somebody waits. An
actor may be killed between two of them.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ray import exceptions
from torch.utils._pytree import tree_leaves

from metadist.cluster import Failures, Server
from metadist.cluster.actors.buffers import OuterSpec, pack_state, split_state
from metadist.cluster.actors.pool import Runtime
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.policies import BSP, Policy
from metadist.cluster.parameter_server.scheduler import Scheduler
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.states import HeldStates
from metadist.cluster.parameter_server.supervisor import Supervisor
from metadist.cluster.parameter_server.worker import Worker
from metadist.cluster.parameter_server.worker_pool import WorkerPool
from metadist.outer import OuterState
from metadist.workload import Workload
from tests.cluster.toy import ADAM


class Ref:
    """An answer to come."""

    answer: Any = None
    is_there = False

    def settle(self, answer: Any) -> None:
        self.answer, self.is_there = answer, True


class Method:
    """`actor.name`, with the calls of Ray."""

    def __init__(self, actor: Actor, name: str, num_returns: int = 1) -> None:
        self._actor, self._name, self._num_returns = actor, name, num_returns

    def options(self, num_returns: int) -> Method:
        return Method(self._actor, self._name, num_returns)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        refs = [Ref() for _ in range(self._num_returns)]
        if self._actor.is_dead:
            for ref in refs:
                ref.settle(exceptions.ActorDiedError())
        else:
            self._actor.queue.append((self._name, arguments, named, refs))
        return refs[0] if self._num_returns == 1 else tuple(refs)


class Actor:
    """An object whose methods are called later."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.num_bytes = 0
        """Of the arrays that it was sent and has sent."""
        self.queue: deque[Any] = deque()
        self.is_dead = False

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def die(self) -> None:
        self.is_dead = True
        for *_, refs in self.queue:
            for ref in refs:
                ref.settle(exceptions.ActorDiedError())
        self.queue.clear()

    @property
    def can_work(self) -> bool:
        return bool(self.queue) and all(
            argument.is_there for argument in self.queue[0][1] if isinstance(argument, Ref)
        )

    def work(self) -> None:
        """Make the next call."""
        name, arguments, named, refs = self.queue.popleft()
        try:
            read = [*map(_read, arguments)]
            found = getattr(self.target, name)(*read, **named)
            answers = copy.deepcopy((found,) if len(refs) == 1 else found)
            self.num_bytes += sum(
                leaf.nbytes for leaf in tree_leaves([read, found]) if isinstance(leaf, np.ndarray)
            )
        except Exception as error:  # noqa: BLE001 - as Ray does
            cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
            failed = exceptions.RayTaskError(name, str(error), cause)
            answers = (failed,) * len(refs)
        for ref, answer in zip(refs, answers, strict=True):
            ref.settle(answer)


def _read(argument: Any) -> Any:
    if not isinstance(argument, Ref):
        return argument
    if isinstance(argument.answer, Exception):
        raise exceptions.RayTaskError("", "", argument.answer)
    return argument.answer


class World(Runtime):
    """The clock and the actors.

    Args:
        pick: Which of so many actors works next.
    """

    look_s = float("inf")

    def __init__(self, pick: Callable[[int], int] = lambda num: 0) -> None:
        self._pick = pick
        self.time = 0.0
        self.actors: list[Actor] = []
        self.happen: Callable[[], None] = lambda: None
        """Called before each call of an actor."""

    def make(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        self.actors.append(Actor(kind(*arguments)))
        return self.actors[-1]

    def of(self, kind: type) -> list[Actor]:
        """The living actors of that class."""
        return [a for a in self.actors if not a.is_dead and isinstance(a.target, kind)]

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def put(self, value: Any) -> Any:
        ref = Ref()
        ref.settle(value)
        return ref

    def _work(self) -> bool:
        self.happen()
        able = [actor for actor in self.actors if actor.can_work]
        if able:
            able[self._pick(len(able))].work()
        return bool(able)

    def ready(self, refs: Sequence[Any], limit_s: float = 0.0) -> list[Any]:
        while limit_s and not any(ref.is_there for ref in refs):
            if not self._work() and not any(ref.is_there for ref in refs):
                assert limit_s < float("inf"), "it would wait for ever"
                self.time += limit_s
                break
        return [ref for ref in refs if ref.is_there]

    def get(self, refs: Any, timeout_s: float | None = None) -> Any:
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        while not refs.is_there:
            assert self._work() or refs.is_there, "it would wait for ever"
        if isinstance(refs.answer, Exception):
            raise refs.answer
        return refs.answer

    def draining(self) -> frozenset[str]:
        return frozenset()

    def this_node(self) -> str:
        return "here"

    def is_gone(self) -> bool:
        return False

    def kill(self, actor: Any) -> None:
        actor.die()


def scheduled(
    world: World,
    workload: Workload,
    state: OuterState,
    num_workers: int,
    policy: Policy = BSP(),
    prefetch: int = 0,
) -> Scheduler:
    """The scheduler of a run whose server has the states, if there are any."""
    pool, supervisor = _started(world, workload, state, num_workers, 5, prefetch)
    return Scheduler(workload, policy, supervisor, pool)


def holding(
    world: World, workload: Workload, state: OuterState, num_workers: int, snapshot_every: int
) -> tuple[Scheduler, HeldStates]:
    """The scheduler of a run whose workers hold the states."""
    without = state._replace(states={})
    pool, supervisor = _started(world, workload, without, num_workers, snapshot_every)
    held = HeldStates(workload, pool, state.version, state.states)
    return Scheduler(workload, BSP(), supervisor, pool, held), held


def _started(
    world: World,
    workload: Workload,
    state: OuterState,
    num_workers: int,
    snapshot_every: int,
    prefetch: int = 0,
) -> tuple[WorkerPool, Supervisor]:
    limits = Failures(max_losses=1000, backoff_s=0.0)
    spec = OuterSpec.of(state.outer)
    bounds = [(0, spec.num_elements)]

    def make_worker(number: int) -> Any:
        return world.make(Worker, f"worker-{number}")

    pool = WorkerPool(make_worker, num_workers, limits, num_workers, prefetch, runtime=world)
    pool.start(10.0, pickle_by_value(workload), spec, bounds)
    options = Server(snapshot_every=snapshot_every, timeout_s=None)
    supervisor = Supervisor(lambda number: world.make(ParameterServer), limits, options, 10, world)
    parts = split_state(pack_state(state), bounds)
    rules = pickle_by_value(workload.stepping_rules())
    supervisor.start(parts, [spec], ADAM, workload.compute.num_threads, rules)
    return pool, supervisor
