"""FSLA: its update by hand, kept and new tasks, convergence."""

from metadist.algorithms.fsla import FSLA
from metadist.autograd import AutogradOracle
from metadist.trees import add, sub
from tests.algorithms.toys import estimate, point
from tests.problems import (
    Quadratic,
    assert_close,
    generator,
    golden_quadratic,
    quadratic_task,
    quadratic_terms,
    randn,
)


def test_the_golden_first_step():
    """y+ = .2 x, v+ = .2 (y+ - t), h = rho x + v+."""
    problem, outer, task = golden_quadratic()
    found = estimate(FSLA(inner_lr=0.2, adjoint_lr=0.2), problem, outer, task)
    assert_close(found.state.inner, {"y": point(0.4, -0.8)}, 1e-12)
    assert_close(found.state.adjoint, {"y": point(-0.12, -0.36)}, 1e-12)
    assert_close(found.hypergradient, {"x": point(0.08, -0.76)}, 1e-12)


def test_the_update_by_hand_under_noise():
    problem, task, weight = Quadratic(2, 4), quadratic_task(0), 0.4
    algorithm = FSLA(inner_lr=0.2, adjoint_lr=0.3, outer_weight=weight)
    points, state = [{"x": randn(seed, 2)} for seed in range(4)], None
    y, v, w = {"y": problem.start}, {"y": 0 * problem.start}, {"x": randn(9, 2)}
    for k, x in enumerate(points):
        oracle = AutogradOracle(problem, task, batch_size=1, step=k)
        first, second = oracle.draw_inner(), oracle.draw_inner()
        third, fourth, fifth = oracle.draw_outer(), oracle.draw_outer(), oracle.draw_inner()

        def d(x, y, v, oracle=oracle, fourth=fourth, fifth=fifth):
            j_v, _ = oracle.second_order(x, y, v, fifth)
            return sub(oracle.outer_grads(x, y, fourth)[0], j_v)

        new_y = add(y, oracle.inner_grad(x, y, first), -0.2)
        right = oracle.outer_grads(x, new_y, third)[1]
        new_v = add(v, sub(oracle.hvp(x, new_y, v, second), right), -0.3)
        new = d(x, new_y, new_v)
        w = add(new, sub(w, d(points[k - 1], y, v)), 1 - weight) if k else new
        found = estimate(algorithm, problem, x, task, state, batch_size=1, step=k)
        y, v, state = new_y, new_v, found.state
        assert_close(state.inner, y, 1e-12)
        assert_close(state.adjoint, v, 1e-12)
        assert_close(found.hypergradient, w, 1e-12)
        assert_close(state.outer_direction, w, 1e-12)
        assert state.age == k + 1


def test_without_noise_the_recursion_changes_nothing():
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer, state = problem.init_outer(generator(1)), None
    _, b, _, _ = quadratic_terms(task)
    for step in range(4):
        algorithm = FSLA(inner_steps=2, inner_lr=0.2, adjoint_lr=0.2)
        found = estimate(algorithm, problem, outer, task, state, step=step)
        state = found.state
        expected = 0.1 * outer["x"] + b.T @ state.adjoint["y"]
        assert_close(found.hypergradient, {"x": expected}, 1e-12)
        outer = add(outer, found.hypergradient, -0.1)


def test_weights():
    assert [FSLA(outer_weight=0.3).recursive_weight(step) for step in range(3)] == [1, 0.3, 0.3]
    assert FSLA(weight_decay=0.5).recursive_weight(4) == 0.25
