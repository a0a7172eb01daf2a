"""Shards: the data of one task cut into parts that lie on different machines.

A shard is a Task whose `Batch.index` are positions in the full sets. Losses are means over
examples, so with share = (examples of a draw on the shard) / (examples of the draw)

    derivative on the draw = sum over shards of share * derivative on the shard's part of the draw

exactly, for every derivative of an `Oracle`, since all are linear in the losses. With local batch
statistics the right side is what is solved, whatever the loss on a part is.

A `ShardWorker` (worker.py) holds a shard and asks its `ShardOracle`; the sum is done by `Exchange`
(exchange.py). The checks here refuse data and problems for which the sum would not be exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.autograd import AutogradOracle
from metadist.compute import DEFAULT
from metadist.draws import SOURCES, BatchSize, Draw, MiniBatches, Source, permuted
from metadist.problem import Problem, per_example_names
from metadist.sampler import Labelled, Shardable, TaskSampler
from metadist.task import Batch, Task, stay_on_host, stays_on_host, targets_of
from metadist.trees import Params, gradients, leaves


def cut(task: Task, part: int, num_parts: int) -> Task:
    """Shard `part` of `num_parts`: consecutive examples of both sets, in equal numbers or one more.

    It has memory of its own, so that the task can be forgotten; what stays on the host, as files
    that are mapped into memory do, is not copied.
    """

    def take(full: Batch) -> Batch:
        first, end = (len(full.index) * number // num_parts for number in (part, part + 1))

        def rows(tensor: Tensor) -> Tensor:
            some = tensor[first:end]
            return stay_on_host(some) if stays_on_host(tensor) else some.clone()

        return full.map(rows)._replace(index=full.index[first:end].clone())

    return Task(take(task.support), take(task.query), task.id)


def sample_shard(sampler: TaskSampler, part: int, num_parts: int) -> Task:
    """Shard `part` of task 0.

    A sampler with a method `shard(index, part, num_parts)` need not read all data; for any other
    the whole task is sampled and cut.
    """
    if isinstance(sampler, Shardable):
        return sampler.shard(0, part, num_parts)
    return cut(sampler.sample(0), part, num_parts)


class FirstShard:
    """Shard 0 of `num_parts` of each task, for checks on machines that hold no full data set."""

    def __init__(self, sampler: Shardable, num_parts: int) -> None:
        self._sampler = sampler
        self._num_parts = num_parts

    def sample(self, index: int) -> Task:
        """Shard 0 of the task, its examples numbered from 0."""
        task = self._sampler.shard(index, 0, self._num_parts)
        return Task(_numbered(task.support), _numbered(task.query), task.id)


def _numbered(batch: Batch) -> Batch:
    return batch._replace(index=torch.arange(len(batch.index)))


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


def class_labels(sampler: TaskSampler, batch: Batch) -> set[int] | None:
    """The labels of a batch; None unless the sampler has `num_classes` and its targets hold them.

    Raises:
        ValueError: It has, and the batch does not say which tensor holds the targets.
    """
    labels = targets_of(batch) if isinstance(sampler, Labelled) else None
    if labels is None or labels.ndim != 1 or labels.dtype != torch.int64:
        return None
    return set(labels.unique().tolist())


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


ShardSizes = tuple[tuple[int, ...], tuple[int, ...]]
"""The number of support and of query examples of every shard."""


class OwnDraws(MiniBatches):
    """Draws of which every shard chooses a part among its own examples, by its share of the set.

    A draw is a window of one order of the set in which shards alternate by their sizes, so the
    parts have equal sizes or one more where the shards do; the window starts anywhere, so every
    example is drawn as often. With one shard the draws are those of `MiniBatches`.

    Args:
        shard_sizes: The number of examples of every shard.
        part: The shard whose part of a draw is chosen.
        others: Those of `MiniBatches`, from `task_id` on.
    """

    def __init__(self, shard_sizes: ShardSizes, part: int, *others: Any) -> None:
        super().__init__((sum(shard_sizes[0]), sum(shard_sizes[1])), *others)
        self._shard_sizes = dict(zip(SOURCES, shard_sizes, strict=True))
        self._part = part

    def chosen(self, draw: Draw, device: torch.device) -> Tensor | None:
        """Which of the shard's examples are in `draw`, counted by position; None: all of them."""
        sizes, size = self._shard_sizes[draw.source], self.size(draw)
        num_examples = sum(sizes)
        if size >= num_examples:
            return None
        held = _held(sizes, self._part)
        seeds: tuple[int | Tensor, ...] = self._seed, self.step, self._task_id, draw.counter
        if draw.share is None:
            first = int(permuted(range(1), num_examples, *seeds, device=torch.device("cpu")))
            places = range(int(held[first + size] - held[first]))
        else:
            first = draw.counter * self._sizes[draw.source]
            places = range(int(held[first]), int(held[first + size]))
            seeds = self._seed, self._task_id
        # Shards of one size would otherwise all choose the same places.
        others = (self._part,) if self._part else ()
        return permuted(places, sizes[self._part], *seeds, *others, device=device)


