"""State of the problem's own: from step to step, to the losses, and in checkpoints."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist import Batch, Compute, OuterOptimizer, Trainer, evaluate
from metadist.algorithms import AID, BOME, ITD, MEHA, SABA, FreePBGD
from metadist.checks.purity import Impure
from metadist.cluster.data_parallel.checks import check_workload
from metadist.hypergradient import task_hypergradients
from metadist.problem import Problem
from metadist.task import Task
from metadist.tasks import FixedTasks
from metadist.trees import Params
from metadist.workload import Workload
from tests.problems import DOUBLE, assert_close, generator

SGD = OuterOptimizer("sgd", lr=0.1)
METHOD = ITD(inner_steps=2, inner_lr=0.1, first_order=True)


@dataclass
class Taught(Problem):
    """Regression towards the data and, with the strength x, a slow copy of y."""

    keep: float = 0.9
    dtype: torch.dtype = DOUBLE

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"strength": torch.full((), 0.3, dtype=self.dtype)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"w": torch.zeros(3, dtype=self.dtype)}

    def init_carried(self, outer: Params, task: Task) -> Params:
        return {"teacher": self.init_inner(outer, task)["w"]}

    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        return {"teacher": self.keep * carried["teacher"] + (1 - self.keep) * inner["w"]}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.fields("inputs", "targets")
        away = inner["w"] - context["teacher"]
        return (inputs @ inner["w"] - targets).square().mean() + context["strength"] * away @ away

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.inner_loss(context, inner, batch)


def a_task(index: int) -> Task:
    random = generator(index)
    support, query = (
        Batch.of(torch.randn(5, 3, generator=random), torch.randn(5, generator=random))
        for _ in range(2)
    )
    return Task(support.map(Tensor.double), query.map(Tensor.double), index)


def tasks(count: int = 3) -> FixedTasks:
    return FixedTasks([a_task(index) for index in range(count)])


class New:
    def sample(self, index: int) -> Task:
        return a_task(index)


def train(
    steps: int, problem: Problem | None = None, resumes: bool = False, **options: Any
) -> Trainer:
    trainer = Trainer(
        problem or Taught(),
        tasks(),
        METHOD,
        outer_optimizer=SGD,
        checkpoint_every=1,
        quiet=True,
        **options,
    )
    if resumes:
        trainer.restore()
    trainer.fit(steps)
    return trainer


def test_the_losses_find_what_the_last_step_left():
    problem, trainer = Taught(), train(4)
    x = problem.init_outer(generator(0))["strength"]
    w, teacher = torch.zeros(3, 3, dtype=DOUBLE), torch.zeros(3, 3, dtype=DOUBLE)
    for _ in range(4):
        gradient = torch.zeros((), dtype=DOUBLE)
        for k in range(3):
            task = a_task(k)
            context = {"strength": x.clone().requires_grad_(), "teacher": teacher[k].clone()}
            y = w[k].clone()
            for _ in range(2):
                at = y.detach().requires_grad_()
                loss = problem.inner_loss(context, {"w": at}, task.support)
                y = at.detach() - 0.1 * torch.autograd.grad(loss, at)[0]
            loss = problem.outer_loss(context, {"w": y}, task.query)
            gradient += torch.autograd.grad(loss, context["strength"])[0]
            w[k], teacher[k] = y, 0.9 * teacher[k] + 0.1 * y
        x = x - 0.1 * gradient / 3
    assert_close(trainer.outer, {"strength": x}, 1e-12)
    for k in range(3):
        assert_close(trainer.inner(k), {"w": w[k]}, 1e-12)
        assert_close(trainer.carried(k), {"teacher": teacher[k]}, 1e-12)
    assert float(teacher.norm()) > 0.01


def test_it_goes_under_vmap_and_one_by_one_alike():
    together, alone = (train(3, compute=Compute(vectorize=way)) for way in (True, False))
    for k in range(3):
        assert_close(together.carried(k), alone.carried(k), 1e-14)
    assert_close(together.outer, alone.outer, 1e-14)


def test_a_resumed_run_has_the_same_bytes(tmp_path):
    whole = train(5)
    train(2, run_dir=tmp_path / "run")
    resumed = train(5, resumes=True, run_dir=tmp_path / "run")
    for k in range(3):
        assert torch.equal(whole.carried(k)["teacher"], resumed.carried(k)["teacher"])
    assert torch.equal(whole.outer["strength"], resumed.outer["strength"])


def test_states_with_counters_have_room_for_it():
    saba = SABA(inner_lr=0.1, adjoint_lr=0.1)
    trainer = Trainer(
        Taught(dtype=torch.float32),
        FixedTasks([a_task(0)]),
        saba,
        outer_optimizer=SGD,
        batch_size=2,
        quiet=True,
    )
    trainer.fit(3)
    assert trainer.carried(0)["teacher"].norm() > 0
    assert trainer.inner(0)["w"].shape == (3,)


@pytest.mark.parametrize("algorithm", [BOME(inner_steps=1), FreePBGD(), MEHA(), AID()])
def test_what_looks_at_the_losses_beforehand_finds_it_too(algorithm):
    trainer = Trainer(Taught(), tasks(), algorithm, outer_optimizer=SGD, quiet=True)
    trainer.fit(2)
    assert all(trainer.carried(k)["teacher"].norm() > 0 for k in range(3))


class Names(Taught):
    def init_carried(self, outer: Params, task: Task) -> Params:
        return {"strength": torch.zeros(3, dtype=DOUBLE)}


class Kind(Taught):
    def init_carried(self, outer: Params, task: Task) -> Params:
        return {"teacher": torch.zeros(3)}


class Nothing(Taught):
    init_carried = Problem.init_carried


class Shape(Taught):
    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        return {"teacher": inner["w"][:2]}


class Single(Taught):
    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        return {"teacher": inner["w"].float()}


class Forgot(Taught):
    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        return None  # type: ignore[return-value]


class Random(Taught):
    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        return {"teacher": torch.randn(3, dtype=DOUBLE)}


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        (Names(), ValueError, r"init_carried must have names that encode has not, got strength"),
        (Kind(), ValueError, r"init_carried must return .*float64, the dtype of x, got teacher of"),
        (Nothing(), ValueError, r"a problem with carry must have init_carried, got Nothing"),
        (Shape(), ValueError, r"carry must return tensors of .*\(3,\).* got .*\(2,\)"),
        (Single(), ValueError, r"carry must return tensors of .*float64.* got .*float32"),
        (Forgot(), ValueError, r"carry must return tensors of .* got NoneType"),
        (Random(), Impure, r"carry must give the same bytes"),
    ],
)
def test_what_cannot_be_carried_is_refused_before_work_starts(problem, error, message):
    with pytest.raises(error, match=message):
        train(1, problem)


class Overflowing(Taught):
    """Carries infinity from task 1 on while x is below a limit."""

    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        found = super().carry(outer, inner, task, carried)["teacher"]
        is_bad = (task.id == 1) & (outer["strength"] < 1)
        return {"teacher": torch.where(is_bad, torch.inf, found)}


def test_a_task_that_would_carry_infinity_is_dropped_and_keeps_its_state():
    problem = Overflowing()
    outer = problem.init_outer(torch.Generator())
    drawn = [a_task(index) for index in range(3)]
    for vectorize in (True, False):
        compute = Compute(vectorize=vectorize)
        found = task_hypergradients(problem, METHOD, outer, drawn, states={}, compute=compute)
        assert found.dropped == (1,) and sorted(found.states) == [0, 2]
        later = {"strength": outer["strength"] + 1}
        again = task_hypergradients(
            problem, METHOD, later, drawn, states=found.states, compute=compute
        )
        assert again.dropped == () and sorted(again.states) == [0, 1, 2]


def test_new_tasks_carry_nothing():
    with pytest.raises(ValueError, match=r"keep_state must be True with Taught, which carries"):
        Trainer(Taught(), New(), METHOD, quiet=True)
    with pytest.raises(ValueError, match=r"keep_state must be True with Taught"):
        task_hypergradients(Taught(), METHOD, Taught().init_outer(generator(0)), [a_task(0)])


def test_workers_that_see_a_part_of_the_data_carry_nothing():
    work = Workload(Taught(), tasks(1), AID(), meta_batch_size=1, keep_state=True)
    with pytest.raises(ValueError, match=r"a problem must carry no state with DataParallel"):
        check_workload(work, 0)


def test_evaluation_starts_from_what_is_carried_at_the_start():
    outer = Taught().init_outer(generator(0))
    one, two = (
        evaluate(Taught(), tasks(), METHOD, outer, 3, compute=Compute(vectorize=way))
        for way in (True, False)
    )
    mean = one.metrics["query_loss"].mean
    assert mean == pytest.approx(two.metrics["query_loss"].mean, rel=1e-12)
