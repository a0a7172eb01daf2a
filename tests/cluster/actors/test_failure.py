"""`Failures.decide` as a table: every error that Ray knows, without a process."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from ray import exceptions

from metadist.cluster import LeaseError, ServerLostError, WorkerLostError
from metadist.cluster.actors.errors import ClusterError
from metadist.cluster.actors.failure import (
    SERVER,
    SHARD,
    WORKER,
    Decision,
    Event,
    Failures,
    History,
    Raise,
    Repeat,
    Replace,
    Retry,
)
from metadist.memory import DeviceMemoryError

LEASE = "lease 7 (tasks 14, 15)"


# fmt: off
LOSSES = (
    "RayActorError", "ActorDiedError", "ActorUnavailableError", "ActorUnschedulableError",
    "TaskUnschedulableError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError",
    "LocalRayletDiedError", "ObjectLostError", "ObjectFetchTimedOutError", "ObjectFreedError",
    "ObjectReconstructionFailedError", "OwnerDiedError", "ReferenceCountingAssertionError",
    "PlasmaObjectNotAvailable", "GetTimeoutError", "RpcError", "RaySystemError",
    "RayDirectTransportError", "RayChannelError", "RayChannelTimeoutError",
    "ObjectReconstructionFailedMaxAttemptsExceededError",  # of older versions
    "ObjectReconstructionFailedLineageEvictedError",
)
FAULTS = (
    "RayError", "CrossLanguageError", "UserCodeException", "UnserializableException",
    "AuthenticationError", "RuntimeEnvSetupError", "ObjectStoreFullError", "OutOfDiskError",
    "TaskCancelledError", "AsyncioActorExit", "TaskPlacementGroupRemoved",
    "ActorPlacementGroupRemoved", "ActorAlreadyExistsError", "ActorHandleNotFoundError",
    "PendingCallsLimitExceeded", "ObjectRefStreamEndOfStreamError",
    "OufOfBandObjectRefSerializationException",
)
# Nothing here uses the channels and generators that raise these.
UNUSED = ("StreamingGeneratorReplayInconsistentError", "RayCgraphCapacityExceeded")
# fmt: on


def instance(name: str, **fields: object) -> Any:
    """An error of this class, whatever its constructor asks for."""
    if not hasattr(exceptions, name):
        pytest.skip(f"this Ray has no {name}")
    kind = getattr(exceptions, name)
    error = kind.__new__(kind)
    texts = dict.fromkeys(("message", "error_msg", "client_exc", "_original_stack_trace"), "")
    error.__dict__.update({**texts, **fields})
    return error


def raised_there(cause: BaseException) -> exceptions.RayTaskError:
    """What the driver gets when a call raises `cause` in its actor."""
    try:
        raise cause
    except type(cause):
        text = traceback.format_exc()
    return exceptions.RayTaskError("compute", text, cause).as_instanceof_cause()


def decide(error: Any, history: History = History(1), **options: Any) -> Decision:  # noqa: B008
    event = Event(WORKER, "worker-1", LEASE, error)
    return Failures(**options).decide(event, history)


def test_every_error_of_ray_is_classified():
    of_ray = {
        name
        for name, value in vars(exceptions).items()
        if isinstance(value, type) and issubclass(value, exceptions.RayError)
    }
    assert of_ray <= {*LOSSES, *FAULTS, *UNUSED, "RayTaskError"}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_lost_is_replaced_and_a_lost_argument_is_sent_again(name):
    error = instance(name, _actor_init_failed=False)
    assert decide(error) == Replace(0.5)
    assert decide(exceptions.RayTaskError("compute", "", error)) == Retry(0.5)


@pytest.mark.parametrize("name", FAULTS)
def test_what_no_other_actor_can_mend_ends_the_run(name):
    error = instance(name, task_id=None, error_message="", traceback_str="")
    decision = decide(error)
    assert isinstance(decision, Raise) and type(decision.error) is ClusterError
    assert str(decision.error).startswith("worker-1 failed: ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.RaySystemError("the raylet is gone"), Replace(0.5)),
        (exceptions.RaySystemError(exceptions.OwnerDiedError("ab", None, ""), "at"), Replace(0.5)),
        (exceptions.RaySystemError(ImportError("no module"), "at line 1"), Raise),
        (raised_there(exceptions.OutOfMemoryError("the node is full")), Retry(0.5)),
        (raised_there(torch.OutOfMemoryError("the GPU is full")), Repeat(0.5)),
        (exceptions.ActorDiedError(exceptions.RayTaskError("init", "", ImportError())), Raise),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_carries_another_is_what_that_one_is(error, expected):
    decision = decide(error)
    assert decision == expected or type(decision) is expected


BROKEN_PIPE, TIMEOUT, ZERO = "builtins.BrokenPipeError", "builtins.TimeoutError", "x.ZeroError"


@pytest.mark.parametrize(
    ("kind", "work", "error", "errors", "expected"),
    [
        (WORKER, LEASE, ZeroDivisionError("0"), (), Repeat(0.5)),
        (WORKER, LEASE, ZeroDivisionError("0"), ("builtins.ZeroDivisionError",), Raise),
        (WORKER, LEASE, ZeroDivisionError("0"), (ZERO,), Repeat(1.0)),
        (WORKER, LEASE, TimeoutError("no answer"), (TIMEOUT, BROKEN_PIPE), Repeat(2.0)),
        (WORKER, LEASE, TimeoutError("no answer"), (TIMEOUT,) * 3, Raise),
        (WORKER, LEASE, OSError(116, "stale handle"), ("builtins.OSError",), Repeat(1.0)),
        (WORKER, LEASE, FileNotFoundError("x.pt"), (), Repeat(0.5)),
        (WORKER, LEASE, FileNotFoundError("x.pt"), ("builtins.FileNotFoundError",), Raise),
        (WORKER, LEASE, PermissionError("x.pt"), ("builtins.PermissionError",), Raise),
        (WORKER, None, OSError("the setup"), (), Raise),
        (SHARD, "shard 2", BlockingIOError("busy"), (), Repeat(0.5)),
        (SHARD, "shard 2", KeyError("a"), ("builtins.KeyError",), Raise),
        (SERVER, "the step from version 3", OSError("x may be half stepped"), (), Raise),
    ],
)
def test_an_error_of_user_code_is_repeated_until_it_comes_again(
    kind, work, error, errors, expected
):
    event = Event(kind, "worker-1", work, raised_there(error))
    # Losses of actors do not count here, nor the other way round.
    decision = Failures().decide(event, History(5, 5, errors))
    assert decision == expected or type(decision) is expected
    if isinstance(decision, Raise) and work is not None:
        attempt = f", attempt {len(errors) + 1}" if errors else ""
        assert f"{work} failed on worker-1, with this error there{attempt}:" in str(decision.error)


def test_an_error_without_tries_ends_at_once_with_its_traceback():
    error = raised_there(ZeroDivisionError("nothing left"))
    decision = decide(error, max_losses=100, max_user_errors=0)
    assert isinstance(decision, Raise) and type(decision.error) is LeaseError
    text = str(decision.error)
    assert text.startswith(f"{LEASE} failed on worker-1, with this error there:\n")
    assert "raise cause" in text and "nothing left" in text
    assert type(decision.error.__cause__) is ZeroDivisionError


def test_pauses_double_up_to_a_limit():
    error = exceptions.NodeDiedError("gone")
    options = {"backoff_s": 0.5, "max_backoff_s": 3.0, "max_losses": 9}
    found = [decide(error, History(n, 8), **options) for n in (1, 2, 3, 4, 5)]
    assert found == [Replace(s) for s in (0.5, 1, 2, 3, 3)]


@pytest.mark.parametrize(
    ("kind", "history", "error", "text"),
    [
        (WORKER, History(2), WorkerLostError, "NAME was lost 2 times in a row without completing "),
        (WORKER, History(1, 2), WorkerLostError, "WORK lost its worker 2 times, max_losses=2: the"),
        (WORKER, History(2, 2), WorkerLostError, "WORK lost its worker 2 times, max_losses=2: the"),
        (SHARD, History(2), WorkerLostError, "NAME was lost 2 times in a row without an answer, "),
        (SERVER, History(3), ServerLostError, "NAME was lost 3 times in a row without a new vers"),
    ],
)
def test_too_many_losses_in_a_row_end_the_run(kind, history, error, text):
    lost = exceptions.OutOfMemoryError("the node is full")
    decision = Failures(max_losses=2).decide(Event(kind, "NAME", "WORK", lost), history)
    assert isinstance(decision, Raise) and type(decision.error) is error
    assert str(decision.error).startswith(text)
    assert str(decision.error).endswith("The last loss, at WORK: the node is full")
    assert decision.error.__cause__ is lost


def test_a_gpu_without_memory_ends_the_run_at_once_and_loses_no_worker():
    error = raised_there(DeviceMemoryError("tasks_per_lease must be lower"))
    decision = decide(error, History(0))
    assert isinstance(decision, Raise) and isinstance(decision.error, LeaseError)
    assert str(decision.error) == (
        f"{LEASE} failed on worker-1, with this error there:\ntasks_per_lease must be lower"
    )
