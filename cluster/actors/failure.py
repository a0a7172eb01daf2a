"""What is lost with an error of Ray, and what is done about it: decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ray import exceptions

from metadist.cluster.actors.errors import (
    ClusterError,
    LeaseError,
    ServerLostError,
    WorkerLostError,
    message,
)


class Loss(Enum):
    """What is lost with an error."""

    ACTOR = "the actor, or the answer that it gave"
    ARGUMENT = "something that the actor was sent; it lives"
    NOTHING = "a bug, or a fault that any other actor would meet too"


# By name, since older versions of Ray lack some; a test compares the lists with the installed Ray.
# fmt: off
LOSSES = (
    "RayActorError", "ActorDiedError", "ActorUnavailableError", "ActorUnschedulableError",
    "TaskUnschedulableError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError",
    "LocalRayletDiedError", "ObjectLostError", "ObjectFetchTimedOutError", "ObjectFreedError",
    "ObjectReconstructionFailedError", "OwnerDiedError", "ReferenceCountingAssertionError",
    "PlasmaObjectNotAvailable", "GetTimeoutError", "RpcError", "RayDirectTransportError",
)
FAULTS = (
    "RayError", "CrossLanguageError", "UserCodeException", "UnserializableException",
    "AuthenticationError", "RuntimeEnvSetupError", "ObjectStoreFullError", "OutOfDiskError",
    "TaskCancelledError", "AsyncioActorExit", "TaskPlacementGroupRemoved",
    "ActorPlacementGroupRemoved", "ActorAlreadyExistsError", "ActorHandleNotFoundError",
    "PendingCallsLimitExceeded", "ObjectRefStreamEndOfStreamError",
    "StreamingGeneratorReplayInconsistentError", "OufOfBandObjectRefSerializationException",
    "RayChannelError", "RayChannelTimeoutError", "RayCgraphCapacityExceeded",
)
# fmt: on
_IS_LOSS: dict[object, bool] = {
    **{getattr(exceptions, name, None): True for name in LOSSES},
    **{getattr(exceptions, name, None): False for name in FAULTS},
}


def loss_of(error: object) -> Loss:
    """What is lost with this error, in a process that called an actor."""
    if isinstance(error, exceptions.RayTaskError):
        # Ray raises a lost argument of a call as an error of the call.
        is_lost = loss_of(error.cause) is not Loss.NOTHING
        return Loss.ARGUMENT if is_lost else Loss.NOTHING
    if getattr(error, "actor_init_failed", False):
        return Loss.NOTHING
    for kind in type(error).__mro__:
        if kind in _IS_LOSS:
            return Loss.ACTOR if _IS_LOSS[kind] else Loss.NOTHING
        if kind is exceptions.RaySystemError:
            # It wraps whatever was raised while an answer was read. What Ray's core reports itself,
            # a dead raylet or a worker that did not start, comes as text.
            cause = error.client_exc  # type: ignore[attr-defined]
            return Loss.ACTOR if isinstance(cause, str) else loss_of(cause)
    return Loss.NOTHING


class Kind(NamedTuple):
    """What is said of actors of one kind that are lost too often.

    Args:
        goal: The success after which losses are counted from 0 again.
        error: Ends the run.
        advice: The likely causes, or a way out.
    """

    goal: str
    error: type[ClusterError]
    advice: str


_CAUSES = "the machine may lack memory, or the code may crash the process"
WORKER = Kind("completing a lease", WorkerLostError, _CAUSES)
SHARD = Kind("an answer", WorkerLostError, _CAUSES)
SERVER = Kind(
    "a new version of x",
    ServerLostError,
    "its machine may lack memory. The last checkpoint holds, resume from it",
)


class Event(NamedTuple):
    """A call that failed.

    Args:
        kind: The kind of actor.
        name: The name of the actor.
        work: What it was asked for, for example "lease 7 (tasks 7)"; None: to get ready.
        error: The error of Ray.
    """

    kind: Kind
    name: str
    work: str | None
    error: exceptions.RayError


class History(NamedTuple):
    """Losses in a row, this one included: of actors at this place, and over this work."""

    of_actor: int
    of_work: int = 0


class Retry(NamedTuple):
    """Ask the same actor again after a pause."""

    after_s: float


class Replace(NamedTuple):
    """Start another actor in its place after a pause."""

    after_s: float


class Raise(NamedTuple):
    """End the run with this error."""

    error: ClusterError


Decision = Retry | Replace | Raise


@dataclass(frozen=True)
class Failures:
    """How often and how soon lost workers, leases and servers are tried again.

    Args:
        max_losses: A worker, a lease or the server that is lost so often in a row ends the run.
        timeout_s: A worker that computes one lease, or answers one round, for longer is replaced;
            None: never.
        backoff_s: The pause before another attempt; it doubles with every loss in a row.
        max_backoff_s: The longest pause.
        all_lost_s: The run ends when it has been without workers for so long.
    """

    max_losses: int = 5
    timeout_s: float | None = None
    backoff_s: float = 0.5
    max_backoff_s: float = 10.0
    all_lost_s: float = 300.0

    def __post_init__(self) -> None:
        if self.max_losses < 1:
            raise ValueError(f"max_losses must be >= 1, got {self.max_losses}")
        for name in ("backoff_s", "max_backoff_s", "all_lost_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0 or None for no limit, got {self.timeout_s}")

    def decide(self, event: Event, history: History) -> Decision:
        """What to do about a call that failed; a pure function."""
        loss = loss_of(event.error)
        if loss is Loss.NOTHING:
            return Raise(_fault(event))
        if max(history) >= self.max_losses:
            return Raise(self._too_many(event, history))
        # The pause is that of the actor: work that kills its workers goes to another one at once.
        pause_s = min(self.max_backoff_s, self.backoff_s * 2.0 ** (history.of_actor - 1))
        return Retry(pause_s) if loss is Loss.ARGUMENT else Replace(pause_s)

    def _too_many(self, event: Event, history: History) -> ClusterError:
        what = f"{event.name} was lost {history.of_actor} times in a row without {event.kind.goal}"
        if history.of_work >= history.of_actor:
            what = f"{event.work} lost its worker {history.of_work} times"
        at = f", at {event.work}" if event.work else ""
        error = event.kind.error(
            f"{what}, max_losses={self.max_losses}: {event.kind.advice}. The last loss{at}: "
            f"{message(event.error)}"
        )
        error.__cause__ = event.error
        return error


def _fault(event: Event) -> ClusterError:
    """The error of the user's own code with its traceback, or what else no attempt can mend."""
    text = message(event.error)
    if event.work is None or not isinstance(event.error, exceptions.RayTaskError):
        error = ClusterError(f"{event.name} failed: {text}")
    else:
        error = LeaseError(f"{event.work} failed on {event.name}, with this error there:\n{text}")
    error.__cause__ = getattr(event.error, "cause", None)
    return error
