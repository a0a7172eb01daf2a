"""What an algorithm keeps: as one vector, from step to step, in checkpoints; two-point methods."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithm import Algorithm, InnerState
from metadist.algorithms import AID, ITD, MRBO, Reptile
from metadist.compute import Compute
from metadist.evaluation import evaluate
from metadist.executor import LocalExecutor
from metadist.flat_states import counters_of, flatten_state, same_form, unflatten_state
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP
from metadist.outer import OuterVariable, StepRules
from metadist.problem import Problem
from metadist.task import Task
from metadist.tasks import FewShotProblem, FixedTasks
from metadist.trees import Params, add, flatten
from metadist.workload import Workload, tasks_of_steps
from tests.core.test_executor import started
from tests.helpers import with_compute
from tests.problems import (
    DOUBLE,
    Quadratic,
    QuadraticSampler,
    assert_close,
    assert_same_bytes,
    computed_lease,
    generator,
    golden_quadratic,
    oracle_of,
    quadratic_task,
    true_hypergradient,
    vector_task,
)

SGD = OuterOptimizer("sgd", lr=0.1)
WARM = AID(inner_steps=1, inner_lr=0.3, solver="fixed_point", adjoint_steps=1, warm_start=True)
TWO_POINT = MRBO(inner_lr=0.2)


class Nested(NamedTuple):
    inner: Params
    steps: int
    deeper: InnerState
    weight: torch.Tensor


def nested(steps: int = 3) -> Nested:
    inner = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": torch.randn((), dtype=DOUBLE)}
    return Nested(inner, steps, InnerState({"c": torch.randn(4, dtype=DOUBLE)}), torch.ones(1))


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"state must have shape \(14,\) .* got \(3,\): it is of"):
        unflatten_state(torch.zeros(3), nested(), (0,))
    with pytest.raises(TypeError, match=r"a state must hold Params, .* got list"):
        flatten_state(InnerState([torch.ones(1)]))  # type: ignore[arg-type]


def fixed(num_tasks: int) -> FixedTasks:
    return FixedTasks([quadratic_task(index) for index in range(num_tasks)])


def kept(algorithm: Algorithm = WARM, num_tasks: int = 3, **options: Any) -> Workload:
    options = {"meta_batch_size": num_tasks, **options}
    return Workload(
        Quadratic(2, 4), fixed(num_tasks), algorithm, keep_state=True, **with_compute(options)
    )


def test_every_step_has_the_same_tasks_and_goes_on_from_their_states():
    executor = started(kept(tasks_per_lease=1), SGD)
    list(executor.run(4))
    outer = Quadratic(2, 4).init_outer(generator(0))
    states: dict[int, Any] = {}
    for step in range(4):
        total: Params = {}
        for index in range(3):
            problem, task = Quadratic(2, 4), quadratic_task(index)
            oracle, context, start = oracle_of(problem, outer, task, step=step)
            state = states.get(index) or WARM.init(oracle, context, start)
            estimate = WARM.estimate(oracle, context, state)
            states[index] = estimate.state
            total = add(total, estimate.hypergradient) if total else estimate.hypergradient
        outer = add(outer, total, -0.1 / 3)
    assert_close(executor.state().outer, outer, 1e-12)
    saved = executor.state().states
    assert sorted(saved) == [0, 1, 2]
    assert_close({"s": saved[1]}, {"s": flatten_state(states[1])}, 1e-12)


def test_tasks_of_unequal_age_go_one_by_one():
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    tasks = [quadratic_task(index) for index in range(2)]
    first = task_hypergradients(problem, TWO_POINT, outer, tasks[:1], states={}).states
    both = task_hypergradients(
        problem, TWO_POINT, outer, tasks, compute=Compute(vectorize=True), states=first
    )
    alone = task_hypergradients(
        problem, TWO_POINT, outer, tasks, compute=Compute(vectorize=False), states=first
    )
    assert_same_bytes(both.total, alone.total)
    assert counters_of(both.states[0]) != counters_of(both.states[1])


def test_a_task_that_is_dropped_keeps_its_state():
    sampler = QuadraticSampler()
    work = Workload(Quadratic(2, 4), sampler, WARM, meta_batch_size=2, keep_state=True)
    executor = started(work, SGD)
    list(executor.run(2))
    before = executor.state().states
    sampler.broken = (1,)
    (report,) = executor.run(3)
    assert sum((result.dropped for result in report.results), ()) == (1,)
    after = executor.state().states
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_a_single_problem_is_solved_through_the_trainer():
    problem, _, task = golden_quadratic()
    trainer = Trainer(
        problem,
        FixedTasks([task]),
        AID(inner_steps=5, inner_lr=0.2, adjoint_steps=5),
        outer_optimizer=OuterOptimizer("sgd", lr=1.0),
        quiet=True,
        allow_equal_examples=True,
    )
    trainer.fit(120)
    assert float(true_hypergradient(problem, trainer.outer, task).norm()) < 1e-6
    solution = trainer.outer["x"] / torch.tensor([1.0, 4.0], dtype=DOUBLE)
    assert_close(trainer.inner(0), {"y": solution}, 1e-6)


@pytest.mark.parametrize(
    ("sampler", "algorithm", "given", "expected"),
    [
        (fixed(3), AID(), (None, None), (3, True)),
        (fixed(3), AID(), (3, True), (3, True)),
        (fixed(3), Reptile(), (None, None), (3, False)),  # nothing to keep: it trains the start
        (fixed(3), Reptile(), (2, False), (2, False)),
        (QuadraticSampler(), AID(), (None, None), (16, False)),
        (QuadraticSampler(), AID(), (2, True), (2, True)),
    ],
)
def test_a_sampler_of_a_fixed_set_has_all_its_tasks_at_every_step(
    sampler, algorithm, given, expected
):
    assert tasks_of_steps(sampler, algorithm, *given) == expected


def test_a_fixed_set_is_neither_forgotten_nor_cut():
    with pytest.raises(ValueError, match=r"keep_state must be True with FixedTasks, whose num_t"):
        Trainer(Quadratic(2, 4), fixed(3), AID(), keep_state=False, quiet=True)
    with pytest.raises(ValueError, match=r"meta_batch_size must be 3, the num_tasks of FixedTasks"):
        Trainer(Quadratic(2, 4), fixed(3), AID(), meta_batch_size=2, quiet=True)


def test_a_learned_start_is_trained_on_a_fixed_set():
    tasks = FixedTasks([vector_task(index) for index in range(2)])
    for adapt, keep_state in (("all", None), ("head", None), ("all", False)):
        problem = FewShotProblem(MLP(3, 2, (4,)).double(), adapt=adapt, loss="mse")
        trainer = Trainer(problem, tasks, ITD(inner_steps=1), keep_state=keep_state, quiet=True)
        before = trainer.outer
        trainer.fit(2)
        assert (trainer.workload.meta_batch_size, trainer.workload.keep_state) == (2, False)
        assert not any(torch.equal(before[name], trainer.outer[name]) for name in before)
    with pytest.raises(
        ValueError, match="keep_state must be False for a problem that learns nothing but"
    ):
        Trainer(
            FewShotProblem(MLP(3, 2, (4,)), loss="mse"), tasks, ITD(), keep_state=True, quiet=True
        )


class Own:
    """A user's single problem: `num_tasks` is said or not, and there is no task beyond it."""

    def __init__(self, num_tasks: Any) -> None:
        if num_tasks is not None:
            self.num_tasks = num_tasks

    def sample(self, index: int) -> Task:
        if index >= getattr(self, "num_tasks", 2):
            raise IndexError(index)
        return quadratic_task(0)._replace(id=index)


