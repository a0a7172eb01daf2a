"""`Algorithm`: how an inner variable is found and a hypergradient estimated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from metadist.oracle import Oracle
from metadist.problem import Problem
from metadist.task import Task
from metadist.trees import Params

State = Any
"""What persists between outer steps: a pytree (NamedTuple of Params) with a field `inner`."""


class InnerState(NamedTuple):
    """The state of algorithms that keep nothing but the inner variable."""

    inner: Params


class Estimate(NamedTuple):
    """What one outer step of an algorithm gives for one task.

    Args:
        hypergradient: d f / d outer, shaped like the `outer` the algorithm was given.
        start_gradient: d f / d inner at the start of adaptation, shaped like the inner variable;
            None if the algorithm treats the start as a constant.
        state: what persists; `state.inner` is the adapted inner variable.
        metrics: tensors of shape ().
    """

    hypergradient: Params
    start_gradient: Params | None
    state: State
    metrics: dict[str, Tensor]


class Algorithm(ABC):
    """One method of the literature; subclass it as a frozen dataclass of its hyperparameters.

    Pure: no hidden state, no in-place change, no data-dependent Python branch, randomness only
    through the oracle's draws. So it runs under `torch.func.vmap`, in any process, and can be
    checkpointed.
    """

    @abstractmethod
    def init(self, oracle: Oracle, outer: Params, inner: Params) -> State:
        """The state before the first outer step, `inner` being where adaptation starts."""

    @abstractmethod
    def estimate(self, oracle: Oracle, outer: Params, state: State) -> Estimate:
        """The hypergradient at `outer`, and the next state."""

    @abstractmethod
    def adapt(self, oracle: Oracle, outer: Params, inner: Params) -> Params:
        """The adapted inner variable alone: what evaluation needs, no hypergradient."""

    def init_own(self, inner: Params) -> Params:
        """Outer variables of the algorithm itself (learned rates), by default none.

        They are trained like the problem's; their names must start with `OWN`. `inner` is a
        start of adaptation, for shapes.
        """
        return {}

    @property
    def supports_vmap(self) -> bool:
        """Whether `estimate` may run under `torch.func.vmap` over tasks."""
        return True

    @property
    def compiles(self) -> bool:
        """Whether the oracle shall compile its derivatives (`torch.compile`)."""
        return False

    def check(self, problem: Problem, outer: Params, task: Task) -> None:
        """Raise ValueError if this algorithm cannot train this problem; default: it can."""


OWN = "algorithm."
"""Prefix of the names of an algorithm's own outer variables."""


def split_own(outer: Params) -> tuple[Params, Params]:
    """(the problem's outer variables, the algorithm's own)."""
    own = {name: leaf for name, leaf in outer.items() if name.startswith(OWN)}
    return {name: leaf for name, leaf in outer.items() if name not in own}, own
