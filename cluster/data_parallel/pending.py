"""Values that come from many machines: asked for together, computed with before they are known.

An answer takes a round trip to all shards, and most of what an algorithm asks for next does not
depend on it. So an answer is at first a `Pending` tensor, and arithmetic on it gives further ones.
Each has a level: a question is one level above what it is made of, arithmetic on the highest level
it needs. Where a value is read at last (`float`, `bool`, ...), all questions of a level go out in
one round. So the number of rounds is the length of the longest chain of questions, in whatever
order the algorithm asks them. The values are the same: the same operations, later.

`ClusterOracle` (oracle.py) asks the questions; `Exchange` (exchange.py), the `exchange` of
`Rounds`, gets the answers.
"""

# Why a Tensor subclass. An algorithm is written once, for a local oracle, as plain code: it asks
# for grad f, then for H v, adds and scales. Batching its questions would otherwise need algorithms
# written as coroutines or graphs, a second version of each. Deferring values needs only that an
# answer can be computed with before it is there, and torch lets a subclass catch every operation
# (`__torch_function__`): the operation is recorded with its arguments, and its result is pending
# too. Recording needs shapes and dtypes, which torch itself works out on meta tensors, without
# values. Whatever has no result of that kind, `float(loss)` or a Python branch, needs the values
# and makes the rounds: no operation can see a wrong value, it can only cost a round more.
#
# Why levels. Questions of one level depend on answers of lower levels only, so they can share a
# round trip. Level by level is also the order in which recorded operations can be replayed, each
# level in the order of recording, so no graph is walked and nothing recurses.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.trees import Params


class Question(NamedTuple):
    """The derivative `method` at `trees` (x, y, directions) on the examples of `draw`."""

    method: str
    draw: Any
    trees: tuple[Params, ...]


Answer = tuple[Params, ...]


class Rounds:
    """Questions, and the operations on their answers, by level.

    Args:
        exchange: Gets the answers to questions whose trees are known; called once per round, with
            the number of rounds before it.
    """

    def __init__(self, exchange: Callable[[int, list[Question]], list[Answer]]) -> None:
        self._exchange = exchange
        self._questions: dict[int, list[tuple[Question, Answer]]] = defaultdict(list)
        self._steps: dict[int, list[tuple[Callable[[], Any], Any]]] = defaultdict(list)
        self.num_rounds = 0
        """Rounds made so far; everything of this level or below is known."""

    def ask(self, question: Question, like: tuple[Params, ...]) -> Answer:
        """The answer, pending, of the shapes of the trees `like`."""
        level = self._level(question.trees) + 1
        answer: Answer = self._pending(like, level)
        self._questions[level].append((question, answer))
        return answer

    def later(self, function: Callable[..., Any], arguments: Any, like: Any) -> Any:
        """`function(*arguments)` once they are known; a tensor or tree of the shapes of `like`."""
        level = self._level(arguments)
        if level <= self.num_rounds:
            return function(*known(arguments))
        result = self._pending(like, level)
        # `known` finds values when the step runs: by then, those of its level have been settled.
        self._steps[level].append((lambda: function(*known(arguments)), result))
        return result

    def run(self, level: int) -> None:
        """Make rounds until everything of `level` is known."""
        while self.num_rounds < level:
            asked = self._questions.pop(self.num_rounds + 1)
            questions = [question._replace(trees=known(question.trees)) for question, _ in asked]
            answers = self._exchange(self.num_rounds, questions)
            self.num_rounds += 1
            for (_, pending), answer in zip(asked, answers, strict=True):
                _settle(pending, answer)
            for function, pending in self._steps.pop(self.num_rounds, ()):
                _settle(pending, function())

    def _level(self, node: Any) -> int:
        """The round after which everything in `node` is known."""
        levels = (leaf.level for leaf in _leaves(node) if isinstance(leaf, Pending))
        return max([self.num_rounds, *levels])

    def _pending(self, like: Any, level: int) -> Any:
        return _mapped(lambda leaf: Pending.of(_meta(leaf), self, level), like)


