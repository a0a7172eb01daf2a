"""`ShardPool` with workers in this process, whose replies are lost as the test says."""

from __future__ import annotations

from typing import Any

import pytest
from ray import exceptions

from metadist.cluster import LeaseError, WorkerLostError
from tests.cluster.data_parallel.shards import InProcess, bytes_of, solve
from tests.cluster.data_parallel.test_executor import ALL

DIED = exceptions.ActorDiedError()
FULL = exceptions.OutOfMemoryError("the node is full")
ARGUMENT = exceptions.RayTaskError("compute", "", exceptions.OwnerDiedError("ab", None, ""))


def started() -> tuple[InProcess, Any]:
    """(an executor after one step, the slot of its second worker)."""
    executor = InProcess(3)
    solve(executor, ALL["fsla"], 1, batch_size=8)
    return executor, executor.pool._slots[1]


@pytest.mark.parametrize(
    ("faults", "num_lost"),
    [([DIED], 1), ([FULL], 1), ([None], 1), ([ARGUMENT], 0), ([ARGUMENT, ARGUMENT, DIED], 1)],
    ids=["died", "out of memory", "hangs", "argument", "three in a row"],
)
def test_a_lost_reply_changes_no_byte_and_the_shard_is_sent_all_trees_again(faults, num_lost):
    expected, _ = solve(InProcess(3), ALL["fsla"], 4, batch_size=8)
    executor, slot = started()
    first = slot.actor
    first.faults += faults
    round_number = len(executor.pool.packages)
    reports = list(executor.run(4))
    assert bytes_of(executor.state()) == bytes_of(expected)
    assert [report.lost_workers for report in reports] == [num_lost, 0, 0]
    assert (slot.actor is first) == (num_lost == 0)
    assert slot.num_losses == 0
    sent = executor.pool.packages[round_number]
    assert len(sent) == 3 + len(faults)
    needed = {key for request in sent[-1].message.requests for key in request.trees}
    assert sent[-1].shared.keys() == needed > sent[0].shared.keys()


def test_pauses_end_before_the_next_try():
    executor, slot = started()
    began = executor.pool._runtime.now()
    slot.actor.faults += [ARGUMENT, ARGUMENT, DIED]
    list(executor.run(2))
    assert executor.pool._runtime.now() == began + 0.5 + 1.0 + 2.0


def test_replies_that_are_lost_again_and_again_end_the_run():
    executor, slot = started()
    slot.actor.faults += [ARGUMENT] * 5
    message = "shard 1 lost its worker 5 times, max_losses=5: the machine"
    with pytest.raises(WorkerLostError, match=message):
        list(executor.run(2))


def raised(cause):
    return exceptions.RayTaskError("compute", "in strike", cause)


def test_an_error_of_user_code_that_passes_changes_no_byte_and_is_reported():
    expected, _ = solve(InProcess(3), ALL["fsla"], 4, batch_size=8)
    executor, slot = started()
    first, began = slot.actor, executor.pool._runtime.now()
    # With OSErrors in between, a type may not come twice.
    first.faults += [raised(TimeoutError("disk")), raised(TimeoutError("disk")), raised(KeyError())]
    reports = list(executor.run(4))
    assert bytes_of(executor.state()) == bytes_of(expected)
    assert slot.actor is first and all(report.lost_workers == 0 for report in reports)
    assert executor.pool._runtime.now() == began + 0.5 + 1.0 + 2.0
    error = "shard 1 on worker-1: TimeoutError: disk"
    assert [report.retried for report in reports] == [
        (error, error, "shard 1 on worker-1: KeyError: "),
        (),
        (),
    ]


def test_an_error_of_user_code_that_comes_again_ends_the_run():
    executor, slot = started()
    slot.actor.faults += [raised(ZeroDivisionError()), raised(ZeroDivisionError())]
    message = "shard 1 failed on worker-1, with this error there, attempt 2:\nin s"
    with pytest.raises(LeaseError, match=message):
        list(executor.run(2))


def test_an_answer_forgives_the_errors_before_it():
    executor, slot = started()
    for step in (2, 3, 4):
        slot.actor.faults.append(raised(ZeroDivisionError()))
        list(executor.run(step))
