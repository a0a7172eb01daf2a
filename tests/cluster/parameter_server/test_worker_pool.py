"""`WorkerPool` alone, with calls that end when and how the test says."""

from __future__ import annotations

from typing import Any

import pytest
from ray import exceptions

from metadist.cluster import LeaseError
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.parameter_server.worker_pool import STUCK_FACTOR, Done, Lost, WorkerPool
from metadist.outer import LeaseResult
from metadist.workload import Lease
from tests.cluster.dummy import DummyCall, DummyRuntime


class Actor:
    """Every worker, its calls in order."""

    def __init__(self, number: int) -> None:
        self.info = WorkerInfo(f"worker-{number}", "cpu", "here", number)
        self.calls: list[DummyCall] = []
        self.setup = self.compute = self.judge = self

    def options(self, num_returns: int):
        assert num_returns == 2
        return self

    def remote(self, *arguments):
        call = DummyCall()
        if isinstance(arguments[0], Lease):
            self.calls.append(call)
            return call, object()
        if isinstance(arguments[0], range):
            self.calls.append(call)
            return call
        call.answer = self.info
        return call

    @property
    def open(self) -> list[DummyCall]:
        """Its calls that go on."""
        return [call for call in self.calls if call.answer is None]

    def answer(self, lease: Lease, compute_s: float = 0.0) -> None:
        result = LeaseResult(lease.id, lease.version, 1, (), {}, 0.0, compute_s)
        self.open[0].answer = result

    def die(self) -> None:
        for call in self.open:
            call.answer = exceptions.ActorDiedError()


@pytest.fixture
def clock():
    return DummyRuntime()


@pytest.fixture
def start(clock):
    """Makes (a pool, its actors by number, the newest of each).

    Every worker has had one lease, which took a second.
    """

    def start(
        num_workers: int = 3, prefetch: int = 0, backup: float | None = None, **failures: Any
    ):
        actors: dict[int, Actor] = {}

        def make(number):
            actors[number] = Actor(number)
            return actors[number]

        limits = Failures(**{"backoff_s": 0.0, **failures})
        pool: Any = WorkerPool(make, num_workers, limits, num_workers, prefetch, backup, clock)
        pool.start(10.0, b"", None)
        for number in range(num_workers):
            first = lease(number, 0)
            pool.submit(first, (object(),))
            clock.sleep(1.0)
            next(actor for actor in actors.values() if actor.open).answer(first, 1.0)
            assert [event.result.lease_id for event in pool.wait(0.0)] == [number]
        pool.take_waiting_s()
        return pool, actors

    return start


@pytest.fixture
def workers(start):
    """Three of them, with backups."""
    return start(3, backup=1.0)


def lease(number: int, version: int = 1) -> Lease:
    return Lease(number, version, (number,), False)


LEASE = lease(7)


def holders(pool: WorkerPool, lease: Lease = LEASE) -> list[int]:
    return [n for n, slot in enumerate(pool._slots) for call in slot.calls if call.item == lease]


def back_up(pool: WorkerPool) -> list[int]:
    """Who computes it, when it has taken as long as is usual."""
    assert pool.wait(timeout_s=1.0) == []
    pool.back_up()
    return holders(pool)


def test_a_second_worker_gets_a_lease_that_takes_long_and_no_third(workers):
    pool, actors = workers
    pool.submit(LEASE, (object(),))
    first, second = back_up(pool)
    assert back_up(pool) == [first, second]
    actors[second].answer(LEASE)
    (done,) = pool.wait(0.0)
    assert isinstance(done, Done) and done.result.worker == f"worker-{second}"
    assert back_up(pool) == [first], "an answered lease goes to nobody"
    actors[first].answer(LEASE)
    assert pool.wait(0.0) == []
    assert holders(pool) == []


def test_two_answers_at_once_count_as_one(workers):
    pool, actors = workers
    pool.submit(LEASE, (object(),))
    for number in back_up(pool):
        actors[number].answer(LEASE)
    assert len(pool.wait(0.0)) == 1


def test_a_lease_is_lost_with_the_last_of_its_workers(workers):
    pool, actors = workers
    pool.submit(LEASE, (object(),))
    first, second = back_up(pool)
    actors[first].die()
    assert pool.wait(0.0) == []
    actors[second].die()
    assert pool.wait(0.0) == [Lost(LEASE, lost_data=False)]
    assert pool.take_num_lost() == 2


