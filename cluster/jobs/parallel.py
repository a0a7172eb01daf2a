"""`in_parallel`: calls of one function on Ray, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray import cloudpickle, exceptions

from metadist.cluster.actors.connection import check_room, connected
from metadist.cluster.actors.errors import ClusterError, message
from metadist.cluster.actors.options import JOB_UNUSED, Workers, refuse_unused
from metadist.cluster.actors.runtime_env import pickle_by_value

Item = TypeVar("Item")


def in_parallel(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    workers: Workers,
    *,
    address: str | None = None,
) -> Iterator[tuple[int, Any]]:
    """(position, result) of every item as it is ready; a ClusterError in place of a lost one.

    A call whose process or node dies is repeated, so it must resume from what it left behind. An
    error that `function` raises is raised here.

    Args:
        function: The function; it and its results must be picklable.
        items: Its arguments.
        workers: How many calls run at a time, and what is reserved for each.
        address: The address of the cluster, see `RayExecutor`.
    """
    refuse_unused(workers, "runs side by side", JOB_UNUSED)
    if not items:
        return
    with connected(address, workers.num_cpus):
        check_room(workers.bundle, f"num_workers={workers.num_workers}")
        call = ray.remote(_call).options(
            num_cpus=workers.cpus_per_worker,
            num_gpus=workers.gpus_per_worker or 0.0,
            max_retries=2,
        )
        payload = ray.put(pickle_by_value(function))
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers.num_workers:
                    position, item = waiting.pop()
                    running[call.remote(payload, pickle_by_value(item))] = position
                (done,), _ = ray.wait(list(running))
                position = running.pop(done)
                try:
                    yield position, cloudpickle.loads(ray.get(done))
                except exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except exceptions.RayError as error:
                    yield position, ClusterError(f"the process of the call died: {message(error)}")
        finally:
            for call_ref in running:
                ray.cancel(call_ref, force=True)


def _call(function: bytes, item: bytes) -> bytes:
    return bytes(cloudpickle.dumps(cloudpickle.loads(function)(cloudpickle.loads(item))))
