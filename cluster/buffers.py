"""What travels: one flat numpy buffer per message, and the names and shapes to read it by.

Arrays that come out of the object store are shared and read-only. torch would write through
them without an error, so they appear on the right-hand side of a copy only.
"""

from __future__ import annotations

import warnings
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
        """How many numbers the outer variable holds."""
        return sum(leaf.numel() for leaf in self._like().values())

    def _like(self) -> Params:
        return {
            name: torch.empty(shape, dtype=self.dtype, device="meta")
            for name, shape in self.shapes.items()
        }

    def views(self, flat: Tensor) -> Params:
        """Views of `flat` by name."""
        return unflatten(flat, self._like())


def to_array(flat: Tensor) -> Array:
    """The values of `flat` as numpy; the same memory if it is on the CPU."""
    array: Array = flat.detach().cpu().numpy()
    return array


def read_only(array: Array) -> Tensor:
    """A tensor on the memory of `array`, to be read from and never written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class PackedState(NamedTuple):
    """`OuterState` in numpy, which Ray moves 20 times faster than tensors."""

    flat: Array
    optimizer: dict[str, Array]
    version: int
    applied_below: int
    applied: tuple[int, ...]
    recursion: dict[str, Array]
    states: dict[int, Array]


class Kept(NamedTuple):
    """What a lease needs beside x: the previous x of a two-point method, states by task index."""

    previous: Array | None
    states: dict[int, Array]


def pack_state(state: OuterState) -> PackedState:
    """The state as numpy arrays."""
    return PackedState(
        to_array(flatten(state.outer)),
        {name: to_array(leaf) for name, leaf in state.optimizer.items()},
        state.version,
        state.applied_below,
        state.applied,
        {name: to_array(leaf) for name, leaf in state.recursion.items()},
        {index: to_array(leaf) for index, leaf in state.states.items()},
    )


def to_tensor(array: Array) -> Tensor:
    """A tensor of the same values, in fresh memory."""
    return torch.from_numpy(np.array(array))


def unpack_state(packed: PackedState, spec: OuterSpec) -> OuterState:
    """The inverse of `pack_state`, in fresh memory."""
    return OuterState(
        spec.views(to_tensor(packed.flat)),
        {name: to_tensor(leaf) for name, leaf in packed.optimizer.items()},
        packed.version,
        packed.applied_below,
        packed.applied,
        {name: to_tensor(leaf) for name, leaf in packed.recursion.items()},
        {index: to_tensor(leaf) for index, leaf in packed.states.items()},
    )
