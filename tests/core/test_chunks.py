"""How many tasks are computed together: by their sizes, with the sums of a loop."""

from __future__ import annotations

import pytest
import torch

from metadist import Batch, Problem, Task
from metadist.algorithms import AID, ITD, LancBiO, Reptile
from metadist.chunks import FEW, GPU_BYTES, chunk_of, vectorizes
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP
from metadist.tasks import FewShotProblem
from tests.helpers import regression
from tests.pretend_device import pretending, task_there, there
from tests.problems import Smooth, assert_close, generator, smooth_task, vector_task


def chunk_of_mlp(width: int, num_examples: int = 10, dtype: torch.dtype = torch.float32) -> int:
    problem = regression(MLP(hidden=(width, width)).to(dtype))
    x = torch.zeros(num_examples, 1, dtype=dtype)
    task = Task(Batch.of(x, x), Batch.of(x, x), 0)
    return chunk_of(problem, problem.init_outer(generator(0)), task)


def test_a_chunk_fills_eight_megabytes():
    num_elements = 40 * 40 + 4 * 40 + 1
    assert chunk_of_mlp(40) == 2**23 // (4 * num_elements)
    assert chunk_of_mlp(40, dtype=torch.float64) == 2**23 // (8 * num_elements)
    assert chunk_of_mlp(2000) == FEW


def test_a_chunk_is_smaller_where_a_task_computes_much():
    assert FEW < chunk_of_mlp(40, num_examples=1000) < chunk_of_mlp(40, num_examples=500)
    assert chunk_of_mlp(40, num_examples=100_000) == FEW
    # What encode computes counts as well: the inner variable is the head alone.
    head = FewShotProblem(MLP(hidden=(4000, 4000)), adapt="head", loss="mse")
    x = torch.zeros(1000, 1)
    task = Task(Batch.of(x, x), Batch.of(x, x), 0)
    assert chunk_of(head, head.init_outer(generator(0)), task) == FEW


@pytest.mark.parametrize(("width", "together"), [(300, True), (400, False)])
def test_an_inner_variable_of_more_than_512_kb_is_computed_in_a_loop(width, together):
    problem = FewShotProblem(MLP(3, 2, hidden=(width, width)), loss="mse")
    tasks = [vector_task(index) for index in range(2)]
    outer = problem.init_outer(generator(0))
    assert vectorizes("auto", problem, ITD(), outer, tasks) == together
    assert vectorizes(True, problem, ITD(), outer, tasks)


@pytest.mark.parametrize(
    "algorithm",
    [ITD(inner_steps=3), AID(inner_steps=3), LancBiO(inner_steps=3), Reptile(inner_steps=3)],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_chunks_add_up_to_what_a_loop_computes(algorithm):
    problem: Problem = Smooth()
    tasks = [smooth_task(index) for index in range(9)]
    outer = problem.init_outer(generator(0))
    found, expected = (
        task_hypergradients(
            problem, algorithm, outer, tasks, compute=Compute(vectorize=vectorize), report=True
        )
        for vectorize in ("auto", False)
    )
    assert_close(found.total, expected.total, 1e-12)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-12)


def test_on_a_gpu_the_bytes_of_a_forward_pass_bound_a_chunk():
    x = torch.zeros(1000, 1)
    task = Task(Batch.of(x, x), Batch.of(x, x), 0)
    found = []
    with pretending():
        for width in (400, 800, 400_000):
            problem = regression(MLP(hidden=(width,)))
            outer = there(problem.init_outer(generator(0)))
            found.append(chunk_of(problem, outer, task_there(task)))
    few, half, one = found
    # Of both sets the hidden numbers before and after their activation.
    assert few == pytest.approx(GPU_BYTES / (4 * 4 * 1000 * 400), rel=0.2)
    assert half == pytest.approx(few / 2, rel=0.05)
    assert one == 1
