"""`Fleet` alone, with calls that end when and how the test says."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray import exceptions

from metadist.cluster import fleet as module
from metadist.cluster.fleet import Done, Fleet, Lost, Retry
from metadist.cluster.worker import WorkerInfo
from metadist.lease import Lease, LeaseResult


class Call:
    """A call of an actor; `answer` is what it returns or raises, None while it goes on."""

    answer: object = None


class Actor:
    """Every worker, its calls in order."""

    def __init__(self, number: int) -> None:
        self.info = WorkerInfo(f"worker-{number}", "cpu", "here", number)
        self.calls: list[Call] = []
        self.setup = self.compute = self

    def options(self, num_returns: int):
        return self

    def remote(self, *arguments):
        call = Call()
        if isinstance(arguments[0], Lease):
            self.calls.append(call)
            return call, object()
        call.answer = self.info
        return call

    def answer(self, lease: Lease) -> None:
        self.calls[-1].answer = LeaseResult(lease.id, lease.version, 1, (), {}, 0.0, 0.0)

    def die(self) -> None:
        self.calls[-1].answer = exceptions.ActorDiedError()


class FakeRay:
    """What `Fleet` asks of ray."""

    ObjectRef = object

    def wait(self, refs, num_returns=1, timeout=None):
        ready = [ref for ref in refs if ref.answer is not None]
        return ready, [ref for ref in refs if ref.answer is None]

    def get(self, ref):
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, actor):
        pass


@pytest.fixture
def workers(monkeypatch):
    """(a fleet of three, their actors by number, the newest of each)."""
    monkeypatch.setattr(module, "ray", FakeRay())
    actors: dict[int, Actor] = {}

    def make(number):
        actors[number] = Actor(number)
        return actors[number]

    fleet: Any = Fleet(make, 3, Retry(backup_factor=1.0, backoff_s=0.0), min_workers=3)
    fleet.start(10.0, b"", None)
    # One lease after another until every worker has had one: then it is known what is usual.
    for number in range(3):
        first = Lease(number, 0, (number,), False)
        fleet.submit(first, (object(),))
        next(a for a in actors.values() if a.calls and a.calls[-1].answer is None).answer(first)
        assert [event.result.lease_id for event in fleet.wait(0.0)] == [number]
    return fleet, actors


LEASE = Lease(7, 1, (7,), False)


def holders(fleet: Fleet) -> list[int]:
    return [n for n, slot in enumerate(fleet._slots) if slot.lease == LEASE]


def back_up(fleet: Fleet) -> list[int]:
    """Who computes it, when it has taken long."""
    time.sleep(0.05)
    fleet.back_up()
    return holders(fleet)


def test_a_second_worker_gets_a_lease_that_takes_long_and_no_third(workers):
    fleet, actors = workers
    fleet.submit(LEASE, (object(),))
    first, second = back_up(fleet)
    assert back_up(fleet) == [first, second]
    actors[second].answer(LEASE)
    (done,) = fleet.wait(0.0)
    assert isinstance(done, Done) and done.worker == f"worker-{second}"
    assert back_up(fleet) == [first], "an answered lease goes to nobody"
    actors[first].answer(LEASE)
    assert fleet.wait(0.0) == []
    assert holders(fleet) == []


def test_two_answers_at_once_count_as_one(workers):
    fleet, actors = workers
    fleet.submit(LEASE, (object(),))
    for number in back_up(fleet):
        actors[number].answer(LEASE)
    assert len(fleet.wait(0.0)) == 1


def test_a_lease_is_lost_with_the_last_of_its_workers(workers):
    fleet, actors = workers
    fleet.submit(LEASE, (object(),))
    first, second = back_up(fleet)
    actors[first].die()
    assert fleet.wait(0.0) == []
    actors[second].die()
    assert fleet.wait(0.0) == [Lost(LEASE, lost_data=False)]
    assert fleet.take_num_lost() == 2


def test_a_worker_that_dies_over_an_answered_lease_loses_none(workers):
    fleet, actors = workers
    fleet.submit(LEASE, (object(),))
    first, second = back_up(fleet)
    actors[second].answer(LEASE)
    fleet.wait(0.0)
    actors[first].die()
    assert fleet.wait(0.0) == []


def test_a_lease_whose_answer_was_lost_is_not_mistaken_for_its_late_copy(workers):
    fleet, actors = workers
    fleet.submit(LEASE, (object(),))
    first, second = back_up(fleet)
    actors[second].answer(LEASE)
    fleet.wait(0.0)
    fleet.submit(LEASE, (object(),))  # again, while the first is still at it
    (again,) = set(holders(fleet)) - {first}
    actors[again].die()
    assert fleet.wait(0.0) == [Lost(LEASE, lost_data=False)]
