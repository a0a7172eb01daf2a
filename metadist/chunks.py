"""How many tasks are computed together.

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

from metadist.algorithm import split_own
from metadist.compute import DEFAULT, Compute
from metadist.oracle import first_parts
from metadist.problem import Problem, context_of
from metadist.task import Task
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
        context, inner = (
            context_of(problem, problem_outer, task),
            problem.init_inner(problem_outer, task),
        )
        problem.inner_loss(context, inner, some.support)
        problem.outer_loss(context, inner, some.query)
    beside = results.num_bytes + num_bytes([*some.support.tensors, *some.query.tensors])
    if next(iter(outer.values())).device.type != "cpu":
        return max(1, GPU_BYTES // beside)
    by_size = min(CACHE_BYTES // num_bytes(inner), FORWARD_BYTES // beside)
    return max(FEW, by_size)


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
