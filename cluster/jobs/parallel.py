"""`in_parallel`: calls of one function on Ray, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray import cloudpickle, exceptions

from metadist.cluster.actors.connection import connected
from metadist.cluster.actors.errors import ClusterError, message
from metadist.cluster.actors.runtime_env import pickle_by_value

Item = TypeVar("Item")


def in_parallel(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    num_workers: int,
    *,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
) -> Iterator[tuple[int, Any]]:
    """(position, result) of every item as it is ready; a ClusterError in place of one lost.

    A call whose process or node dies is made again, so it must go on from what it left. What
    `function` raises is raised here.

    Args:
        function: picklable, and so its results.
        items: its arguments.
        num_workers: calls at a time, >= 1.
        cpus_per_worker: reserved for a call.
        gpus_per_worker: reserved for a call.
        address: of the cluster, see `RayExecutor`.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be >= 1, got {num_workers}")
    if not items:
        return
    with connected(address, num_workers * cpus_per_worker):
        call = ray.remote(_call).options(
            num_cpus=cpus_per_worker, num_gpus=gpus_per_worker, max_retries=2
        )
        payload = ray.put(pickle_by_value(function))
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
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
