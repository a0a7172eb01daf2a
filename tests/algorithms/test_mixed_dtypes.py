"""x and y of different floating dtypes: every method, kept states, and the shipped problems."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist import Trainer
from metadist.algorithms import AID, ITD, MEHA, SOBA
from metadist.problem import Problem
from metadist.step_rules import Adam
from metadist.task import Batch, Task, to_device
from metadist.tasks import (
    ClassWeights,
    FixedTasks,
    HyperCleaning,
    LinearClassifier,
    LossWeighting,
    Sine,
    SparseRegression,
)
from metadist.trees import Params, flatten, tree_map
from tests.core.test_rematerialise import METHODS, hypergradient
from tests.problems import Smooth, generator, smooth_task, vector_task

SINGLE, DOUBLE = torch.float32, torch.float64


class Mixed(Smooth):
    """Its losses are computed in the wider of the dtypes of x and y."""

    def __init__(self, x: torch.dtype, y: torch.dtype) -> None:
        self.x, self.y = x, y

    def _wide(self, tree: Params) -> Params:
        return tree_map(lambda leaf: leaf.to(torch.promote_types(self.x, self.y)), tree)

    def init_outer(self, generator: torch.Generator) -> Params:
        return tree_map(lambda leaf: leaf.to(self.x), super().init_outer(generator))

    def init_inner(self, outer: Params, task: Task) -> Params:
        return tree_map(lambda leaf: leaf.to(self.y), super().init_inner(outer, task))

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return super().inner_loss(self._wide(context), self._wide(inner), batch.map(self._wide_one))

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return super().outer_loss(self._wide(context), self._wide(inner), batch.map(self._wide_one))

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return super().metrics(self._wide(context), self._wide(inner), batch.map(self._wide_one))

    def _wide_one(self, leaf: Tensor) -> Tensor:
        return self._wide({"": leaf})[""]


OTHERS = [(DOUBLE, SINGLE), (SINGLE, DOUBLE)]


@pytest.mark.parametrize(("x", "y"), OTHERS)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "metasgd"])
def test_every_method_gives_the_hypergradient_in_the_dtype_of_x(name, x, y):
    exact = hypergradient(Mixed(DOUBLE, DOUBLE), METHODS[name], smooth_task(0))
    found = hypergradient(Mixed(x, y), METHODS[name], to_device(smooth_task(0), "cpu", x))
    assert {leaf.dtype for leaf in found.values()} == {x}
    expected = flatten(exact)
    error = float((flatten(found).double() - expected).norm() / expected.norm())
    assert 1e-12 < error < 2e-5


@pytest.mark.parametrize(("x", "y"), OTHERS)
@pytest.mark.parametrize(
    "algorithm",
    [SOBA(inner_lr=0.05), AID(3, inner_optimizer=Adam(0.01)), ITD(3, 0.05, truncate=1)],
    ids=["soba", "aid", "itd"],
)
def test_kept_states_are_saved_and_resumed_to_the_same_bytes(algorithm, x, y, tmp_path):
    def trainer(run_dir: Any) -> Trainer:
        return Trainer(
            Mixed(x, y),
            FixedTasks([smooth_task(0)]),
            algorithm,
            run_dir=run_dir,
            keep_state=True,
            quiet=True,
        )

    once, first, again = trainer(tmp_path / "a"), trainer(tmp_path / "b"), trainer(tmp_path / "b")
    once.fit(4)
    first.fit(2)
    again.restore()
    again.fit(4)
    assert {leaf.dtype for leaf in once.inner(0).values()} == {y}
    for one, other in ((once.outer, again.outer), (once.inner(0), again.inner(0))):
        assert all(torch.equal(one[name], other[name]) for name in one)


def pictures(num_examples: int = 6) -> Task:
    def batch(seed: int) -> Batch:
        inputs = torch.rand(num_examples, 2, 2, generator=generator(seed), dtype=DOUBLE)
        return Batch.named(inputs=inputs, targets=torch.arange(num_examples) % 3)

    return Task(batch(1), batch(2), 0)


def vectors() -> Task:
    support, query, _ = vector_task(0, outputs=1)

    def flat(batch: Batch) -> Batch:
        return Batch.of(batch.tensors[0], batch.tensors[1][:, 0])

    return Task(flat(support), flat(query), 0)


SHIPPED: dict[str, tuple[Callable[[], Problem], Callable[[], Task]]] = {
    "hyper-cleaning": (lambda: HyperCleaning(6, model=LinearClassifier(4, 3)), pictures),
    "class weights": (lambda: ClassWeights(3, model=LinearClassifier(4, 3)), pictures),
    "loss weighting": (lambda: LossWeighting(4, model=LinearClassifier(4, 3)), pictures),
    "sparse regression": (lambda: SparseRegression(3, 1, terms=("ridge",)), vectors),
    "toy": (Sine, vectors),
}


@pytest.mark.parametrize(("x", "y"), [*OTHERS, (SINGLE, SINGLE), (DOUBLE, DOUBLE)])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_problems_follow_x_and_refuse_another_y_before_they_start(name, x, y):
    make, task_of = SHIPPED[name]
    problem, task = make(), task_of()
    init_outer, init_inner = problem.init_outer, problem.init_inner

    def outer_in_x(random: torch.Generator) -> Params:
        return tree_map(lambda leaf: leaf.to(x), init_outer(random))

    def inner_in_y(outer: Params, task: Task) -> Params:
        return tree_map(lambda leaf: leaf.to(y), init_inner(outer, task))

    start = init_inner(outer_in_x(generator(0)), task)
    assert {leaf.dtype for leaf in start.values()} == {x}
    vars(problem).update(init_outer=outer_in_x, init_inner=inner_in_y)
    # Toys do arithmetic alone, in which torch mixes dtypes; products of matrices it does not.
    refused = x != y and name != "toy"
    with pytest.raises(ValueError, match="dtype") if refused else nullcontext():
        trainer = Trainer(problem, FixedTasks([task]), MEHA(2, 0.01), quiet=True)
        trainer.fit(1)
        assert {leaf.dtype for leaf in trainer.outer.values()} == {x}