def test_a_worker_that_dies_over_an_answered_lease_loses_none(workers):
    pool, actors = workers
    pool.submit(LEASE, (object(),))
    first, second = back_up(pool)
    actors[second].answer(LEASE)
    pool.wait(0.0)
    actors[first].die()
    assert pool.wait(0.0) == []


def test_a_lease_whose_answer_was_lost_is_not_mistaken_for_its_late_copy(workers):
    pool, actors = workers
    pool.submit(LEASE, (object(),))
    first, second = back_up(pool)
    actors[second].answer(LEASE)
    pool.wait(0.0)
    pool.submit(LEASE, (object(),))  # again, while the first is still at it
    (again,) = set(holders(pool)) - {first}
    actors[again].die()
    assert pool.wait(0.0) == [Lost(LEASE, lost_data=False)]


def busy(start, num_workers: int = 1, **options: Any):
    """A pool whose workers have computed a lease for half the usual time."""
    pool, actors = start(num_workers, prefetch=1, **options)
    for number in range(num_workers):
        pool.submit(lease(10 + number), (object(),))
    assert not pool.has_room
    assert pool.wait() == [], "it must not wait longer than until there is room"
    assert pool.has_room
    return pool, actors


def ids(events) -> list[int]:
    return [event.result.lease_id for event in events]


def test_a_busy_worker_is_given_its_next_lease_before_it_is_idle(start, clock):
    before = clock.time
    pool, actors = busy(start)
    assert clock.time == before + 1.0 + 0.5
    pool.submit(LEASE, (object(),))
    assert not pool.has_room, "one beside the one it computes"
    actors[0].answer(lease(10))
    actors[0].answer(LEASE)
    assert ids(pool.wait(0.0)) == [10, 7]


def test_without_prefetch_a_busy_worker_is_given_none(start):
    pool, _ = start(1)
    pool.submit(LEASE, (object(),))
    assert pool.wait(timeout_s=10.0) == []
    assert not pool.has_room


def test_idle_workers_come_first(start):
    pool, actors = busy(start, num_workers=2)
    actors[1].answer(lease(11))
    pool.wait(0.0)
    pool.submit(LEASE, (object(),))
    assert holders(pool) == [1]


def test_a_dead_worker_loses_all_it_had_and_what_it_computed_is_blamed(start):
    pool, actors = busy(start)
    pool.submit(LEASE, (object(),))
    actors[0].die()
    assert pool.wait(0.0) == [Lost(lease(10), False), Lost(LEASE, False)]
    assert pool._losses == {"lease 10 (tasks 10)": 1}
    assert pool.take_num_lost() == 1


def test_what_a_dead_worker_has_answered_is_not_lost(start):
    pool, actors = busy(start)
    pool.submit(LEASE, (object(),))
    actors[0].answer(lease(10))
    actors[0].die()
    done, lost = pool.wait(0.0)
    assert ids([done]) == [10] and lost == Lost(LEASE, False)
    assert pool._losses == {"lease 7 (tasks 7)": 1}


def test_what_is_stuck_behind_a_slow_lease_goes_to_an_idle_worker(start, clock):
    pool, actors = busy(start, num_workers=2)
    began = clock.time - 0.5
    pool.submit(LEASE, (object(),))
    (slow,) = holders(pool)
    actors[1 - slow].answer(lease(11 - slow))
    pool.wait(0.0)
    pool.back_up()
    assert holders(pool) == [slow], "it may be the next to begin"
    while len(holders(pool)) < 2:
        assert pool.wait() == []
        pool.back_up()
    assert clock.time == began + STUCK_FACTOR
    assert holders(pool, lease(10 + slow)) == [slow], "no backup of what has begun"
    actors[1 - slow].answer(LEASE)
    (done,) = pool.wait(0.0)
    assert done.result.worker == f"worker-{1 - slow}"
    actors[slow].answer(lease(10 + slow))
    actors[slow].answer(LEASE)
    assert ids(pool.wait(0.0)) == [10 + slow]


