"""BDA: plain unrolling of both levels, its limit ITD, the example of its paper."""

from typing import Any

import pytest
import torch

from metadist import SGD, Adam
from metadist.algorithms.bda import BDA
from metadist.algorithms.itd import ITD
from metadist.checks.hypergradient import check_hypergradient
from metadist.tasks.synthetic.toys import MerelyConvex
from metadist.trees import leaves
from tests.algorithms.toys import counts_of, estimate, point, toy_task
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    oracle_of,
    plain_gradient,
    quadratic_task,
    run_single,
    smooth_task,
)

PLAIN: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}


def aggregated(problem, task, context, y, algorithm):
    """f at the end of the inner loop, by torch.autograd alone."""
    memory = algorithm.step_rule.start(y)
    for t in range(algorithm.inner_steps):
        share = algorithm.alpha / (t + 1) ** algorithm.alpha_decay
        g = problem.inner_loss(context, y, task.support)
        f = problem.outer_loss(context, y, task.query)
        g_y = torch.autograd.grad(g, list(y.values()), **PLAIN)
        f_y = torch.autograd.grad(f, list(y.values()), **PLAIN)
        lr = algorithm.step_rule.lr
        weight = share * (algorithm.y_lr or lr) / lr
        steps = zip(y, g_y, f_y, strict=True)
        along = {name: (1 - share) * in_g + weight * in_f for name, in_g, in_f in steps}
        y, memory = algorithm.step_rule.step(y, memory, along, lr)
    return problem.outer_loss(context, y, task.query)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"inner_lr": 0.1},
        {"inner_lr": 0.1, "y_lr": 0.03, "alpha_decay": 0.5},
        {"inner_optimizer": SGD(0.1, momentum=0.8, clip_norm=0.5), "alpha_decay": 0.0},
        {"inner_optimizer": Adam(0.05), "y_lr": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("problem", "task_of"), [(Quadratic(2, 4), quadratic_task), (Smooth(), smooth_task)]
)
def test_it_is_the_derivative_of_the_aggregated_loop(problem, task_of, options, eager):
    task, outer = task_of(1), problem.init_outer(generator(1))
    algorithm = BDA(4, alpha=0.4, **options)
    found = estimate(algorithm, problem, outer, task, eager=eager)
    _, context, start = oracle_of(problem, outer, task)
    in_context = plain_gradient(
        lambda c: aggregated(problem, task, c, leaves(start), algorithm), context
    )
    in_start = plain_gradient(lambda y: aggregated(problem, task, context, y, algorithm), start)
    assert_close(found.hypergradient, in_context)
    assert_close(found.start_gradient, in_start)


def test_without_a_share_of_f_it_is_itd():
    problem, task = Smooth(), smooth_task(2)
    outer = problem.init_outer(generator(2))
    mine = estimate(BDA(5, 0.1, alpha=0.0), problem, outer, task)
    theirs = estimate(ITD(5, 0.1), problem, outer, task)
    assert_close(mine.hypergradient, theirs.hypergradient, 1e-15)
    assert_close(mine.start_gradient, theirs.start_gradient, 1e-15)
    counts = counts_of(BDA(5, 0.1, alpha=0.0), problem, outer, task)
    assert counts == counts_of(ITD(5, 0.1), problem, outer, task)


def test_it_finds_the_solution_where_g_leaves_half_of_y_free():
    """ITD moves only the half that g depends on, and ends elsewhere."""
    problem, task = MerelyConvex(3), toy_task()
    outer = {"x": point(0.0, 0.5, 2.0)}
    ends = {}
    for algorithm in (BDA(60, 0.3, y_lr=1.0, alpha=0.9, alpha_decay=0.7), ITD(60, 0.3)):
        run = run_single(
            algorithm, problem, task, outer, 30, 0.3, start={"y": torch.zeros(6).double()}
        )
        ends[type(algorithm)] = problem.error(run.outer["x"], run.state.inner["y"])
    assert float(ends[BDA].abs().max()) < 0.05
    assert float(ends[ITD].abs().max()) > 0.4


def test_the_check_of_hypergradients_judges_the_aggregated_loop():
    report = check_hypergradient(Smooth(), smooth_task(0), BDA(4, 0.1), repeats=())
    assert report.error < 1e-7


def test_evaluation_adapts_on_the_support_set_alone():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), task)
    mine = BDA(4, 0.1).adapt(oracle, context, start)
    assert_close(mine, ITD(4, 0.1).adapt(oracle, context, start), 1e-15)
