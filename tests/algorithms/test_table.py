"""Every algorithm against every promise that all of them make; the cases are in cases_*.py."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist.algorithm import Algorithm
from metadist.algorithms import (
    AID,
    ALGORITHMS,
    BOME,
    DARTS,
    F2SA,
    IMAML,
    MEHA,
    SAMA,
    T1T2,
    UFOM,
    VPBGD,
    AmIGO,
    NoLoopAID,
    Nystrom,
    Penalty,
    SubBiO,
)  # fmt: skip
from metadist.autograd import AutogradOracle
from metadist.compute import Compute
from metadist.flat_states import counters_of, flatten_state, unflatten_state
from metadist.hypergradient import task_hypergradients
from metadist.oracle import CountingOracle
from metadist.problem import Problem
from metadist.step_rules import Adam
from metadist.task import Batch, Task
from metadist.trees import Params, add
from tests.algorithms import cases_first_order, cases_implicit, cases_own, cases_stochastic
from tests.algorithms.cases import Case, implicit
from tests.algorithms.toys import counts_of, estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    assert_same_bytes,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    randn,
    run_single,
    smooth_task,
    true_hypergradient,
)

CASES: dict[str, Case] = {
    **cases_own.CASES,
    **cases_implicit.CASES,
    **cases_stochastic.CASES,
    **cases_first_order.CASES,
}

of_each = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))


def test_no_algorithm_is_left_out():
    assert CASES.keys() == ALGORITHMS.keys()
    for name, case in CASES.items():
        assert type(case.algorithm) is ALGORITHMS[name]


# Reptile moves the start of adaptation, which this problem does not have, and PBGD-Free leaves out
# all that x does through y, which is the most of it here.
SOLVERS = [name for name in CASES if name not in ("reptile", "freepbgd")]


@pytest.mark.parametrize("shape", [(2, 4), (4, 3)], ids=["wide", "tall"])
@pytest.mark.parametrize(("name", "case"), [(name, CASES[name]) for name in SOLVERS], ids=SOLVERS)
def test_it_solves_quadratics(name, case, shape):
    num_outer, num_inner = shape
    problem = Quadratic(num_outer, num_inner, rho=1.0)
    task = mild_task(num_outer, num_inner)
    outer = outer_of(case, problem, task)
    before = float(true_hypergradient(problem, outer, task).norm())
    run = run_single(case.algorithm, problem, task, outer, case.num_steps, case.outer_lr)
    after = float(true_hypergradient(problem, run.outer, task).norm())
    assert after < case.tolerance, (before, after)
    assert after < 0.5 * before


def outer_of(case: Case, problem: Problem, task: Task) -> Params:
    """An outer variable to start from, the algorithm's own included."""
    outer = problem.init_outer(generator(1))
    return {**outer, **case.algorithm.init_own(problem.init_inner(outer, task))}


def mild_task(num_outer: int, num_inner: int) -> Task:
    """A with eigenvalues from 1 to 2, not diagonal; B with singular values 1."""
    basis = torch.linalg.qr(randn(1, num_inner, num_inner))[0]
    a = basis @ torch.diag(torch.linspace(1, 2, num_inner, dtype=DOUBLE)) @ basis.T
    size = max(num_outer, num_inner)
    b = torch.linalg.qr(randn(2, size, size))[0][:num_inner, :num_outer]
    support = Batch.of(a[None], b[None], randn(3, 1, num_inner))
    return Task(support, Batch.of(randn(4, 1, num_inner)), 1)


@of_each
def test_one_estimate_costs_what_is_said(name, case):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = outer_of(case, problem, task)
    oracle, context, start = oracle_of(problem, outer, task)
    state = case.algorithm.init(oracle, context, start)
    state = case.algorithm.estimate(oracle, context, state).state
    counting = CountingOracle(AutogradOracle(problem, task, step=1))
    case.algorithm.estimate(counting, context, state)
    assert dict(counting.counts) == case.counts


PENALISED = {"inner_grad": 5 + 2, "inner_grad_x": 2, "outer_grads": 1}

