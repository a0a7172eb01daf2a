"""On a GPU: right, and the same bytes again. `pytest -m gpu`; skipped where torch sees none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from metadist import LocalExecutor, OuterOptimizer, Trainer, evaluate, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BOME, ITD, SOBA, LancBiO
from metadist.compute import Compute
from metadist.feed import Feed, Wanted
from metadist.memory import DeviceMemoryError
from metadist.models import MLP, Conv4, rematerialise
from metadist.sampler import TaskSampler, sample_task
from metadist.task import tensors_of, to_device
from metadist.tasks import CorruptedImages, FewShotProblem, Glyphs, Sinusoid
from metadist.trees import Params, flatten
from tests.algorithms.test_there import KINDS, METHODS, start_of
from tests.core.test_graphs import GRAPHS, assert_same, of_name, run
from tests.helpers import exact_regression
from tests.pretend_device import last_of_two
from tests.problems import generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

CASES: dict[str, tuple[Any, Algorithm]] = {
    "maml": ("all", ITD(inner_steps=2, inner_lr=0.01)),
    "anil": ("head", ITD(inner_steps=5, inner_lr=0.1)),
    "anil, unrolled": ("head", ITD(inner_steps=5, inner_lr=0.1, engine="unrolled")),
    "aid": ("head", AID(inner_steps=5, inner_lr=0.1, adjoint_steps=5)),
    "lancbio": ("head", LancBiO(inner_steps=3, inner_lr=0.1)),
    "soba": ("head", SOBA(inner_lr=0.1, adjoint_lr=0.1)),
    "bome": ("head", BOME(inner_steps=5, inner_lr=0.1)),
}


def hypergradient(
    name: str, device: str, dtype: torch.dtype, vectorize: bool, **options: Any
) -> torch.Tensor:
    """Flat and on the CPU, of three tasks."""
    torch.manual_seed(0)
    adapt, algorithm = CASES[name]
    problem = FewShotProblem(Conv4(width=16, image_size=28).to(dtype), adapt=adapt)
    outer = {n: leaf.to(device) for n, leaf in problem.init_outer(torch.Generator()).items()}
    sampler = Glyphs(n_way=5, k_shot=2, k_query=3)
    tasks = [to_device(sampler.sample(index), device, dtype) for index in range(3)]
    found = task_hypergradients(
        *(problem, algorithm, outer, tasks),
        compute=Compute(vectorize=vectorize, **options),
        states={} if name in ("lancbio", "soba") else None,
        is_checked=True,
    )
    assert not found.dropped
    return flatten(found.total).cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_hypergradients_are_those_of_the_cpu(name, vectorize):
    expected = hypergradient(name, "cpu", torch.float64, False)
    assert distance(hypergradient(name, "cuda", torch.float64, vectorize), expected) < 1e-8


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_single_precision_is_that_of_float32_whatever_torch_is_set_to(name, monkeypatch):
    expected = hypergradient(name, "cpu", torch.float64, False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    full = distance(hypergradient(name, "cuda", torch.float32, False), expected)
    rounded = distance(
        hypergradient(name, "cuda", torch.float32, False, precision="tf32"), expected
    )
    assert full < 1e-3
    assert full <= rounded


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_the_same_again(name, vectorize):
    first = hypergradient(name, "cuda", torch.float32, vectorize)
    blocker = torch.empty(1 << 20, device="cuda")  # so that other addresses are used
    again = hypergradient(name, "cuda", torch.float32, vectorize)
    del blocker
    assert torch.equal(first, again)


def digest(name: str) -> str:
    return hashlib.sha256(
        hypergradient(name, "cuda", torch.float32, False).numpy().tobytes()
    ).hexdigest()


@pytest.mark.parametrize("name", ["maml", "lancbio"])
def test_the_bytes_are_the_same_in_another_process(name):
    code = f"from tests.gpu.test_card import digest; print(digest({name!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == digest(name)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_have_the_bytes_of_the_plain_computation(name, vectorize):
    algorithm = of_name(name)
    problem, outer, tasks = exact_regression(algorithm, num_tasks=12, device="cuda")
    for keeps in (False, True) if algorithm.trains != "start" else (False,):
        options: dict[str, Any] = {"keeps": keeps, "together": 2, "vectorize": vectorize}
        plain = run(problem, algorithm, outer, tasks, False, **options, batch_size=6)
        found = run(problem, algorithm, outer, tasks, True, **options, batch_size=6)
        assert_same(found, plain)
        # SABA has a graph for each choice of parts.
        assert found.replayed >= 2 or name == "saba"


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name != "lancbio"])
def test_graphs_of_networks_have_the_bytes_of_the_plain_computation(name, vectorize):
    torch.manual_seed(0)
    adapt, algorithm = CASES[name]
    problem = FewShotProblem(Conv4(width=16, image_size=28), adapt=adapt)
    sampler = Glyphs(n_way=5, k_shot=2, k_query=3)
    tasks = [to_device(sampler.sample(index), "cuda", torch.float32) for index in range(8)]
    outer = {n: leaf.cuda() for n, leaf in problem.init_outer(torch.Generator()).items()}
    options: dict[str, Any] = {"together": 2, "vectorize": vectorize, "keeps": name == "soba"}
    plain = run(problem, algorithm, outer, tasks, False, **options)
    found = run(problem, algorithm, outer, tasks, True, **options)
    assert_same(found, plain)
    assert found.replayed >= 2


def test_what_waits_for_the_card_is_computed_without_a_graph():
    class Reading(FewShotProblem):
        """Looks at a number of its own loss."""

        def inner_loss(self, context: Params, inner: Params, batch: Any) -> torch.Tensor:
            loss = super().inner_loss(context, inner, batch)
            return loss if bool(loss.detach() < 1e9) else 2 * loss

    problem = Reading(MLP(1, 1, (4,)), adapt="all", loss="mse")
    algorithm, sampler = ITD(inner_steps=2, inner_lr=0.01), Sinusoid(k_shot=4, k_query=4)
    tasks = [to_device(sampler.sample(index), "cuda", torch.float32) for index in range(4)]
    outer = {n: leaf.cuda() for n, leaf in problem.init_outer(generator(0)).items()}
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        found = run(problem, algorithm, outer, tasks, "auto")
    assert_same(found, run(problem, algorithm, outer, tasks, False))


def trained(device: str) -> tuple[Params, Any]:
    torch.manual_seed(0)
    problem = FewShotProblem(Conv4(width=8), adapt="head")
    sampler = Glyphs(n_way=5, k_shot=1, k_query=3)
    trainer = Trainer(
        problem,
        sampler,
        ITD(inner_steps=3, inner_lr=0.1),
        outer_optimizer=OuterOptimizer("adam", lr=1e-3),
        meta_batch_size=4,
        executor=LocalExecutor(),
        compute=Compute(device=device),
        quiet=True,
    )
    trainer.fit(5)
    return trainer.outer, evaluate(problem, sampler, trainer.algorithm, trainer.outer, 8)


def test_a_training_has_the_same_bytes_twice_and_is_near_that_of_the_cpu():
    (first, judged), (again, judged_again) = trained("cuda"), trained("cuda")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert judged.metrics == judged_again.metrics
    on_cpu, _ = trained("cpu")
    moved = flatten({name: leaf.cpu() for name, leaf in first.items()})
    assert distance(moved, flatten(on_cpu).double()) < 1e-2


def test_memory_that_runs_out_says_what_to_lower():
    sampler = Glyphs(n_way=5, k_shot=1, k_query=3)
    trainer = Trainer(
        FewShotProblem(Conv4(width=8), adapt="head"),
        sampler,
        ITD(inner_steps=3, inner_lr=0.1),
        meta_batch_size=4,
        compute=Compute(device="cuda"),
        quiet=True,
    )
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(DeviceMemoryError, match="tasks_per_lease or meta_batch_size"):
            trainer.fit(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("autocasts", [False, True])
def test_rematerialised_blocks_have_the_products_of_plain_ones(autocasts):
    def products(change):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)]
        model = change(nn.Sequential(*layers)).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocasts):
            outputs = model(torch.ones(8, 32, device="cuda"))
        weights = list(model.parameters())
        slopes = torch.autograd.grad(outputs.float().sin().sum(), weights, create_graph=True)
        return torch.autograd.grad(
            torch.stack([slope.sin().sum() for slope in slopes]).sum(), weights
        )

    for plain, again in zip(products(lambda model: model), products(rematerialise), strict=True):
        assert distance(again.flatten(), plain.flatten().double()) < (5e-2 if autocasts else 1e-5)


def test_features_in_bfloat16_keep_the_direction():
    expected = hypergradient("anil", "cpu", torch.float64, False)
    for vectorize in (False, True):
        found = hypergradient("anil", "cuda", torch.float32, vectorize, encode_precision="bf16")
        assert torch.cosine_similarity(found.double(), expected, dim=0) > 0.99


SAMPLERS: dict[str, Callable[[], TaskSampler]] = {
    "cut from tables": lambda: Glyphs(n_way=5, k_shot=2, k_query=3, augment=False),
    "packed": lambda: Glyphs(n_way=5, k_shot=2, k_query=3),
    "sent once": lambda: CorruptedImages("digits", num_train=80, num_val=60, num_test=10),
}


@pytest.mark.parametrize("how", SAMPLERS)
def test_tasks_come_to_the_card_with_the_bytes_of_sample(how):
    sampler = SAMPLERS[how]()
    feed = Feed(sampler, torch.device("cuda"), torch.float32, 10**9)
    for lease in (Wanted((0, 1, 2), 0), Wanted((3, 4, 5), 0)):
        feed.next = Wanted((3, 4, 5), 0)
        for index, task in zip(lease.indices, feed.tasks(lease), strict=True):
            expected = sample_task(sampler, index)
            for there, here in zip(tensors_of(task), tensors_of(expected), strict=True):
                assert there.is_cuda and torch.equal(there.cpu(), here)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_on_every_problem_is_that_of_the_cpu(kind):
    problem, outer, tasks = start_of(kind)
    ran = 0
    for name, algorithm in METHODS.items():
        for vectorize in (False, True) if len(tasks) > 1 else (False,):
            for batch_size in (None, 4):
                compute = Compute(
                    vectorize=vectorize and algorithm.supports_vmap,
                    batch_size=batch_size,
                    cuda_graphs=False,
                )
                try:
                    algorithm.check(problem, outer, tasks[0], tasks[0])
                    own = outer | algorithm.init_own(problem.init_inner(outer, tasks[0]))
                    expected = last_of_two(problem, algorithm, own, tasks, compute)
                except (ValueError, RuntimeError):
                    continue  # refused, and so it would be on any device
                there = [to_device(task, "cuda", torch.float64) for task in tasks]
                x = {leaf_name: leaf.cuda() for leaf_name, leaf in own.items()}
                found = last_of_two(problem, algorithm, x, there, compute)
                assert found.dropped == expected.dropped, name
                total = flatten(found.total).cpu()
                assert distance(total, flatten(expected.total)) < 1e-8, (name, vectorize)
                ran += 1
    assert ran >= len(METHODS) // 4
