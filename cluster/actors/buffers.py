"""Messages: one flat numpy buffer each, and the names and shapes to read it by.

Arrays that come out of the object store are shared and read-only. torch would write through
them without an error, so they are only ever copied from.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.outer import OuterState
from metadist.trees import Params, check_flattenable, flatten, unflatten

Array = NDArray[Any]

_TRAVELS = (torch.float16, torch.float32, torch.float64)


class OuterSpec(NamedTuple):
    """The names, shapes and dtype of the outer variable."""

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, outer: Params) -> OuterSpec:
        """The description of `outer`; ValueError if it cannot travel as one numpy buffer."""
        dtype = check_flattenable(outer, "outer")
        if dtype not in _TRAVELS:
            raise ValueError(
                f"outer must be float16, float32 or float64 on a cluster, got {dtype}: "
                "cast the model with model.float()"
            )
        return cls({name: tuple(leaf.shape) for name, leaf in outer.items()}, dtype)

    @property
    def num_elements(self) -> int:
        """The number of elements of the outer variable."""
        return sum(leaf.numel() for leaf in self._like().values())

    def of_slices(self, bounds: Sequence[tuple[int, int]]) -> list[OuterSpec]:
        """The descriptions of these slices of x; one slice is the whole x."""
        if len(bounds) == 1:
            return [self]
        return [OuterSpec({"x": (stop - start,)}, self.dtype) for start, stop in bounds]

    def _like(self) -> Params:
        return {
            name: torch.empty(shape, dtype=self.dtype, device="meta")
            for name, shape in self.shapes.items()
        }

    def views(self, flat: Tensor) -> Params:
        """Views of `flat` by name."""
        return unflatten(flat, self._like())


class PackedState(NamedTuple):
    """`OuterState`, or a shard's part of it, in numpy, which Ray moves 20 times faster."""

    flat: Array
    optimizer: dict[str, Array]
    version: int
    applied_below: int
    applied: tuple[int, ...]
    recursion: dict[str, Array]
    states: dict[int, Array]


def to_array(tensor: Tensor) -> Array:
    """A read-only array of the values of `tensor`; the same memory if it is on the CPU.

    numpy has no bfloat16: it travels as the integers of its bits.
    """
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.detach().cpu().numpy()
    array.flags.writeable = False
    return array


def read_only(array: Array) -> Tensor:
    """A tensor on the memory of `array`; never write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def to_tensor(array: Array) -> Tensor:
    """A tensor of the same values, in fresh memory."""
    return read_only(array).clone()


def on_disk(array: Array) -> Tensor:
    """A tensor of the same values, in a file of the temporary folder that has no name any more.

    It is mapped into memory and not read: the kernel reads what somebody looks at, and takes the
    pages back when it needs them. The space is free again when the tensor is gone, or this process.
    """
    if not array.size:
        return to_tensor(array)
    with tempfile.TemporaryFile() as file:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        mapped = np.memmap(file, dtype=array.dtype, mode="c", shape=array.shape)
    return read_only(np.asarray(mapped))


def join(parts: Sequence[Array]) -> Tensor:
    """The parts one after another, in fresh memory."""
    return torch.cat([read_only(part) for part in parts])


def pack_state(state: OuterState, flat: Tensor | None = None) -> PackedState:
    """The state as read-only numpy arrays on the same memory.

    Args:
        state: The state.
        flat: Its x as one vector; None: it is copied into one.
    """
    return PackedState(
        flat=to_array(flatten(state.outer) if flat is None else flat),
        optimizer={name: to_array(leaf) for name, leaf in state.optimizer.items()},
        version=state.version,
        applied_below=state.applied_below,
        applied=state.applied,
        recursion={name: to_array(leaf) for name, leaf in state.recursion.items()},
        states={index: to_array(leaf) for index, leaf in state.states.items()},
    )


def split_state(packed: PackedState, bounds: Sequence[tuple[int, int]]) -> list[PackedState]:
    """The parts of shards with these slices of x; the same memory. The first has the states."""

    def cut(arrays: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
        return {name: a[start:stop] if a.ndim else a for name, a in arrays.items()}

    return [
        packed._replace(
            flat=packed.flat[start:stop],
            optimizer=cut(packed.optimizer, start, stop),
            recursion=cut(packed.recursion, start, stop),
            states={} if start else packed.states,
        )
        for start, stop in bounds
    ]


def unpack_state(packed: PackedState, spec: OuterSpec) -> OuterState:
    """The inverse of `pack_state`, on the same memory; never write to it."""
    return OuterState(
        outer=spec.views(read_only(packed.flat)),
        optimizer={name: read_only(leaf) for name, leaf in packed.optimizer.items()},
        version=packed.version,
        applied_below=packed.applied_below,
        applied=packed.applied,
        recursion={name: read_only(leaf) for name, leaf in packed.recursion.items()},
        states={index: read_only(leaf) for index, leaf in packed.states.items()},
    )


def owned(packed: PackedState) -> PackedState:
    """The same values in memory of this process alone, which no loss of the object store takes."""

    def copied(arrays: Mapping[Any, Array]) -> dict[Any, Array]:
        return {key: np.array(array) for key, array in arrays.items()}

    return packed._replace(
        flat=np.array(packed.flat),
        optimizer=copied(packed.optimizer),
        recursion=copied(packed.recursion),
        states=copied(packed.states),
    )


def versions_of(parts: Sequence[PackedState]) -> list[int]:
    """The versions of x in the parts: one, unless a step has reached some shards only."""
    return sorted({part.version for part in parts})


def join_states(parts: Sequence[PackedState], spec: OuterSpec) -> OuterState:
    """The state with these parts, in fresh memory.

    Raises:
        ValueError: They are of more than one version of x.
    """
    first = parts[0]
    if any(part[2:5] != first[2:5] for part in parts):
        raise ValueError(f"the parts of x must be of one version, got {versions_of(parts)}")

    def joined(field: str) -> dict[str, Tensor]:
        return {
            name: join([getattr(part, field)[name] for part in parts])
            if leaf.ndim
            else to_tensor(leaf)
            for name, leaf in getattr(first, field).items()
        }

    return OuterState(
        outer=spec.views(join([part.flat for part in parts])),
        optimizer=joined("optimizer"),
        version=first.version,
        applied_below=first.applied_below,
        applied=first.applied,
        recursion=joined("recursion"),
        states={index: to_tensor(leaf) for index, leaf in first.states.items()},
        num_shards=len(parts),
    )