def test_a_sampler_of_ones_own_says_how_many_tasks_it_has():
    def trainer(num_tasks: Any, **options: Any) -> Trainer:
        return Trainer(Quadratic(2, 4), Own(num_tasks), AID(), quiet=True, **options)

    told = trainer(np.int64(1))
    before = told.outer["x"]
    told.fit(2)
    assert told.workload.keep_state and not torch.equal(before, told.outer["x"])
    with pytest.raises(
        ValueError, match=r"keep_state must be True with Own, whose num_tasks=1 are"
    ):
        trainer(1, keep_state=False)
    with pytest.raises(
        ValueError, match=r"keep_state must be given for Own, whose tasks 0 and 1 ar"
    ):
        trainer(None)
    assert not trainer(None, keep_state=False).workload.keep_state
    for wrong in (0, 1.5, lambda: 1):
        with pytest.raises(ValueError, match=r"num_tasks of Own must be an integer >= 1, got"):
            trainer(wrong)


def test_a_fixed_set_is_evaluated_on_the_tasks_it_has():
    result = evaluate(Quadratic(2, 4), fixed(3), AID(), {"x": torch.ones(2, dtype=DOUBLE)}, 50)
    assert result.protocol["tasks"] == "3 (indices 0 .. 2)"


def test_messages_about_kept_states(tmp_path):
    with pytest.raises(ValueError, match=r"keep_state must be False with Reptile, got True: it"):
        kept(Reptile())
    trainer = Trainer(Quadratic(2, 4), QuadraticSampler(), ITD(), quiet=True)
    with pytest.raises(ValueError, match=r"inner needs keep_state=True and a step taken"):
        trainer.inner(0)


