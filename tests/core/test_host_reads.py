"""On a device that Python must wait for: no mix of devices, the CPU's results, few waits."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from metadist import task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, ALGORITHMS, BOME, ITD, LancBiO
from metadist.compute import Compute
from metadist.task import to_device
from metadist.tasks import FewShotProblem
from tests.helpers import exact_regression, small_conv4
from tests.pretend_device import here, last_of_two, pretending, task_there, there
from tests.problems import generator, image_task

TASKS = [to_device(image_task(index), "cpu", torch.float32) for index in range(2)]

EIGENVALUES = 1
"""LAPACK's, of a small matrix, by which LancBiO solves on its subspace."""

# By task, or for all tasks under vmap: one read of everything, and what is named.
CASES: list[tuple[str, Algorithm, bool, int]] = [
    ("all", ITD(inner_steps=3, inner_lr=0.1), False, 0),
    ("head", ITD(inner_steps=3, inner_lr=0.1), False, 0),
    ("head", ITD(inner_steps=3, inner_lr=0.1, engine="unrolled"), False, 0),
    ("head", AID(inner_steps=3, inner_lr=0.1, adjoint_steps=4), False, 0),
    ("head", AID(inner_steps=3, inner_lr=0.1, adjoint_steps=4, warm_start=True), True, 0),
    ("head", BOME(inner_steps=3, inner_lr=0.1), False, 0),
    ("head", LancBiO(inner_steps=3, inner_lr=0.1), True, EIGENVALUES),
]


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("adapt", "algorithm", "keeps", "more"), CASES)
def test_a_lease_waits_once_for_the_device(adapt, algorithm, keeps, more, vectorize, report):
    torch.manual_seed(0)
    problem = FewShotProblem(small_conv4(), adapt=adapt)
    outer = problem.init_outer(generator(0))
    options: dict[str, Any] = {"compute": Compute(vectorize=vectorize), "is_checked": True}
    states: dict[int, torch.Tensor] | None = {} if keeps else None

    def lease(outer, tasks, states):
        arguments = (problem, algorithm, outer, tasks)
        return task_hypergradients(*arguments, states=states, report=report, **options)

    first = lease(outer, TASKS, states)
    expected = lease(outer, TASKS, first.states) if keeps else first
    with pretending() as waits:
        tasks = [task_there(task) for task in TASKS]
        moved = there(first.states) if keeps else None
        found = lease(there(outer), tasks, moved)
        seen = dict(waits)
    num_groups = 1 if vectorize else len(TASKS)
    counters = 1 if keeps else 0  # of kept states, which tell what to compute
    assert sum(seen.values()) == num_groups * (1 + more) + counters, seen
    for name, leaf in here(found.total).items():
        scale = float(expected.total[name].abs().max())
        torch.testing.assert_close(leaf, expected.total[name], rtol=0, atol=1e-4 + 1e-3 * scale)
    assert found.metrics.keys() == expected.metrics.keys()


def test_the_pretend_device_refuses_to_mix_and_notes_what_waits():
    with pretending() as waits:
        (leaf,) = there({"y": torch.ones(3)}).values()
        with pytest.raises(RuntimeError, match="on two devices"):
            leaf + torch.ones(3)
        assert not waits
        assert float((2 * leaf).sum()) == 6
        leaf.cpu()
        leaf.new_tensor(1.0)
        assert [text.partition(" at ")[0] for text in waits] == [
            *("_local_scalar_dense", "_to_copy", "copy"),
        ]
        assert all("tests/core/test_host_reads.py:" in text for text in waits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_computes_on_the_device_what_it_does_on_the_cpu(name):
    algorithm = cast(Any, ALGORITHMS[name])(inner_steps=3, inner_lr=0.01)
    problem, outer, tasks = exact_regression(algorithm)

    # torch.tensordot, which SABA uses, mistakes the shape of a pretend tensor under vmap.
    for vectorize in (False,) if name == "saba" else (False, True):
        compute = Compute(vectorize=vectorize, batch_size=6)
        expected = last_of_two(problem, algorithm, outer, tasks, compute)
        with pretending():
            moved = [task_there(task) for task in tasks]
            found = last_of_two(problem, algorithm, there(outer), moved, compute)
        for leaf, on_cpu in zip(here(found.total).values(), expected.total.values(), strict=True):
            torch.testing.assert_close(leaf, on_cpu, rtol=1e-9, atol=1e-12)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-9, abs=1e-12)
