"""What travels between the driver and the shards, and how trees become buffers.

Flat numpy buffers travel. A tree like the outer variable ("outer") or the context ("x") becomes
two: one for all shards, and one for each shard with the rows of per-example variables that belong
to its examples. A tree like the inner variable ("y") becomes one. `Exchange` (exchange.py) writes
messages and reads replies, `ShardWorker` (worker.py) the other way round.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.cluster.actors.buffers import Array, OuterSpec
from metadist.cluster.actors.placement import WorkerInfo
from metadist.cluster.data_parallel.data import ShardSizes, spread
from metadist.draws import Draw
from metadist.trees import Params

Role = Literal["outer", "x", "y", "value"]

METRICS = "metrics"
"""The request for losses and metrics at (outer, y)."""

Key = tuple[Role, int]
"""A tree that was sent: its role and a number."""


class Layout(NamedTuple):
    """How trees become buffers.

    Args:
        outer: Names and shapes of the outer variable.
        x: Those of the context.
        y: Those of the inner variable.
        rows: Names of the per-example variables, whose leading axis is the support example.
        num_examples: The sizes of the full support and query set.
        shard_sizes: With local batch statistics the number of examples of every shard, of both
            sets: each shard then draws from its own (see `OwnDraws`); None: from the full sets.
    """

    outer: OuterSpec
    x: OuterSpec
    y: OuterSpec
    rows: frozenset[str]
    num_examples: tuple[int, int]
    shard_sizes: ShardSizes | None = None

    def spec(self, role: Role) -> OuterSpec:
        """Names and shapes of a tree."""
        return {"outer": self.outer, "x": self.x, "y": self.y}[role]

    def shared(self, role: Role) -> OuterSpec:
        """Names and shapes of the part of a tree that all shards receive."""
        spec = self.spec(role)
        rows = self.rows if role != "y" else ()
        return spec._replace(shapes={n: s for n, s in spec.shapes.items() if n not in rows})

    def own(self, role: Role, num_rows: int) -> OuterSpec:
        """Names and shapes of the part that a shard with `num_rows` support examples has alone."""
        spec = self.spec(role)
        rows = self.rows if role != "y" else ()
        shapes = {n: (num_rows, *s[1:]) for n, s in spec.shapes.items() if n in rows}
        return spec._replace(shapes=shapes)

    def pack_shared(self, role: Role, tree: Params) -> Tensor:
        """The values of `shared`."""
        return _joined([tree[name] for name in self.shared(role).shapes], self.spec(role).dtype)

    def pack_own(self, role: Role, tree: Params, index: Tensor) -> Tensor:
        """The values of `own` for the shard with the support examples `index`."""
        names = self.own(role, len(index)).shapes
        return _joined([tree[name][index] for name in names], self.spec(role).dtype)

    def unpack(self, role: Role, shared: Tensor, own: Tensor, index: Tensor) -> Params:
        """The tree, with zeros where the rows of other shards are."""
        tree = self.shared(role).views(shared)
        for name, leaf in self.own(role, len(index)).views(own).items():
            tree[name] = spread(leaf, index, self.num_examples[0])
        return {name: tree[name] for name in self.spec(role).shapes}


def _joined(leaves: list[Tensor], dtype: torch.dtype) -> Tensor:
    if not leaves:
        return torch.empty(0, dtype=dtype)
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


class Request(NamedTuple):
    """One question: a name in `DERIVATIVES`, or METRICS (whose `draw` is None); trees by key."""

    method: str
    draw: Draw | None
    trees: tuple[Key, ...]


class Message(NamedTuple):
    """All questions of a round to one shard, to be answered from this alone and what it holds.

    The shard drops the trees `forget`, which no further question refers to.
    """

    layout: Layout
    step: int
    requests: tuple[Request, ...]
    forget: tuple[Key, ...]


class Reply(NamedTuple):
    """A shard's part of all answers of a round, to be added up.

    Args:
        answered: Whether each request is answered; the shard holds no example of the others.
        flat: For each of these the trees that `DERIVATIVES` says, times the share of the draw.
        metrics: Losses and metrics, times the shard's share of the set.
        seconds: How long computing took.
    """

    answered: tuple[bool, ...]
    flat: Array
    metrics: dict[str, float]
    seconds: float


class ShardInfo(NamedTuple):
    """What a shard is: where, which examples of the two sets, the form of one, and the classes.

    `classes` of a set is None where its labels are not known, see `class_labels`.
    """

    where: WorkerInfo
    support: Array
    query: Array
    form: tuple[tuple[str, ...], tuple[str, ...]]
    classes: tuple[set[int] | None, set[int] | None]


class ShardCheck(NamedTuple):
    """What a shard finds at the start: a fault, or the context's names and the start."""

    fault: str | None
    context: tuple[str, ...]
    start: dict[str, Array]
