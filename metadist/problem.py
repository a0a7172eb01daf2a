"""`Problem`: what a user writes to describe a bilevel problem.

    min_x  mean over tasks of f(x, y(x))    where  y(x) comes from adapting on  g(x, .)

Every method is pure: no in-place change of an argument, no state, no randomness that is not
given. The split of the outer variable into a *context* (from `encode`) and a *start* (from
`init_inner`) carries both speed and generality: an algorithm sees only context and start, and
one vector-Jacobian product through the two methods gives the hypergradient (hypergradient.py).

Problems are in metadist/tasks, beside the samplers of their data. Nothing here depends on how a
problem is solved.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metadist.compute import DEFAULT, Compute
from metadist.sampler import TaskSampler
from metadist.task import Batch, Task
from metadist.trees import Params, detach, gradients, leaves


class Problem(Protocol):
    """A bilevel problem; subclass it and write the abstract methods.

    `outer` is the outer variable x. `context`, which the losses receive, is what `encode` returned
    for the task: by default x itself.
    """

    few_shot_classes: bool = False
    """Whether the targets of a task are its classes, 0 .. N-1, with each in the support set; the
    Trainer then checks that of its samplers. Targets are anything else otherwise."""

    @abstractmethod
    def init_outer(self, generator: torch.Generator) -> Params:
        """The outer variable to start from; all randomness comes from `generator`, on the CPU."""

    def encode(self, outer: Params, task: Task) -> Params:
        """The context of `task`: differentiable in `outer`, computed once per outer step."""
        return outer

    def encode_tasks(self, outer: Params, tasks: Task) -> Params:
        """`encode` of a stack of tasks, with a leading task axis in every result.

        Override it where one batched call is cheaper than one call per task; the values must
        be those of `encode` task by task.
        """
        return torch.func.vmap(self.encode, in_dims=(None, 0))(outer, tasks)

    @abstractmethod
    def init_inner(self, outer: Params, task: Task) -> Params:
        """Where adaptation starts, differentiable in `outer`."""

    @abstractmethod
    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """g, shape (): the loss that adaptation lowers, on (a batch of) the support set."""

    @abstractmethod
    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """f, shape (): the loss of the adapted variable on (a batch of) the query set."""

    def init_carried(self, outer: Params, task: Task) -> Params:
        """What `carry` starts from, by default nothing: floating tensors in the dtype of x."""
        return {}

    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        """State of the problem's own after an outer step: a teacher, targets of stored examples.

        The losses find what the last step left in their context, beside what `encode` returned, as
        a constant. It needs kept states, with which it is sent, saved and resumed.

        Args:
            outer: x before the step.
            inner: The adapted variable.
            task: The task, with the data of the step.
            carried: What the last step left, of `init_carried` before the first.

        Returns:
            Tensors with the names and shapes of `carried`.
        """
        return carried

    def nonsmooth_loss(self, context: Params, inner: Params) -> Tensor:
        """r, shape (): a part of the lower objective g + r that is not smooth in y, else 0.

        Write it together with `prox_inner`; it must be differentiable in `context`.
        """
        return torch.zeros(())

    def prox_inner(self, context: Params, inner: Params, step_size: float) -> Params:
        """argmin_z r(context, z) + |z - inner|^2 / (2 step_size), for algorithms with a prox."""
        return inner

    def inner_map(self, context: Params, inner: Params, batch: Batch) -> Params:
        """Phi: where y moves to in one inner step, for a lower level that minimises nothing.

        Override it where the lower solution is the fixed point y = Phi(x, y) of a contraction: an
        equilibrium model, a projected or any other solver's step. ITD then makes inner_steps of
        y <- Phi(x, y) and differentiates through them; AID differentiates the fixed point; all
        other methods refuse the problem. `inner_loss` is only reported (for example
        |Phi(x, y) - y|^2). Differentiable in both arguments; the result is shaped like `inner`.
        """
        return inner  # stands for "none", see `has_inner_map`

    def project_outer(self, outer: Params) -> Params:
        """The point of the feasible set nearest to x, applied after every outer step."""
        return outer

    def per_example(self, outer: Params) -> set[str]:
        """Names of outer variables whose row i belongs to support example i: weights of the data.

        Row i may enter the inner loss of example i only, as `context[name][batch.index]`. Where the
        data is on many workers, each worker receives the rows of its own examples.
        """
        return set()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        """Metrics on the query set beside f, each of shape (), for example `accuracy`."""
        return {}

    def loss_and_metrics(
        self, context: Params, inner: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(`outer_loss`, `metrics`), for an evaluation.

        Override it where one pass serves both; the values must be those of the two methods. A
        subclass that overrides one of these, and not this, is asked for each alone.
        """
        return self.outer_loss(context, inner, batch), self.metrics(context, inner, batch)

    def solution_metrics(self, outer: Params, inner: Params) -> dict[str, float]:
        """Metrics of a solution that need no data, for example the distance to a known one."""
        return {}

    def artifacts(self, outer: Params, inner: Params | None) -> dict[str, bytes]:
        """Files by name that show what was learned so far, such as a figure as PNG.

        The Trainer writes them to `artifacts/step-NNNNNNNN/` in its run folder, with each
        validation and at the end. A name consists of letters, digits and `._-`.

        Args:
            outer: x, on the CPU.
            inner: With kept states, the inner variable of task 0 after the last step; else None.
        """
        return {}

    def check_sampler(self, sampler: TaskSampler) -> None:
        """Raise ValueError if the tasks of `sampler` cannot be those of this problem; once, before.

        The losses are tried on task 0 anyway: this is for what one mini-batch does not show.
        """
        return None

    def describe(self) -> dict[str, str]:
        """What one must know to reproduce a result, for example the batch-norm policy."""
        return {}


