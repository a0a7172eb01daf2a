"""Problems with outer parameters enough for several shards of a parameter server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from metadist.optimizer import OuterOptimizer
from metadist.outer import BLOCK, OuterState
from metadist.task import Batch, Task
from metadist.trees import Params
from metadist.workload import Workload
from tests.algorithms.directions import Directions, run_in_one_process
from tests.cluster.toy import Regression, make_workload

CLIPPED = OuterOptimizer("adam", lr=0.05, clip_norm=0.5, schedule="linear", schedule_steps=9)


@dataclass(frozen=True)
class Wide(Regression):
    """A regression with many parameters beside, each pulled somewhere else by each task."""

    num_idle: int = 2 * BLOCK + 500

    def init_inner(self, outer: Params, task: Task) -> Params:
        return outer

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        pull = torch.arange(self.num_idle, dtype=inner["idle"].dtype).cos() * batch.tensors[1][0]
        return (
            super().inner_loss(context, inner, batch) + 1e-3 * (inner["idle"] - pull).square().sum()
        )

    outer_loss = inner_loss


class WideDirections(Directions):
    """With further outer parameters, which move what the outer loss is compared with."""

    def init_outer(self, generator: torch.Generator) -> Params:
        idle = torch.ones(BLOCK + 300, dtype=torch.float64)
        return {**super().init_outer(generator), "idle": idle}

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return (
            super().outer_loss(context, inner, batch)
            + (context["idle"] * batch.tensors[1][0]).square().mean()
        )


def wide_directions(name: str, keep_state: bool) -> tuple[Workload, OuterState, OuterState]:
    """(leases of `NEW_TASKS[name]` on `WideDirections`, the first state, that after six steps)."""
    workload, first, local = run_in_one_process(name, keep_state, CLIPPED, problem=WideDirections())
    list(local.run(6))
    return workload, first, local.state()


def wide_workload(**options: Any) -> Workload:
    return make_workload(problem=Wide(), **options)


def pid_of(server: Any) -> int:
    pid: int = ray.get(server.__ray_call__.remote(lambda _: os.getpid()))
    return pid
