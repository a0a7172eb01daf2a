"""The optimisers of `higher` that are offered are those of torch.optim; the others are refused."""

from typing import Any

import higher
import pytest
import torch

from metadist.algorithms import ITD
from metadist.algorithms.parts.higher import HIGHER_OPTIMIZERS, REFUSED
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP
from metadist.tasks.few_shot.problem import FewShotProblem
from tests.problems import (
    Smooth,
    assert_close,
    central_difference,
    generator,
    oracle_of,
    plain_objective,
    smooth_task,
    vector_task,
)

RATE = "algorithm.inner_lr."


def adapt_with_torch(name, problem, outer, task, num_steps, rates):
    """(context, y) after steps of the real torch.optim optimiser."""
    _, context, start = oracle_of(problem, outer, task)
    leaves = {n: torch.nn.Parameter(leaf.clone()) for n, leaf in start.items()}
    reference = HIGHER_OPTIMIZERS[name]([{"params": [leaves[n]], "lr": rates[n]} for n in leaves])
    for _ in range(num_steps):
        reference.zero_grad()
        problem.inner_loss(context, leaves, task.support).backward()
        reference.step()
    return context, {n: leaf.detach() for n, leaf in leaves.items()}


@pytest.mark.parametrize("name", HIGHER_OPTIMIZERS)
def test_every_offered_optimizer_is_that_of_torch_step_by_step(name):
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    oracle, context, start = oracle_of(problem, outer, task)
    for num_steps in range(1, 6):
        if num_steps == 1 and name != "sgd":  # refused: the sign of the gradient
            continue
        algorithm = ITD(num_steps, 0.05, engine="higher", inner_optimizer=name)
        adapted = algorithm.adapt(oracle, context, start)
        rates = dict.fromkeys(start, 0.05)
        expected = adapt_with_torch(name, problem, outer, task, num_steps, rates)[1]
        assert_close(adapted, expected, 1e-12)


@pytest.mark.parametrize("learn_lr", ["no", "per_tensor"])
@pytest.mark.parametrize("name", HIGHER_OPTIMIZERS)
def test_its_hypergradient_agrees_with_central_differences_of_torch(name, learn_lr):
    problem, task = Smooth(), smooth_task(1)
    algorithm = ITD(4, 0.05, learn_lr=learn_lr, engine="higher", inner_optimizer=name)
    outer = problem.init_outer(generator(1))
    outer = {**outer, **algorithm.init_own(problem.init_inner(outer, task))}

    def objective(x):
        rates = {n: float(x.get(RATE + n, torch.tensor(0.05))) for n in ("w", "m")}
        x = {n: leaf for n, leaf in x.items() if not n.startswith(RATE)}
        context, y = adapt_with_torch(name, problem, x, task, 4, rates)
        return problem.outer_loss(context, y, task.query)

    total = task_hypergradients(problem, algorithm, outer, [task]).total
    assert_close(total, central_difference(objective, outer), 1e-6)


@pytest.mark.parametrize("name", HIGHER_OPTIMIZERS)
def test_units_without_any_gradient_spoil_no_hypergradient(name):
    torch.manual_seed(1)
    model = MLP(3, 2, (6,)).double()
    with torch.no_grad():
        model.get_parameter("features.0.bias")[:2] -= 50  # ReLU gives 0 for every example
    problem, task = FewShotProblem(model, loss="mse"), vector_task(0)
    outer = problem.init_outer(generator(0))
    algorithm = ITD(3, 0.01, engine="higher", inner_optimizer=name)

    def objective(x):
        rates = dict.fromkeys(x, 0.01)
        context, y = adapt_with_torch(name, problem, x, task, 3, rates)
        return problem.outer_loss(context, y, task.query)

    total = task_hypergradients(problem, algorithm, outer, [task]).total
    assert not total["features.0.weight"][:2].any()
    assert_close(total, central_difference(objective, outer, 1e-6), 1e-6)


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "adamax"])
@pytest.mark.parametrize("options", [{"first_order": True}, {"truncate": 1}])
def test_less_than_full_second_order_leaves_the_adapted_variable_as_it_is(name, options):
    problem, task = Smooth(), smooth_task(1)
    outer = problem.init_outer(generator(1))
    none: dict[str, Any] = {}
    whole, less = (
        task_hypergradients(
            problem,
            ITD(3, 0.05, engine="higher", inner_optimizer=name, **extra),
            outer,
            [task],
            report=True,
        )
        for extra in (none, options)
    )
    assert less.metrics == pytest.approx(whole.metrics, rel=1e-12)
    assert float((less.total["b"] - whole.total["b"]).norm()) > 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"inner_optimizer with engine='higher' .*'{name}'") as e:
        ITD(engine="higher", inner_optimizer=name)
    assert REFUSED[name] in str(e.value)
    assert str(sorted(HIGHER_OPTIMIZERS)) in str(e.value)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"must be one of .*, got 'lbfgs': it is not known here"):
        ITD(engine="higher", inner_optimizer="lbfgs")


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "adamax"])
def test_momentum_belongs_to_sgd(name):
    with pytest.raises(
        ValueError, match=rf"momentum must be 0 with inner_optimizer='{name}', got 0.5: .*'sgd'"
    ):
        ITD(engine="higher", inner_optimizer=name, momentum=0.5)


def test_no_optimizer_is_both_offered_and_refused():
    assert not HIGHER_OPTIMIZERS.keys() & REFUSED.keys()


def one_step(optimizer, gradient):
    """(the step of torch.optim, the step of higher) from 0 for this gradient."""
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    differentiable = higher.get_diff_optim(optimizer([leaf], lr=1.0), [leaf])
    (moved,) = differentiable.step((leaf * gradient).sum(), params=[leaf])
    reference = optimizer([leaf], lr=1.0)
    leaf.grad = torch.full_like(leaf, gradient)
    reference.step()
    return float(leaf.detach()), float(moved.detach())


def test_adam_of_higher_is_another_adam_so_its_refusal_stays_justified():
    expected, actual = one_step(torch.optim.Adam, 1e-8)
    assert abs(actual / expected) < 0.5  # epsilon is added before the bias correction
    expected, actual = one_step(torch.optim.SGD, 1e-8)
    assert actual == expected


def test_adamw_is_missing_in_higher():
    leaf = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="Optimizer type"):
        higher.get_diff_optim(torch.optim.AdamW([leaf]), [leaf])


def test_a_parameter_that_the_loss_does_not_depend_on_stays_and_has_no_gradient():
    class Idle(Smooth):
        def init_inner(self, outer, task):
            return {**super().init_inner(outer, task), "idle": outer["a"][:1]}

    problem, task = Idle(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    for first_order in (False, True):
        algorithms = [
            ITD(3, engine="higher", first_order=first_order),
            ITD(3, engine="adjoint", first_order=first_order),
        ]
        one, two = (
            task_hypergradients(problem, algorithm, outer, [task]).total for algorithm in algorithms
        )
        assert_close(one, two)


def test_sgd_of_higher_takes_momentum():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    algorithm = ITD(4, 0.1, momentum=0.6, engine="higher")
    total = task_hypergradients(problem, algorithm, outer, [task]).total
    expected = central_difference(lambda x: plain_objective(problem, x, task, 4, 0.1, 0.6), outer)
    assert_close(total, expected, 1e-8)
