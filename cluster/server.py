"""`ParameterServer`: owns x; becomes an actor where it is created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ray import cloudpickle

from metadist.cluster.buffers import (
    Array,
    Kept,
    OuterSpec,
    PackedState,
    pack_state,
    read_only,
    to_array,
    unpack_state,
)
from metadist.lease import intra_op_threads
from metadist.outer import Contribution, OuterOptimizer, OuterVariable, StepResult


class Arrival(NamedTuple):
    """A contribution without its tensor, see `Contribution`."""

    lease_id: int
    version: int
    num_tasks: int
    weight: float
    state_sizes: Mapping[int, int] = {}  # never changed


class Progress(NamedTuple):
    """The version of x and the leases in it, see `OuterState`."""

    version: int
    applied_below: int
    applied: tuple[int, ...]


class ParameterServer:
    """A shell around `OuterVariable` that speaks numpy."""

    def setup(
        self,
        state: PackedState,
        spec: OuterSpec,
        optimizer: OuterOptimizer,
        num_threads: int,
        rules: bytes | None = None,
    ) -> None:
        """Continue from `state`.

        Args:
            state: of x and its optimiser.
            spec: names, shapes and dtype of x.
            optimizer: how x is stepped.
            num_threads: intra-op threads of a step; the sum in a norm may depend on it.
            rules: the `StepRules`, if there are any, pickled by `runtime_env.pickle_by_value`.
        """
        self._variable = OuterVariable.from_state(
            unpack_state(state, spec), optimizer, cloudpickle.loads(rules) if rules else None
        )
        self._num_threads = num_threads

    def apply(self, arrivals: Sequence[Arrival], *totals: Array) -> tuple[StepResult, Array]:
        """(what one outer step with these did, a copy of x); each lease counts once."""
        contributions = [_contribution(*pair) for pair in zip(arrivals, totals, strict=True)]
        with intra_op_threads(self._num_threads):
            step = self._variable.apply(contributions)
        return step, self._copy()

    def pull(self) -> Array:
        """A copy of x."""
        return self._copy()

    def kept(self, indices: Sequence[int]) -> Kept:
        """What a lease of these tasks needs beside x."""
        previous, states = self._variable.previous, self._variable.states
        return Kept(
            None if previous is None else to_array(previous.clone()),
            {index: to_array(states[index].clone()) for index in indices if index in states},
        )

    def version(self) -> int:
        """The version of x."""
        return self._variable.version

    def progress(self) -> Progress:
        """The version of x, and the leases in it."""
        state = self._variable.state()
        return Progress(state.version, state.applied_below, state.applied)

    def state(self) -> PackedState:
        """A copy of everything that must persist."""
        return pack_state(self._variable.state())

    def _copy(self) -> Array:
        # Never the memory of x itself: who holds it could write to x, or see it change.
        return to_array(self._variable.flat.clone())


def _contribution(item: Arrival, buffer: Array) -> Contribution:
    flat = read_only(buffer)
    sizes = item.state_sizes
    total, *states = flat.split([len(flat) - sum(sizes.values()), *sizes.values()])
    return Contribution(
        item.lease_id,
        item.version,
        total,
        item.num_tasks,
        item.weight,
        {index: state.clone() for index, state in zip(sizes, states, strict=True)},
    )
