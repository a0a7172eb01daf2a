"""`errand`: one call of a function by a process of the cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray import cloudpickle, exceptions
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from metadist.cluster.actors.errors import ClusterError, message
from metadist.cluster.actors.runtime_env import pickle_by_value

T = TypeVar("T")


def errand(group: PlacementGroup, function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns with the resources of `group`; its warnings come here too.

    Raises:
        ClusterError: The process was lost.
        Exception: What the function raises.
    """
    bundle = group.bundle_specs[0]
    task: Any = ray.remote(_run).options(
        num_cpus=bundle["CPU"],
        max_retries=2,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    try:
        found, told = ray.get(task.remote(pickle_by_value((function, arguments))))
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    except exceptions.RayError as error:
        name = getattr(function, "__name__", "a function")
        raise ClusterError(
            f"the process that called `{name}` was lost: its machine may lack memory, or the code "
            f"may crash the process. {message(error)}"
        ) from error
    for category, text in told:
        warnings.warn(text, category, stacklevel=4)  # the call of the executor
    answer: T = found
    return answer


def _run(payload: bytes) -> tuple[Any, list[tuple[type[Warning], str]]]:
    function, arguments = cloudpickle.loads(payload)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = function(*arguments)
    return found, [(told.category, str(told.message)) for told in caught]
