"""A small few-shot problem that all algorithms can train: regression along a shared direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from metadist import OuterOptimizer, Trainer
from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS, BOME, MEHA, VPBGD, Reptile
from metadist.compute import Compute
from metadist.executor import LocalExecutor
from metadist.outer import OuterState, OuterVariable
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, flatten
from metadist.workload import Workload
from tests.problems import DOUBLE, assert_same_bytes, generator

DIRECTION = torch.tensor([0.6, -0.8, 0.3], dtype=DOUBLE)


class Directions(Problem):
    """Predict  slope * <w, input> + offset: w is shared, slope and offset are the task's own.

    With `learns_start` it is the start of slope and offset that is shared, and w is given.
    """

    def __init__(self, learns_start: bool = False) -> None:
        self.learns_start = learns_start

    def init_outer(self, generator: torch.Generator) -> Params:
        if self.learns_start:
            return {"start": torch.zeros(2, dtype=DOUBLE)}
        return {"w": torch.tensor([0.3, 0.2, 0.3], dtype=DOUBLE)}

    def encode(self, outer: Params, task: Task) -> Params:
        return {} if self.learns_start else outer

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["start"] if self.learns_start else torch.ones(2, dtype=DOUBLE)}

    def _loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        slope, offset = inner["y"]
        predicted = slope * (inputs @ context.get("w", DIRECTION)) + offset
        return (predicted - targets).square().mean()

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._loss(context, inner, batch) + 0.05 * inner["y"].square().sum()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._loss(context, inner, batch)


class DirectionSampler:
    """Slopes from 1 to 2, offsets from 1 to 1.5, noise of 0.05; 10 examples in each set."""

    def sample(self, index: int) -> Task:
        random = generator(index, 5)
        slope, offset = torch.rand(2, generator=random, dtype=DOUBLE)

        def batch() -> Batch:
            inputs = torch.randn(10, 3, generator=random, dtype=DOUBLE)
            noise = 0.05 * torch.randn(10, generator=random, dtype=DOUBLE)
            return Batch.of(inputs, (1 + slope) * (inputs @ DIRECTION) + 1 + offset / 2 + noise)

        return Task(batch(), batch(), index)


NEW_TASKS: dict[str, Algorithm] = {
    **{name: cast(Any, cls)(inner_steps=5, inner_lr=0.2) for name, cls in ALGORITHMS.items()},
    # One move of y says little on a new task.
    "meha": MEHA(inner_steps=10, inner_lr=0.2, c=10.0),
    "bome": BOME(inner_steps=5, inner_lr=0.2, rounds=5, y_lr=0.2),
    "vpbgd": VPBGD(inner_steps=5, inner_lr=0.2, rounds=5, y_lr=0.2),
}
"""Algorithms as they are used where every task is new."""

MODES = [
    pytest.param(name, keep_state, id=f"{name}-{'kept' if keep_state else 'new'}")
    for name, algorithm in NEW_TASKS.items()
    for keep_state in (False, True)
    # What trains where adaptation starts has nothing to keep.
    if not (keep_state and algorithm.trains == "start")
]
"""Every algorithm on new tasks, and on tasks whose state is kept."""

with_what_a_step_leaves = pytest.mark.parametrize(
    ("name", "keep_state"), [("soba", True), ("mrbo", False)], ids=["kept state", "two points"]
)
"""Both kinds of what a step leaves for the next."""


def trainer(algorithm: Algorithm, keep_state: bool = False, **options: object) -> Trainer:
    """A training of `Directions` by it, on two tasks at a step."""
    return Trainer(
        Directions(learns_start=isinstance(algorithm, Reptile)),
        DirectionSampler(),
        algorithm,
        **{  # type: ignore[arg-type]
            "outer_optimizer": OuterOptimizer("adam", lr=0.05),
            "meta_batch_size": 2,
            "tasks_per_lease": 1,
            "keep_state": keep_state,
            "batch_size": 6,
            "compute": Compute(vectorize=False, device="cpu"),
            "quiet": True,
            "seed": 3,
            **options,
        },
    )


def assert_resumes(algorithm: Algorithm, keep_state: bool, folder: Path, **resumed: object) -> None:
    """A training that is stopped in the middle ends with the bytes of one in one go."""
    whole = trainer(algorithm, keep_state)
    whole.fit(5)
    trainer(algorithm, keep_state, run_dir=folder).fit(3)
    again = trainer(algorithm, keep_state, run_dir=folder, **resumed)
    again.restore()
    again.fit(5)
    assert_same_bytes(again.outer, whole.outer)
    assert bool(flatten(whole.outer).isfinite().all())
    if keep_state:
        for index in range(2):
            assert_same_bytes(again.inner(index), whole.inner(index))


def run_in_one_process(
    name: str,
    keep_state: bool,
    optimizer: OuterOptimizer,
    meta_batch_size: int = 2,
    problem: Directions | None = None,
) -> tuple[Workload, OuterState, LocalExecutor]:
    """(leases of `NEW_TASKS[name]`, the first state, an executor in this process started on it)."""
    workload = Workload(
        problem or Directions(),
        DirectionSampler(),
        NEW_TASKS[name],
        meta_batch_size=meta_batch_size,
        keep_state=keep_state,
        compute=Compute(batch_size=6, vectorize=False, device="cpu"),
    )
    outer = workload.problem.init_outer(torch.Generator())
    first = OuterVariable(outer, optimizer, workload.stepping_rules()).state()
    local = LocalExecutor()
    local.start(workload, optimizer, first)
    return workload, first, local
