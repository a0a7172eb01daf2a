"""IAPTT-GM: plain unrolling up to the worst f, alone and with tasks that are cut elsewhere."""

import pytest
import torch

from metadist import Adam
from metadist.algorithms.iaptt import IAPTT
from metadist.algorithms.itd import ITD
from metadist.checks.hypergradient import check_hypergradient
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.trees import add, leaves
from tests.algorithms.toys import estimate, point
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    plain_gradient,
    quadratic_task,
    smooth_task,
)

STEPS = IAPTT(6, 0.2)


def losses(problem, task, context, y, algorithm):
    """f after every step of gradient descent on g, by torch.autograd alone."""
    found, memory = [], algorithm.step_rule.start(y)
    for _ in range(algorithm.inner_steps):
        loss = problem.inner_loss(context, y, task.support)
        g_y = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        along = dict(zip(y, g_y, strict=True))
        y, memory = algorithm.step_rule.step(y, memory, along, algorithm.step_rule.lr)
        found.append(problem.outer_loss(context, y, task.query))
    return found


# f is worst after the first step, after the third, the fifth and the last.
CUT = {0: 1, 4: 3, 6: 5, 9: 6}
ADAM = IAPTT(5, inner_optimizer=Adam(0.1))


@pytest.mark.parametrize(
    ("algorithm", "index", "eager"),
    [
        *((STEPS, index, eager) for index in CUT for eager in (False, True)),
        *((ADAM, index, False) for index in range(6)),
    ],
)
def test_it_is_the_derivative_of_the_largest_f_of_the_loop(algorithm, index, eager):
    problem, task = Smooth(), smooth_task(index)
    outer = problem.init_outer(generator(index))
    found = estimate(algorithm, problem, outer, task, eager=eager)
    _, context, start = oracle_of(problem, outer, task)

    def worst(context, start):
        return torch.stack(losses(problem, task, context, start, algorithm)).max()

    assert_close(found.hypergradient, plain_gradient(lambda c: worst(c, leaves(start)), context))
    assert_close(found.start_gradient, plain_gradient(lambda y: worst(context, y), start))
    of_each = torch.stack(losses(problem, task, context, leaves(start), algorithm))
    assert float(found.metrics["truncated_at"]) == int(of_each.argmax()) + 1
    assert algorithm is ADAM or found.metrics["truncated_at"] == CUT[index]


def test_tasks_that_are_cut_elsewhere_go_through_together():
    problem, tasks = Smooth(), [smooth_task(index) for index in range(8)]
    outer = problem.init_outer(generator(6))
    alone, together = (
        task_hypergradients(problem, STEPS, outer, tasks, compute=Compute(vectorize=vectorize))
        for vectorize in (False, True)
    )
    assert_close(together.total, alone.total, 1e-12)
    cuts = [estimate(STEPS, problem, outer, task).metrics["truncated_at"] for task in tasks]
    assert len({float(cut) for cut in cuts}) > 1


def test_where_f_rises_to_the_end_it_is_itd():
    problem, outer, task = golden_quadratic()
    problem.start = point(1, 1)  # the minimum of f, from where g leads away
    mine = estimate(IAPTT(4, 0.1), problem, outer, task)
    theirs = estimate(ITD(4, 0.1), problem, outer, task)
    assert float(mine.metrics["truncated_at"]) == 4
    assert_close(mine.hypergradient, theirs.hypergradient, 1e-14)
    assert_close(mine.start_gradient, theirs.start_gradient, 1e-14)


def test_the_first_of_several_largest_values_is_taken():
    problem, outer, task = golden_quadratic()
    problem.start = point(2, -1)  # the solution y*: the loop stays there
    assert float(estimate(IAPTT(3, 0.1), problem, outer, task).metrics["truncated_at"]) == 1


def test_z_descends_in_a_kept_state_alone():
    problem, task = Quadratic(2, 4), quadratic_task(3)
    outer = problem.init_outer(generator(3))
    algorithm = IAPTT(4, 0.1, start_lr=0.3)
    first = estimate(algorithm, problem, outer, task)
    _, _, start = oracle_of(problem, outer, task)
    assert_close(first.state.start, add(start, first.start_gradient, -0.3), 1e-14)
    second = estimate(algorithm, problem, outer, task, first.state)
    problem.start = first.state.start["y"]
    assert_close(second.hypergradient, estimate(STEPS_4, problem, outer, task).hypergradient, 1e-14)
    with pytest.raises(ValueError, match=r"start_lr=0.3 acts on a kept state alone\. Leave it out"):
        task_hypergradients(problem, algorithm, outer, [task])


STEPS_4 = IAPTT(4, 0.1)


def test_a_loop_that_diverges_is_not_taken_for_a_short_one():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = {"x": torch.full((2,), 1e300, dtype=DOUBLE)}
    found = estimate(IAPTT(20, 1e100), problem, outer, task)
    assert not found.hypergradient["x"].isfinite().all()


def test_the_check_of_hypergradients_judges_the_truncated_loop():
    report = check_hypergradient(Quadratic(2, 4), quadratic_task(0), STEPS, repeats=())
    assert report.error < 1e-7
