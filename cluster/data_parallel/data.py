"""Shards: the data of one task cut into parts that lie on different machines.

A shard is a Task whose `Batch.index` are positions in the full sets. Losses are means over
examples, so with share = (examples of a draw on the shard) / (examples of the draw)

    derivative on the draw = sum over shards of share * derivative on the shard's part of the draw

exactly, for every derivative of an `Oracle`, since all are linear in the losses. With local batch
statistics the right side is what is solved, whatever the loss on a part is.

A `ShardWorker` (worker.py) holds a shard and asks its `ShardOracle`; the sum is done by `Exchange`
(exchange.py). What is refused, since the sum would not be exact, is in checks.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.autograd import AutogradOracle
from metadist.compute import DEFAULT
from metadist.draws import SOURCES, BatchSize, Draw, MiniBatches, permuted
from metadist.problem import Problem
from metadist.sampler import Labelled, Shardable, TaskSampler
from metadist.task import Batch, Task, stay_on_host, stays_on_host, targets_of


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


def class_labels(sampler: TaskSampler, batch: Batch) -> set[int] | None:
    """The labels of a batch; None unless the sampler has `num_classes` and its targets hold them.

    Raises:
        ValueError: It has, and the batch does not say which tensor holds the targets.
    """
    labels = targets_of(batch) if isinstance(sampler, Labelled) else None
    if labels is None or labels.ndim != 1 or labels.dtype != torch.int64:
        return None
    return set(labels.unique().tolist())


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
