"""BAMM: its limit SOBA, the closed form of an average, the example without a unique solution."""

import pytest
import torch

from metadist.algorithms.bamm import BAMM
from metadist.algorithms.soba import SOBA
from metadist.tasks.synthetic.toys import MerelyConvex
from tests.algorithms.toys import counts_of, estimate, point, toy_task
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    central_difference,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    run_single,
    smooth_task,
)


def test_without_a_share_of_f_it_is_soba():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    one = two = None
    for step in range(3):
        mine = estimate(BAMM(3, 0.1, mu=0.0), problem, outer, task, one, step=step)
        theirs = estimate(SOBA(3, 0.1), problem, outer, task, two, step=step)
        one, two = mine.state, theirs.state
        assert_close(mine.hypergradient, theirs.hypergradient, 1e-15)
        assert_close(one.inner, two.inner, 1e-15)
        assert_close(one.adjoint, two.adjoint, 1e-15)
    counts = counts_of(BAMM(mu=0.0), problem, outer, task)
    assert counts == counts_of(SOBA(), problem, outer, task)


def test_two_steps_by_hand():
    problem, outer, task = golden_quadratic()
    algorithm = BAMM(inner_lr=0.2, adjoint_lr=0.1, mu=0.25, mu_decay=1.0)
    first = estimate(algorithm, problem, outer, task)
    # psi_y = .75 (-2, 4) + .25 (-1, -1)
    assert_close(first.state.inner, {"y": point(0.35, -0.55)}, 1e-12)
    assert_close(first.state.adjoint, {"y": point(-0.1, -0.1)}, 1e-12)
    assert_close(first.hypergradient, {"x": point(0.2, -0.4)}, 1e-12)
    second = estimate(algorithm, problem, outer, task, first.state, step=1)
    # mu_1 = 1/8; psi_yy = diag(1, 3.625), psi_xy = -.875
    g_y, f_y = point(0.35 - 2, -2.2 + 4), point(-0.65, -1.55)
    y = point(0.35, -0.55) - 0.2 * (0.875 * g_y + 0.125 * f_y)
    assert_close(second.state.inner, {"y": y}, 1e-12)
    v = point(-0.1, -0.1) - 0.1 * (point(-0.1, -0.3625) - f_y)
    assert_close(second.state.adjoint, {"y": v}, 1e-12)
    assert_close(second.hypergradient, {"x": point(0.2 - 0.0875, -0.4 - 0.0875)}, 1e-12)


@pytest.mark.parametrize("mu", [0.1, 0.6])
def test_moves_at_one_x_end_at_the_hypergradient_of_the_averaged_lower_problem(mu):
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer = problem.init_outer(generator(1))
    a, b, c, t = quadratic_terms(task)
    averaged = mu * torch.eye(4, dtype=DOUBLE) + (1 - mu) * a

    def phi(outer):
        linear = mu * t + (1 - mu) * (b @ outer["x"] + c)
        return problem.outer_loss(outer, {"y": torch.linalg.solve(averaged, linear)}, task.query)

    found = estimate(BAMM(300, 0.3, adjoint_lr=0.3, mu=mu), problem, outer, task)
    assert_close(found.hypergradient, central_difference(phi, outer), 1e-8)


def test_it_finds_the_solution_where_g_leaves_half_of_y_free():
    """There the solution is that of every average. SOBA leaves the free half where it started."""
    problem, task = MerelyConvex(3), toy_task()
    outer, start = {"x": point(0, 0.5, 2)}, {"y": torch.zeros(6, dtype=DOUBLE)}
    algorithm = BAMM(inner_lr=0.5, adjoint_lr=0.5, mu=0.5, mu_decay=0.1)
    run = run_single(algorithm, problem, task, outer, 800, 0.05, start=start)
    error = problem.error(run.outer["x"], run.state.inner["y"])
    assert float(error.abs().max()) < 1e-3