COSTS: list[tuple[Algorithm, dict[str, int]]] = [
    (AID(6, adjoint_steps=3), implicit(6, 3)),
    (AID(6, adjoint_steps=3, warm_start=True), implicit(6, 4)),
    (AID(6, adjoint_steps=3, solver="neumann"), implicit(6, 3)),
    (AID(6, adjoint_steps=3, solver="fixed_point"), implicit(6, 2)),
    (AID(6, adjoint_steps=3, solver="fixed_point", warm_start=True), implicit(6, 3)),
    (AID(6, adjoint_steps=3, tolerance=1.0), implicit(6, 0)),
    (AmIGO(6, adjoint_steps=3), implicit(6, 3)),
    (AmIGO(6, adjoint_steps=3, solver="cg"), implicit(6, 4)),
    (SubBiO(6, adjoint_steps=1), implicit(6, 3)),
    (SubBiO(6, adjoint_steps=2), implicit(6, 6)),
    (NoLoopAID(), implicit(1, 1)),
    (IMAML(6, adjoint_steps=3), implicit(6, 3)),
    (Nystrom(6, rank=3), implicit(6, 3)),
    (T1T2(5), implicit(5, 0)),
    (BOME(5), PENALISED),
    (BOME(5, rounds=2), {name: 2 * count for name, count in PENALISED.items()}),
    (BOME(5, phi="value"), {**PENALISED, "inner_value": 2}),
    (DARTS(5), PENALISED),
    (SAMA(5), PENALISED),
    (SAMA(5, inner_optimizer=Adam(0.1, carry=True)), PENALISED),
    (VPBGD(5), PENALISED),
    (VPBGD(5, rounds=3), {name: 3 * count for name, count in PENALISED.items()}),
    (F2SA(5), {"inner_grad": 12, "inner_grad_x": 2, "outer_grads": 5 + 1}),
    (F2SA(5, order=2), {"inner_grad": 12, "inner_grad_x": 2, "outer_grads": 10 + 2}),
    # The last H w is the by-product of J w.
    (Penalty(5), {"inner_grad": 5 + 1, "hvp": 5 + 1, "outer_grads": 5 + 1, "jvp": 1}),
    (UFOM(4, exact_probability=1e-9), {"inner_grad": 4, "outer_grads": 1}),
    (UFOM(4, exact_probability=1.0), {"inner_grad": 4, "outer_grads": 1, "hvp": 4, "jvp": 4}),
    (
        UFOM(4, exact_probability=1.0, recompute=True),
        {"inner_grad": 4 + 6, "outer_grads": 1, "hvp": 4, "jvp": 4},
    ),
]


@pytest.mark.parametrize(("algorithm", "counts"), COSTS, ids=str)
def test_an_estimate_from_a_new_state_costs_what_is_said(algorithm, counts):
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    assert counts_of(algorithm, problem, outer, quadratic_task(0)) == counts


VECTORIZED: list[Algorithm] = [
    BOME(3, 0.1, rounds=2),
    BOME(3, phi="value", inner_optimizer=Adam(0.01), rounds=2),
    DARTS(4, 0.1),
    F2SA(4, 0.1),
    F2SA(4, 0.1, order=2),
    F2SA(4, inner_optimizer=Adam(0.01)),
    F2SA(4, order=2, inner_optimizer=Adam(0.01)),
    MEHA(4, 0.05, y_lr=0.05),
    Penalty(3, 0.01, eps=2.0),
    Penalty(3, inner_optimizer=Adam(0.01), lr_factor=0.9),
    SAMA(4, 0.1),
    SAMA(4, inner_optimizer=Adam(0.02)),
    T1T2(4, 0.1),
    VPBGD(3, 0.05, y_lr=0.05, rounds=2),
]


@pytest.mark.parametrize("algorithm", VECTORIZED, ids=str)
def test_a_report_of_tasks_together_is_that_of_a_loop(algorithm):
    problems: tuple[Any, ...] = ((Quadratic(2, 4), quadratic_task), (Smooth(), smooth_task))
    for problem, task_of in problems:
        outer, tasks = problem.init_outer(generator(1)), [task_of(index) for index in range(3)]
        one, other = (
            task_hypergradients(
                problem,
                algorithm,
                outer,
                tasks,
                compute=Compute(vectorize=vectorize, batch_size=2),
                states={} if algorithm.needs_kept_state else None,
                report=True,
            )
            for vectorize in (False, True)
        )
        assert one.num_tasks == 3
        assert_close(other.total, one.total, 1e-9)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept"])
