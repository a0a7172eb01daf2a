"""Every algorithm on every kind of problem where tensors are elsewhere: the bytes of the CPU.

But those that multiply a vector by a matrix, whose squeeze_ a pretend tensor does not follow, and
texts, which are sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metadist import Batch, Problem, Task
from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS, ITD
from metadist.compute import Compute
from metadist.models import MLP
from metadist.task import to_device
from metadist.tasks import (
    ClassWeights,
    FewShotProblem,
    HyperCleaning,
    Lasso,
    LinearClassifier,
    LossWeighting,
    NoData,
    QuadraticData,
    Quadratics,
    Sinusoid,
)
from tests.helpers import raw, small_conv4
from tests.pretend_device import here, last_of_two, pretending, task_there, there
from tests.problems import generator, image_task

COMPUTE = Compute(vectorize=False, num_threads=1)
IMAGES = [image_task(index) for index in range(2)]


def conv(adapt: str, **options: Any) -> Problem:
    return FewShotProblem(small_conv4().double(), adapt=adapt, weight_decay=0.1, **options)


def vectors() -> Task:
    random = generator(3)

    def batch() -> Batch:
        inputs = torch.randn(12, 5, generator=random, dtype=torch.float64)
        return Batch.named(inputs=inputs, targets=torch.arange(12) % 3)

    return Task(batch(), batch(), 0)


def linear() -> LinearClassifier:
    return LinearClassifier(5, 3)


KINDS: dict[str, tuple[Callable[[], Problem], Callable[[], list[Task]]]] = {
    "anil": (lambda: conv("head"), lambda: IMAGES),
    "proto-anil": (lambda: conv("head", head_start="prototypes"), lambda: IMAGES),
    "maml": (lambda: conv("all"), lambda: IMAGES[:1]),
    "boil": (lambda: conv("features.*"), lambda: IMAGES[:1]),
    "curves": (
        lambda: FewShotProblem(MLP(1, 1, (4,)).double(), loss="mse", weight_decay=0.1),
        lambda: [Sinusoid(k_shot=5, k_query=5).sample(index) for index in range(2)],
    ),
    "cleaning": (lambda: HyperCleaning(12, linear()), lambda: [vectors()]),
    "classes": (lambda: ClassWeights(3, linear()), lambda: [vectors()]),
    "losses": (lambda: LossWeighting(4, linear()), lambda: [vectors()]),
    "prox": (Lasso, lambda: [NoData().sample(0)]),
    "quadratics": (lambda: Quadratics(6, 6), lambda: [QuadraticData(6, 6, 16).sample(0)]),
}

FIELDS = {"inner_lr": 0.02, "inner_steps": 2}


def small(kind: Any) -> Algorithm:
    """An algorithm of few steps."""
    known = {name: value for name, value in FIELDS.items() if name in kind.__dataclass_fields__}
    algorithm: Algorithm = kind(**known)
    return algorithm


METHODS = {name: small(kind) for name, kind in ALGORITHMS.items()}
METHODS["itd unrolled"] = ITD(inner_steps=2, engine="unrolled", inner_lr=0.02)
METHODS["itd rates"] = ITD(inner_steps=2, learn_lr="per_tensor", inner_lr=0.02)

SOME = ("itd", "aid", "bome", "soba", "reptile", "itd unrolled")
"""With convolutions, which take long; tests/core/test_host_reads.py has more of them."""

UNLIKE = {"lancbio", "subbio", "nystrom"}
"""Rounded otherwise where LAPACK gets a matrix in another memory layout."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_gives_the_bytes_of_the_cpu(kind):
    torch.manual_seed(0)
    make_problem, make_tasks = KINDS[kind]
    problem = make_problem()
    start = {n: leaf.double() for n, leaf in problem.init_outer(generator(0)).items()}
    tasks = [to_device(task, "cpu", torch.float64) for task in make_tasks()]
    ran = set()
    names = SOME if tasks[0].support.tensors[0].ndim == 4 else tuple(METHODS)
    for name in names:
        algorithm = METHODS[name]
        try:
            algorithm.check(problem, start, tasks[0], tasks[0])
            outer = start | algorithm.init_own(problem.init_inner(start, tasks[0]))
            expected = last_of_two(problem, algorithm, outer, tasks, COMPUTE)
        except (ValueError, RuntimeError):
            continue  # refused, and so it would be on any device
        with pretending():
            moved = [task_there(task) for task in tasks]
            found = last_of_two(problem, algorithm, there(outer), moved, COMPUTE)
        for leaf, (own_name, theirs) in zip(
            here(found.total).values(), expected.total.items(), strict=True
        ):
            torch.testing.assert_close(leaf, theirs, rtol=1e-7, atol=1e-10, equal_nan=True)
            assert raw(leaf) == raw(theirs) or name in UNLIKE, (name, own_name)
        assert found.dropped == expected.dropped
        ran.add(name)
    assert len(ran) >= len(names) // 4, sorted(set(names) - ran)
