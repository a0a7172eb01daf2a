"""`ActorPool` alone: pauses, replacements and limits, with a dummy of Ray and of the clock."""

from __future__ import annotations

from typing import Any

import pytest
from ray import exceptions

from metadist.cluster import MixedDevicesError, ResourcesError, WorkerLostError
from metadist.cluster.actors.failure import WORKER, Failures
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.actors.pool import ActorPool, Call, Slot
from tests.cluster.dummy import DummyCall, DummyRuntime

DIED = exceptions.ActorDiedError()
ARGUMENT = exceptions.RayTaskError("ask", "", exceptions.OwnerDiedError("ab", None, ""))


class Pool(ActorPool[Slot]):
    """Its actors get ready with `answers` in turn, and at once when there are none left."""

    def __init__(self, num_slots: int, num_needed: int, **failures: Any) -> None:
        self.clock = DummyRuntime()
        self.answers: list[Any] = []
        self.made_at: list[float] = []
        self.setup_at: list[float] = []
        self.lost: list[tuple[str, int, bool]] = []
        slots = [Slot(f"worker-{number}") for number in range(num_slots)]
        super().__init__(self._make, slots, num_needed, WORKER, Failures(**failures), self.clock)

    @property
    def setup(self):
        return self

    def remote(self, number: int) -> Any:
        self.setup_at.append(self.clock.time)
        here = WorkerInfo(f"worker-{number}", "cpu", "here", number)
        return self.clock.put(self.answers.pop(0) if self.answers else here)

    def _make(self, number: int):
        self.made_at.append(self.clock.time)
        return self

    def _setup_of(self, slot: Slot) -> tuple[Any, ...]:
        return (self._slots.index(slot),)

    def _ready(self, slot: Slot, answer: WorkerInfo) -> WorkerInfo:
        return answer

    def _answered(self, slot: Slot, call: Any, answer: Any) -> None:
        pass

    def _lost(self, slot: Slot, calls: list[Any], lost_data: bool, after_s: float = 0.0) -> None:
        self.lost.append((slot.name, len(calls), lost_data))

    def send(self, number: int, answer: Any = None) -> None:
        """Work for a worker, which ends with `answer`; None: it never does."""
        call = DummyCall()
        call.answer = answer
        self._slots[number].since = self.clock.time
        self._slots[number].calls.append(Call(call, "the work"))  # type: ignore[arg-type]


def started(num_slots: int = 1, num_needed: int = 1, **failures: Any) -> Pool:
    pool = Pool(num_slots, num_needed, **failures)
    pool._start(10.0, num_slots)
    return pool


def test_pauses_double_until_an_actor_answers():
    pool = started(backoff_s=1.0)
    began = pool.clock.time
    pool.answers = [DIED, DIED]
    pool.send(0, DIED)
    while not pool.made_at[3:]:
        pool._wait(100.0)
    assert [at - began for at in pool.made_at[1:]] == [1.0, 3.0, 7.0]
    pool._wait(0.0)
    assert pool.num_alive == 1 and pool.take_num_lost() == 3 and pool.take_num_lost() == 0
    pool.send(0, "answer")
    pool._wait(0.0)
    pool.send(0, DIED)
    pool._wait(0.0)
    assert pool._slots[0].resume_at == pool.clock.time + 1.0


def test_an_actor_that_could_not_read_what_it_was_sent_lives_and_rests():
    pool = started()
    pool.send(0, ARGUMENT)
    pool._wait(0.0)
    assert pool.lost == [("worker-0", 1, True)]
    assert (pool.num_alive, pool.take_num_lost(), pool.clock.killed) == (1, 0, [])
    assert pool._slots[0].resume_at == pool.clock.time + 0.5
    assert pool._slots[0].calls == []


def test_an_argument_of_setup_that_is_lost_is_sent_again_to_the_same_actor():
    pool = Pool(1, 1, backoff_s=2.0)
    pool.answers = [ARGUMENT]
    pool._start(10.0, 1)
    first, second = pool.setup_at
    assert second == first + 2.0 and len(pool.made_at) == 1


def test_all_calls_of_a_lost_actor_are_lost():
    pool = started()
    pool.send(0)
    pool.send(0, DIED)
    pool._wait(0.0)
    assert pool.lost == [("worker-0", 2, False)]


def test_an_actor_that_takes_too_long_is_killed_and_replaced():
    pool = started(2, timeout_s=4.0)
    began = pool.clock.time
    pool.send(1)
    pool._wait(float("inf"))
    assert pool.clock.time == began + 4.0
    assert pool.lost == [("worker-1", 1, False)] and len(pool.clock.killed) == 1
    pool._wait(float("inf"))
    pool._wait(0.0)
    assert pool.num_alive == 2 and len(pool.made_at) == 3


def lose_one_after_another(pool: Pool) -> None:
    """Lose a worker for good every 10 s, the first after 5."""
    for number in range(3):
        pool.clock.time = 1005.0 + 10.0 * number
        pool.send(number, DIED)
        pool._wait(0.0)
        for _ in range(9):
            pool._check_starved()
            pool._wait(1.0)


@pytest.mark.parametrize(("num_needed", "end"), [(1, 1030.0), (3, 1010.0)])
def test_the_run_ends_when_too_few_have_been_alive_for_too_long(num_needed, end):
    pool = started(3, num_needed, all_lost_s=5.0, max_losses=99)
    pool._make_actor = lambda number: NeverReady()
    message = f"at least {num_needed} workers must be alive within all_lost_s=5 after a loss, got "
    with pytest.raises(WorkerLostError, match=message):
        lose_one_after_another(pool)
    assert pool.clock.time == pytest.approx(end, abs=1.01)


