"""StocBiO: closed form, the limit of many terms."""

import pytest
import torch

from metadist.algorithms.stocbio import StocBiO
from tests.algorithms.toys import estimate
from tests.problems import (
    DOUBLE,
    Quadratic,
    assert_close,
    generator,
    quadratic_task,
    quadratic_terms,
    randn,
)


def ill_conditioned(index):
    task = quadratic_task(index)
    basis = torch.linalg.qr(randn(index, 4, 4))[0]
    a = basis @ torch.diag(torch.logspace(-3, 0.5, 4, dtype=DOUBLE)) @ basis.T
    support = task.support
    return task._replace(
        support=support._replace(tensors=(a.expand(3, 4, 4), *support.tensors[1:]))
    )


@pytest.mark.parametrize("make", [quadratic_task, ill_conditioned])
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_closed_form(make, num_steps):
    for index in range(3):
        problem, task, eta = Quadratic(2, 4, rho=0.3), make(index), 0.3
        outer = problem.init_outer(generator(index))
        a, b, _, t = quadratic_terms(task)
        result = estimate(
            StocBiO(4, 0.2, adjoint_steps=num_steps, adjoint_lr=eta), problem, outer, task
        )
        y, identity = result.state.inner["y"], torch.eye(4, dtype=DOUBLE)
        power = torch.linalg.matrix_power(identity - eta * a, num_steps + 1)
        v = torch.linalg.solve(a, (identity - power) @ (y - t))
        assert_close(result.hypergradient, {"x": 0.3 * outer["x"] + b.T @ v}, 1e-10)
        assert result.start_gradient is None
        expected = (power @ (y - t)).norm() / (y - t).norm()
        assert float(result.metrics["adjoint_residual"]) == pytest.approx(float(expected))