# Two-point methods on new tasks: the server keeps w and the previous x.


def rule(weight: float) -> StepRules:
    return StepRules(recursive_weight=lambda version: 1.0 if version == 0 else weight)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_outer_variable_does_the_recursion(weight):
    variable = OuterVariable({"x": torch.zeros(2)}, OuterOptimizer("sgd", lr=1.0), rule(weight))
    first, new, old = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0]), torch.tensor([3.0, 3.0])
    assert "previous" not in variable.state().recursion
    variable.apply([computed_lease(0, 0, 2 * first, 2)])
    assert variable.state().recursion["previous"].tolist() == [0, 0]
    x = variable.flat.clone()
    step = variable.apply([computed_lease(1, 1, torch.cat([2 * new, 2 * old]), 2)])
    w = new + (1 - weight) * (first - old)
    torch.testing.assert_close(x - variable.flat, w)
    assert step.hypergradient_norm == pytest.approx(float(w.norm()))
    previous = variable.previous
    assert previous is not None and torch.equal(previous, x)


def test_a_step_at_weight_one_needs_one_point():
    variable = OuterVariable({"x": torch.zeros(2)}, SGD, rule(1.0))
    for version in range(3):
        variable.apply([computed_lease(version, version, torch.ones(2), 1)])
    with pytest.raises(ValueError, match=r"contribution of lease 3 must have shape \(2,\), got"):
        variable.apply([computed_lease(3, 3, torch.ones(4), 1)])


def test_new_tasks_are_seen_at_both_points_with_the_same_draws():
    work = Workload(
        Quadratic(2, 4), fixed(40), TWO_POINT, meta_batch_size=4, compute=Compute(batch_size=1)
    )
    assert work.is_two_point and work.must_be_synchronous and not kept(TWO_POINT).is_two_point
    assert not work.needs_previous(0) and work.needs_previous(1)
    outer = work.problem.init_outer(generator(0))
    computed = work.compute_lease(work.lease(3, 5), outer, previous=outer)
    now, before = computed.total.chunk(2)
    assert torch.equal(now, before) and now.any()
    elsewhere = add(outer, outer)
    moved = work.compute_lease(work.lease(3, 5), outer, previous=elsewhere).total.chunk(2)
    assert torch.equal(moved[0], now)
    alone = work.compute_lease(work.lease(3, 5), elsewhere)
    assert torch.equal(moved[1], alone.total)
    first = work.compute_lease(work.lease(3, 0), outer, previous=outer).total
    assert first.shape == now.shape


def test_training_with_new_tasks_is_the_recursion_written_by_hand():
    work = Workload(Quadratic(2, 4), fixed(40), TWO_POINT, meta_batch_size=4)
    executor = started(work, SGD)
    list(executor.run(3))
    outer = previous = work.problem.init_outer(generator(0))
    w = torch.empty(0)
    for step in range(3):
        tasks = [quadratic_task(index) for index in range(4 * step, 4 * step + 4)]

        def mean(x: Params, tasks=tasks, step=step) -> torch.Tensor:
            found = task_hypergradients(work.problem, TWO_POINT, x, tasks, step=step)
            return flatten(found.total) / 4

        weight = TWO_POINT.recursive_weight(step)
        w = mean(outer) + (1 - weight) * (w - mean(previous)) if step else mean(outer)
        previous, outer = outer, add(outer, {"x": w}, -0.1)
    assert_close(executor.state().outer, outer, 1e-12)


# The feasible set of x.


class Boxed(Quadratic):
    def project_outer(self, outer: Params) -> Params:
        return {"x": outer["x"].clamp(-0.5, 0.5)}


class Bare:
    """A problem that derives from nothing."""

    def __init__(self, problem: Problem) -> None:
        for name in ("init_outer", "encode", "init_inner", "inner_loss", "outer_loss", "metrics"):
            setattr(self, name, getattr(problem, name))


