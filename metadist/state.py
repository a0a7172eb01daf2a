"""The state of an algorithm as one vector: what is sent to a worker, kept by a server and saved.

[how many counters, the counters, all tensors in order]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flatten_state(state: Any) -> Tensor:
    """The numbers of a state, shape (S,), in the dtype of its tensors."""
    counters: list[int] = []
    tensors: list[Tensor] = []
    _collect(state, counters, tensors)
    head = torch.tensor([len(counters), *counters])
    return torch.cat([head.to(tensors[0]), *(leaf.reshape(-1) for leaf in tensors)])


def counters_of(flat: Tensor) -> tuple[int, ...]:
    """The counters in a flat state (not for vmap)."""
    return tuple(int(number) for number in flat[1 : 1 + int(flat[0])])


def unflatten_state(flat: Tensor, like: Any, counters: tuple[int, ...]) -> Any:
    """The inverse of `flatten_state`; `like` is a state of the same structure."""
    shapes: list[Tensor] = []
    _collect(like, [], shapes)
    sizes = [leaf.numel() for leaf in shapes]
    expected = 1 + len(counters) + sum(sizes)
    if flat.shape != (expected,):
        raise ValueError(
            f"state must have shape ({expected},) for this algorithm and task, got "
            f"{tuple(flat.shape)}: it is of another algorithm, problem or task"
        )
    pieces = flat[1 + len(counters) :].split(sizes)
    tensors = iter(
        piece.reshape(leaf.shape).to(leaf.dtype) for piece, leaf in zip(pieces, shapes, strict=True)
    )
    return _build(like, iter(counters), tensors)


def _collect(node: Any, counters: list[int], tensors: list[Tensor]) -> None:
    if isinstance(node, Tensor):
        tensors.append(node)
    elif isinstance(node, int):
        counters.append(node)
    elif isinstance(node, (dict, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            _collect(child, counters, tensors)
    else:
        raise TypeError(
            "a state must hold Params, tensors, ints and NamedTuples of these, got "
            f"{type(node).__name__}"
        )


def _build(like: Any, counters: Any, tensors: Any) -> Any:
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, int):
        return next(counters)
    if isinstance(like, dict):
        return {name: _build(child, counters, tensors) for name, child in like.items()}
    children = [_build(child, counters, tensors) for child in like]
    return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
