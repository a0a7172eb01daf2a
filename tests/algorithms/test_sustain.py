"""SUSTAIN: lengths of the chain, the same one at both points."""

from metadist.algorithms.sustain import SUSTAIN
from metadist.autograd import AutogradOracle
from tests.algorithms.toys import estimate, point
from tests.problems import Quadratic, assert_close, golden_quadratic, quadratic_task


def test_all_lengths_occur_equally_often():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    algorithm, counts = SUSTAIN(adjoint_steps=4), [0] * 4
    for step in range(2000):
        oracle = AutogradOracle(problem, task, step=step)
        before = oracle.draw_inner().counter
        algorithm.draw_estimator(oracle)
        num_draws = oracle.draw_inner().counter - before - 1
        counts[num_draws - 3] += 1  # beside p factors: the coin, f and J
    assert min(counts) > 500 - 4 * (2000 * 0.25 * 0.75) ** 0.5, counts


def test_without_noise_in_draws_both_points_have_the_same_length():
    """x and y at rest: then w - h_old is 0 only if both points took the same p."""
    problem, outer, task = golden_quadratic()
    problem.start = point(2, -1)
    algorithm = SUSTAIN(adjoint_steps=2, adjoint_lr=0.2, outer_weight=0.3, weight_decay=0.0)
    lengths, state, w = {0.4: 0, 0.32: 1}, None, None
    for step in range(20):
        found = estimate(algorithm, problem, outer, task, state, step=step)
        state = found.state
        fresh = estimate(algorithm, problem, outer, task, step=step).hypergradient["x"]
        assert min(abs(float(fresh[0]) - 0.2 - v) for v in lengths) < 1e-12
        w = fresh if w is None else 0.3 * fresh + 0.7 * w
        assert_close(found.hypergradient, {"x": w}, 1e-12)