@runtime_checkable
class HasModel(Protocol):
    """A problem whose inner loop trains a model: it can be asked for predictions."""

    def predict(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """The model's outputs on a batch of the query set, shape (examples, ...).

        `context` is what `encode` returned for the task of that query set, `inner` is adapted. The
        targets of the batch are not looked at.
        """
        ...

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        """The model as a plain torch module that holds copies of the adapted weights."""
        ...


@runtime_checkable
class HasScores(Protocol):
    """A problem whose outer variable weights training data, see `metadist scores`."""

    def scores(self, outer: Params, task: Task) -> Iterator[dict[str, Any]]:
        """What was learned of each source or support example of `task`, as JSON has it."""
        ...


def has_few_shot_classes(problem: Problem) -> bool:
    """Whether targets are the classes of a task, see `Problem`."""
    return bool(getattr(problem, "few_shot_classes", False))


def loss_and_metrics(
    problem: Problem, context: Params, inner: Params, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """(`outer_loss`, `metrics`), in one pass where the problem has one for both."""
    places = [problem, *type(problem).__mro__]

    def place(name: str) -> float:
        found = (i for i, place in enumerate(places) if name in getattr(place, "__dict__", {}))
        return next(found, math.inf)

    # What is inherited knows nothing of a loss that a subclass has changed.
    if place("loss_and_metrics") <= min(place("outer_loss"), place("metrics"), len(places)):
        return problem.loss_and_metrics(context, inner, batch)
    return problem.outer_loss(context, inner, batch), problem.metrics(context, inner, batch)


def check_sampler(problem: Problem, sampler: TaskSampler) -> None:
    """`Problem.check_sampler` of a problem that has it."""
    if _overrides(problem, "check_sampler"):
        problem.check_sampler(sampler)


def has_artifacts(problem: Problem) -> bool:
    """Whether the problem has files to show."""
    return _overrides(problem, "artifacts")


def is_nonsmooth(problem: Problem) -> bool:
    """Whether the problem has a non-smooth part in its lower objective."""
    return _overrides(problem, "prox_inner")


def has_inner_map(problem: Problem) -> bool:
    """Whether the lower solution is the fixed point of the problem's own map."""
    return _overrides(problem, "inner_map")


def carries(problem: Problem) -> bool:
    """Whether the problem may have a state of its own."""
    return _overrides(problem, "init_carried") or _overrides(problem, "carry")


def start_carried(problem: Problem, outer: Params, task: Task) -> Params:
    """The state of the problem's own before the first step, a constant; empty: it has none.

    Raises:
        ValueError: Not all of it is floating and in the dtype of x; `carry` goes on with nothing.
    """
    if not carries(problem):
        return {}
    with torch.no_grad():
        carried = problem.init_carried(outer, task)
    if not carried and not _overrides(problem, "init_carried"):
        raise ValueError(
            f"a problem with carry must have init_carried, got {type(problem).__name__} without: "
            "return what it starts from, tensors of the shapes that carry returns"
        )
    dtype = next(iter(outer.values())).dtype
    for name, leaf in carried.items():
        if leaf.dtype != dtype:
            raise ValueError(
                f"init_carried must return tensors of {dtype}, the dtype of x, got {name} of "
                f"{leaf.dtype}: it is sent and saved with y; cast it, and cast it back in the loss"
            )
    return detach(carried)


def carry(problem: Problem, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
    """The state of the problem's own after a step that found it to be `carried`.

    Raises:
        ValueError: It has other names, shapes or dtypes than before.
    """
    if not carried:
        return {}
    with torch.no_grad():
        found = problem.carry(outer, inner, task, carried)
    got, expected = _form(found), _form(carried)
    if got != expected:
        raise ValueError(
            f"carry must return tensors of {expected}, names and dtypes as of init_carried, "
            f"got {got}: a state is saved as one vector of a fixed length and dtype"
        )
    return {name: found[name].detach() for name in carried}


def _form(tree: object) -> dict[str, str] | str:
    """The shape and dtype of each tensor; of what is no tree of tensors, its type."""
    if not isinstance(tree, Mapping):
        return type(tree).__name__
    return {
        name: f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
        for name, leaf in tree.items()
    }


def context_of(
    problem: Problem,
    outer: Params,
    task: Task,
    carried: Params | None = None,
    compute: Compute = DEFAULT,
) -> Params:
    """What the losses of a task receive: that of `encode`, and what is carried (None: its start).

    `compute` says in which precision.

    Raises:
        ValueError: A name is in both.
    """
    if carried is None:
        carried = start_carried(problem, outer, task)
    return with_carried(compute.encode(problem.encode, outer, task), carried)


def with_carried(context: Params, carried: Params) -> Params:
    """A context of `encode` with what is carried; ValueError if a name is in both."""
    both = sorted(context.keys() & carried.keys())
    if both:
        raise ValueError(
            f"init_carried must have names that encode has not, got {', '.join(both)} in both: "
            "choose others, the losses find both in one context"
        )
    return {**context, **carried}


def is_constrained(problem: Problem) -> bool:
    """Whether the outer variable of the problem is confined to a set."""
    return _overrides(problem, "project_outer")


def per_example_names(problem: Problem, outer: Params) -> set[str]:
    """Names of the outer variables with a row for each support example.

    Raises:
        ValueError: `per_example` returns a name that no outer variable has.
    """
    names = set(problem.per_example(outer)) if _overrides(problem, "per_example") else set()
    if not names <= outer.keys():
        raise ValueError(
            f"per_example must name outer variables ({', '.join(outer)}), got "
            f"{', '.join(sorted(names - outer.keys()))}"
        )
    return names


def check_rows(problem: Problem, outer: Params, num_examples: int) -> set[str]:
    """`per_example_names`; ValueError unless each has a row for each of the support examples."""
    names = per_example_names(problem, outer)
    for name in sorted(names):
        shape = tuple(outer[name].shape)
        if shape[:1] != (num_examples,):
            raise ValueError(
                f"per_example variable {name} must have a row for each of {num_examples} support "
                f"examples, got shape {shape}: give {type(problem).__name__} the number of "
                "examples that the sampler's tasks have"
            )
    return names


def context_depends_on(problem: Problem, outer: Params, task: Task) -> set[str]:
    """Names of the outer variables that the context of `task` depends on."""
    x = leaves(outer)
    with torch.enable_grad():
        context = problem.encode(x, task)
    return _reached(context, x)


def start_depends_on(problem: Problem, outer: Params, task: Task) -> set[str]:
    """Names of the outer variables that the start of adaptation of `task` depends on."""
    x = leaves(outer)
    with torch.enable_grad():
        start = problem.init_inner(x, task)
    return _reached(start, x)


def _reached(tree: Params, x: Params) -> set[str]:
    """Names of the leaves of `x` that have a gradient from `tree`."""
    # Random cotangents: along all ones, for example, a normalised context does not change.
    random = torch.Generator().manual_seed(0)
    cotangents = [torch.rand(leaf.shape, generator=random).to(leaf) for leaf in tree.values()]
    (gradient,) = gradients(list(tree.values()), cotangents, x)
    return {name for name, leaf in gradient.items() if bool(leaf.any())}


def _overrides(problem: Problem, method: str) -> bool:
    # Problem is a protocol: a problem need not derive from it, and then has no default to compare.
    return getattr(type(problem), method, getattr(Problem, method)) is not getattr(Problem, method)
