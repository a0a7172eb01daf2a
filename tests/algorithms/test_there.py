"""Every algorithm on every kind of problem where tensors are elsewhere: the bytes of the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import metadist.tasks
from metadist import Batch, Problem, Task
from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS, ITD
from metadist.compute import Compute
from metadist.models import MLP
from metadist.task import to_device
from metadist.tasks import (
    AmigoToy,
    ArchitectureSearch,
    ClassWeights,
    ContextualNetwork,
    ContinualLearning,
    Coreset,
    Degenerate,
    FewShotProblem,
    HyperCleaning,
    LancBiOData,
    LancBiOMatrixFree,
    LancBiOMatrixFreeData,
    LancBiOSynthetic,
    LanguageModelProblem,
    Lasso,
    LinearClassifier,
    LinearProbe,
    LossWeighting,
    MerelyConvex,
    Minimax,
    NearestCentroid,
    NoData,
    PBGDToy,
    PenaltyToy,
    PermutedImages,
    ProtoNet,
    QuadraticData,
    Quadratics,
    RidgeHead,
    Sine,
    Sinusoid,
    SparseRegression,
    SparseRegressionData,
    Supernet,
    TextRegularisation,
)
from metadist.trees import Params
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


def texts() -> Task:
    random = generator(4)

    def batch() -> Batch:
        terms = [torch.randperm(9, generator=random)[:3] for _ in range(12)]
        values = torch.rand(12, 3, generator=random, dtype=torch.float64)
        return Batch.named(columns=torch.stack(terms), values=values, targets=torch.arange(12) % 3)

    return Task(batch(), batch(), 0)


def continual() -> Problem:
    torch.manual_seed(0)
    network = ContextualNetwork(64, width=4, num_tasks=3, embedding=2)
    return ContinualLearning(network, distillation=1.0, num_slots=STREAM.num_slots)


STREAM = PermutedImages(
    "digits", num_tasks=3, per_task=40, num_test=10, batch=5, memory=12, semantic=4, replay=10
)
GROUPS: dict[str, Any] = {"num_features": 8, "num_groups": 2}


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
    "texts": (lambda: TextRegularisation(9, 3), lambda: [texts()]),
    "continual": (continual, lambda: [STREAM.sample_at(0, 20)]),
    "architecture": (
        lambda: ArchitectureSearch(Supernet(channels=2, cells="NR", nodes=1, num_classes=3)),
        lambda: IMAGES[:1],
    ),
    "quadratics": (lambda: Quadratics(6, 6), lambda: [QuadraticData(6, 6, 16).sample(0)]),
    "sparse regression": (
        lambda: SparseRegression(**GROUPS),
        lambda: [SparseRegressionData(**GROUPS, coefficients=(1.0,), num_active=1).sample(0)],
    ),
    "sines": (lambda: LancBiOSynthetic(6), lambda: [LancBiOData(6, 10.0).sample(0)]),
    "sines, matrix free": (
        lambda: LancBiOMatrixFree(6),
        lambda: [LancBiOMatrixFreeData(6, 10.0).sample(0)],
    ),
    **{
        toy.__name__.lower(): (toy, lambda: [NoData().sample(0)])
        for toy in (Coreset, Degenerate, Lasso, MerelyConvex, Minimax, PBGDToy, PenaltyToy, Sine)
    },
    "amigo's toy": (lambda: AmigoToy(4, 4), lambda: [NoData().sample(0)]),
}

ELSEWHERE = {
    LanguageModelProblem: "tests/tasks/language/test_there.py: its tokens stay on the host",
    ProtoNet: "adapts nothing: it is FewShotProblem with a head that is computed",
    RidgeHead: "as ProtoNet",
    NearestCentroid: "as ProtoNet",
    LinearProbe: "as ProtoNet",
}
"""Problems that are not in the table, and why."""


def test_no_kind_of_problem_is_missing():
    exported = {getattr(metadist.tasks, name) for name in vars(metadist.tasks)["__all__"]}
    problems = {
        kind for kind in exported if hasattr(kind, "inner_loss") and not inspect.isabstract(kind)
    }
    assert {type(make()) for make, _ in KINDS.values()} | set(ELSEWHERE) == problems


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


def start_of(kind: str) -> tuple[Problem, Params, list[Task]]:
    """(the problem, x, tasks), all of float64 on the CPU."""
    torch.manual_seed(0)
    make_problem, make_tasks = KINDS[kind]
    problem = make_problem()
    start = {n: leaf.double() for n, leaf in problem.init_outer(generator(0)).items()}
    return problem, start, [to_device(task, "cpu", torch.float64) for task in make_tasks()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_gives_the_bytes_of_the_cpu(kind):
    problem, start, tasks = start_of(kind)
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
