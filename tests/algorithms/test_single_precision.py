"""Every algorithm in float32: states, gradients and metrics stay in it, and are nearly the same."""

import pytest
import torch

from metadist.algorithm import Algorithm
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.task import Batch, Task
from metadist.trees import add
from tests.algorithms.test_table import CASES
from tests.problems import DOUBLE, Quadratic, quadratic_task

KEPT = {name: case.algorithm for name, case in CASES.items() if case.algorithm.trains != "start"}


def trained(algorithm: Algorithm, dtype: torch.dtype, num_steps: int = 3) -> torch.Tensor:
    """The hypergradient after some steps on tasks whose states are kept."""

    def cast(batch: Batch) -> Batch:
        return batch._replace(tensors=tuple(tensor.to(dtype) for tensor in batch.tensors))

    problem = Quadratic(2, 4)
    problem.start = problem.start.to(dtype)
    tasks = [
        Task(cast(task.support), cast(task.query), index)
        for index, task in enumerate(quadratic_task(index) for index in range(2))
    ]
    x = torch.tensor([0.5, -1.0], dtype=dtype)
    outer = {"x": x, **algorithm.init_own({"y": problem.start})}
    states: dict[int, torch.Tensor] = {}
    for step in range(num_steps):
        found = task_hypergradients(
            problem,
            algorithm,
            outer,
            tasks,
            compute=Compute(vectorize=False, batch_size=2),
            step=step,
            states=states,
        )
        states = found.states
        assert all(state.dtype == dtype for state in states.values())
        outer = add(outer, found.total, -0.02)
    assert found.total["x"].dtype == dtype
    return found.total["x"]


@pytest.mark.parametrize("name", KEPT)
def test_it_is_nearly_the_same_in_single_precision(name):
    single, double = (trained(KEPT[name], dtype) for dtype in (torch.float32, DOUBLE))
    # Differences of nearly equal losses lose more digits.
    tolerance = 0.05 if name in ("darts", "sama", "pzobo", "f2sa") else 1e-4
    assert (single.double() - double).norm() < tolerance * double.norm()