@of_each
def test_tasks_together_are_tasks_in_a_loop(name, case, kept):
    problem = Quadratic(2, 4)
    tasks = [quadratic_task(index) for index in range(3)]
    outer = outer_of(case, problem, tasks[0])
    found = {}
    for vectorize in (True, False):
        new: dict[int, Tensor] | None = {} if kept or case.algorithm.needs_kept_state else None
        states = new
        for step in range(3):
            result = task_hypergradients(
                problem,
                case.algorithm,
                outer,
                tasks,
                compute=Compute(vectorize=vectorize, batch_size=2),
                step=step,
                states=states,
            )
            states = dict(result.states) if kept else new
        assert result.num_tasks == 3
        found[vectorize] = result
    assert_close(found[True].total, found[False].total)
    for index, state in found[False].states.items():
        assert_close({"state": found[True].states[index]}, {"state": state})


@pytest.mark.parametrize("vectorize", [False, True])
@of_each
def test_a_report_changes_no_byte_and_no_count(name, case, vectorize):
    problem, tasks = Smooth(), [smooth_task(index) for index in range(2)]
    outer = outer_of(case, problem, tasks[0])
    without, reported = (
        task_hypergradients(
            problem,
            case.algorithm,
            outer,
            tasks,
            compute=Compute(vectorize=vectorize, batch_size=2),
            states={},
            report=report,
        )
        for report in (False, True)
    )
    assert_same_bytes(without.total, reported.total)
    assert_same_bytes(by_name(without.states), by_name(reported.states))
    assert without.calls == reported.calls and without.num_tasks == 2
    assert without.metrics == {} and reported.metrics


def by_name(states: dict[int, Tensor]) -> Params:
    return {str(index): state for index, state in states.items()}


@of_each
def test_a_state_that_was_sent_goes_on_bit_for_bit(name, case):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = outer_of(case, problem, task)
    fresh = state = sent = None
    for step in range(4):
        oracle, context, start = oracle_of(problem, outer, task, step=step)
        if step == 0:
            fresh = state = sent = case.algorithm.init(oracle, context, start)
        here = case.algorithm.estimate(oracle, context, state)
        oracle, _, _ = oracle_of(problem, outer, task, step=step)
        there = case.algorithm.estimate(oracle, context, sent)
        assert_same_bytes(there.hypergradient, here.hypergradient)
        state = here.state
        flat = flatten_state(there.state)
        sent = unflatten_state(flat, fresh, counters_of(flat))
        outer = add(outer, here.hypergradient, -0.01)


@of_each
def test_the_same_call_gives_the_same_bytes_and_changes_no_argument(name, case):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = outer_of(case, problem, task)
    oracle, context, start = oracle_of(problem, outer, task, batch_size=2)
    state = case.algorithm.init(oracle, context, start)
    before = flatten_state(state).clone(), context["x"].clone()
    first = case.algorithm.estimate(oracle, context, state)
    assert torch.equal(flatten_state(state), before[0]) and torch.equal(context["x"], before[1])
    oracle, _, _ = oracle_of(problem, outer, task, batch_size=2)
    second = case.algorithm.estimate(oracle, context, state)
    assert_same_bytes(second.hypergradient, first.hypergradient)
    assert torch.equal(flatten_state(second.state), flatten_state(first.state))
    for leaf in (*first.hypergradient.values(), flatten_state(first.state)):
        assert not leaf.requires_grad and leaf.dtype == DOUBLE
    for metric in first.metrics.values():
        assert metric.shape == () and bool(metric.isfinite())


@of_each
def test_nothing_to_do_gives_finite_numbers(name, case):
    """At the solution, where the residual of every system is 0 from the start."""
    problem = Quadratic(2, 2, rho=0.0)
    support = Batch.of(*(torch.zeros(1, *shape, dtype=DOUBLE) for shape in ((2, 2), (2, 2), (2,))))
    support.tensors[0][0] = torch.eye(2, dtype=DOUBLE)
    task = Task(support, Batch.of(torch.zeros(1, 2, dtype=DOUBLE)), 0)
    outer = {**outer_of(case, problem, task), "x": torch.zeros(2, dtype=DOUBLE)}
    run = run_single(case.algorithm, problem, task, outer, 3, 0.1)
    assert_close({"x": run.outer["x"]}, {"x": outer["x"]})
    assert bool(flatten_state(run.state).isfinite().all())
    assert all(bool(metric.isfinite()) for metric in run.estimate.metrics.values())


