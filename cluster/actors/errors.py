"""The errors that end a run on a cluster.

RuntimeError
  ClusterError
    ConnectError       the cluster cannot be reached
    ResourcesError     it has too few CPUs or GPUs
    MixedDevicesError  workers on different hardware or libraries would give different bytes
    LeaseError         user code raised an exception on a worker or on the parameter server
    WorkerLostError    workers die again and again
    ServerLostError    the parameter server dies again and again, or cannot start
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class ClusterError(RuntimeError):
    """Base of the errors of metadist.cluster."""


class ConnectError(ClusterError):
    """The cluster cannot be reached."""


class ResourcesError(ClusterError):
    """The cluster has too few CPUs or GPUs for the workers."""


class MixedDevicesError(ClusterError):
    """Results would depend on which worker computed them, since hardware or libraries differ."""


class LeaseError(ClusterError):
    """User code raised; the message has its traceback, `__cause__` the exception."""


class WorkerLostError(ClusterError):
    """Workers die again and again without completing a lease."""


class ServerLostError(ClusterError):
    """The parameter server dies again and again without a new version of x, or cannot start."""


@contextmanager
def exits_raised() -> Iterator[None]:
    """Within the block `sys.exit` is an error of user code, and not the loss of the actor."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"somebody's code called sys.exit({error.code!r})") from error


def message(error: BaseException) -> str:
    """The text of an error of Ray, without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