class NeverReady:
    @property
    def setup(self):
        return self

    def remote(self, *_):
        return DummyCall()


def test_a_start_ends_in_time():
    pool = Pool(2, 1)
    pool._make_actor = lambda number: NeverReady()
    with pytest.raises(ResourcesError, match="2 workers must be ready within start_timeout_s=3, g"):
        pool._start(3.0, 2)


@pytest.mark.parametrize(
    ("took_s", "slow_s", "said"),
    [
        ((), 300.0, "the work takes 300 s on worker-1: it may hang"),
        (
            (0.5, 0.5, 0.5),
            30.0,
            "the work takes 30 s on worker-1, the median is 0.5 s: it may hang",
        ),
        ((2.0, 20.0, 200.0), 200.0, "takes 200 s on worker-1, the median is 20 s: it may hang"),
    ],
)
def test_work_that_may_hang_is_reported_once_and_goes_on(caplog, took_s, slow_s, said):
    pool = started(2)
    events: list[tuple[str, dict[str, Any]]] = []
    pool.notify = lambda event, **fields: events.append((event, fields))
    for seconds in took_s:
        pool.send(0, "answer")
        pool.clock.time += seconds
        pool._wait(0.0)
    began = pool.clock.time
    pool.send(1)
    pool._wait(float("inf"))
    assert pool.clock.time == pytest.approx(began + slow_s) and events == [
        (
            "lease_slow",
            {
                "leases": ["the work"],
                "worker": "worker-1",
                "seconds": pytest.approx(slow_s),
                "median_s": sorted(took_s)[len(took_s) // 2] if took_s else None,
            },
        )
    ]
    assert said in caplog.text
    pool._wait(1000.0)
    assert len(events) == 1 and pool.lost == [] and pool.num_alive == 2


def on(node: str) -> WorkerInfo:
    return WorkerInfo("worker-0", "cpu", "here", 0, node)


def started_on(node: str) -> Pool:
    """A pool whose actor is on that node, which will stop; no loss is allowed."""
    pool = Pool(1, 1, max_losses=1)
    pool.answers = [on(node)]
    pool._start(10.0, 1)
    pool.clock.stopping = {node, "another"}
    return pool


def test_an_actor_leaves_a_node_that_will_stop_after_its_call():
    pool = started_on("a")
    events: list[tuple[str, dict[str, Any]]] = []
    pool.notify = lambda event, **fields: events.append((event, fields))
    pool.answers = [on("b")]
    pool.send(0)
    pool.send(0)
    pool._wait(0.0)
    assert len(pool.made_at) == 2 and pool.clock.killed == [] and pool.num_alive == 1
    pool._slots[0].calls[0].ref.answer = "answer"
    pool._wait(0.0)
    assert pool.lost == [("worker-0", 1, False)] and len(pool.clock.killed) == 1
    for _ in range(2):
        pool._wait(0.0)
        assert pool.infos == [on("b")] and pool.num_alive == 1 and len(pool.made_at) == 2
    assert pool.take_num_lost() == 0
    assert events == [("worker_moved", {"worker": "worker-0", "node": "a"})]


def test_an_actor_without_a_call_leaves_at_once():
    pool = started_on("a")
    pool.answers = [on("b")]
    pool._wait(0.0)
    pool._wait(0.0)
    assert pool.infos == [on("b")] and pool.lost == [("worker-0", 0, False)]


def test_an_actor_that_is_lost_with_a_node_that_was_to_stop_is_no_failure():
    pool = started_on("a")
    pool.answers = [None]
    pool.send(0)
    pool._wait(0.0)
    heir = pool._slots[0].heir
    pool._slots[0].calls[0].ref.answer = DIED
    pool._wait(0.0)
    assert pool.lost == [("worker-0", 1, False)] and pool.take_num_lost() == 0
    assert heir is not None
    assert pool._slots[0].setup is heir[1] and len(pool.made_at) == 2
    heir[1].answer = on("b")  # type: ignore[attr-defined]
    pool._wait(0.0)
    assert pool.infos == [on("b")] and pool.num_alive == 1


def test_a_pool_that_stops_kills_those_that_wait_too():
    pool = started_on("a")
    pool.answers = [None]
    pool._wait(0.0)
    pool.stop()
    assert len(pool.clock.killed) == 2


def like(computes_as: str, number: int = 0) -> WorkerInfo:
    return WorkerInfo(f"worker-{number}", "cpu", "there", 0, computes_as=computes_as)


@pytest.mark.parametrize("must_agree", [True, False])
def test_workers_that_compute_differently_are_refused_where_bytes_must_agree(must_agree):
    pool = Pool(2, 1)
    pool.must_agree = must_agree
    pool.answers = [like("H100, torch 2.14"), like("A100, torch 2.14", 1)]
    if must_agree:
        message = (
            r"allow_mixed_devices must be True .*worker-0 on there \(H100, torch 2.14\) and "
            r"worker-1 on there \(A100, torch 2.14\)"
        )
        with pytest.raises(MixedDevicesError, match=message):
            pool._start(10.0, 2)
    else:
        pool._start(10.0, 2)
        assert pool.num_alive == 2


@pytest.mark.parametrize("others", [0, 1])
def test_a_worker_that_joins_must_compute_as_those_before_it(others):
    pool = Pool(1 + others, 1, backoff_s=0.0)
    pool.must_agree = True
    pool.answers = [like("H100")] * (1 + others)
    pool._start(10.0, 1 + others)
    pool.send(0, DIED)
    pool.answers = [like("A100")]
    pool._wait(1.0)
    with pytest.raises(MixedDevicesError, match=r"\(H100\) and worker-0 on there \(A100\)"):
        pool._wait(1.0)
