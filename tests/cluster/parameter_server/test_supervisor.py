"""`Supervisor` alone: what follows from each loss of the server, without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray import exceptions

from metadist.cluster import LeaseError, ServerLostError
from metadist.cluster.actors.buffers import PackedState
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.options import Server
from metadist.cluster.parameter_server.supervisor import ServerGone, SumLost, Supervisor
from tests.cluster.dummy import DummyRuntime

FULL = exceptions.OutOfMemoryError("the node is full")


def state(version: int) -> Any:
    return PackedState(None, {}, version, 0, (), {}, {})  # type: ignore[arg-type]


class Actor:
    """Answers every call with `answers` in turn, else with the version that it was set up with."""

    def __init__(self, clock: DummyRuntime, answers: list[Any]) -> None:
        self._clock = clock
        self.answers = answers
        self.version: Any = self
        self.setup: Any = self
        self.state: Any = self
        self.resumed_from: int | None = None

    def remote(self, *arguments: Any) -> Any:
        if arguments:
            self.resumed_from = arguments[0].answer.version
        return self._clock.put(self.answers.pop(0) if self.answers else state(7))


@pytest.fixture
def start():
    """Makes a supervisor with a server of version 7, whose answers, of all servers, are a list."""

    def start(answers: list[Any] | None = None, num_shards: int = 1, **failures: Any):
        clock = DummyRuntime()
        answers = [] if answers is None else answers
        supervisor = Supervisor(
            lambda _: Actor(clock, answers),
            Failures(**failures),
            Server(num_shards=num_shards, timeout_s=5.0),
            60.0,
            clock,
        )
        supervisor.start([state(7)] * num_shards, [None] * num_shards)  # type: ignore[list-item]
        return supervisor, answers, clock

    return start


def test_a_server_that_is_lost_while_it_starts_is_replaced(start):
    supervisor, _, clock = start(answers=[exceptions.ActorDiedError()])
    assert len(clock.killed) == 1 and supervisor.server is not clock.killed[0]
    assert supervisor.server.resumed_from == 7
    with pytest.raises(ServerLostError, match="max_losses=2"):
        start(answers=[FULL] * 9, max_losses=2)


def test_a_server_that_does_not_answer_while_it_starts_ends_the_run(start):
    with pytest.raises(ServerLostError, match=r"could not start: .* 60 s"):
        start(answers=[None])


LOSSES = [
    FULL,
    exceptions.ActorDiedError(),
    exceptions.NodeDiedError("gone"),
    exceptions.ActorUnschedulableError("its node is gone"),
    exceptions.WorkerCrashedError(),
    exceptions.OwnerDiedError("ab", None, ""),
    None,
]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: type(error).__name__)
def test_a_lost_server_is_replaced_by_one_that_resumes_from_the_snapshot(start, error):
    supervisor, answers, clock = start()
    first, began = supervisor.server, clock.time
    answers.append(error)
    with pytest.raises(ServerGone) as caught:
        supervisor.ask(supervisor.versions())
    waited_s = 0.0 if error else 5.0
    supervisor.replace(caught.value)
    assert clock.killed == [first] and supervisor.server is not first
    assert supervisor.server.resumed_from == 7
    assert clock.time == began + waited_s + 0.5
    assert (supervisor.take_num_lost(), supervisor.take_num_lost()) == (1, 0)


def test_pauses_double_and_servers_that_die_again_and_again_end_the_run(start):
    supervisor, answers, clock = start(max_losses=4)
    began = clock.time
    answers += [FULL] * 4
    with pytest.raises(ServerGone) as caught:
        supervisor.ask(supervisor.versions())
    with pytest.raises(ServerLostError, match=r"was lost 4 times in a row .*the node is full"):
        supervisor.replace(caught.value)
    assert clock.time == began + 0.5 + 1.0 + 2.0


def test_a_new_version_of_x_forgives_the_losses_before_it(start):
    supervisor, answers, _ = start(max_losses=2)
    for version in (8, 9, 10):
        answers.append(FULL)
        with pytest.raises(ServerGone) as caught:
            supervisor.ask(supervisor.versions())
        supervisor.replace(caught.value)
        supervisor.stepped(version)


def test_a_sum_that_was_lost_on_the_way_leaves_the_server_alone(start):
    supervisor, answers, clock = start()
    answers.append(exceptions.RayTaskError("apply", "", exceptions.ObjectLostError("ab", None, "")))
    with pytest.raises(SumLost):
        supervisor.ask(supervisor.versions())
    assert clock.killed == [] and supervisor.take_num_lost() == 0


def test_an_error_of_user_code_ends_the_run(start):
    supervisor, answers, _ = start()
    answers.append(exceptions.RayTaskError("apply", "in project_outer", ZeroDivisionError("by 0")))
    message = "the step from version 7 failed on the parameter server, with this error there:\nin p"
    with pytest.raises(LeaseError, match=message):
        supervisor.ask(supervisor.versions())


def test_a_snapshot_that_is_lost_on_the_way_is_left_out(start):
    supervisor, answers, _ = start()
    answers.append(FULL)
    supervisor.stepped(17)  # asks for one
    supervisor.stepped(18)
    assert supervisor._snapshot[0].version == 7
    supervisor.stepped(27)
    supervisor.stepped(28)
    assert supervisor._fetching == []


def test_a_server_that_is_silent_while_nobody_asks_is_noticed(start):
    supervisor, answers, clock = start()
    answers.append(None)
    assert supervisor.check() == 2.5
    clock.time += 2.6
    assert supervisor.check() == 2.5
    clock.time += 5.1
    with pytest.raises(ServerGone, match="no answer for 5 s"):
        supervisor.check()


@pytest.mark.parametrize("max_losses", [1, 5])
def test_a_server_of_the_last_run_that_is_gone_is_no_loss(start, max_losses):
    supervisor, answers, _ = start(max_losses=max_losses)
    answers.append(FULL)
    supervisor.start([state(9)], [None])
    assert supervisor.server.resumed_from == 9
    answers += [FULL] * (1 + max_losses)
    with pytest.raises(ServerLostError):
        supervisor.start([state(9)], [None])


@pytest.mark.parametrize("torn", ["state", "last_state"])
def test_shards_of_two_versions_are_no_state(start, torn):
    supervisor, answers, _ = start(num_shards=2)
    answers += [state(9), state(8)]
    if torn == "last_state":
        assert [part.version for part in supervisor.last_state(5.0)] == [7, 7]
        return
    with pytest.raises(ServerGone, match=r"its shards have versions \[8, 9\] of x"):
        supervisor.state()
    answers += [state(9), state(9)]
    assert [part.version for part in supervisor.last_state(5.0)] == [9, 9]


def test_a_snapshot_in_two_versions_is_left_out(start):
    supervisor, answers, _ = start(num_shards=2)
    answers += [state(17), state(16)]
    supervisor.stepped(17)
    supervisor.stepped(18)
    assert supervisor._snapshot[0].version == 7


@pytest.mark.parametrize("lost", [FULL, None, "gone", "no server"])
def test_the_last_state_of_a_lost_server_is_the_snapshot(start, lost):
    supervisor, answers, clock = start()
    began = clock.time
    clock.gone = lost == "gone"
    if lost == "no server":
        supervisor.stop()
    answers.append(None if clock.gone else lost)
    assert supervisor.last_state(4.0)[0].version == 7
    assert clock.time - began == (4.0 if lost is None else 0.0)
    assert len(clock.killed) == (lost == "no server"), "it starts and stops nothing"


def test_a_server_leaves_a_node_that_will_stop_once_and_that_is_no_loss(start):
    supervisor, answers, clock = start(answers=["a"])
    first = supervisor.server
    assert not supervisor.take_notice() and not supervisor.leave_nodes()
    clock.stopping = {"a", "another"}
    assert not supervisor.leave_nodes()  # before a checkpoint was asked for
    assert [supervisor.take_notice(), supervisor.take_notice()] == [True, False]
    answers += [state(9), "a"]
    assert supervisor.leave_nodes()
    assert clock.killed == [first] and supervisor.server.resumed_from == 9
    assert not supervisor.leave_nodes()  # though it was set up there again
    assert supervisor.take_num_lost() == 0


def test_a_server_stays_with_a_driver_whose_node_will_stop(start):
    supervisor, _, clock = start(answers=["driver's"])
    clock.stopping = {"driver's"}
    assert supervisor.take_notice() and not supervisor.leave_nodes()
    assert clock.killed == []


def test_a_server_that_is_lost_with_a_node_that_was_to_stop_is_no_failure(start):
    supervisor, answers, clock = start(answers=["a"], max_losses=2)
    clock.stopping = {"a"}
    for _ in range(4):
        answers += [FULL, "a"]
        with pytest.raises(ServerGone) as caught:
            supervisor.ask(supervisor.versions())
        supervisor.replace(caught.value)


class Pair:
    """Two shards, the second of which is interrupted as it is sent its commit."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.interrupts = 1

    def shard(self, number: int) -> Any:
        pair = self

        class Commit:
            def options(self, **_: Any) -> Any:
                return self

            def remote(self, norm: float) -> Any:
                if number == 1 and pair.interrupts:
                    pair.interrupts -= 1
                    raise KeyboardInterrupt
                pair.committed.append(number)

        class Shard:
            commit = Commit()

        return Shard()


def test_an_interruption_between_commits_leaves_no_shard_behind(start):
    supervisor, _, _ = start()
    pair = Pair()
    supervisor.servers = [pair.shard(0), pair.shard(1), pair.shard(2)]
    with pytest.raises(KeyboardInterrupt):
        supervisor._commit(1.0)
    assert pair.committed == [0, 1, 2]
