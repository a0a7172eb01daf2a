"""Streams: tasks whose data changes from outer step to outer step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from metadist import LocalExecutor, OuterOptimizer, Trainer
from metadist.algorithms import AID, ITD, SABA, SOBA, VRBO
from metadist.compare import kept_metrics
from metadist.compute import Compute
from metadist.evaluation import evaluate
from metadist.outer import OuterVariable, differences
from metadist.problem import Problem
from metadist.sampler import num_steps_of, sample_task
from metadist.task import Batch, Task
from metadist.tasks import FixedTasks
from metadist.workload import Workload
from tests.cluster.data_parallel.shards import InProcess
from tests.problems import DOUBLE, Quadratic, assert_same_bytes, generator, quadratic_task

SGD = OuterOptimizer("sgd", lr=0.1)


@dataclass(frozen=True)
class Drifting:
    """Tasks of `Quadratic`, others at every outer step."""

    num_tasks: int = 1
    num_steps: int = 20

    def sample(self, index: int) -> Task:
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Task:
        if step >= self.num_steps:
            raise IndexError(step)
        return quadratic_task(1000 * step + index)._replace(id=index)


class Endless:
    """New tasks at every step, which drift as well."""

    def sample(self, index: int) -> Task:
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Task:
        return quadratic_task(1000 * step + index)._replace(id=index)


@dataclass(frozen=True)
class At:
    """`Endless` at one step, as if it were no stream."""

    step: int

    def sample(self, index: int) -> Task:
        return Endless().sample_at(index, self.step)


@dataclass
class Mutable:
    """The same data as of `Drifting`, by a sampler that goes on at every call."""

    num_tasks: int = 1
    calls: int = 0

    def sample(self, index: int) -> Task:
        self.calls += 1
        return quadratic_task(1000 * (self.calls - 1) + index)._replace(id=index)


def trained(sampler: Any, num_steps: int = 6, algorithm: Any = None, **options: Any) -> Trainer:
    algorithm = algorithm or AID(inner_steps=2, inner_lr=0.2, warm_start=True, solver="fixed_point")
    trainer = Trainer(
        Quadratic(2, 4), sampler, algorithm, outer_optimizer=SGD, quiet=True, **options
    )
    trainer.fit(num_steps)
    return trainer


def test_a_kept_state_goes_on_while_the_data_of_its_task_changes():
    stream = trained(Drifting())
    executor = LocalExecutor()
    first = OuterVariable(Quadratic(2, 4).init_outer(generator(0)), SGD).state()
    stream_work = replace(stream.workload, compute=Compute(seed=0))
    executor.start(replace(stream_work, sampler=Mutable()), SGD, first)
    list(executor.run(6))
    found = executor.state()
    executor.start(stream_work, SGD, first)
    list(executor.run(6))
    assert differences(executor.state(), found) == []
    fixed = trained(FixedTasks([quadratic_task(0)]))
    assert not torch.equal(stream.outer["x"], fixed.outer["x"])


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
def test_graphs_and_batches_that_are_kept_are_of_the_step(engine, batch_size):
    algorithm = ITD(inner_steps=3, inner_lr=0.2, engine=engine)
    trainer = trained(Drifting(), 4, algorithm, batch_size=batch_size)
    work = trainer.workload
    outer = work.problem.init_outer(generator(0))
    alone = [work.compute_lease(work.lease(n, n), outer).total for n in (3, 1, 2, 3)]
    assert torch.equal(alone[0], alone[3])
    assert len({tuple(total.tolist()) for total in alone}) == 3


@pytest.mark.parametrize("sampler", [Drifting(num_tasks=4), Endless()])
@pytest.mark.parametrize("tasks_per_lease", [1, 4])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(tmp_path, sampler, tasks_per_lease):
    options: dict[str, Any] = {"meta_batch_size": 4, "tasks_per_lease": tasks_per_lease}
    if isinstance(sampler, Endless):
        options["algorithm"] = ITD(inner_steps=2)
    whole = trained(sampler, 6, **options)
    trained(sampler, 3, run_dir=tmp_path, **options)
    again = Trainer(
        Quadratic(2, 4),
        sampler,
        outer_optimizer=SGD,
        quiet=True,
        run_dir=tmp_path,
        **{"algorithm": whole.algorithm, **options},
    )
    again.restore()
    again.fit(6)
    assert_same_bytes(again.outer, whole.outer)
    other = trained(sampler, 6, **{**options, "tasks_per_lease": 2})
    assert torch.allclose(other.outer["x"], whole.outer["x"], rtol=1e-12)


def test_a_lease_has_the_data_of_the_version_of_x_it_is_computed_at():
    work = Workload(Quadratic(2, 4), Endless(), ITD(inner_steps=2), meta_batch_size=2)
    outer = work.problem.init_outer(generator(0))
    there = replace(work, sampler=At(5)).compute_lease(work.lease(7, 5), outer)
    assert torch.equal(work.compute_lease(work.lease(7, 5), outer).total, there.total)
    again = work.compute_lease(work.lease(7, 6), outer)  # handed out again after a loss
    assert not torch.equal(again.total, there.total)


def test_a_run_past_the_end_of_a_stream_is_refused(tmp_path):
    trainer = trained(Drifting(num_steps=5), 5, run_dir=tmp_path)
    message = r"num_steps must be <= 5, the num_steps of Drifting, got 6: the stream has no data"
    with pytest.raises(ValueError, match=message):
        trainer.fit(6)
    assert trainer.version == 5 and not trainer.has_started
    with pytest.raises(ValueError, match=r"num_steps must be <= 3, the num_steps of Drifting"):
        trained(FixedTasks([quadratic_task(0)]), 4, val_sampler=Drifting(2, num_steps=3))
    with pytest.raises(ValueError, match=r"step \+ 1 must be <= 3, the num_steps of Drifting"):
        evaluate(
            Quadratic(2, 4), Drifting(2, num_steps=3), trainer.algorithm, trainer.outer, 2, step=3
        )


class Method(Drifting):
    def num_steps(self) -> int:  # type: ignore[override]
        return 3


@pytest.mark.parametrize(
    ("sampler", "got"), [(Method(), "got a method"), (Drifting(num_steps=0), "got 0")]
)
def test_a_number_of_steps_that_is_none_is_refused(sampler, got):
    if isinstance(sampler, Method):
        sampler = object.__new__(Method)
        object.__setattr__(sampler, "num_tasks", 1)
    with pytest.raises(ValueError, match=f"num_steps of .* must be .*{got}"):
        num_steps_of(sampler)


def test_validation_and_metrics_have_the_step_that_was_taken_last():
    trainer = trained(Drifting(num_tasks=2), 4, val_sampler=Drifting(3))
    assert trainer.last_step == 3
    found = trainer.test(Drifting(3), 3)
    there = FixedTasks([sample_task(Drifting(3), index, 3) for index in range(3)])
    expected = evaluate(Quadratic(2, 4), there, trainer.algorithm, trainer.outer, 3)
    assert found.metrics == expected.metrics
    assert found.protocol["step"] == "3" and "step" not in expected.protocol
    losses = [
        Quadratic(2, 4).outer_loss(
            trainer.outer, trainer.inner(index), sample_task(Drifting(2), index, 3).query
        )
        for index in range(2)
    ]
    assert kept_metrics(trainer)["query_loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-12)


@pytest.mark.parametrize("algorithm", [SABA(), VRBO()])
def test_tables_over_sets_that_change_are_refused(algorithm):
    with pytest.raises(ValueError, match="must not go through whole sets in parts"):
        trained(Drifting(), algorithm=algorithm)


def test_workers_that_keep_their_part_of_the_data_refuse_a_stream():
    with pytest.raises(ValueError, match="sampler must have no sample_at with DataParallelExec"):
        trained(Drifting(), algorithm=SOBA(), executor=InProcess(2))


class Weighted(Problem):
    """A weight for each of three examples."""

    def init_outer(self, generator: torch.Generator) -> Any:
        return {"w": torch.zeros(3, dtype=DOUBLE)}

    def init_inner(self, outer: Any, task: Task) -> Any:
        return {"y": torch.zeros((), dtype=DOUBLE)}

    def per_example(self, outer: Any) -> set[str]:
        return {"w"}

    def inner_loss(self, context: Any, inner: Any, batch: Batch) -> torch.Tensor:
        weights = context["w"][batch.index].sigmoid()
        return (weights * (inner["y"] - batch.tensors[0]).square()).mean()

    def outer_loss(self, context: Any, inner: Any, batch: Batch) -> torch.Tensor:
        return (inner["y"] - batch.tensors[0]).square().mean()


class Shrinking:
    """Three examples at the first step, and two from then on."""

    num_tasks = 1

    def sample(self, index: int) -> Task:
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Task:
        examples = torch.arange(3.0 if step == 0 else 2.0, dtype=DOUBLE)
        return Task(Batch.of(examples), Batch.of(examples + 0.5), index)


def test_weights_of_examples_must_fit_the_data_of_every_step():
    trainer = Trainer(
        Weighted(),
        Shrinking(),
        ITD(inner_steps=1, inner_lr=0.1),
        executor=LocalExecutor(max_user_errors=0),
        quiet=True,
    )
    with pytest.raises(ValueError, match="must have a row for each of 2 support examples"):
        trainer.fit(3)
    assert trainer.version == 1