@lru_cache(maxsize=4)
def _held(sizes: tuple[int, ...], part: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many of the first 0, 1, ... places of the order, taken twice, belong to shard `part`."""
    place = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    owner = np.repeat(np.arange(len(sizes)), sizes)[place.argsort(kind="stable")]
    return np.concatenate([[0], np.tile(owner == part, 2).cumsum()])


def check_own_draws(shard_sizes: ShardSizes, batch_sizes: BatchSize) -> None:
    """Raise ValueError if a part of a draw could have fewer than two examples: no statistics."""
    both = batch_sizes if isinstance(batch_sizes, tuple) else (batch_sizes, batch_sizes)
    for source, sizes, size in zip(SOURCES, shard_sizes, both, strict=True):
        total = sum(sizes)
        drawn = min(size or total, total)
        for part in range(len(sizes)):
            held = _held(sizes, part)
            least = int((held[drawn : drawn + total] - held[:total]).min())
            if least < 2:
                raise ValueError(
                    "batch_size must leave every worker two examples of a draw or more with "
                    f"batch_statistics='local', got {drawn} of {total} {source} examples, of which "
                    f"worker {part} may hold {least}: use larger batches or fewer workers"
                )


class ShardOracle(AutogradOracle):
    """Derivatives on those examples of a draw that a shard holds, `share` of them.

    `num_examples` are the sizes of the full support and query set; with `shard_sizes` the shard
    `part` of them chooses its own examples (`OwnDraws`). The other arguments are those of an
    `AutogradOracle` on the full task.
    """

    def __init__(
        self,
        problem: Problem,
        shard: Task,
        num_examples: tuple[int, int],
        batch_size: BatchSize = None,
        seed: int = 0,
        compile: bool = False,
        step: int = 0,
        graph_budget: int = DEFAULT.graph_budget,
        shard_sizes: ShardSizes | None = None,
        part: int = 0,
    ) -> None:
        super().__init__(
            problem,
            shard,
            batch_size,
            seed,
            compile,
            eager=True,
            step=step,
            graph_budget=graph_budget,
        )
        # The draws are those of the full sets.
        draws = shard.id, batch_size, seed, step
        self._mini_batches = (
            OwnDraws(shard_sizes, part, *draws)
            if shard_sizes
            else MiniBatches(num_examples, *draws)
        )

    def share(self, draw: Draw) -> float:
        """Examples of `draw` on the shard over examples of `draw`."""
        return len(self.batch(draw).index) / self._mini_batches.size(draw)

    def _take(self, draw: Draw) -> Batch:
        # A draw is a choice of positions in the full set, by a hash that every machine computes
        # alike: all shards agree on it without a message, and each takes what it holds.
        shard = self._set(draw.source)
        chosen = self._mini_batches.chosen(draw, shard.index.device)
        if chosen is None:
            return shard
        order = _order(shard.index)
        if isinstance(self._mini_batches, OwnDraws):
            return shard.take(order[chosen])
        places = torch.searchsorted(shard.index, chosen, sorter=order)
        inside = places < len(order)
        places = order[places[inside]]
        return shard.take(places[shard.index[places] == chosen[inside]])


@lru_cache(maxsize=4)
def _order(index: Tensor) -> Tensor:
    """What sorts `index`, told by identity: it is sorted once, not at every step."""
    return index.argsort()


def spread(rows: Tensor, index: Tensor, num_examples: int) -> Tensor:
    """A per-example variable at its full size: `rows` at the positions `index`, zeros elsewhere."""
    full = rows.new_zeros(num_examples, *rows.shape[1:])
    full[index] = rows
    return full


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
