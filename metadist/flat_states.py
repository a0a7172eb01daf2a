"""The state of an algorithm as one vector, in which form it is sent, kept and saved.

    [number of counters, the counters, all tensors in order]

No structure is stored beside it: `Algorithm.init` gives a state of the same structure. The counters
are in front, readable without it, since vmap needs them as Python ints before any task is computed.
They stay exact although the vector is one of floating numbers: as soon as one of them is too large
for the dtype, all are written byte by byte, and their number is negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from metadist.followed import Followed, filled
from metadist.trees import Params, num_elements, unflatten

_BYTES = 8
_MOST = 33
"""Numbers of a flat state that are read at once: four counters in bytes."""


def flatten_state(state: Any) -> Tensor:
    """A state as one vector, shape (S,), in the dtype of its tensors.

    Raises:
        TypeError: It holds something that is no tensor, int, dict or tuple.
    """
    counters: list[int] = []
    tensors: list[Tensor] = []
    _collect(state, counters, tensors)
    dtype = reduce(torch.promote_types, map(_exact_in, tensors))
    # Filled on the device: one tensor of them would be copied there, and be waited for.
    head = [filled(tensors[0], (1,), number, dtype) for number in _head(counters, dtype)]
    return torch.cat([*head, *(leaf.reshape(-1) for leaf in tensors)])


def _exact_in(leaf: Tensor) -> torch.dtype:
    """The floating dtype that holds the numbers of a tensor as they are."""
    is_integer = not leaf.is_floating_point() and leaf.dtype != torch.bool
    return torch.float64 if is_integer else leaf.dtype


def _head(counters: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The counters and their number, as numbers that `dtype` holds exactly."""
    if all(abs(number) < _first_inexact(dtype) for number in counters):
        return [len(counters), *counters]
    head = [-len(counters)]
    for number in counters:
        head += int(number).to_bytes(_BYTES, "little", signed=True)
    return head


def _first_inexact(dtype: torch.dtype) -> int:
    """The integer from which on they round: 256 in bfloat16, 2^24 in float32."""
    return round(2 / torch.finfo(dtype).eps)


def counters_of(flat: Tensor) -> tuple[int, ...]:
    """The counters in a flat state (not for vmap).

    Raises:
        ValueError: An earlier version may have rounded one of them.
    """
    return counters_of_all([flat])[0]


def counters_of_all(flats: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """`counters_of` of each, for which a GPU is waited for once."""
    heads = [flat[:_MOST] for flat in flats]
    numbers = iter(torch.cat(heads).tolist() if heads else ())
    read = [list(itertools.islice(numbers, len(head))) for head in heads]
    return [_counters(flat, head) for flat, head in zip(flats, read, strict=True)]


def _counters(flat: Tensor, head: list[float]) -> tuple[int, ...]:
    """The counters in a flat state that begins with the numbers `head`."""
    count = int(head[0])
    if count < 0:
        end = 1 - count * _BYTES
        numbers = list(map(int, head[1:end] if end <= _MOST else flat[1:end].tolist()))
        pieces = [bytes(numbers[at : at + _BYTES]) for at in range(0, len(numbers), _BYTES)]
        return tuple(int.from_bytes(piece, "little", signed=True) for piece in pieces)
    if count >= _MOST:
        head = flat[: 1 + count].tolist()
    counters = tuple(map(int, head[1 : 1 + count]))
    limit = _first_inexact(flat.dtype)
    if any(abs(number) >= limit for number in counters):
        raise ValueError(
            f"counters of a state in {flat.dtype} must be below {limit}, got {counters}: an "
            "earlier version of metadist saved it and may have rounded them. Start that run again"
        )
    return counters


def same_form(flat: Tensor, other: Tensor) -> bool:
    """Whether these are flat states of one algorithm and task; counters grow and need more room."""
    if flat.ndim != 1 or other.ndim != 1 or flat.dtype != other.dtype:
        return False
    short, long = sorted((flat, other), key=Tensor.numel)
    if short.shape == long.shape:
        return True
    count = float(short[0]) if short.numel() else 0.0
    grown = long.numel() - short.numel() == count * (_BYTES - 1)
    return grown and float(long[0]) == -count


def unflatten_state(flat: Tensor, like: Any, counters: tuple[int, ...]) -> Any:
    """The inverse of `flatten_state`.

    Args:
        flat: The vector, shape (S,).
        like: A state of the same structure.
        counters: `counters_of(flat)`, which vmap could not read.

    Raises:
        ValueError: It has another length than such a state.
    """
    shapes: list[Tensor] = []
    _collect(like, [], shapes)
    sizes = [leaf.numel() for leaf in shapes]
    head = len(_head(counters, flat.dtype))
    expected = head + sum(sizes)
    if flat.shape != (expected,):
        raise ValueError(
            f"state must have shape ({expected},) for this algorithm and task, got "
            f"{tuple(flat.shape)}: it is of another algorithm, problem or task"
        )
    pieces = flat[head:].split(sizes)
    tensors = iter(
        piece.reshape(leaf.shape).to(leaf.dtype) for piece, leaf in zip(pieces, shapes, strict=True)
    )
    return _build(like, iter(counters), tensors)


def split_carried(flat: Tensor, like: Params) -> tuple[Tensor, Params]:
    """(the state, still flat; what the problem carries) of the two in one vector.

    Args:
        flat: `flatten_state((state, carried))`.
        like: A tree like what is carried; empty: nothing is.
    """
    size = num_elements(like)
    state, rest = flat.split([len(flat) - size, size])
    return state, unflatten(rest, like) if like else {}


def _collect(node: Any, counters: list[int], tensors: list[Tensor]) -> None:
    if isinstance(node, Tensor):
        tensors.append(node)
    elif isinstance(node, int | Followed):
        counters.append(cast(int, node))
    elif isinstance(node, (dict, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            _collect(child, counters, tensors)
    else:
        raise TypeError(
            "a state must hold Params, tensors, ints and NamedTuples of these, got "
            f"{type(node).__name__}"
        )


def _build(like: Any, counters: Iterator[int], tensors: Iterator[Tensor]) -> Any:
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, int | Followed):
        return next(counters)
    if isinstance(like, dict):
        return {name: _build(child, counters, tensors) for name, child in like.items()}
    children = [_build(child, counters, tensors) for child in like]
    return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
