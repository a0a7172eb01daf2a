"""Deep copies in which closures hold copies too: to `copy.deepcopy` a function is a constant."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import numpy as np
from torch import Tensor, nn

T = TypeVar("T")

PLAIN = (str, bytes, bool, int, float, complex, np.generic, type(None))
ATOMS = (*PLAIN, type, ModuleType)
FLAT = frozenset({list, tuple, set, frozenset, dict})

_originals: WeakKeyDictionary[nn.Module, list[ref[Tensor]]] = WeakKeyDictionary()
"""The parameters of the modules that these are copies of."""


def is_flat(value: Any) -> bool:
    """Whether `value` is a container of plain values alone: quick, where there are millions."""
    kind = type(value)
    if kind not in FLAT:
        return False
    inside = {*map(type, value.values() if kind is dict else value)}
    return inside <= _PLAIN_TYPES and (kind is not dict or {*map(type, value)} <= _PLAIN_TYPES)


_PLAIN_TYPES = frozenset({str, bytes, bool, int, float, complex, type(None)})


def reachable(value: Any) -> Iterator[Any]:
    """Everything that a copy of `value` may hold: also slots, closures, and fields of lists."""
    seen: dict[int, Any] = {}  # holds what it has seen, since a new object may get an old id
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, ATOMS) or id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        if is_flat(part):
            continue
        if isinstance(part, FunctionType):
            waiting += [part.__closure__, part.__defaults__, part.__kwdefaults__, vars(part)]
        elif isinstance(part, np.ndarray) and part.dtype.hasobject:
            waiting += part.ravel().tolist()
        else:
            waiting += gc.get_referents(part)


def deep_copy(value: T, memo: dict[int, Any], functions: Iterable[FunctionType]) -> T:
    """A deep copy of `value`; in that of `functions`, the closures hold copies as well.

    Args:
        value: What to copy.
        memo: The copies to use, by the id of what they stand for, as `copy.deepcopy` has it.
        functions: Some of those that `value` holds; all others stay as they are.
    """
    cells: dict[int, tuple[CellType, CellType]] = {}
    for function in functions:
        for cell in function.__closure__ or ():
            memo[id(cell)] = cells.setdefault(id(cell), (cell, CellType()))[1]
        closure = tuple(memo[id(cell)] for cell in function.__closure__ or ())
        alike = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            closure,
        )
        alike.__kwdefaults__ = function.__kwdefaults__
        vars(alike).update(vars(function))
        memo[id(function)] = alike
    copied = copy.deepcopy(value, memo)
    for cell, alike_cell in cells.values():
        with suppress(ValueError):  # of an empty cell
            alike_cell.cell_contents = content = cell.cell_contents
            with suppress(Exception):  # what cannot be copied is shared
                alike_cell.cell_contents = copy.deepcopy(content, memo)
    return copied


def copy_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of `model`, in which functions that hold a part of `model` hold that of the copy."""
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    functions = [
        part
        for part in reachable(model)
        if isinstance(part, FunctionType)
        and part.__closure__
        and any(id(held) in own for held in reachable(part.__closure__))
    ]
    copied = deep_copy(model, memo, functions)
    own_weights: list[ref[Tensor]] = []
    own_weights += (ref(leaf) for leaf in model.parameters() if leaf.requires_grad)
    _originals[copied] = _originals.get(model, own_weights)
    return copied


def originals_of(module: nn.Module) -> list[Tensor]:
    """The trainable parameters, as far as they are left, of what `module` was copied from."""
    found = (original() for original in _originals.get(module, ()))
    return [leaf for leaf in found if leaf is not None]