def test_x_is_projected_after_every_step():
    work = Workload(Boxed(2, 4), QuadraticSampler(), ITD(learn_lr="per_tensor"), meta_batch_size=4)
    outer = {"algorithm.inner_lr.y": torch.tensor(0.1, dtype=DOUBLE)}
    outer = {**work.problem.init_outer(generator(0)), **outer}
    executor = LocalExecutor()
    optimizer = OuterOptimizer("sgd", lr=10.0)
    executor.start(work, optimizer, OuterVariable(outer, optimizer).state())
    list(executor.run(2))
    assert bool((executor.state().outer["x"].abs() <= 0.5).all())
    assert list(executor.state().outer) == list(outer)


def test_a_problem_that_derives_from_nothing_is_neither_projected_nor_proximal():
    work = Workload(Bare(Quadratic(2, 4)), QuadraticSampler(), ITD(), meta_batch_size=4)  # type: ignore[arg-type]
    assert work.stepping_rules() == StepRules(None, None)
    oracle, x, y = oracle_of(work.problem, {"x": torch.ones(2, dtype=DOUBLE)}, quadratic_task(0))
    assert_same_bytes(oracle.prox_inner(x, y, 0.1), y)


LARGE = [
    (torch.float16, 2049),
    (torch.float16, 70_000),
    (torch.bfloat16, 255),
    (torch.bfloat16, 1001),
    (torch.bfloat16, 2**40 + 1),
    (torch.float32, 2**24 - 1),
    (torch.float32, 2**24 + 1),
    (DOUBLE, 70_000),
    (DOUBLE, 2**53 + 1),
]


@pytest.mark.parametrize(("dtype", "steps"), LARGE, ids=str)
def test_counters_are_exact_in_every_dtype(dtype, steps):
    inner = {"a": torch.randn(2, 3, dtype=dtype), "b": torch.randn((), dtype=dtype)}
    state = Nested(inner, steps, InnerState({"c": torch.randn(4).to(dtype)}), torch.ones(1))
    state = state._replace(weight=state.weight.to(dtype))
    flat = flatten_state(state)
    assert flat.dtype == dtype and counters_of(flat) == (steps,)
    again = unflatten_state(flat.clone(), state._replace(steps=0), counters_of(flat))
    assert type(again) is Nested and again.steps == steps
    assert_same_bytes(again.inner, state.inner)
    assert_same_bytes(again.deeper.inner, state.deeper.inner)
    assert torch.equal(again.weight, state.weight)
    first = flatten_state(state._replace(steps=0))
    assert same_form(flat, first) and same_form(first, flat)
    assert not same_form(flat, torch.cat([first, first[-1:]]))


class Counting(ITD):
    """It keeps a counter, and takes part of its hypergradient from it."""

    trains = "context"

    def init(self, oracle, context, inner):
        return Nested(inner, 2**24 - 1, InnerState({}), next(iter(inner.values())).new_ones(1))

    def estimate(self, oracle, context, state):
        found = super().estimate(oracle, context, InnerState(state.inner))
        return found._replace(
            start_gradient=None,
            state=state._replace(inner=found.state.inner, steps=state.steps + 1),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_counts_on_where_the_dtype_of_its_states_ends(dtype, tmp_path):
    class Rounded(Quadratic):
        def init_inner(self, outer, task):
            return {"y": self.start.to(dtype)}

        def inner_loss(self, context, inner, batch):
            return super().inner_loss(context, {"y": inner["y"].to(DOUBLE)}, batch)

        def outer_loss(self, context, inner, batch):
            return super().outer_loss(context, {"y": inner["y"].to(DOUBLE)}, batch)

    def run():
        return Trainer(
            Rounded(2, 4),
            QuadraticSampler(),
            Counting(1, 0.01),
            keep_state=True,
            meta_batch_size=2,
            run_dir=tmp_path / "run",
            quiet=True,
        )

    whole = run()
    whole.fit(3)
    again = run()
    again.restore()
    again.fit(6)
    for flat in again._state.states.values():
        assert counters_of(flat) == (2**24 + 5,)


def test_a_counter_that_was_rounded_is_refused():
    """As saved before: 1001 was 1000, one number of the dtype each."""
    old = torch.tensor([1.0, 1000.0, 0.5], dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"counters of a state in torch.bfloat16 must be below 256"
    ):
        counters_of(old)
    assert counters_of(old.float()) == (1000,)  # exact there, and read as ever


def test_integer_tensors_of_a_state_are_exact():
    state = InnerState({"y": torch.ones(1), "n": torch.tensor(2**24 + 1)})
    flat = flatten_state(state)
    again = unflatten_state(flat, state, ())
    assert_same_bytes(again.inner, state.inner)
    assert again.inner["n"].dtype == torch.int64
