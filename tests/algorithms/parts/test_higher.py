"""Why `higher` is offered with SGD alone; test_itd.py compares the engines."""

import higher
import pytest
import torch

from metadist.algorithms import ITD
from metadist.hypergradient import task_hypergradients
from metadist.step_rules import SGD
from tests.problems import (
    Smooth,
    assert_close,
    central_difference,
    generator,
    plain_objective,
    smooth_task,
)

RATE = "algorithm.inner_lr."


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
    algorithm = ITD(4, inner_optimizer=SGD(0.1, momentum=0.6), engine="higher")
    total = task_hypergradients(problem, algorithm, outer, [task]).total
    expected = central_difference(lambda x: plain_objective(problem, x, task, 4, 0.1, 0.6), outer)
    assert_close(total, expected, 1e-8)
