"""What is lost with an error of Ray, and what is done about it: decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ray import exceptions

from metadist.checks.values import check_fields, rule
from metadist.cluster.actors.errors import (
    ClusterError,
    LeaseError,
    ServerLostError,
    WorkerLostError,
    message,
)
from metadist.memory import DeviceMemoryError
from metadist.retry import is_worth_a_try, pause_after


class Loss(Enum):
    """What is lost with an error."""

    ACTOR = "the actor, or the answer that it gave"
    ARGUMENT = "something that the actor was sent; it lives"
    NOTHING = "a bug, or a fault that any other actor would meet too"


_LOSSES = (
    exceptions.RayActorError,
    exceptions.ActorUnschedulableError,
    exceptions.TaskUnschedulableError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError,
    exceptions.PlasmaObjectNotAvailable,
    exceptions.GetTimeoutError,
    exceptions.RpcError,
    exceptions.RaySystemError,
)
"""With the classes that derive from these; a test names each class that Ray has."""


def loss_of(error: object) -> Loss:
    """What is lost with this error, in a process that called an actor."""
    if isinstance(error, exceptions.RayTaskError):
        # Ray raises a lost argument of a call as an error of the call.
        is_lost = loss_of(error.cause) is not Loss.NOTHING
        return Loss.ARGUMENT if is_lost else Loss.NOTHING
    cause = getattr(error, "client_exc", None)
    if isinstance(error, exceptions.RaySystemError) and isinstance(cause, BaseException):
        # It was raised while an answer was read. Ray's own errors, such as a dead raylet, are text.
        return loss_of(cause)
    is_lost = isinstance(error, _LOSSES) and not getattr(error, "actor_init_failed", False)
    return Loss.ACTOR if is_lost else Loss.NOTHING


class Kind(NamedTuple):
    """What a message says of lost actors: `goal` is the success that resets the count of losses."""

    goal: str
    error: type[ClusterError]
    advice: str


_CAUSES = "the machine may lack memory, or the code may crash the process"
_RESUME = "its machine may lack memory. The last checkpoint holds, resume from it"
WORKER = Kind("completing a lease", WorkerLostError, _CAUSES)
SHARD = Kind("an answer", WorkerLostError, _CAUSES)
SERVER = Kind("a new version of x", ServerLostError, _RESUME)


class Event(NamedTuple):
    """A call that failed: of the actor `name`, about `work`; None: it was being set up."""

    kind: Kind
    name: str
    work: str | None
    error: exceptions.RayError

    @property
    def is_of_user(self) -> bool:
        """Whether user code raised it in work that can be done again.

        The server's state may be half changed by then, so its work cannot.
        """
        return (
            isinstance(self.error, exceptions.RayTaskError)
            and loss_of(self.error) is Loss.NOTHING
            and self.work is not None
            and self.kind is not SERVER
        )

    @property
    def cause(self) -> object:
        """What was raised there."""
        return getattr(self.error, "cause", None) or self.error


class History(NamedTuple):
    """Losses in a row, this one included: of actors at this place, and over this work.

    `errors` are the types of the errors that user code raised in this work before.
    """

    of_actor: int
    of_work: int = 0
    errors: tuple[str, ...] = ()


class Repeat(NamedTuple):
    """Do the same work again after a pause: user code raised, and nothing is lost."""

    after_s: float


class Retry(NamedTuple):
    """Ask the same actor again after a pause."""

    after_s: float


class Replace(NamedTuple):
    """Start another actor in its place after a pause."""

    after_s: float


class Raise(NamedTuple):
    """End the run with this error."""

    error: ClusterError


Decision = Repeat | Retry | Replace | Raise


@dataclass(frozen=True)
class Failures:
    """How often and how soon lost workers, leases and servers are tried again.

    Args:
        max_losses: A worker, a lease or the server that is lost so often in a row ends the run.
        max_user_errors: How often the same lease, or the answer of the same shard, is tried again
            after your own code has raised an exception there, such as an OSError of a network disk.
            An exception of a type that this lease has raised before ends the run at once, since it
            would come for ever; an OSError does so only after all tries. 0: every exception ends
            the run.
        timeout_s: A worker that computes one lease, or answers one round, for longer is replaced;
            None: never. Tasks of an evaluation have this time each.
        backoff_s: The pause before another attempt; it doubles with every loss in a row.
        max_backoff_s: The longest pause.
        all_lost_s: The run ends when it has been without workers for so long.
    """

    max_losses: int = rule(5, ge=1)
    max_user_errors: int = rule(3, ge=0)
    timeout_s: float | None = rule(None, gt=0, none="for no limit")
    backoff_s: float = rule(0.5, ge=0)
    max_backoff_s: float = rule(10.0, ge=0)
    all_lost_s: float = rule(300.0, ge=0)

    def __post_init__(self) -> None:
        check_fields(self)

    def decide(self, event: Event, history: History) -> Decision:
        """What to do about a call that failed; a pure function."""
        loss = loss_of(event.error)
        if loss is Loss.NOTHING:
            num_errors = len(history.errors)
            if not event.is_of_user or not is_worth_a_try(
                event.cause, history.errors, self.max_user_errors
            ):
                return Raise(_fault(event, num_errors + 1))
            return Repeat(self._pause_s(num_errors))
        if max(history.of_actor, history.of_work) >= self.max_losses:
            return Raise(self._too_many(event, history))
        # The pause is that of the actor: work that kills its workers goes to another one at once.
        pause_s = self._pause_s(history.of_actor - 1)
        return Retry(pause_s) if loss is Loss.ARGUMENT else Replace(pause_s)

    def _pause_s(self, num_before: int) -> float:
        return pause_after(num_before, self.backoff_s, self.max_backoff_s)

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


def _fault(event: Event, attempt: int) -> ClusterError:
    """The error of the user's own code with its traceback, or what else no attempt can mend."""
    text = message(event.error)
    if isinstance(event.cause, DeviceMemoryError):
        text = str(event.cause)
    if event.work is None or not isinstance(event.error, exceptions.RayTaskError):
        error = ClusterError(f"{event.name} failed: {text}")
    else:
        there = "there" if attempt == 1 else f"there, attempt {attempt}"
        error = LeaseError(f"{event.work} failed on {event.name}, with this error {there}:\n{text}")
    error.__cause__ = getattr(event.error, "cause", None)
    return error
