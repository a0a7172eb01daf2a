"""Mini-batches and random numbers that are the same in every process and on every device.

A draw is a number, not a set of examples: which examples it stands for follows from the seed, the
outer step, the task and that number, by arithmetic on integers. So whoever has the data finds the
same mini-batch, under vmap and after an interruption too.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.checks.values import check
from metadist.followed import call
from metadist.task import Batch, Task
from metadist.trees import Params, num_elements, unflatten

Source = Literal["support", "query"]
SOURCES: tuple[Source, Source] = ("support", "query")


class Draw(NamedTuple):
    """A mini-batch by number: the same draw of the same oracle is the same examples.

    Args:
        source: The set that it is drawn from.
        counter: The number of the draw, or of the part.
        share: For a part of the set's fixed partition (see `Oracle.parts`), its share of the set;
            None for a random mini-batch.
    """

    source: Source
    counter: int
    share: float | None = None


BatchSize = int | None | tuple[int | None, int | None]


class MiniBatches:
    """The draws of one outer step on one task, and its random numbers: no data, no derivatives.

    Args:
        num_examples: Sizes of the support and the query set.
        task_id: Part of the seed, as are `seed` and `step`.
        batch_size: Examples per draw, of both sets or of (support, query); None: every draw is the
            whole set.
        seed: The seed of all draws; the draws are the same on every device.
        step: The outer step; other steps have other draws.
    """

    def __init__(
        self,
        num_examples: tuple[int, int],
        task_id: int | Tensor,
        batch_size: BatchSize,
        seed: int,
        step: int,
    ) -> None:
        sizes = batch_size if isinstance(batch_size, tuple) else (batch_size, batch_size)
        for size in sizes:
            check("batch_size", size, is_integer=True, ge=1, none="for whole sets")
        self.step = step
        self._num_examples: dict[Source, int] = dict(zip(SOURCES, num_examples, strict=True))
        self._task_id = task_id
        self._sizes: dict[Source, int] = {
            source: min(size or number, number)
            for source, size, number in zip(SOURCES, sizes, num_examples, strict=True)
        }
        self._seed = seed
        self._num_draws = 0

    def _count(self) -> int:
        self._num_draws += 1
        return self._num_draws - 1

    def draw(self, source: Source) -> Draw:
        return Draw(source, self._count())

    def parts(self, source: Source) -> list[Draw]:
        num_examples, size = self._num_examples[source], self._sizes[source]
        return [
            Draw(source, number, min(size, num_examples - number * size) / num_examples)
            for number in range(math.ceil(num_examples / size))
        ]

    def uniform(self) -> float:
        drawn: float = call(_uniform, self._seed, self.step, self._count())
        return drawn

    def random_like(self, tree: Params, kind: Literal["normal", "rademacher"]) -> Params:
        leaf = next(iter(tree.values()))
        places = torch.arange(num_elements(tree), device=leaf.device)
        keys = random_keys(places, self._seed, self.step, self._task_id, self._count())
        if kind == "rademacher":
            return unflatten((1 - 2 * ((keys >> 40) & 1)).to(leaf.dtype), tree)
        # Box and Muller's transform of two uniform numbers; + 0.5 keeps the logarithm finite.
        radius, angle = (
            (((bits >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) / 2**53
            for bits in (keys, random_keys(keys, 1))
        )
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        return unflatten(normal.to(leaf.dtype), tree)

    def of(self, task_id: int | Tensor) -> MiniBatches:
        """Those of another task of the same sizes."""
        other = copy.copy(self)
        other._task_id = task_id
        return other

    def is_whole(self, source: Source) -> bool:
        """Whether every draw from `source` is the whole set."""
        return self._sizes[source] >= self._num_examples[source]

    def canonical(self, draw: Draw) -> Draw:
        """The one name for the examples of `draw`: all draws of a whole set are the same."""
        return Draw(draw.source, 0) if self.is_whole(draw.source) else draw

    def size(self, draw: Draw) -> int:
        """The number of examples of `draw`."""
        if draw.share is not None:
            return round(draw.share * self._num_examples[draw.source])
        return self._sizes[draw.source]

    def chosen(self, draw: Draw, device: torch.device) -> Tensor | None:
        """Which examples of the full set are in `draw`; None: all of them.

        A uniform choice without replacement, or a fixed part; int64, shape (examples,).
        """
        num_examples, size = self._num_examples[draw.source], self.size(draw)
        if size >= num_examples:
            return None
        seeds: tuple[int | Tensor, ...] = self._seed, self.step, self._task_id, draw.counter
        first = 0
        if draw.share is not None:
            seeds, first = (self._seed, self._task_id), draw.counter * self._sizes[draw.source]
        return permuted(range(first, first + size), num_examples, *seeds, device=device)


def in_parts(
    task: Task, source: Source, batch_size: BatchSize, seed: int
) -> Iterator[tuple[float, Batch]]:
    """(share of the set, examples) of each part of a fixed partition of a set, see `Oracle.parts`.

    The sum of shares times losses is the loss on the whole set where that is a mean over examples.
    Any other loss is, as on a draw, taken as it is on each part: nothing scales it.
    """
    full = task.support if source == "support" else task.query
    num_examples = task.support.index.shape[0], task.query.index.shape[0]
    draws = MiniBatches(num_examples, task.id, batch_size, seed, 0)
    for draw in draws.parts(source):
        chosen = draws.chosen(draw, full.index.device)
        yield draw.share or 1.0, full if chosen is None else full.take(chosen)


def first_parts(task: Task, batch_size: BatchSize, seed: int) -> Task:
    """The task with the first part of each of its sets in place of the set."""
    support, query = (next(in_parts(task, source, batch_size, seed))[1] for source in SOURCES)
    return Task(support, query, task.id)


def _uniform(*seeds: int) -> float:
    return random.Random(" ".join(map(str, seeds))).random()


def random_keys(index: Tensor, *seeds: int | Tensor) -> Tensor:
    """Pseudo-random int64 like `index`, a hash of each entry and of the seeds.

    Integer arithmetic only (the finaliser of splitmix64, Steele et al. 2014): the same on every
    device and under vmap, where a torch.Generator is neither.
    """
    return _hash(index, *seeds)


GOLDEN = -0x61C8864680B583EB
"""2^64 over the golden ratio, as a signed number: what splitmix64 adds each time."""

Integers = Any
"""Tensors, which run under vmap, or NumPy arrays, which are four times as fast if small."""


def _hash(index: Integers, *seeds: int | Tensor) -> Integers:
    # Without tensors the key is a whole number of Python, which costs a fifth of an array of one.
    is_plain = isinstance(index, np.ndarray)
    key = 0 if is_plain else index[:1] * 0
    for seed in seeds:
        key = _mix(key + seed + GOLDEN)
    if is_plain:
        key = (key + 2**63) % 2**64 - 2**63
    return _mix(key + index + GOLDEN)


def _mix(z: Integers) -> Integers:
    # A shift of int64 copies the sign; the mask makes it the shift of an unsigned number.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


SORTED_UP_TO = 1024
"""The sizes that are permuted by sorting: of fewer, rounds would not make all orders alike."""

ROUNDS = 6


def permuted(places: range, size: int, *seeds: int | Tensor, device: torch.device) -> Tensor:
    """Where a random permutation of 0 .. size-1, a function of the seeds, puts `places`.

    Cost: by the number of places and the root of the size, unless that is small. A Feistel network
    on pairs (row, column), as Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """
    if any(isinstance(seed, Tensor) for seed in seeds):
        found: Tensor = _permuted(partial(torch.arange, device=device), places, size, *seeds)
        return found
    array = _permuted(np.arange, places, size, *seeds)
    return torch.from_numpy(array).to(device, non_blocking=True)


def _permuted(
    arange: Callable[..., Integers], places: range, size: int, *seeds: int | Tensor
) -> Integers:
    if size <= SORTED_UP_TO:
        return _hash(arange(size), *seeds).argsort()[places.start : places.stop]
    num_rows, num_columns = _sides(size)
    # A round moves all places of a row, or of a column, by the same distance: a table tells it.
    keys = _hash(arange(ROUNDS), *seeds)[:, None]
    distances = _mix(keys + arange(max(num_rows, num_columns)))
    by_row, by_column = distances[::2] % num_columns, distances[1::2] % num_rows

    def move(place: Integers) -> Integers:
        row, column = place // num_columns, place % num_columns
        for along_row, along_column in zip(by_row, by_column, strict=True):
            column = (column + along_row[row]) % num_columns
            row = (row + along_column[column]) % num_rows
        return row * num_columns + column

    found = move(arange(places.start, places.stop))
    # The table has a few places too many. Who lands on one moves on, and is inside after as many
    # moves as there are, since no place comes twice: so no branch need depend on data.
    for _ in range(num_rows * num_columns - size):
        found = found + (found >= size) * (move(found) - found)
    return found


@lru_cache
def _sides(size: int) -> tuple[int, int]:
    """(rows, columns) of a table that has room for `size`, with little left over."""
    root = math.isqrt(size - 1) + 1
    shapes = [(rows, -(-size // rows)) for rows in range(root, 2 * root)]
    return min(shapes, key=math.prod)
