"""A run as commands use it: its objects, and the outer variable of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jsonargparse import Namespace
from torch import Tensor, nn

from metadist.algorithm import Algorithm
from metadist.checks.preflight import initial_outer
from metadist.cli import train
from metadist.cli.workload import instantiate
from metadist.compute import Compute
from metadist.executor import Executor
from metadist.inference import export, kept_state, predict
from metadist.problem import Problem
from metadist.run.checkpoint import CheckpointStore, check_same_model
from metadist.run.files import CHECKPOINTS
from metadist.run.storage import Folder
from metadist.sampler import TaskSampler, last_step
from metadist.task import Batch, Task
from metadist.trees import Params
from metadist.workload import Workload


@dataclass(frozen=True)
class Trained:
    """What a run has learned.

    Args:
        problem, sampler, algorithm, executor: The objects that its config names.
        compute: On the device that was asked for.
        inner_steps: Steps of adaptation; None: as in training.
        checkpoint: The name of the checkpoint.
        version: Its outer step.
        outer: The outer variable, the algorithm's own variables included.
        states: The states that training keeps of its tasks, by index.
    """

    problem: Problem
    sampler: TaskSampler
    algorithm: Algorithm
    executor: Executor
    compute: Compute
    inner_steps: int | None
    checkpoint: str
    version: int
    outer: Params
    states: Mapping[int, Tensor]

    @property
    def last_step(self) -> int:
        """See `metadist.sampler.last_step`."""
        return last_step(self.version)

    def predict(self, task: Task | Batch, inputs: Tensor | None = None) -> Tensor:
        """As `metadist.predict`."""
        tensor: Tensor = self._use(partial(predict, inputs=inputs), task)
        return tensor

    def export(self, task: Task | Batch) -> nn.Module:
        """As `metadist.export`."""
        module: nn.Module = self._use(export, task)
        return module

    def _use(self, use: Any, task: Task | Batch) -> Any:
        return use(
            self.problem,
            self.algorithm,
            self.outer,
            task,
            inner_steps=self.inner_steps,
            state=kept_state(self.states, self.sampler, task, self.last_step),
            compute=self.compute,
        )


def load(saved: Namespace, config: Namespace) -> Trained:
    """The run of the options `saved`, as those of the command say: checkpoint, device, inner_steps.

    Raises:
        ValueError: The checkpoint is not of this run's model.
    """
    objects = instantiate(saved, train.parser())
    original = train.saved_config(config.run_dir)

    def sampler() -> TaskSampler:
        if original.sampler == saved.sampler:
            return objects.sampler
        return instantiate(original, train.parser(), "sampler").sampler

    train.require_rebuilt(config.run_dir, objects.problem, sampler)
    store = CheckpointStore((Folder(config.run_dir) / CHECKPOINTS).uri)
    name, checkpoint = store.load(config.checkpoint)
    train.report_skipped(store.skipped)
    compute = objects.compute.given(batch_size=saved.batch_size, seed=saved.seed)
    workload = Workload(objects.problem, objects.sampler, objects.algorithm, compute=compute)
    check_same_model(checkpoint.state.outer, initial_outer(workload), f"{store.uri}/{name}")
    return Trained(
        problem=objects.problem,
        sampler=objects.sampler,
        algorithm=objects.algorithm,
        executor=objects.executor,
        compute=replace(compute, device=config.device),
        inner_steps=saved.eval_inner_steps if config.inner_steps is None else config.inner_steps,
        checkpoint=name,
        version=checkpoint.state.version,
        outer=checkpoint.state.outer,
        states=checkpoint.state.states,
    )
