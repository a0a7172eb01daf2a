"""`Algorithm`: how an inner variable is found and a hypergradient estimated.

The methods are in metadist/algorithms, one file each. An algorithm sees a context, a start and an
`Oracle` (oracle.py), never the problem or its data, so it runs unchanged under vmap, in a worker
and where the data is on many machines; `task_hypergradients` (hypergradient.py) runs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from metadist.oracle import Oracle
from metadist.problem import Problem
from metadist.task import Task
from metadist.trees import Params

State = Any
"""What persists between estimates: a NamedTuple with a field `inner`.

Its fields are Params, tensors, plain ints that depend on no data (counters), or NamedTuples of
these, the same in number, shape and order from `init` on, so that it can be sent and saved as one
vector (flat_states.py).
"""


class InnerState(NamedTuple):
    """The state of algorithms that keep nothing but the inner variable.

    `memory` is a `metadist.step_rules.Memory` if they carry one, else ().
    """

    inner: Params
    memory: Any = ()


class Estimate(NamedTuple):
    """What one outer step of an algorithm gives for one task.

    Args:
        hypergradient: d f / d context, shaped like the `context` the algorithm was given.
        start_gradient: d f / d inner at the start of adaptation, shaped like the inner variable;
            None if the algorithm treats the start as a constant.
        state: What persists; `state.inner` is the adapted inner variable.
        metrics: Tensors of shape (). They are read where `Oracle.reports` says so.
    """

    hypergradient: Params
    start_gradient: Params | None
    state: State
    metrics: dict[str, Tensor]


class Algorithm(ABC):
    """One method of the literature; subclass it as a frozen dataclass of its hyperparameters.

    Pure: no hidden state, no in-place change, no data-dependent Python branch, randomness only
    through the oracle's draws. So it runs under `torch.func.vmap`, in any process, and can be
    checkpointed. Schedules go by `oracle.step`.

    The docstring of a method is its entry in `metadist list algorithms` and docs/algorithms.md.
    The first line is its title; formulas and prose follow, then Args, then paragraphs, all
    optional, that start with "Family:" (the heading it stands under), "For:" (which lower
    problems), "Cost:", "State:" (what it keeps beside x), "Memory:", "Use:" (when to pick it),
    "Breaks:" (when it fails), "Source:" and "Differs:" (from paper and official code). Where space
    is short the first sentence of a paragraph stands for it.
    """

    # Class attributes, no fields: this class is no dataclass, and subclasses assign without
    # annotation. Annotated with built-in names only, since jsonargparse evaluates them in the
    # module of the subclass and would lose the types of all its fields.
    trains: str = "both"
    """What gets a hypergradient: "context" (what the losses see of x), "start" (of adaptation),
    or "both"."""
    takes_prox: bool = False
    """Whether it can handle a lower objective with a non-smooth part (`Problem.prox_inner`)."""
    takes_map: bool = False
    """Whether it can go through the fixed point of `Problem.inner_map`."""
    no_graph: str = ""
    """Why a lease of it can be no CUDA graph; empty: it can."""

    @abstractmethod
    def init(self, oracle: Oracle, context: Params, inner: Params) -> State:
        """The state before the first estimate, `inner` being where adaptation starts.

        Cheap: it asks the oracle for no derivative, since a kept state is read by its shapes.
        """

    @abstractmethod
    def estimate(self, oracle: Oracle, context: Params, state: State) -> Estimate:
        """The hypergradient at `context`, and the next state."""

    @abstractmethod
    def adapt(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        """The adapted inner variable alone: what evaluation needs, no hypergradient."""

    def unrolled_map(self, oracle: Oracle, context: Params, inner: Params) -> Params:
        """The y at which training takes f, where the method differentiates through its steps.

        Only `check_hypergradient` asks for it; default: what `adapt` gives.
        """
        return self.adapt(oracle, context, inner)

    def recursive_weight(self, step: int) -> float | None:
        """For a two-point method, the weight a_k of the new hypergradient; None for all others.

        The method steps x along  w_k = h_k(x_k) + (1 - a_k) (w_{k-1} - h_k(x_{k-1})), where h_k
        is the estimate on the tasks and draws of step k. Where each step has new tasks, workers
        also receive x_{k-1} and call `estimate` on a new state at both points, and the server
        keeps w and x_{k-1}. Where the tasks and their states are kept, `estimate` does the
        recursion in the state instead. a_k = 1 asks for one point only.
        """
        return None

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
    def takes_second_derivatives(self) -> bool:
        """Whether it differentiates a gradient of a loss.

        Attention then computes by plain operators, since its fused kernels have no double backward
        pass; a method that says False keeps those, which are faster and smaller.
        """
        return True

    @property
    def bears_rounding(self) -> str:
        """What h may be computed in.

        "float32": no less, where h is divided by what may be small, the distance of points near one
        another. "autocast": also losses in bfloat16 from a y in float32. "bfloat16": also a y in
        bfloat16.
        """
        return "bfloat16"

    @property
    def compiles(self) -> bool:
        """Whether the oracle compiles what is asked in `Oracle.together` (`torch.compile`)."""
        return False

    @property
    def tolerates_staleness(self) -> bool:
        """Whether the steps of this method may mix derivatives at points a few steps apart.

        True for single loops of gradient steps: stale points add to their error and no more. A
        solver that assumes one matrix for all its products, and a recursion on differences, break.
        """
        return False

    @property
    def kept_options(self) -> dict[str, str]:
        """The fields that act on a kept state alone: they must have their defaults on new tasks.

        With what to set more of, so that they act there too; empty: nothing does.
        """
        return {}

    @property
    def needs_kept_state(self) -> str:
        """Why `estimate` cannot do on a new task what it is told, and what to do; empty: it can."""
        for name, more in self.kept_options.items():
            value = getattr(self, name)
            if value != getattr(type(self), name):  # where a dataclass has its defaults
                set_more = f", set more {more}" if more else ""
                return f"{name}={value!r} acts on a kept state alone. Leave it out{set_more}"
        return ""

    @property
    def differentiates_values(self) -> bool:
        """Whether the algorithm differentiates `Oracle.inner_value` or `outer_value` itself."""
        return False

    def check(self, problem: Problem, outer: Params, task: Task, some: Task | None = None) -> None:
        """Raise ValueError if this algorithm cannot train this problem; default: it can.

        Losses are to be computed on `some`, mini-batches of `task`; None: on the whole task.
        """


OWN = "algorithm."
"""Prefix of the names of an algorithm's own outer variables."""


def split_own(outer: Params) -> tuple[Params, Params]:
    """(the problem's outer variables, the algorithm's own)."""
    own = {name: leaf for name, leaf in outer.items() if name.startswith(OWN)}
    return {name: leaf for name, leaf in outer.items() if name not in own}, own