class Pending(Tensor):
    """A tensor of known shape and dtype, on the CPU, whose values come with a round.

    Its own memory is a meta tensor: what bypasses `__torch_function__` raises an error instead of
    reading values that are not there.
    """

    rounds: Rounds
    level: int
    result: Tensor | None
    form: tuple[Any, ...]

    @staticmethod
    def of(meta: Tensor, rounds: Rounds, level: int) -> Pending:
        """A tensor like `meta`, known after round `level` of `rounds`."""
        pending: Pending = meta.as_subclass(Pending)
        pending.form = meta.shape, meta.stride(), meta.dtype
        pending.rounds, pending.level, pending.result = rounds, level, None
        return pending

    def settled(self) -> Tensor:
        """The values; makes the rounds they need."""
        if self.result is None:
            self.rounds.run(self.level)
        assert self.result is not None
        return self.result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Shape and dtype are those of the meta tensor; its device is not.
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _DEVICE:
            return torch.device("cpu")
        open_leaves = [
            leaf
            for leaf in _leaves((args, kwargs))
            if isinstance(leaf, Pending) and leaf.result is None
        ]
        like = _form(func, args, kwargs) if open_leaves else None
        if like is None:  # all values are there, or `func` needs them now
            return func(*known(args), **known(kwargs))
        return open_leaves[0].rounds.later(
            lambda args, kwargs: func(*args, **kwargs), (args, kwargs), like
        )


_DESCRIPTIONS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
"""What is known of a tensor whose values are not."""

_DEVICE = Tensor.device.__get__


def _form(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """A meta tensor like `func(*args, **kwargs)`; None if that needs values or is no tensor."""
    try:
        key = func, _signature(args), _signature(kwargs)
        if key in _forms:
            return _forms[key]
    except TypeError:  # something that cannot be hashed
        key = None
    like = None
    # What fails without values needs them, or is wrong and says so again with them.
    with suppress(RuntimeError, TypeError):
        like = func(*_mapped(_meta, args), **_mapped(_meta, kwargs))
    if type(like) is not Tensor:
        like = None
    if key is not None:
        if len(_forms) >= _MAX_FORMS:
            _forms.clear()
        _forms[key] = like
    return like


_forms: dict[Any, Tensor | None] = {}
"""A cache for the process: on meta tensors, many operators run in Python and take 0.2 ms."""

_MAX_FORMS = 10_000


def _signature(node: Any) -> Any:
    """A hashable key of what the form of a result depends on; any float stands for all floats."""
    if isinstance(node, Pending):
        return node.form
    if isinstance(node, Tensor):
        return node.shape, node.stride(), node.dtype
    if isinstance(node, (list, tuple)):
        return type(node), tuple(map(_signature, node))
    if isinstance(node, dict):
        return tuple((name, _signature(child)) for name, child in node.items())
    if isinstance(node, slice):
        return slice, node.start, node.stop, node.step
    return float if type(node) is float else (type(node), node)


def known(node: Any) -> Any:
    """The same with values in the place of pending tensors; makes the rounds they need."""
    return _mapped(lambda leaf: leaf.settled() if isinstance(leaf, Pending) else leaf, node)


def _settle(pending: Any, value: Any) -> None:
    if isinstance(pending, Pending):
        pending.result = value
    elif isinstance(pending, dict):
        for name, leaf in pending.items():
            _settle(leaf, value[name])
    else:
        for child, found in zip(pending, value, strict=True):
            _settle(child, found)


def _meta(leaf: Tensor) -> Tensor:
    """A tensor like `leaf` without values."""
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(Tensor).to("meta") if type(leaf) is Pending else leaf.to("meta")


def _leaves(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _leaves(child)
    elif isinstance(node, dict):
        for child in node.values():
            yield from _leaves(child)


def _mapped(function: Callable[[Tensor], Tensor], node: Any) -> Any:
    """`node` with `function` of its tensors, in lists, tuples and dictionaries."""
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, dict):
        return {name: _mapped(function, child) for name, child in node.items()}
    if isinstance(node, (list, tuple)):
        children = [_mapped(function, child) for child in node]
        return type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
    return node
