"""`Exchange`: turns a round of questions into a message per shard, and the replies into answers."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metadist.cluster.actors.buffers import Array, read_only, to_array
from metadist.cluster.data_parallel.layout import (
    METRICS,
    Key,
    Layout,
    Message,
    Reply,
    Request,
    Role,
)
from metadist.cluster.data_parallel.pending import Answer, Question
from metadist.oracle import DERIVATIVES
from metadist.trees import Params, zeros_like


class Package(NamedTuple):
    """The arguments of `ShardWorker.compute` for one shard and one round."""

    message: Message
    shared: dict[Key, Array]
    own: dict[Key, Array]

    @property
    def num_bytes(self) -> int:
        """Bytes of its buffers."""
        return sum(array.nbytes for part in (self.shared, self.own) for array in part.values())


@dataclass
class Round:
    """The questions of a round, with everything that is needed to ask any shard at any time.

    A shard that was lost is asked again by a new worker, which holds no trees; so a package is made
    for each shard when it is sent, and the round keeps all trees until it ends.

    Args:
        step: The outer step.
        place: Which round of the step this is. The answers of an earlier step at the same place are
            older answers to the same questions.
        requests: The questions.
        trees: The trees that they refer to.
        alive: All trees that later questions may refer to; shards forget the others.
        layout: How trees become buffers.
        positions: The support examples of each shard.
    """

    step: int
    place: Hashable
    requests: tuple[Request, ...]
    trees: dict[Key, Params]
    alive: frozenset[Key]
    layout: Layout
    positions: Sequence[Tensor]
    _flats: dict[Key, Array] = field(default_factory=dict)

    def package(self, part: int, held: frozenset[Key]) -> Package:
        """The package for the shard `part`, which holds the trees `held`."""
        missing = [key for key in self.trees if key not in held]
        own = {
            key: to_array(self.layout.pack_own(key[0], self.trees[key], self.positions[part]))
            for key in missing
        }
        forget = tuple(sorted(held - self.alive))
        message = Message(self.layout, self.step, self.requests, forget)
        return Package(message, {key: self._flat(key) for key in missing}, own)

    def _flat(self, key: Key) -> Array:
        if key not in self._flats:
            self._flats[key] = to_array(self.layout.pack_shared(key[0], self.trees[key]))
        return self._flats[key]


class Shards(Protocol):
    """Answers rounds: a `ShardPool`, or a dummy in tests."""

    def ask(self, round: Round) -> list[Reply]:
        """The reply of every shard, in their order."""
        ...


class Exchange:
    """Packs questions, sends each tree once, and adds up replies in the order of the shards.

    A tree is identified by its tensors, not by its values: algorithms ask several times at the same
    x and y, and never change a tensor in place. While the tensors live, a shard that holds the tree
    is sent its key only. Weak references show when they have died, since their ids may then belong
    to others. The fixed order of the sums makes runs with as many shards give the same bytes.

    Args:
        shards: The workers.
        layout: How trees become buffers.
        positions: The support examples of each shard, int64.
    """

    def __init__(self, shards: Shards, layout: Layout, positions: Sequence[Tensor]) -> None:
        self._shards = shards
        self._layout = layout
        self._positions = positions
        self._known: dict[Hashable, tuple[Key, list[weakref.ref[Tensor]]]] = {}
        self._numbers = count()

    def ask(self, step: int, number: int, questions: list[Question]) -> list[Answer]:
        """The answers to the questions of round `number` of a step."""
        trees: dict[Key, Params] = {}
        requests: list[Request] = []
        sums: list[list[_Sum]] = []
        for question in questions:
            derivative = DERIVATIVES[question.method]
            keys = self._keys(derivative.takes, question.trees, trees)
            requests.append(Request(question.method, question.draw, keys))
            sums.append([_Sum(self._layout, role) for role in derivative.gives])
        place = (number, *((request.method, request.draw.source) for request in requests))  # type: ignore[union-attr]
        replies = self._ask(step, place, tuple(requests), trees)
        for reply, index in zip(replies, self._positions, strict=True):
            flat = read_only(reply.flat)
            for is_answered, question_sums in zip(reply.answered, sums, strict=True):
                # A shard without examples of a mini-batch has nothing to add.
                for total in question_sums if is_answered else ():
                    flat = total.add_first(flat, index)
        return [
            tuple(total.tree(question.trees) for total in question_sums)
            for question, question_sums in zip(questions, sums, strict=True)
        ]

    def metrics(self, step: int, outer: Params, y: Params) -> dict[str, float]:
        """Losses and metrics, means over all examples."""
        trees: dict[Key, Params] = {}
        request = Request(METRICS, None, self._keys(("outer", "y"), (outer, y), trees))
        found: dict[str, float] = {}
        for reply in self._ask(step, METRICS, (request,), trees):
            for name, value in reply.metrics.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _ask(
        self, step: int, place: Hashable, requests: tuple[Request, ...], trees: dict[Key, Params]
    ) -> list[Reply]:
        return self._shards.ask(
            Round(
                step=step,
                place=place,
                requests=requests,
                trees=trees,
                alive=self._alive(),
                layout=self._layout,
                positions=self._positions,
            )
        )

    def _keys(
        self, roles: Sequence[Role], trees: Sequence[Params], used: dict[Key, Params]
    ) -> tuple[Key, ...]:
        keys = []
        for role, tree in zip(roles, trees, strict=True):
            key = self._key("x" if self._layout.spec(role) == self._layout.x else role, tree)
            used[key] = tree
            keys.append(key)
        return tuple(keys)

    def _key(self, role: Role, tree: Params) -> Key:
        names = sorted(tree)
        signature = (role, *((name, id(tree[name])) for name in names))
        known = self._known.get(signature)
        # The id may have been that of a tensor that has died.
        if known is None or any(
            ref() is not tree[name] for ref, name in zip(known[1], names, strict=True)
        ):
            known = (role, next(self._numbers)), [weakref.ref(tree[name]) for name in names]
            self._known[signature] = known
        return known[0]

    def _alive(self) -> frozenset[Key]:
        self._known = {
            signature: known
            for signature, known in self._known.items()
            if all(ref() is not None for ref in known[1])
        }
        return frozenset(key for key, _ in self._known.values())


class _Sum:
    """One tree of an answer, added up over shards."""

    def __init__(self, layout: Layout, role: Role) -> None:
        self._layout = layout
        self._role = role
        self._flat: Tensor | None = None
        self._rows: list[tuple[Tensor, Params]] = []

    def add_first(self, flat: Tensor, index: Tensor) -> Tensor:
        """Add the beginning of the reply of the shard with this index; returns the rest."""
        if self._role == "value":
            self._add(flat[:1])
            return flat[1:]
        shared = self._layout.shared(self._role)
        own = self._layout.own(self._role, len(index))
        sizes = [shared.num_elements, own.num_elements]
        values, rows, rest = flat.split([*sizes, len(flat) - sum(sizes)])
        self._add(values.to(shared.dtype))
        self._rows.append((index, own.views(rows.to(own.dtype))))
        return rest

    def _add(self, piece: Tensor) -> None:
        if self._flat is None:
            self._flat = piece.clone()
        else:
            self._flat += piece

    def tree(self, trees: tuple[Params, ...]) -> Params:
        """The sum, shaped like the tree of this role among those of the question."""
        if self._role == "value":
            value = torch.zeros(1) if self._flat is None else self._flat
            return {"value": value.reshape(())}
        found = zeros_like(trees[0] if self._role == "x" else trees[1])
        if self._flat is not None:
            found |= self._layout.shared(self._role).views(self._flat)
        for index, rows in self._rows:
            for name, leaf in rows.items():
                found[name][index] = leaf
        return found
