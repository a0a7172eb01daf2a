"""Options that executors and jobs share: each is declared, described and checked here."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Workers:
    """The processes that compute, and what the cluster reserves for each of them.

    Args:
        num_workers: The number of workers, each one process with one piece of work at a time.
        min_workers: The number of workers with which a run starts; the others join when their
            resources appear, and Ray's autoscaler counts the missing ones as demand. None:
            `num_workers`.
        cpus_per_worker: The CPUs reserved for each worker, > 0.
        gpus_per_worker: The GPUs reserved for each worker, or a fraction of one. None: one where
            the cluster has one for each of `min_workers` at the start, an equal share where it has
            fewer, none where it has none or with Compute(device="cpu"); give a number if nodes
            with GPUs join later. In runs side by side (tune, compare) None is 0.
        start_timeout_s: How long to wait for free resources, and again for the workers.
        show_output: Whether to print what workers print, with Ray's own messages. Errors of user
            code come with their traceback in any case.
    """

    num_workers: int = 2
    min_workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    start_timeout_s: float = 60.0
    show_output: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be >= 1, got {self.num_workers}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers must be >= 1 and <= num_workers={self.num_workers}, or None for all "
                f"of them, got {self.min_workers}"
            )
        if not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker must be > 0, got {self.cpus_per_worker}")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker must be >= 0 or None, got {self.gpus_per_worker}")
        if not self.start_timeout_s > 0:
            raise ValueError(f"start_timeout_s must be > 0, got {self.start_timeout_s}")

    @property
    def num_at_start(self) -> int:
        """The number of workers with which a run starts."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def num_cpus(self) -> float:
        """The CPUs of all workers together."""
        return self.num_workers * self.cpus_per_worker


@dataclass(frozen=True)
class Server:
    """The parameter server, which owns x.

    Args:
        num_shards: The number of processes among which the server is divided, to the same bytes.
            The first runs on the driver's node, the second on another, and so on in turn (on nodes
            with a free GPU where `gpus_per_server` asks for one). More than one is for an x that is
            too large for the memory or network of one node; on one node they are no faster. A
            shard holds at least 65536 elements of x, and a problem with `project_outer` needs one
            shard.
        gpus_per_server: The GPUs reserved for each shard, or a fraction of one; with some, x is
            kept and stepped there, and with "nixl" goes from GPU to GPU. The result has other
            roundings than a step on the CPU. `gpus_per_worker` must be given then.
        timeout_s: A server that does not answer for longer is replaced; None: never.
        snapshot_every: The versions of x between the states that the driver keeps in shared memory
            in case the server is lost; later steps are then computed again. One costs the server
            about half the time of a step, and the driver's node the memory of two checkpoints.
    """

    num_shards: int = 1
    gpus_per_server: float = 0.0
    timeout_s: float | None = 300.0
    snapshot_every: int = 10

    def __post_init__(self) -> None:
        for name in ("num_shards", "snapshot_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.gpus_per_server < 0:
            raise ValueError(f"gpus_per_server must be >= 0, got {self.gpus_per_server}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(
                f"timeout_s of the server must be > 0 or None for no limit, got {self.timeout_s}"
            )


def check_kind(field: str, value: object, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is of that class."""
    if not isinstance(value, kind):
        raise ValueError(f"{field} must be a {kind.__name__}, such as {example}, got {value!r}")


JOB_UNUSED = ("min_workers", "start_timeout_s", "show_output")
"""The fields of `Workers` that runs side by side (tune, compare) do not use."""


def refuse_unused(workers: Workers, user: str, unused: tuple[str, ...]) -> None:
    """Raise ValueError for a field that `user` does not use and that has not its default value."""
    for field in fields(workers):
        value = getattr(workers, field.name)
        if field.name in unused and value != field.default:
            raise ValueError(
                f"{field.name} must be {field.default} with {user}, which does not use it, got "
                f"{value}: leave it out"
            )
