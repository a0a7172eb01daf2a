"""What is refused: workloads, data and problems whose derivatives are no means over shards.

The driver checks a workload before the start, and then what the shards say of themselves. Each
shard looks for a fault in its own data, and in the losses on it (`shard_fault`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metadist.cluster.actors.buffers import to_tensor
from metadist.cluster.data_parallel.data import spread
from metadist.cluster.data_parallel.layout import ShardCheck, ShardInfo
from metadist.draws import SOURCES, Source
from metadist.problem import Problem, carries, has_inner_map, per_example_names
from metadist.sampler import Stream
from metadist.task import Batch, Task
from metadist.trees import Params, gradients, leaves
from metadist.workload import Workload


def check_workload(workload: Workload, staleness: int) -> None:
    """Raise ValueError for what is no single problem, or no algorithm that can run like this."""
    algorithm = workload.algorithm
    name = type(algorithm).__name__
    if not workload.keep_state or workload.meta_batch_size != 1:
        raise ValueError(
            "keep_state must be True and meta_batch_size 1 with DataParallelExecutor, which cuts "
            f"one task into shards, got {workload.keep_state} and {workload.meta_batch_size}: for "
            "many tasks use RayExecutor"
        )
    if isinstance(workload.sampler, Stream):
        raise ValueError(
            "sampler must have no sample_at with DataParallelExecutor, whose workers keep their "
            f"part of the data for the whole run, got {type(workload.sampler).__name__}: use "
            "LocalExecutor or RayExecutor"
        )
    if has_inner_map(workload.problem):
        raise ValueError(
            "problem must have no inner_map with DataParallelExecutor, got "
            f"{type(workload.problem).__name__}: a map need not be the mean of those of the "
            "shards. Use LocalExecutor"
        )
    if carries(workload.problem):
        raise ValueError(
            "a problem must carry no state with DataParallelExecutor, whose workers each see a "
            f"part of the task, got {type(workload.problem).__name__} with init_carried: use "
            "RayExecutor or LocalExecutor"
        )
    if algorithm.differentiates_values:
        raise ValueError(
            f"algorithm must ask for derivatives with DataParallelExecutor, got {algorithm}, "
            "which differentiates through the values of its losses: use engine='adjoint'"
        )
    if staleness and not algorithm.tolerates_staleness:
        raise ValueError(
            f"staleness must be 0 with {name}, got {staleness}: it takes answers that belong "
            "together (of one matrix, or at two points of a difference), and a few steps between "
            "them break it. Single loops tolerate that: SOBA, FSLA, MEHA, F2SA, AmIGO with "
            "solver='gd'"
        )


def check_shards(infos: list[ShardInfo], allow_missing_classes: bool) -> list[Tensor]:
    """The support positions of each shard; raises ValueError if shards do not fit together."""
    for part, info in enumerate(infos):
        if info.form != infos[0].form:
            raise ValueError(
                f"shards must have examples of one form, got {infos[0].form} in shard 0 and "
                f"{info.form} in shard {part}"
            )
    positions = [to_tensor(info.support) for info in infos]
    check_partition(positions, "support")
    check_partition([to_tensor(info.query) for info in infos], "query")
    for number, source in enumerate(() if allow_missing_classes else SOURCES):
        check_classes([info.classes[number] or set() for info in infos], source)
    return positions


def check_starts(checks: list[ShardCheck]) -> tuple[tuple[str, ...], Params]:
    """(the context's names, the start of y); raises ValueError if shards have found a fault."""
    for part, found in enumerate(checks):
        if found.fault is not None:
            raise ValueError(f"in shard {part} {found.fault}")
    first = {name: to_tensor(leaf) for name, leaf in checks[0].start.items()}
    for part, found in enumerate(checks):
        start = {name: to_tensor(leaf) for name, leaf in found.start.items()}
        if start.keys() != first.keys() or any(
            not torch.equal(start[name], leaf) for name, leaf in first.items()
        ):
            raise ValueError(
                f"init_inner must not depend on data, got another start in shard {part} than in "
                "shard 0: start from a constant or from the outer variable, or use LocalExecutor"
            )
    return checks[0].context, first


def check_partition(indices: Sequence[Tensor], source: Source) -> None:
    """Raise ValueError unless these positions, by shard, are 0, 1, ... with each of them once."""
    for part, index in enumerate(indices):
        if not len(index):
            raise ValueError(
                f"shard {part} must hold at least one {source} example, got none: num_workers "
                f"must be <= the number of {source} examples, {sum(map(len, indices))}"
            )
    positions = torch.cat(list(indices)).sort().values
    wrong = (positions != torch.arange(len(positions))).nonzero()
    if len(wrong):
        raise ValueError(
            f"shards must hold every position of the {source} set once, from 0 on, got "
            f"{int(positions[wrong[0]])} where {int(wrong[0])} was due: see `shard` of the sampler"
        )


def check_classes(found: Sequence[set[int]], source: Source) -> None:
    """Raise ValueError unless shards with these labels have all of the same classes."""
    classes = set().union(*found)
    for part, labels in enumerate(found):
        if missing := sorted(classes - labels):
            raise ValueError(
                f"the {source} set of every shard must hold all {len(classes)} classes, got none "
                f"of class {', '.join(map(str, missing))} in shard {part}: is the data sorted by "
                "class? Shuffle it, or use fewer workers. Where that is as it should be (the "
                "result is exact all the same): allow_missing_classes=True"
            )


def shard_fault(
    problem: Problem,
    shard: Task,
    outer: Params,
    start: Params,
    num_support: int,
    is_local: bool = False,
) -> str | None:
    """Why derivatives on the full sets are no mean of those on shards; None: they are.

    With local batch statistics (`is_local`) a loss need only be the same on the examples twice.

    Looked at in x = `outer` and y = `start`; `num_support` is the size of the full support set.

    Cost: gradients of both losses, three times, on 64 examples at the most.
    """
    for source, batch in zip(SOURCES, (shard.support, shard.query), strict=True):
        for number, tensor in enumerate(batch.tensors):
            finite = tensor.isfinite().reshape(len(tensor), math.prod(tensor.shape[1:])).all(1)
            if not bool(finite.all()):
                position = int(batch.index[~finite][0])
                return (
                    f"the {source} set must be finite, got NaN or Inf in its tensor {number} at "
                    f"example {position}"
                )
    context = problem.encode(outer, shard)
    changed = [name for name, leaf in context.items() if leaf is not outer.get(name)]
    if changed:
        return (
            "encode must return outer variables as they are, got another "
            f"{', '.join(changed)}: what depends on data would differ between shards. Compute it "
            "in inner_loss and outer_loss, or use LocalExecutor"
        )
    random = torch.Generator().manual_seed(0)

    def beside(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        return leaf + 0.1 * noise.to(leaf)

    y = {name: beside(leaf) for name, leaf in start.items()}
    fault_of = _scale_fault if is_local else _mean_fault
    for name, loss, batch in (
        ("inner_loss", problem.inner_loss, shard.support),
        ("outer_loss", problem.outer_loss, shard.query),
    ):
        if fault := fault_of(name, loss, context, y, batch):
            return fault
    rows = per_example_names(problem, outer) & context.keys()
    return _row_fault(problem, context, y, shard, rows, beside, num_support) if rows else None


Loss = Callable[[Params, Params, Batch], Tensor]


def _mean_fault(name: str, loss: Loss, x: Params, y: Params, batch: Batch) -> str | None:
    """What is wrong if the loss is no mean over examples: halves against the whole of them."""
    size = min(len(batch.index), 64)
    places = torch.arange(size, device=batch.index.device)
    # A single example has no halves: twice the same one stands for the whole.
    halves = places.tensor_split(2) if size > 1 else (places, places)
    whole = torch.cat(halves)
    expected = _derivatives(loss, x, y, batch.take(whole))
    parts = [_derivatives(loss, x, y, batch.take(half)) for half in halves]
    weights = [len(half) / len(whole) for half in halves]
    for leaf, *halved in zip(expected, *parts, strict=True):
        mean = sum(weight * half for weight, half in zip(weights, halved, strict=True))
        if not _equal(leaf, mean, *halved):
            return (
                f"{name} must be a mean over examples (plus terms without data), but on {size} "
                "examples it is not the weighted mean of that on their halves: take means and no "
                "sums, keep batch norm and other statistics of a batch out or let every worker "
                "take those of its own part (batch_statistics='local'), or use LocalExecutor"
            )
    return None


def _scale_fault(name: str, loss: Loss, x: Params, y: Params, batch: Batch) -> str | None:
    """What is wrong if the loss changes when every example is there twice.

    No mean and no variance does, so losses of statistics pass; sums do not.
    """
    places = torch.arange(min(len(batch.index), 64), device=batch.index.device)
    once = _derivatives(loss, x, y, batch.take(places))
    twice = _derivatives(loss, x, y, batch.take(torch.cat([places, places])))
    # What batch norm cancels, as the bias before it, has a gradient of rounding errors only: it is
    # compared by the size of the others.
    if all(_equal(a, b, *once) for a, b in zip(once, twice, strict=True)):
        return None
    return (
        f"{name} must be a mean over examples, or of statistics of the batch, but on {len(places)} "
        "examples twice it is not what it is on them once: take means and no sums, and no variance "
        "over n - 1, or use LocalExecutor"
    )


def _row_fault(
    problem: Problem,
    x: Params,
    y: Params,
    shard: Task,
    rows: set[str],
    beside: Callable[[Tensor], Tensor],
    num_support: int,
) -> str | None:
    """What is wrong if the rows of other examples matter."""
    own = shard.support.index
    zeroed, noisy = dict(x), dict(x)
    for name, leaf in x.items():
        if name in rows:
            zeroed[name] = spread(leaf[own], own, num_support)
            noisy[name] = beside(leaf).index_copy(0, own, leaf[own])
    for name, loss, batch in (
        ("inner_loss", problem.inner_loss, shard.support),
        ("outer_loss", problem.outer_loss, shard.query),
    ):
        few = batch.take(torch.arange(min(len(batch.index), 64), device=own.device))
        first, second = (_derivatives(loss, at, y, few) for at in (zeroed, noisy))
        if not all(_equal(a, b) for a, b in zip(first, second, strict=True)):
            return (
                f"per_example variables ({', '.join(sorted(rows))}) must enter {name} as "
                "context[name][batch.index] only, but rows of other examples change it (a "
                "normalisation over all of them?): leave the variable out of per_example, or "
                "normalise within the example"
            )
    return None


def _derivatives(loss: Loss, x: Params, y: Params, batch: Batch) -> list[Tensor]:
    """The value, and the gradients in x and in y."""
    x, y = leaves(x), leaves(y)
    value = loss(x, y, batch)
    trees = gradients([value], [None], x, y)
    return [value.detach(), *(leaf for tree in trees for leaf in tree.values())]


def _equal(first: Tensor, second: Tensor | float, *others: Tensor) -> bool:
    """Whether they are the same up to rounding, relative to the largest number anywhere."""
    largest = max(float(leaf.abs().max()) for leaf in (first, *others) if leaf.numel())
    tolerance = torch.finfo(first.dtype).eps ** 0.5 * largest if first.numel() else 0.0
    difference = (first - second).abs()
    # NaN on both sides counts as equal: other checks look for it.
    return not bool((difference > tolerance).any())
