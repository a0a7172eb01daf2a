"""What an object holds, and whether two objects hold the same bytes."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metadist.copies import PLAIN, is_flat
from metadist.trees import as_bytes, same_bytes


def random_states() -> list[Any]:
    """The states of the global generators of torch, Python and numpy."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # only looked at
    return [torch.get_rng_state(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block the global generators start from `seed`; afterwards they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    # Not torch.manual_seed, which would also seed every GPU.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # that generator is the one to look at
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf or module) for all that `value` holds, modules before what is in them.

    Leaves are tensors, arrays, numbers, texts, containers of these two alone, and the state of a
    counter.
    """
    seen: dict[int, Any] = {}  # holds what it has seen, since a new object may get an old id
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, PLAIN):
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if is_flat(value):
            yield path, value
            continue
        if isinstance(value, Tensor | nn.Module | count) or _is_plain_array(value):
            yield path, value
        found = [(f"{path}.{name}" if path else str(name), child) for name, child in _in(value)]
        waiting.extend(reversed(found))


def _is_plain_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def _in(value: Any) -> Iterable[tuple[Any, Any]]:
    """(name, child) of what `value` holds itself."""
    if isinstance(value, OPAQUE):
        return ()
    if isinstance(value, nn.Module):
        fields = dict(vars(value))
        parts = [fields.pop(part).items() for part in ("_parameters", "_buffers", "_modules")]
        return chain(*parts, fields.items())
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    if isinstance(value, np.ndarray):
        return enumerate(value.ravel().tolist()) if value.dtype.hasobject else ()
    if isinstance(value, partial):
        return (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    if isinstance(value, MethodType):
        return (("self", value.__self__),)
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        kept = [(name, cell.cell_contents) for name, cell in cells if cell != CellType()]
        return [*kept, *enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    fields = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**fields, **getattr(value, "__dict__", {})}.items()


OPAQUE = (type, Tensor, ModuleType, BuiltinFunctionType)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor consists of."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _unwrapped(tensor: Tensor) -> Tensor:
    """What functional transforms have wrapped, which has the bytes."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def digest(tensor: Tensor | np.ndarray[Any, Any]) -> bytes:
    """A digest of its dtype, shape and bytes."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if isinstance(tensor, np.ndarray):
        hasher.update(tensor.tobytes())
    elif tensor.device.type != "meta":
        for part in _parts(tensor):
            hasher.update(as_bytes(_unwrapped(part)).numpy())  # type: ignore[arg-type]
    return hasher.digest()


def digests(value: Any) -> dict[str, bytes]:
    """A digest of every tensor that `value` holds, by its path."""
    return {path: digest(leaf) for path, leaf in walk(value) if isinstance(leaf, Tensor)}


def same(first: Any, second: Any, *, exact: bool = True) -> bool:
    """Whether two results have the same structure and the same bytes."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (first.dtype, first.shape, first.layout) != (second.dtype, second.shape, second.layout):
            return False
        if not exact and first.device.type != "cpu" and first.is_floating_point():
            allowed = torch.finfo(first.dtype).eps ** (1 / 3) * float(first.norm())
            return torch.allclose(first, second, rtol=0, atol=allowed, equal_nan=True)
        pairs = zip(_parts(first), _parts(second), strict=True)
        return all(same_bytes(_unwrapped(a), _unwrapped(b)) for a, b in pairs)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return list(first) == list(second) and all(
            same(first[name], second[name], exact=exact) for name in first
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(
            same(a, b, exact=exact) for a, b in zip(first, second, strict=True)
        )
    # NaN is no fault here; other checks ask for finite values.
    return bool(first == second) or (first != first and second != second)


agree = partial(same, exact=False)
"""`same`, but up to rounding on devices where equal sums need not have equal bytes."""


def changed_argument(before: tuple[Any, ...], after: tuple[Any, ...]) -> str | None:
    """The name of a tensor that differs between two lists of arguments."""
    for one, two in zip(before, after, strict=True):
        if not isinstance(one, dict):
            continue
        if list(one) != list(two):
            return "the names of a dictionary"
        for name, leaf in one.items():
            if not same(leaf, two[name]):
                return repr(name)
    return None
