"""Whether tasks are computed together, and how many.

A call under vmap costs nearly the same for one small task as for many, until what it works on
leaves the cache of a CPU; a GPU gains from all that its memory holds. So the sizes of a task
decide, and nothing else: neither time nor the number of workers, so that every process finds the
same number.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metadist.algorithm import Algorithm, split_own
from metadist.compute import DEFAULT, Compute, Vectorize, warn_once
from metadist.draws import first_parts
from metadist.memory import is_out_of_memory
from metadist.problem import Problem, context_of
from metadist.task import Task, shape_signature, stays_on_host
from metadist.trees import Params

CACHE_BYTES = 8 << 20
"""What the inner variables of a chunk may fill; measured, about a core's share of the cache."""

MAX_INNER_BYTES = CACHE_BYTES // 16
"""The largest inner variable that gains from vmap: above it a loop is as fast."""

FORWARD_BYTES, FEW = 64 << 20, 4
"""What the tasks of a chunk may take beside their inner variables, unless they are few."""


GPU_BYTES = 4 << 30
"""The same on a GPU, where derivatives take about four times as much for a while."""

_known: dict[Any, tuple[ReferenceType[Problem], int]] = {}
"""What was measured in this process, by the identity of a problem and the sizes of x and a task."""


def chunk_of(problem: Problem, outer: Params, task: Task, compute: Compute = DEFAULT) -> int:
    """How many tasks like `task` go through vmap together, on a CPU at least `FEW`.

    As many as their inner variables fill 8 MB. And as many as their data, and what their encoding
    and their losses compute in a forward pass on a draw, fill 64 MB: beyond that memory is all that
    grows. On a GPU, as many as the latter fill 4 GB.

    Cost: a forward pass, once for tasks of equal sizes.
    """
    some = first_parts(task, compute.batch_sizes, compute.seed)
    tensors = [*outer.values(), *some.support.tensors, *some.query.tensors]
    key = id(problem), tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in tensors)
    of, chunk = _known.get(key, (None, 0))
    if of is None or of() is not problem:  # an identity may come again
        chunk = _measure(problem, outer, task, some)
        if len(_known) >= 256:
            _known.clear()
        _known[key] = ref(problem), chunk
    return chunk


def _measure(problem: Problem, outer: Params, task: Task, some: Task) -> int:
    problem_outer, _ = split_own(outer)
    with torch.no_grad(), _Results() as results:
        context = context_of(problem, problem_outer, task)
        inner = problem.init_inner(problem_outer, task)
        problem.inner_loss(context, inner, some.support)
        problem.outer_loss(context, inner, some.query)
    beside = results.num_bytes + num_bytes([*some.support.tensors, *some.query.tensors])
    if next(iter(outer.values())).device.type != "cpu":
        return max(1, GPU_BYTES // beside)
    by_size = min(CACHE_BYTES // num_bytes(inner), FORWARD_BYTES // beside)
    return max(FEW, by_size)


def vectorizes(
    vectorize: Vectorize,
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
) -> bool:
    """Whether these tasks go through vmap together."""
    if vectorize is False or len(tasks) == 1:
        return False
    on_host = any(map(stays_on_host, (*tasks[0].support.tensors, *tasks[0].query.tensors)))
    if on_host and vectorize is True:
        raise ValueError(
            "vectorize must be False or 'auto' for tasks whose data stays in files or in the "
            "memory of the host, got True: a stack of them would be a copy"
        )
    stackable = len({shape_signature(task) for task in tasks}) == 1 and not on_host
    if vectorize is True:
        if not algorithm.supports_vmap:
            raise ValueError(
                f"vectorize must be False or 'auto' with {algorithm}: its engine does not run "
                "under vmap, got True"
            )
        if not stackable:
            raise ValueError(
                "vectorize=True needs tasks of equal shapes, got "
                f"{sorted({shape_signature(task) for task in tasks})}: use 'auto' or False"
            )
        return True
    if not stackable or not algorithm.supports_vmap:
        return False
    if next(iter(outer.values())).device.type != "cpu":
        return True
    with torch.no_grad():
        inner = problem.init_inner(split_own(outer)[0], tasks[0])
    return num_bytes(inner) <= MAX_INNER_BYTES and all(leaf.ndim < 3 for leaf in inner.values())


FAILS_UNDER_VMAP = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""The exceptions of torch, and of what is no torch, for tensors under vmap."""


def falls_back(vectorize: Vectorize, error: Exception) -> bool:
    """Whether tasks that failed together are to be computed one by one; warns once if so.

    What fails for another reason fails again then. Memory that ran out is no such case: whether
    it does would decide how results are rounded.
    """
    if vectorize != "auto" or is_out_of_memory(error):
        return False
    reason = str(error).strip().partition("\n")[0]
    warn_once(
        "tasks are computed one by one, since vmap cannot run them together; vectorize=False "
        f"says so from the start. Got {type(error).__name__}: {reason}"
    )
    return True


def num_bytes(tensors: Any) -> int:
    """The bytes that the tensors in a tree take; at least 1."""
    found = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    return max(1, sum(leaf.numel() * leaf.element_size() for leaf in found))


class _Results(TorchDispatchMode):
    """Adds up the bytes of what operators return, views left out."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_bytes += num_bytes(result)
        return result
