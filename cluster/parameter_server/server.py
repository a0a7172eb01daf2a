"""`ParameterServer`: owns x; becomes an actor where it is created."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray import cloudpickle

from metadist.cluster.actors.buffers import (
    Array,
    OuterSpec,
    PackedState,
    pack_state,
    to_array,
    to_tensor,
    unpack_state,
)
from metadist.cluster.actors.connection import this_node
from metadist.cluster.actors.errors import exits_raised
from metadist.cluster.parameter_server.transport import (
    OBJECT_STORE,
    Pulled,
    Pushed,
    Transport,
    receive,
)
from metadist.compute import intra_op_threads, pick_device
from metadist.optimizer import OuterOptimizer
from metadist.outer import Contribution, LeaseResult, OuterVariable, StepResult


class Progress(NamedTuple):
    """The version of x and the leases in it, see `OuterState`."""

    version: int
    applied_below: int
    applied: tuple[int, ...]


class ParameterServer:
    """An `OuterVariable` behind calls that take and return numpy; each shard has one.

    It returns the memory of x itself, without a copy: an actor computes one call at a time, and
    Ray has copied the result into shared memory before the next call can modify x.
    """

    @exits_raised()
    def setup(
        self,
        state: PackedState,
        spec: OuterSpec,
        optimizer: OuterOptimizer,
        num_threads: int | None,
        rules: bytes | None = None,
        transport: Transport = OBJECT_STORE,
    ) -> str:
        """Continue from `state`; returns the id of the node that this runs on.

        Args:
            state: The state of x and its optimiser, or of a slice of it.
            spec: The names, shapes and dtype of x; for a slice, see `OuterSpec.of_slices`.
            optimizer: How x is stepped.
            num_threads: The intra-op threads of a step; the sum in a norm may depend on it.
            rules: The `StepRules`, if there are any, pickled by `runtime_env.pickle_by_value`.
            transport: How x travels to workers, and on which device it is.
        """
        # Free the x of the last run first: two of them may not fit in memory.
        self.__dict__.clear()
        self._transport = transport
        self._device = pick_device(transport.device)
        self._variable = OuterVariable.from_state(
            unpack_state(state, spec),
            optimizer,
            cloudpickle.loads(rules) if rules else None,
            self._device,
        )
        self._num_threads = num_threads
        return this_node()

    @exits_raised()
    def apply(
        self, results: Sequence[LeaseResult], weights: Sequence[float], *pushed: Pushed
    ) -> tuple[StepResult, Pulled]:
        """(what one outer step with these leases did, the new x); each lease counts once."""
        contributions = self._contributions(results, weights, pushed)
        with intra_op_threads(self._num_threads):
            step = self._variable.apply(contributions)
        return step, self.pull()

    def prepare(
        self, results: Sequence[LeaseResult], weights: Sequence[float], *pushed: Pushed
    ) -> list[float]:
        """The first half of a step on several shards, see `OuterVariable.prepare`.

        A step changes all shards or none: a shard that cannot read its slice of a sum, or finds it
        not finite, raises here, while every shard still has the old x. And `commit` needs the norm
        over all shards, which the caller computes of what they return.
        """
        contributions = self._contributions(results, weights, pushed)
        with intra_op_threads(self._num_threads):
            return self._variable.prepare(contributions)

    @exits_raised()
    def commit(self, norm: float) -> tuple[StepResult, Pulled]:
        """(what the prepared step did, the new slice of x), see `OuterVariable.commit`."""
        with intra_op_threads(self._num_threads):
            step = self._variable.commit(norm)
        return step, self.pull()

    def pull(self) -> Pulled:
        """x as a lease needs it."""
        send, previous = self._transport.send_copy, self._variable.previous
        return Pulled(send(self._variable.flat), None if previous is None else send(previous))

    def kept(self, indices: Sequence[int]) -> dict[int, Array]:
        """The states of these tasks, where there are any."""
        states = self._variable.states
        return {index: to_array(states[index]) for index in indices if index in states}

    def version(self) -> int:
        """The version of x."""
        return self._variable.version

    def progress(self) -> Progress:
        """The version of x, and the leases in it."""
        state = self._variable.state(copy=False)
        return Progress(state.version, state.applied_below, state.applied)

    def state(self) -> PackedState:
        """Everything that must persist."""
        return pack_state(self._variable.state(copy=False), self._variable.flat)

    def _contributions(
        self, results: Sequence[LeaseResult], weights: Sequence[float], pushed: Sequence[Pushed]
    ) -> list[Contribution]:
        contributions = []
        for result, weight, sent in zip(results, weights, pushed, strict=True):
            states = {
                index: to_tensor(state).to(self._device) for index, state in sent.states.items()
            }
            total = receive(sent.total).to(self._device)
            contributions.append(Contribution(result, total, states, weight))
        return contributions
