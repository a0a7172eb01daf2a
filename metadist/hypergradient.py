"""`task_hypergradients`: the whole mathematics of a worker, in one function.

encode and init_inner -> the algorithm on every task -> pull back -> sum over tasks.

It joins the three parts that do not know one another: a `Problem` defines the maps from x, an
`AutogradOracle` the derivatives, an `Algorithm` the estimate. `Workload.compute` calls it for a
lease, in this process or in a worker.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.algorithm import Algorithm, State, split_own
from metadist.autograd import AutogradOracle
from metadist.checks.purity import check_each_pure
from metadist.chunks import FAILS_UNDER_VMAP, FEW, chunk_of, falls_back, vectorizes
from metadist.compute import AS_TORCH_IS_SET, Compute
from metadist.draws import first_parts
from metadist.flat_states import counters_of_all, flatten_state, split_carried, unflatten_state
from metadist.graphs import graphs_of, plain_settings
from metadist.metrics import adaptation_metrics
from metadist.oracle import Constants, CountingOracle
from metadist.problem import Problem, carries, carry, start_carried, with_carried
from metadist.task import Task, stack_tasks
from metadist.trees import (
    Params,
    detach,
    flatten,
    gradients,
    leaves,
    num_elements,
    tree_map,
    unflatten,
    zeros_like,
)


@dataclass(frozen=True)
class HypergradientSum:
    """Sums over tasks; sums and counts, not means, so that any two of them can be added.

    Args:
        total: The sum over tasks of d f / d outer, shaped like the outer variable.
        num_tasks: Tasks in `total`.
        dropped: The ids of the tasks left out because their hypergradient or their new state was
            NaN or infinite; they keep the state that they had.
        metrics: With `report`, sums over the tasks in `total` of the metrics of each.
        previous: For a two-point method, the sum at the previous outer variable; else None.
        states: With `states` given, the new flat state of each task in `total`, by its id.
        calls: What the algorithm asked of the oracle, summed over the tasks, see `CountingOracle`.
            The engines "unrolled" and "higher" of ITD ask for values alone and differentiate
            them themselves.
    """

    total: Params
    num_tasks: int
    dropped: tuple[int, ...]
    metrics: dict[str, float]
    previous: Params | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def task_hypergradients(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
    *,
    compute: Compute = AS_TORCH_IS_SET,
    report: bool = False,
    step: int = 0,
    previous: Params | None = None,
    states: Mapping[int, Tensor] | None = None,
    is_checked: bool = False,
) -> HypergradientSum:
    """The sum over `tasks` of the algorithm's hypergradients at `outer`.

    Args:
        problem: The problem.
        algorithm: The algorithm, which runs once on each task.
        outer: The outer variable, the algorithm's own variables included.
        tasks: Tasks on the device of `outer`.
        compute: Vectorisation, mini-batches and threads. The device is that of `outer`, whatever
            it says.
        report: Also the metrics of the algorithm, and losses and metrics before and after
            adaptation (keys `query_loss`, `query_loss_before`, and so on), at the cost of three
            forward passes.
        step: Outer steps taken so far: for schedules, and part of the seed of the draws.
        previous: The outer variable one step before, for the sum there on the same draws (see
            `Algorithm.recursive_weight`); None: no such sum.
        states: The flat states that the last step left, by task id, empty at the first step; None:
            every task is new. The start of a kept state counts as a constant.
        is_checked: The problem is known to be pure; False: the first call with a problem checks
            it on the first task, see `check_pure`, and the first call with another task there.

    Raises:
        ValueError: vectorize=True with an algorithm or tasks that cannot be vectorized; a problem
            that is not pure; states that the algorithm needs and that are not kept.

    Cost: per task that of the algorithm, plus one forward and one backward pass of `encode` and
    `init_inner`. A result that is not finite is computed again task by task to find the culprit.
    """
    _refuse(problem, algorithm, outer, tasks, states)
    if not is_checked:
        check_each_pure(problem, detach(split_own(outer)[0]), tasks, compute)
    leaf = next(iter(outer.values()))
    graphs = graphs_of(problem, algorithm, compute, leaf.device)
    zero = leaf.new_zeros(num_elements(outer))
    sums = _Sums([zero] if previous is None else [zero, zero])
    dropped: list[int] = []
    calls: Counter[str] = Counter()
    of_task = None if states is None else _kept(states, tasks)

    def computed(group: list[Task]) -> _Found | None:
        """What one pass finds for these tasks; None: they must go one by one."""
        kept = None if of_task is None else [of_task[int(task.id)] for task in group]
        if kept is not None and len({(flat is None, counters) for flat, counters in kept}) > 1:
            return None  # all of a group are new, or have the same counters
        run = _Run(
            problem=problem,
            algorithm=algorithm,
            compute=compute,
            together=len(group) > 1,
            keeps=kept is not None,
            report=report,
        )
        numbers = (step, *(kept[0][1] if kept else ()))
        with compute.applied(), attention_for(algorithm, run.together and _on_cpu(outer)):
            try:
                inputs = _inputs(outer, previous, group, kept)
                if graphs is None:
                    return run(inputs, numbers)
                ids = tuple(int(task.id) for task in group)
                key = *run[2:], *plain_settings(problem)
                return graphs.run(run.__call__, inputs.counted(), numbers, key, ids)
            except FAILS_UNDER_VMAP as error:
                if len(group) == 1 or not falls_back(compute.vectorize, error):
                    raise
                return None

    groups = _groups(problem, algorithm, outer, tasks, compute)
    while groups:
        group = groups.pop(0)
        found = computed(group)
        if found is not None:
            calls.update({name: count * len(group) for name, count in found.calls.items()})
        metrics = None if found is None else _read(found)
        if found is not None and metrics is not None:
            sums.add(found, metrics, group)
        elif len(group) > 1:
            groups[:0] = [[task] for task in group]
        else:
            dropped.append(int(group[0].id))
    total, *before = (unflatten(total, outer) for total in sums.totals)
    return HypergradientSum(
        total=total,
        num_tasks=sums.num_tasks,
        dropped=tuple(dropped),
        metrics=sums.metrics,
        previous=before[0] if before else None,
        states=sums.states,
        calls=dict(calls),
    )


def _on_cpu(outer: Params) -> bool:
    return next(iter(outer.values())).device.type == "cpu"


def _groups(
    problem: Problem, algorithm: Algorithm, outer: Params, tasks: list[Task], compute: Compute
) -> list[list[Task]]:
    """The tasks, in groups that go through together."""
    size = 1
    if vectorizes(compute.vectorize, problem, algorithm, outer, tasks):
        size = compute.chunk_size or len(tasks)
        if compute.chunk_size is None and len(tasks) > (FEW if _on_cpu(outer) else 1):
            size = chunk_of(problem, outer, tasks[0], compute)
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def _refuse(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: list[Task],
    states: Mapping[int, Tensor] | None,
) -> None:
    """Raise ValueError for what would give wrong hypergradients."""
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none")
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            raise ValueError(
                f"torch.autocast({kind!r}) must be off around hypergradients, got on: it rounds "
                "inner gradients to half precision, whose second derivatives are then off by 40 % "
                "and more. Put it within the losses, around the model alone (docs/gpu.md says for "
                "which methods); encode_precision='bf16' runs the part before an adapted head so"
            )
    if states is None and algorithm.needs_kept_state:
        raise ValueError(
            f"states must be given with {algorithm}, got None: {algorithm.needs_kept_state}, or "
            "pass the states of the last step"
        )
    if states is None and start_carried(problem, split_own(outer)[0], tasks[0]):
        raise ValueError(
            f"keep_state must be True with {type(problem).__name__}, which carries a state from "
            "step to step, got False: a new task has none. Use a sampler with num_tasks, or leave "
            "out init_carried"
        )


def attention_for(
    algorithm: Algorithm, under_vmap_on_cpu: bool = False
) -> AbstractContextManager[object]:
    """Within the block attention can be differentiated as often as the algorithm does."""
    # The fused kernels have no double backward, and that of the CPU no rule for vmap.
    needs_plain = algorithm.takes_second_derivatives or under_vmap_on_cpu
    return sdpa_kernel(SDPBackend.MATH) if needs_plain else nullcontext()


class _Inputs(NamedTuple):
    """What the hypergradient of a group of tasks is computed from: `task` is one, or their stack.

    `flat` is the flat state, or the stack of all.
    """

    outer: Params
    previous: Params | None
    task: Task
    flat: Tensor | None

    def counted(self) -> _Inputs:
        """The same with the id of a task as a tensor: filled, since a copy would be waited for."""
        if isinstance(self.task.id, Tensor):
            return self
        index = self.task.support.index
        return self._replace(task=self.task._replace(id=index.new_full((), self.task.id)))


def _inputs(
    outer: Params,
    previous: Params | None,
    group: list[Task],
    kept: list[tuple[Tensor | None, tuple[int, ...]]] | None,
) -> _Inputs:
    together = len(group) > 1
    flats = [flat for flat, _ in kept or () if flat is not None]
    return _Inputs(
        outer=outer,
        previous=previous,
        task=stack_tasks(group) if together else group[0],
        flat=(torch.stack(flats) if together else flats[0]) if flats else None,
    )


class _Found(NamedTuple):
    """Flat sums of hypergradients of tasks that went through together, and what comes with them.

    Args:
        totals: At x, and at the previous x if there is one.
        read: float64: the sum of each total and of the states, then the metrics.
        names: Those of the metrics.
        states: The new flat states, one below the other; None: none are kept.
        calls: Of the oracle, counted once for the group.
    """

    totals: tuple[Tensor, ...]
    read: Tensor
    names: tuple[str, ...]
    states: Tensor | None
    calls: dict[str, int]


@dataclass
class _Sums:
    totals: list[Tensor]
    num_tasks: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def add(self, found: _Found, metrics: Mapping[str, float], group: list[Task]) -> None:
        self.totals = [a + b for a, b in zip(self.totals, found.totals, strict=True)]
        self.num_tasks += len(group)
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        if found.states is not None:
            for task, flat in zip(group, found.states, strict=True):
                self.states[int(task.id)] = flat


def _kept(
    states: Mapping[int, Tensor], tasks: list[Task]
) -> dict[int, tuple[Tensor | None, tuple[int, ...]]]:
    """(flat state, its counters) of each task by id; (None, ()) before its first step."""
    ids = [int(task.id) for task in tasks]
    known = [task_id for task_id in ids if task_id in states]
    counters = dict(zip(known, counters_of_all([states[n] for n in known]), strict=True))
    return {task_id: (states.get(task_id), counters.get(task_id, ())) for task_id in ids}


class _Estimated(NamedTuple):
    """What the algorithm gives for one task, or with a leading task axis for many.

    Every field holds tensors only, as vmap demands: `state` is empty where no state is kept.
    """

    context_gradient: Params
    start_gradient: Params
    own_gradient: Params
    metrics: dict[str, Tensor]
    state: Tensor


class _Point(NamedTuple):
    """Sum of hypergradients and metrics at one x, and the states that are left."""

    total: Params
    metrics: dict[str, Tensor]
    states: Tensor | None


class _Run(NamedTuple):
    """How a group of tasks is computed: a pure function of tensors and whole numbers.

    Args:
        problem, algorithm, compute: Those of the call.
        together: Whether tasks go through vmap, as a stack.
        keeps: Whether states are kept.
        report: Whether losses and metrics are asked for.
    """

    problem: Problem
    algorithm: Algorithm
    compute: Compute
    together: bool
    keeps: bool
    report: bool

    def __call__(self, inputs: _Inputs, numbers: Sequence[int]) -> _Found:
        """The hypergradients; `numbers` are the outer step and the counters of the states."""
        calls: Counter[str] = Counter()
        here = self._at(inputs.outer, inputs, numbers, self.report, calls)
        points = [here]
        if inputs.previous is not None:
            points.append(self._at(inputs.previous, inputs, numbers, False, calls))
        totals = tuple(
            flatten({name: point.total[name] for name in inputs.outer}) for point in points
        )
        # A sum is finite only if all terms are, and costs one pass without a temporary.
        results = _results(totals, here.states)
        read = [result.sum() for result in results] + [v.detach() for v in here.metrics.values()]
        return _Found(
            totals=totals,
            read=torch.stack([number.double() for number in read]),
            names=tuple(here.metrics),
            states=here.states,
            calls=dict(calls),
        )

    def _at(
        self,
        outer: Params,
        inputs: _Inputs,
        numbers: Sequence[int],
        report: bool,
        calls: Counter[str],
    ) -> _Point:
        """Encode, run the algorithm, pull back."""
        # x enters f(x, y(x)) in two places only: the context c = encode(x), which the losses see,
        # and the start y_0 = init_inner(x) of adaptation. The algorithm gets both cut from the
        # graph, as if they were variables of their own, and returns (an estimate of) the total
        # derivatives h_c and h_0 in them. By the chain rule the hypergradient is then
        #
        #     (dc/dx)' h_c + (dy_0/dx)' h_0,
        #
        # one vector-Jacobian product. So whatever encode does (ANIL's backbone) runs once forward
        # and once backward per outer step, however many inner steps and second-order products the
        # algorithm takes on the small part behind it; its graph alone is kept meanwhile; and since
        # the product is linear, it adds no bias to a stochastic estimate. MAML is the case of an
        # empty context, hyper-cleaning that of a constant start.
        problem_outer, own = split_own(outer)
        task, flat = inputs.task, inputs.flat
        x = leaves(problem_outer)
        carried, flat = self._carried(detach(x), task, flat)
        with torch.enable_grad():
            contexts, starts = self._encode(x, task)
        contexts = with_carried(contexts, carried)
        constants = Constants(
            frozenset(name for name, leaf in contexts.items() if not leaf.requires_grad),
            frozenset(
                name for name, leaf in starts.items() if self.keeps or not leaf.requires_grad
            ),
        )

        def one(context: Params, start: Params, task: Task, flat: Tensor | None) -> _Estimated:
            arguments = ({**context, **own}, context, start, task, flat)
            found, state = self._one(*arguments, constants, numbers, report, calls)
            if self.keeps:
                own_state = {name: context[name] for name in carried}
                own_state = carry(self.problem, detach(x), state.inner, task, own_state)
                found = found._replace(state=flatten_state((state, own_state)))
            return found

        if self.together:
            in_dims = (0, 0, 0, None if flat is None else 0)
            found = vmap(one, in_dims, randomness="error")(
                detach(contexts), detach(starts), task, flat
            )
            own_gradient, metrics = _summed(found.own_gradient), _summed(found.metrics)
            states = found.state
        else:
            found = one(detach(contexts), detach(starts), task, flat)
            own_gradient, metrics, states = found.own_gradient, found.metrics, found.state[None]
        (gradient,) = gradients(
            [*contexts.values(), *starts.values()],
            [*found.context_gradient.values(), *found.start_gradient.values()],
            x,
        )
        return _Point({**gradient, **own_gradient}, metrics, states if self.keeps else None)

    def _encode(self, x: Params, task: Task) -> tuple[Params, Params]:
        """The context and the start of a task, or of each of a stack of tasks."""
        if not self.together:
            context = self.compute.encode(self.problem.encode, x, task)
            return context, self.problem.init_inner(x, task)
        starts = vmap(self.problem.init_inner, in_dims=(None, 0))(x, task)
        # vmap expands what does not depend on the task; others need memory of their own.
        starts = tree_map(Tensor.contiguous, starts)
        return self.compute.encode(self.problem.encode_tasks, x, task), starts

    def _carried(self, x: Params, task: Task, flat: Tensor | None) -> tuple[Params, Tensor | None]:
        """What the problem carries, and a flat state without it; each for a task, or for many."""
        if not carries(self.problem):
            return {}, flat

        def one(task: Task) -> Params:
            return start_carried(self.problem, x, task)

        carried = vmap(one)(task) if self.together else one(task)
        if flat is None or not carried:
            return carried, flat
        state, carried = (vmap(split_carried) if self.together else split_carried)(flat, carried)
        return carried, state

    def _one(
        self,
        x: Params,
        context: Params,
        start: Params,
        task: Task,
        flat: Tensor | None,
        constants: Constants,
        numbers: Sequence[int],
        report: bool,
        calls: Counter[str],
    ) -> tuple[_Estimated, State]:
        """The estimate for one task, whose field `state` is left empty, and the next state.

        `x` is the context with the algorithm's own variables.
        """
        step, *counters = numbers
        oracle = CountingOracle(
            AutogradOracle(
                self.problem,
                task,
                self.compute.batch_sizes,
                self.compute.seed,
                compile=self.algorithm.compiles,
                eager=not self.together,
                step=step,
                constants=constants,
                graph_budget=self.compute.graph_budget,
                reports=report,
            )
        )
        state = self.algorithm.init(oracle, x, start)
        if flat is not None and self.keeps:
            state = unflatten_state(flat, state, tuple(counters))
        estimate = self.algorithm.estimate(oracle, x, state)
        calls.update(oracle.counts)
        context_gradient, own_gradient = split_own(estimate.hypergradient)
        start_gradient = estimate.start_gradient
        if start_gradient is None or self.keeps:
            start_gradient = zeros_like(start)
        metrics: dict[str, Tensor] = {}
        if report:
            some = first_parts(task, self.compute.part_size, self.compute.seed)
            metrics = estimate.metrics | adaptation_metrics(
                self.problem,
                context,
                start,
                estimate.state.inner,
                [(1.0, some.support)],
                [(1.0, some.query)],
            )
        found = _Estimated(
            context_gradient=context_gradient,
            start_gradient=start_gradient,
            own_gradient=own_gradient,
            metrics=metrics,
            state=torch.zeros(0),
        )
        return found, estimate.state


def _summed(tree: Params) -> Params:
    return {name: leaf.sum(0) for name, leaf in tree.items()}


def _results(totals: tuple[Tensor, ...], states: Tensor | None) -> list[Tensor]:
    """What must be finite: a state that is not would spoil all steps to come."""
    return [*totals, *(() if states is None else (states,))]


def _read(found: _Found) -> dict[str, float] | None:
    """The metrics, read at once with what tells whether results are finite; None: they are not.

    One look for all of it, since a GPU has to be waited for each time.
    """
    read: list[float] = found.read.tolist()
    results = _results(found.totals, found.states)
    count = len(results)
    if not all(map(math.isfinite, read[:count])) and not all(
        bool(result.isfinite().all()) for result in results
    ):
        return None
    return dict(zip(found.names, read[count:], strict=True))