@pytest.mark.parametrize(
    "algorithm",
    [
        *(case.algorithm for case in CASES.values()),
        AID(2, 0.2, solver="fixed_point"),
        AID(2, 0.2, solver="neumann"),
        BOME(phi="value"),
        F2SA(order=2),
        MEHA(3),
        SAMA(1, inner_optimizer=Adam(0.1, carry=True)),
    ],
    ids=str,
)
def test_where_both_levels_are_solved_the_hypergradient_is_zero(algorithm):
    problem, _, task = golden_quadratic()
    problem.rho, problem.start = 0.0, point(1, 1)
    own = algorithm.init_own({"y": problem.start})
    found = estimate(algorithm, problem, {"x": point(1, 4), **own}, task)
    assert_close({"x": found.hypergradient["x"]}, {"x": point(0, 0)}, 1e-14)
    assert_close(found.state.inner, {"y": point(1, 1)}, 1e-12)
    assert all(bool(metric.isfinite()) for metric in found.metrics.values())
    assert found.metrics.get("adjoint_residual", 0) == 0


@of_each
def test_it_adapts_to_the_lower_problem(name, case):
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = outer_of(case, problem, task)
    oracle, context, start = oracle_of(problem, outer, task)
    adapted = case.algorithm.adapt(oracle, context, start)
    loss = [float(problem.inner_loss(context, y, task.support)) for y in (start, adapted)]
    assert loss[1] < loss[0]


@of_each
def test_its_docstring_has_every_fact_and_every_field(name, case):
    cls = type(case.algorithm)
    doc = inspect.getdoc(cls) or ""
    # What differs from the paper is said only where something does.
    for fact in ("Family", "For", "Cost", "State", "Memory", "Use", "Breaks", "Source"):
        assert f"\n{fact}: " in doc, fact
    documented = "\n".join(inspect.getdoc(base) or "" for base in cls.__mro__)
    for field in dataclasses.fields(cls):
        assert f"\n    {field.name}: " in documented, field.name


KEPT_OPTIONS = [
    ("aid", {"warm_start": True}),
    ("bome", {"y_lr": 0.02}),
    ("lancbio", {"adjoint_steps": 1, "subspace_start": 2}),
    ("meha", {"inner_steps": 1, "gamma": 0.5}),
    ("meha", {"inner_steps": 1, "y_lr": 0.02}),
    ("mrbo", {"inner_weight": 0.25}),
    ("penalty", {"eps": 1e6}),
    ("saba", {"adjoint_lr": 0.02}),
    ("soba", {"adjoint_decay": 0.5}),
    ("bamm", {"adjoint_lr": 0.02}),
    ("srba", {"adjoint_lr": 0.02}),
    ("srba", {"inner_steps": 2, "period": 2}),
    ("iaptt", {"start_lr": 0.02}),
    ("subbio", {"adjoint_lr": 0.02}),
    ("sustain", {"inner_weight": 0.25}),
    ("vpbgd", {"y_lr": 0.02}),
]


@pytest.mark.parametrize(("name", "options"), KEPT_OPTIONS, ids=str)
def test_options_of_kept_states_are_those_that_do_nothing_on_new_tasks(name, options):
    option = list(options)[-1]
    told: Any = ALGORITHMS[name](**options)
    plain = dataclasses.replace(told, **{option: getattr(ALGORITHMS[name], option)})
    assert option in told.kept_options and not plain.needs_kept_state
    problem, task, compute = Quadratic(2, 4), quadratic_task(3), Compute(batch_size=1)
    outer = problem.init_outer(generator(0))

    def totals(algorithm, steps):
        found = []
        states: dict[int, Tensor] = {}
        for step in steps:
            result = task_hypergradients(
                problem,
                algorithm,
                outer,
                [task],
                compute=compute,
                step=step,
                states=states,
            )
            states = result.states
            found.append(result.total["x"])
        return torch.stack(found)

    assert_same_bytes({"x": totals(told, [3])}, {"x": totals(plain, [3])})  # of a new task
    assert not torch.equal(totals(told, range(5)), totals(plain, range(5)))
    with pytest.raises(
        ValueError, match=rf"states must be given .*{option}=.* alone\. Leave it out"
    ):
        task_hypergradients(problem, told, outer, [task])