def test_the_time_of_a_lease_begins_when_the_one_before_it_ends(start, clock):
    pool, actors = busy(start, timeout_s=2.0)
    pool.submit(LEASE, (object(),))
    clock.sleep(1.0)
    actors[0].answer(lease(10))
    assert ids(pool.wait(0.0)) == [10]
    clock.sleep(1.75)
    assert pool.wait(0.0) == []
    clock.sleep(0.25)
    assert pool.wait(0.0) == [Lost(LEASE, False)]


def test_tasks_of_an_evaluation_may_take_the_time_of_as_many_leases(start, clock):
    pool, _ = start(1, timeout_s=2.0)
    pool._send(range(5, 8), [object()], object(), 1)
    clock.sleep(5.9)
    assert pool.wait(0.0) == [] and pool.num_alive == 1
    clock.sleep(0.1)
    assert pool.wait(0.0) == [] and pool.take_num_lost() == 1
    assert [paused.item for paused in pool._take_due(range)] == [range(5, 8)]
    assert pool._losses == {"tasks 5 to 7 of an evaluation": 1}


def test_what_is_let_go_of_keeps_its_worker_busy_and_is_not_reported(start):
    pool, actors = busy(start)
    pool.submit(LEASE, (object(),))
    pool.forget()
    assert not pool.has_room
    actors[0].answer(lease(10))
    actors[0].answer(LEASE)
    assert pool.wait(0.0) == []
    assert pool.has_room
    # The same once more is not mistaken for it.
    pool.submit(LEASE, (object(),))
    actors[0].die()
    assert pool.wait(0.0) == [Lost(LEASE, False)]


def test_only_time_without_computing_is_waiting(start, clock):
    pool, actors = start(2, prefetch=1)
    for number in (10, 11):
        pool.submit(lease(number), (object(),))
    clock.sleep(1.0)
    actors[0].answer(lease(10), compute_s=0.75)
    pool.wait(0.0)
    clock.sleep(0.5)  # without a lease
    assert pool.take_waiting_s() == pytest.approx(0.25 + 0.5)


def test_computing_that_nobody_saw_begin_is_not_waiting(start, clock):
    pool, actors = busy(start)
    pool.submit(LEASE, (object(),))
    clock.sleep(1.0)  # ended after 0.9, and LEASE has begun
    actors[0].answer(lease(10), compute_s=0.9)
    pool.wait(0.0)
    seen = pool.take_waiting_s()
    clock.sleep(0.5)
    actors[0].answer(LEASE, compute_s=1.0)
    pool.wait(0.0)
    assert seen >= 0 and pool.take_waiting_s() == 0
    pool.submit(lease(12), (object(),))
    clock.sleep(1.0)
    actors[0].answer(lease(12), compute_s=0.0)
    pool.wait(0.0)
    assert seen + pool.take_waiting_s() == pytest.approx(0.1 + 1.0)


def test_a_lease_whose_code_raised_is_tried_again_after_a_pause_and_the_worker_stays(start, clock):
    pool, actors = start(2, backoff_s=4.0)
    pool.submit(LEASE, (object(),))
    (number,) = holders(pool)
    actor = actors[number]
    actor.open[0].answer = exceptions.RayTaskError("compute", "there", ConnectionError("no share"))
    began = clock.now()
    assert pool.wait(0.0) == [] and pool.take_num_lost() == 0
    other = lease(8)
    pool.submit(other, (object(),))
    assert holders(pool, other) == [1 - number], "it has a pause, the other one works"
    assert pool.wait() == [Lost(LEASE, False)]
    assert clock.now() == began + 4.0
    assert pool.take_retried() == (
        f"lease 7 (tasks 7) on worker-{number}: ConnectionError: no share",
    )
    pool.submit(LEASE, (object(),))
    assert actors[number] is actor and holders(pool) == [number]
    actor.open[0].answer = exceptions.RayTaskError("compute", "there", ValueError("a bug"))
    assert pool.wait(0.0) == []
    assert pool.wait(20.0) == [Lost(LEASE, False)]
    assert clock.now() == began + 4.0 + 8.0
    pool.submit(LEASE, (object(),))
    (number,) = holders(pool)
    actors[number].open[0].answer = exceptions.RayTaskError("compute", "there", ValueError("a bug"))
    with pytest.raises(LeaseError, match="there, attempt 3:\nthere"):
        pool.wait(0.0)
