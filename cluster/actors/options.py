"""Options that executors and jobs share: each is declared, described and checked here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from metadist.checks.values import check_fields, rule


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
        start_timeout_s: How long to wait for free resources, and again for the workers. What a
            cluster of our own on this machine does not have at all, or no node of another cluster
            without an autoscaler, is not waited for.
        allow_mixed_devices: Whether workers may differ in hardware, versions of torch, CUDA and
            cuDNN, or flags of these. Where a result has the same bytes whichever worker computes
            what (policy "bsp"; `DataParallelExecutor` without staleness), that holds for equal
            workers alone, and others are refused unless this gives it up.
        show_output: Whether to print what workers print, with Ray's own messages. Errors of user
            code come with their traceback in any case.
    """

    num_workers: int = rule(2, ge=1)
    min_workers: int | None = rule(None, ge=1, none="for all of them")
    cpus_per_worker: float = rule(1.0, gt=0)
    gpus_per_worker: float | None = rule(None, ge=0, none="")
    start_timeout_s: float = rule(300.0, gt=0)
    allow_mixed_devices: bool = False
    show_output: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_at_start > self.num_workers:
            raise ValueError(
                f"min_workers must be <= num_workers={self.num_workers}, or None for all of them, "
                f"got {self.min_workers}"
            )

    @property
    def num_at_start(self) -> int:
        """The number of workers with which a run starts."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def bundle(self) -> dict[str, float]:
        """What is reserved for a worker of which `gpus_per_worker` is known; None is 0."""
        return {"CPU": float(self.cpus_per_worker), "GPU": float(self.gpus_per_worker or 0.0)}

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
        snapshot_every: The versions of x between the states that the driver keeps in its memory in
            case the server is lost; later steps are then computed again. One costs the server about
            half the time of a step, the driver that of a copy, and the driver's node the memory of
            two checkpoints.
    """

    num_shards: int = rule(1, ge=1)
    gpus_per_server: float = rule(0.0, ge=0)
    timeout_s: float | None = rule(300.0, gt=0, none="for no limit")
    snapshot_every: int = rule(10, ge=1)

    def __post_init__(self) -> None:
        check_fields(self)


def check_kind(field: str, value: object, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is of that class."""
    if not isinstance(value, kind):
        raise ValueError(f"{field} must be a {kind.__name__}, such as {example}, got {value!r}")


JOB_UNUSED = ("min_workers", "start_timeout_s", "allow_mixed_devices", "show_output")
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
