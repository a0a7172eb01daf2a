"""`Trainer`: from a problem, a sampler and an algorithm to a trained outer variable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metadist import __version__
from metadist.algorithm import Algorithm, split_own
from metadist.callbacks import Callback, EvaluationReport, call_on_evaluation, call_on_step
from metadist.checks.losses import learns_start
from metadist.checks.preflight import check_trainable, checked
from metadist.checks.sampler import check_sampler
from metadist.checks.values import check, require_number
from metadist.compute import DEFAULT, Compute
from metadist.evaluation import EvaluationResult, describe_sampler, evaluate, with_inner_steps
from metadist.executor import Executor, LocalExecutor, StepReport
from metadist.flat_states import split_carried
from metadist.inference import adapt, export, kept_state, predict
from metadist.loggers.base import LoggedRun, Logger
from metadist.loggers.tensor_board import TensorBoardLogger
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterVariable, check_state
from metadist.pictures import Gallery, WeighsExamples, example_weights, log_adaptation
from metadist.problem import Problem, has_artifacts, has_few_shot_classes, start_carried
from metadist.run.background import Background
from metadist.run.banner import banner
from metadist.run.checkpoint import Checkpoint, CheckpointError, check_same_model, name_of
from metadist.run.events import EventLog
from metadist.run.fitting import Fitting, TrainingDiverged
from metadist.run.monitor import Monitor
from metadist.run.processes import software
from metadist.run.progress import TerminalProgress
from metadist.run.rebuild import config_of
from metadist.run.run_folder import RunFolder
from metadist.run.settings import as_text, difference, recorded
from metadist.sampler import TaskSampler, last_step, require_steps, sample_task
from metadist.signals import OneStop
from metadist.task import Batch, Task, to_device
from metadist.trees import Params
from metadist.workload import Workload, default_tasks_per_lease, largest_divisor, tasks_of_steps

log = logging.getLogger("metadist.trainer")


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `Trainer.fit` ended.

    Args:
        num_steps: Outer steps taken in all.
        num_tasks: Tasks whose hypergradient went into these steps, in this call.
        num_dropped: Tasks left out in this call because it was not finite.
        seconds: How long this call took.
        best: The name of the checkpoint with the best validation; None without a run folder.
        calls: What the algorithm asked of the oracle in this call, see `CountingOracle`.
    """

    num_steps: int
    num_tasks: int
    num_dropped: int
    seconds: float
    best: str | None
    calls: dict[str, int]


class Trainer:
    """Meta-training: outer steps on tasks of a sampler, by any executor.

        trainer = Trainer(problem, sampler, ITD(inner_steps=5, inner_lr=0.4))
        trainer.fit(1000)
        evaluate(problem, test_sampler, trainer.algorithm, trainer.outer)

    Args:
        problem, sampler, algorithm: What is trained, on which tasks, by which method.
        outer_optimizer: How the outer variable is stepped; None: Adam with its defaults.
        meta_batch_size: Tasks per (synchronous) outer step; None: all tasks of a sampler that says
            `num_tasks`, 16 of any other.
        tasks_per_lease: Tasks that travel together, see `Workload`; None: as in the checkpoint of
            a resumed run; otherwise a quarter of a meta-batch (the largest divisor below that), and
            in one process as many as go through vmap together if these are more. On GPUs the
            largest that leaves each worker a lease.
        keep_state: True: every outer step has the same tasks and continues from what the algorithm
            keeps of each, see `Workload`; False: every task is new; None: True with a sampler that
            says `num_tasks`, else False; and False where the start of adaptation is learned (MAML),
            which a kept state would not train.
        batch_size, seed: Short for `Compute(batch_size=..., seed=...)`.
        compute: How leases are computed, and on which device.
        executor: What computes leases, and validation and test if it has workers for them; None:
            this process.
        run_dir: The folder for checkpoints, events and results, a path or any fsspec URI; None:
            nothing is kept.
        val_sampler: The tasks of validation; the best checkpoint is the best on them.
        val_every: Outer steps between validations; None: only one at the end of `fit`.
        val_tasks: Tasks per validation.
        eval_inner_steps: Inner steps in validation and test; None: as in training.
        checkpoint_every: Outer steps between checkpoints; the first is of the start. None: no
            checkpoints by steps.
        checkpoint_every_s: Seconds between checkpoints, beside those by steps; None: none by time.
        checkpoint_async: Whether training continues while a checkpoint is written, from a copy in
            memory; the next one waits for it, and so does the end of `fit`. A failure ends the run
            at the next outer step. False: training waits for each.
        keep_checkpoints: How many of the newest checkpoints stay, beside the best.
        keep_every: Checkpoints at multiples of so many outer steps stay for good; None: none.
        log_every: Outer steps between reports of losses and metrics.
        loggers: Where losses and metrics go beside TensorBoard's events in `run_dir`, see
            `metadist.loggers`.
        callbacks: Your own code that is called after outer steps and evaluations, see
            `metadist.Callback`.
        max_dropped: Tasks dropped in a row that end the run.
        quiet: Show no progress.
        allow_equal_examples: See `check_sampler`.
        config: Text that is kept as config.yaml in `run_dir`.

    Raises:
        ValueError: Anything that could not be trained, before any work starts.
    """

    def __init__(
        self,
        problem: Problem,
        sampler: TaskSampler,
        algorithm: Algorithm,
        *,
        outer_optimizer: OuterOptimizer | None = None,
        meta_batch_size: int | None = None,
        tasks_per_lease: int | None = None,
        keep_state: bool | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        compute: Compute = DEFAULT,
        executor: Executor | None = None,
        run_dir: str | Path | None = None,
        val_sampler: TaskSampler | None = None,
        val_every: int | None = None,
        val_tasks: int = 100,
        eval_inner_steps: int | None = None,
        checkpoint_every: int | None = 100,
        checkpoint_every_s: float | None = None,
        checkpoint_async: bool = True,
        keep_checkpoints: int = 3,
        keep_every: int | None = None,
        log_every: int = 10,
        loggers: Sequence[Logger] = (),
        callbacks: Sequence[Callback] = (),
        max_dropped: int = 64,
        quiet: bool = False,
        allow_equal_examples: bool = False,
        config: str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        check_trainable(problem, algorithm)
        compute = compute.given(batch_size=batch_size, seed=seed)
        checkpoint_every = check(
            "checkpoint_every", checkpoint_every, is_integer=True, ge=1, none=""
        )
        checkpoint_every_s = check("checkpoint_every_s", checkpoint_every_s, gt=0, none="")
        keep_every = check("keep_every", keep_every, is_integer=True, ge=1, none="")
        keep_checkpoints = check("keep_checkpoints", keep_checkpoints, is_integer=True, ge=1)
        log_every = check("log_every", log_every, is_integer=True, ge=1)
        max_dropped = check("max_dropped", max_dropped, is_integer=True, ge=1)
        val_every = check("val_every", val_every, is_integer=True, ge=1, none="")
        val_tasks = check("val_tasks", val_tasks, is_integer=True, ge=2)
        if val_every is not None and val_sampler is None:
            raise ValueError(f"val_every must be None without a val_sampler, got {val_every}")
        if eval_inner_steps is not None:
            require_number(eval_inner_steps=eval_inner_steps)
            with_inner_steps(algorithm, eval_inner_steps)
        _check_observers(loggers, callbacks, run_dir)
        self._executor = executor or LocalExecutor()
        self._probe = self._executor.probe(sampler)
        self.problem = problem
        self.algorithm = algorithm
        self.sampler = sampler
        is_one_task = self._check_samplers(val_sampler, allow_equal_examples)
        meta_batch_size, keep_state = tasks_of_steps(
            sampler,
            algorithm,
            meta_batch_size,
            keep_state,
            learns_start=self._executor.call(learns_start, problem, self._probe, compute.seed),
            is_one_task=is_one_task,
        )
        self._optimizer = outer_optimizer or OuterOptimizer()
        self._workload = Workload(
            problem,
            sampler,
            algorithm,
            meta_batch_size=meta_batch_size,
            tasks_per_lease=1 if tasks_per_lease is None else tasks_per_lease,
            keep_state=keep_state,
            report_every=log_every,
            compute=compute,
        )
        self._val_sampler = val_sampler
        self._val_every = val_every
        self._val_tasks = val_tasks
        self._eval_inner_steps = eval_inner_steps
        self._checkpoint_every = [every for every in (checkpoint_every, keep_every) if every]
        self._checkpoint_every_s = math.inf if checkpoint_every_s is None else checkpoint_every_s
        self._checkpoint_async = checkpoint_async
        self._log_every = log_every
        has_tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in loggers)
        self._loggers = [*loggers] if has_tensorboard else [TensorBoardLogger(), *loggers]
        self._callbacks = [*callbacks]
        self._monitor: Monitor | None = None
        self._gallery = Gallery()
        self._max_dropped = max_dropped
        self._quiet = quiet
        self._given = given
        self._folder: RunFolder | None = None
        if run_dir is not None:
            self._folder = RunFolder(run_dir, self._loggers, config, keep_checkpoints, keep_every)
        self._events = EventLog(None) if self._folder is None else self._folder.events
        probed = replace(self._workload, sampler=self._probe)
        is_whole = self._probe is sampler
        outer, compute, chunk = self._executor.call(checked, probed, is_whole, val_sampler)
        self._cuts_freely = tasks_per_lease is None
        if tasks_per_lease is None:
            tasks_per_lease = self._default_lease(meta_batch_size, chunk, compute)
        self._workload = replace(
            self._workload,
            compute=compute,
            tasks_per_lease=tasks_per_lease,
            chunk_on_cpu=chunk,
        )
        self._info: dict[str, Any] = {} if self._folder is None else self._recorded()
        rules = self._workload.stepping_rules()
        self._state = OuterVariable(outer, self._optimizer, rules).state()
        self._like = outer
        self._is_new = True
        self._goes_back = False
        self._saved_at = 0.0
        self._validated: int | None = None
        """The step that was validated last."""
        self._background = Background()
        self.has_started = False
        """Whether the last `fit` began to compute; errors before that are about the input."""

    def _check_samplers(self, val_sampler: TaskSampler | None, allow_equal_examples: bool) -> bool:
        """Whether the tasks 0 and 1 of the training are the same; ValueError for a bad sampler."""
        reports = [
            check_sampler(
                source,
                2,
                processes=False,
                allow_equal_examples=allow_equal_examples,
                few_shot_classes=has_few_shot_classes(self.problem),
            )
            for source in (self._probe, val_sampler)
            if source is not None
        ]
        return reports[0].distinct_tasks == 1

    @property
    def outer(self) -> Params:
        """The outer variable after the last `fit`, on the CPU; within it, not to be written to."""
        return self._state.outer

    @property
    def run_dir(self) -> Path | None:
        """The run folder; if that is not on this machine, the local copy of its events."""
        return None if self._folder is None else self._folder.path

    @property
    def workload(self) -> Workload:
        """Everything but x that a lease is computed from."""
        return self._workload

    @property
    def version(self) -> int:
        """Outer steps taken so far."""
        return self._state.version

    def inner(self, index: int) -> Params:
        """With keep_state: the inner variable of the task at `index` after the last step."""
        inner = self._use(adapt, self._task(index), self._flat(index))
        return {name: leaf.cpu() for name, leaf in inner.items()}

    def carried(self, index: int) -> Params:
        """With keep_state: what the problem carries of the task, see `Problem.carry`."""
        outer, _ = split_own(self.outer)
        leaf = next(iter(outer.values()))
        task = to_device(self._task(index), leaf.device, leaf.dtype)
        return split_carried(self._flat(index), start_carried(self.problem, outer, task))[1]

    def _task(self, index: int) -> Task:
        return sample_task(self.sampler, index, self.last_step)

    def _flat(self, index: int) -> Tensor:
        """The flat state of a task."""
        flat = self._state.states.get(index)
        if flat is None:
            raise ValueError(
                "inner needs keep_state=True and a step taken on that task, got "
                f"{sorted(self._state.states) or 'no states'} and index {index}"
            )
        return flat

    def adapt(self, task: Task | Batch) -> Params:
        """The inner variable after adaptation to a task, or to a support set alone.

        It takes `eval_inner_steps`. With keep_state, a task of the training has its `inner`: what
        training has made of it. See `metadist.adapt`.
        """
        return self._use(adapt, task, self._kept(task))

    def predict(self, task: Task | Batch, inputs: Tensor | Batch | None = None) -> Tensor:
        """The outputs of the problem's model after `adapt`, for `inputs` or the query set.

        See `metadist.predict`.
        """
        return self._use(partial(predict, inputs=inputs), task, self._kept(task))

    def export(self, task: Task | Batch) -> nn.Module:
        """The problem's model with the weights of `adapt` in it: plain torch.

        See `metadist.export`.
        """
        return self._use(export, task, self._kept(task))

    def _use(self, use: Callable[..., Any], task: Task | Batch, state: Tensor | None) -> Any:
        return use(
            self.problem,
            self.algorithm,
            self.outer,
            task,
            inner_steps=self._eval_inner_steps,
            state=state,
            compute=self._workload.compute,
        )

    def _kept(self, task: Task | Batch) -> Tensor | None:
        """The state that training has kept of this very task; None: it has none."""
        return kept_state(self._state.states, self.sampler, task, self.last_step)

    @property
    def last_step(self) -> int:
        """See `metadist.sampler.last_step`."""
        return last_step(self.version)

    @property
    def skipped(self) -> dict[str, str]:
        """Damaged checkpoints that the last `restore` skipped, and why."""
        return self._folder.store.skipped if self._folder else {}

    def restore(self, name: str | None = None) -> str:
        """Continue from a checkpoint of `run_dir`: its name, "best", or None for the newest good.

        Raises:
            CheckpointError: There is none, or it is damaged, or not of this run's model,
                optimiser or leases.
        """
        if self._folder is None:
            raise ValueError("restore needs a run_dir, got None")
        store = self._folder.store
        found, checkpoint = store.load(name)
        self._events.step = checkpoint.state.version
        for damaged, reason in store.skipped.items():
            self._events.write("checkpoint_skipped", checkpoint=damaged, reason=reason)
        check_same_model(checkpoint.state.outer, self._like, f"{store.uri}/{found}")
        info = checkpoint.info
        self._adopt(info)
        # Of older checkpoints.
        info = {
            "batch_statistics": Executor.statistics_of,
            "encode_precision": DEFAULT.encode_precision,
            **info,
        }
        for field, value in self._fixed.items():
            changed = difference(info[field], value, field) if field in info else None
            if changed is not None:
                name, then, now = changed
                writer = info.get("metadist", __version__)
                by = "" if writer == __version__ else f", which metadist {writer} wrote"
                raise CheckpointError(
                    f"{name} must be {as_text(then)} as in checkpoint "
                    f"{store.uri}/{found}{by}, got {now}: start a new run to change it"
                )
        try:
            check_state(checkpoint.state, self._optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {store.uri}/{found} is of another format: {error}"
            ) from error
        self._info = self._recorded()
        self._state = checkpoint.state
        self._is_new = False
        self._goes_back = name is not None
        self._validated = None if checkpoint.score is None else self.version
        return found

    @property
    def _fixed(self) -> dict[str, Any]:
        """What must not change between the parts of one run."""
        return {
            "seed": self._workload.compute.seed,
            "tasks_per_lease": self._workload.tasks_per_lease,
            "chunk_size": self._chunk_size,
            "precision": self._workload.compute.precision,
            "encode_precision": self._workload.compute.encode_precision,
            "keep_state": self._workload.keep_state,
            "batch_statistics": self._executor.statistics_of,
            "algorithm": self.algorithm,
            "outer_optimizer": self._optimizer,
        }

    def _default_lease(self, meta_batch_size: int, chunk: int, compute: Compute) -> int:
        """Tasks per lease where none are given.

        A GPU gets all its tasks of a step at once: it is busy with few only a part of the time.
        """
        if num_workers := self._executor.num_on_gpus(compute):
            return largest_divisor(meta_batch_size, meta_batch_size // num_workers)
        shares = self._executor.shares_leases
        return default_tasks_per_lease(meta_batch_size, 1 if shares else chunk)

    @property
    def _chunk_size(self) -> int:
        """How many tasks go together on a CPU."""
        assert self._workload.chunk_on_cpu is not None
        return min(self._workload.chunk_on_cpu, self._workload.tasks_per_lease)

    def _recorded(self) -> dict[str, Any]:
        fixed = {name: recorded(value, name) for name, value in self._fixed.items()}
        return {**fixed, "metadist": __version__}

    def _adopt(self, info: Mapping[str, Any]) -> None:
        """Cut leases and chunks as a checkpoint does, where no argument says how."""
        per_lease, chunk = info.get("tasks_per_lease"), info.get("chunk_size")
        work = self._workload
        if (
            self._cuts_freely
            and isinstance(per_lease, int)
            and not work.meta_batch_size % per_lease
        ):
            work = replace(work, tasks_per_lease=per_lease)
        if work.compute.chunk_size is None and isinstance(chunk, int) and work.chunk_on_cpu != 1:
            work = replace(work, chunk_on_cpu=chunk)
        self._workload = work

    def fit(
        self, num_steps: int, on_step: Callable[[StepReport], bool | None] | None = None
    ) -> TrainingResult:
        """Train until the outer variable has taken `num_steps` outer steps in all.

        However it ends, a checkpoint of the newest known state is written first: after an error of
        anybody's code, after Ctrl-C, which is raised again, and after SIGTERM, SIGHUP and SIGUSR1,
        which then do what they would have done (SIGUSR1: what SIGTERM does).

        Args:
            num_steps: The outer step to end at; at most the `num_steps` of a stream.
            on_step: Called with the report of every outer step; False ends the run there, as at
                `num_steps`, None does not. Within it, `save` brings `outer` and `inner` to that
                step.

        Raises:
            TrainingDiverged: `max_dropped` tasks in a row had no finite hypergradient; the last
                checkpoint is kept.
        """
        num_steps = check("num_steps", num_steps, is_integer=True, ge=1)
        self.has_started = False
        require_steps("num_steps", num_steps, self.sampler)
        if self._val_sampler is not None:
            require_steps("num_steps", num_steps, self._val_sampler)
        if self._folder is not None and self._is_new:
            self._folder.check_new()
        run = Fitting(num_steps, self._log_every, self._quiet, self._events)
        try:
            with OneStop() as stop, self._locked(run.progress):
                return self._fit(num_steps, on_step, run, stop)
        finally:
            run.progress.close()

    def _fit(
        self,
        num_steps: int,
        on_step: Callable[[StepReport], bool | None] | None,
        run: Fitting,
        stop: OneStop,
    ) -> TrainingResult:
        began = time.perf_counter()
        is_new = self._is_new
        failed = True
        try:
            self._executor.notify = self._events.write  # type: ignore[method-assign]
            self._executor.start(self._workload, self._optimizer, self._state)
            if self._folder is not None:
                self._folder.path.mkdir(parents=True, exist_ok=True)
                self._is_new = False
                self._folder.write_config(partial(self._rebuildable, num_steps))
                newer = self._folder.store.newer(self.version) if self._goes_back else []
                logged = replace(
                    self._logged_run(self._folder), step=self.version, is_branch=bool(newer)
                )
                self._monitor = Monitor(
                    self._loggers, logged, run.logger_failed, bears_open=not is_new
                )
                if self.version == 0:
                    self._monitor.task(self._probe.sample(0))
            self._introduce(run.progress)
            self._tell_of_gpus(run.progress)
            self.has_started = True
            about: dict[str, Any] = {"until_step": num_steps, **self._executor.describe()}
            about["software"] = [f"metadist {__version__}", *software()]
            with self._events.run(self.version, **about):
                if is_new:
                    self._save(waits=True)  # for a run that dies before it gets to the next
                else:
                    if self._folder is not None and self._goes_back:
                        self._folder.abandon_newer(self.version, run.progress.say)
                    self._goes_back = False
                    self._make_up_validation(num_steps, run.progress)
                self._saved_at = time.monotonic()
                self._take_steps(num_steps, on_step, run, stop)
                self._background.wait()
            failed = False
        except BaseException as error:
            if self.has_started:
                self._leave(error, run)
            raise
        finally:
            self._executor.close()
            monitor, self._monitor = self._monitor, None
            if monitor is not None:
                monitor.close(failed)
            self._upload()
        best = self._folder.store.best() if self._folder else None
        return TrainingResult(
            num_steps=self.version,
            num_tasks=run.num_tasks,
            num_dropped=run.num_dropped,
            seconds=time.perf_counter() - began,
            best=best,
            calls=run.calls,
        )

    def _take_steps(
        self,
        num_steps: int,
        on_step: Callable[[StepReport], bool | None] | None,
        run: Fitting,
        stop: OneStop,
    ) -> None:
        """Follow the outer steps to the last one, or to that at which `on_step` ends the run."""
        for report in self._executor.run(num_steps):
            stop.check()
            self._background.check()
            self._events.report(report)
            if self._monitor is not None:
                self._monitor.step(report)
            run.progress.step(report)
            run.count(report, self._max_dropped)
            call_on_step(self._callbacks, report)
            version = report.step.version
            ends = on_step is not None and _is_false(on_step(report))
            if self.version == version:  # it has called `save`
                run.settle()
            is_last = ends or version >= num_steps
            self._periodically(version, is_last, run, report.is_draining)
            if ends and self.version >= version:
                return

    def _introduce(self, progress: TerminalProgress) -> None:
        """Say what is trained, on what and where."""
        if self._quiet:
            return
        outer, _ = split_own(self.outer)
        leaf = next(iter(outer.values()))
        task = to_device(sample_task(self._probe, 0), leaf.device, leaf.dtype)
        with torch.no_grad():
            inner = self.problem.init_inner(outer, task)
        for line in banner(
            problem=self.problem,
            algorithm=self.algorithm,
            outer=self.outer,
            inner=inner,
            task=task,
            num_tasks=self._workload.meta_batch_size,
            place=self._executor.describe(),
        ):
            progress.say(line)

    def save(self) -> int:
        """Within `on_step`: bring `outer` and `inner` to this step and write a checkpoint of it.

        Returns the step of that checkpoint: an earlier one if the server was lost since, whose
        later steps will be reported again.
        """
        self._state = self._executor.state()
        self._save(waits=True)
        return self.version

    def test(
        self, sampler: TaskSampler, num_tasks: int = 600, *, before: bool = True
    ) -> EvaluationResult:
        """Evaluation of the current outer variable, by the executor; see `evaluate`."""
        return evaluate(
            self.problem,
            sampler,
            self.algorithm,
            self.outer,
            num_tasks,
            inner_steps=self._eval_inner_steps,
            compute=self._workload.compute,
            executor=self._executor,
            before=before,
            step=self.last_step,
        )

    def record(self, split: str, result: EvaluationResult) -> None:
        """Log an evaluation of the current outer variable, and tell callbacks of it."""
        if self._folder is None:
            raise ValueError("record needs a run_dir, got None")
        logged = self._logged_run(self._folder)
        monitor = Monitor(self._loggers, logged, self._events.logger_failed)
        monitor.evaluation(split, result, self.version)
        monitor.close()
        self._upload()
        call_on_evaluation(self._callbacks, EvaluationReport(split, self.version, result))

    def log(self, values: Mapping[str, float], group: str = "mine") -> None:
        """Log scalars of your own as "group/name", of the newest step; within `fit` only.

        Raises:
            ValueError: A name is no text, or a value no number.
        """
        if self._monitor is None:
            raise ValueError("log must be called while fit runs, with a run_dir")
        self._monitor.scalars(group, {name: _scalar(name, one) for name, one in values.items()})

    def _logged_run(self, folder: RunFolder) -> LoggedRun:
        return LoggedRun(folder=folder.path, uri=folder.uri, step=None, settings=self.settings())

    def settings(self) -> dict[str, str | int | float]:
        """The settings that a reader of the result needs, by name."""
        return {
            "algorithm": repr(self.algorithm),
            **self.problem.describe(),
            "sampler": describe_sampler(self.sampler),
            **self._optimizer.settings,
            "meta_batch_size": self._workload.meta_batch_size,
            "tasks_per_lease": self._workload.tasks_per_lease,
            "chunk_size": self._chunk_size,
            "seed": self._workload.compute.seed,
            "device": self._workload.compute.device,
            **self._workload.compute.arithmetic,
            "graph_budget": self._workload.compute.graph_budget,
            **self._executor.describe(),
        }

    def _tell_of_gpus(self, progress: TerminalProgress) -> None:
        """Say what was chosen for GPUs: how much travels together, and what stays there."""
        work = self._workload
        if self._cuts_freely and (num_workers := self._executor.num_on_gpus(work.compute)):
            progress.say(
                f"tasks_per_lease={work.tasks_per_lease}, for {num_workers} on GPUs who share the "
                f"{work.meta_batch_size} tasks of a step"
            )
        if (data := self._executor.describe().get("data")) is not None:
            progress.say(f"data: {data}")

    def _periodically(self, version: int, is_last: bool, run: Fitting, is_due: bool) -> None:
        """Validate, log pictures and save after this step, as far as any of it is due.

        Args:
            version: The step.
            is_last: Whether no other step will come.
            run: What it is reported to.
            is_due: Whether a checkpoint is due whatever the number of the step.
        """
        validates = self._validates(version, is_last)
        is_due |= any(version % every == 0 for every in self._checkpoint_every)
        is_due |= time.monotonic() - self._saved_at >= self._checkpoint_every_s
        if not (is_due or validates or is_last):
            return
        self._background.wait()  # so that memory holds no third state
        self._state = self._executor.state()
        if self.version < version:
            return  # the server was lost: this step will be made and reported again
        run.settle()
        score = None
        if validates:
            score = self._validate(run.progress)
        if self._monitor is not None:
            self._gallery.show(partial(self._show, self._monitor, validates))
            self._monitor.flush()
        self._save(score)
        if validates or is_last:
            self._write_artifacts()

    def _show(self, monitor: Monitor, validates: bool) -> None:
        """Log pictures of this step: of the first task of validation, and of learned weights."""
        if validates and self._val_sampler is not None:
            log_adaptation(
                monitor,
                self.problem,
                self.algorithm,
                self.outer,
                sample_task(self._val_sampler, 0, self.last_step),
                self._eval_inner_steps,
                replace(self._workload.compute, device="cpu"),
            )
        if 0 in self._state.states and isinstance(self.problem, WeighsExamples):
            found = example_weights(
                self.problem, self.sampler, self.outer, self.inner(0), self._task(0)
            )
            for name, weights in found.items():
                monitor.histogram(f"weights/{name}", weights)

    def _write_artifacts(self) -> None:
        """Write what the problem shows of this step."""
        if self._folder is None or not has_artifacts(self.problem):
            return
        inner = self.inner(0) if 0 in self._state.states else None
        found = self.problem.artifacts(split_own(self.outer)[0], inner)
        self._folder.write_artifacts(self.version, found)

    def _validates(self, version: int, is_last: bool) -> bool:
        return self._val_sampler is not None and (
            is_last or (self._val_every is not None and version % self._val_every == 0)
        )

    def _make_up_validation(self, num_steps: int, progress: TerminalProgress) -> None:
        """Validate the step that the run continues from, if an interruption prevented that."""
        is_missing = self.version > 0 and self._validated != self.version
        if is_missing and self._validates(self.version, self.version >= num_steps):
            self._save(self._validate(progress))

    def _validate(self, progress: TerminalProgress) -> float | None:
        """The score of validation; None where it is not finite, which must not end the run."""
        sampler = self._val_sampler
        assert sampler is not None
        self._events.step = self.version
        try:
            result = self.test(sampler, self._val_tasks, before=False)
        except FloatingPointError as error:
            self._validated = self.version
            progress.say(f"step {self.version}: validation without a score: {error}")
            self._events.write("validation_failed", error=str(error))
            return None
        self._validated = self.version
        if result.dropped:
            self._events.write("validation_dropped", metrics=result.protocol["dropped"])
        if self._monitor is not None:
            self._monitor.evaluation("val", result, self.version)
        progress.say(f"step {self.version}: validation {result.headline}")
        call_on_evaluation(self._callbacks, EvaluationReport("val", self.version, result))
        return result.score if math.isfinite(result.score) else None

    def _leave(self, error: BaseException, run: Fitting) -> None:
        """Write a checkpoint of the newest state that is known, as `error` ends the run."""
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by an error"
        try:
            self._background.wait()
        except Exception as failure:
            log.exception("a checkpoint could not be written")
            run.progress.say(f"a checkpoint could not be written: {failure}")
        if isinstance(error, TrainingDiverged):
            return  # the last checkpoint is worth more than the last state
        try:
            self._state = self._executor.last_state()
            self._save(waits=True)
        except Exception as failure:
            if isinstance(error, KeyboardInterrupt):
                raise  # an interrupted run has a checkpoint, or has failed
            log.exception("no checkpoint of the last steps could be written")
            run.progress.say(f"{how}, and no checkpoint could be written: {failure}")
            return
        saved = f", saved {name_of(self.version)}" if self._folder else ""
        run.progress.say(f"{how} at step {self.version}{saved}")

    @contextmanager
    def _locked(self, progress: TerminalProgress) -> Iterator[None]:
        """Within the block the run folder, if there is one, is this trainer's."""
        if self._folder is None:
            yield
            return
        with self._folder.locked(self._is_new, progress.say):
            try:
                yield
            finally:
                self._background.join()

    def _rebuildable(self, num_steps: int) -> str:
        """The config of a run that was made in Python."""
        options = {name: v for name, v in self._given.items() if name not in ("config", "run_dir")}
        compute = self._given["compute"].given(
            batch_size=options["batch_size"], seed=options["seed"]
        )
        options |= {
            "num_steps": num_steps,
            "seed": compute.seed,
            "executor": self._executor,
            "outer_optimizer": vars(self._optimizer),
            "compute": {**vars(compute), "seed": compute.seed},
        }
        return config_of(options, self.sampler if self._probe is self.sampler else None)

    def _save(self, score: float | None = None, waits: bool = False) -> None:
        """Write a checkpoint of the state; `waits` until it is there, or has failed."""
        if self._folder is None:
            return
        checkpoint = Checkpoint(self._state, self._info, score)
        self._background.submit(partial(self._folder.write_checkpoint, checkpoint))
        if waits or not self._checkpoint_async:
            self._background.wait()
        self._saved_at = time.monotonic()

    def _upload(self) -> None:
        if self._folder is not None:
            self._folder.upload()


def _is_false(answer: Any) -> bool:
    """Whether it is False, also that of a comparison of numpy or torch."""
    return isinstance(answer, bool | np.bool_ | Tensor) and not answer


def _scalar(name: Any, value: Any) -> float:
    if not isinstance(name, str):
        raise ValueError(f"names in log must be texts, got {name!r}: log({{'distance': 0.5}})")
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"values in log must be numbers, got {got} for {name!r}: give a float, or several names"
        ) from error


def _check_observers(
    loggers: Sequence[Logger], callbacks: Sequence[Callback], run_dir: str | Path | None
) -> None:
    for name, found, kind in (("loggers", loggers, Logger), ("callbacks", callbacks, Callback)):
        if not isinstance(found, (list, tuple)) or not all(isinstance(one, kind) for one in found):
            raise ValueError(
                f"{name} must be a list of objects of classes derived from {kind.__name__}, got "
                f"{found!r}"
            )
    if loggers and run_dir is None:
        raise ValueError(
            f"loggers must be empty without a run_dir, got {loggers!r}: what they continue after "
            "an interruption is kept there"
        )
    if len({type(logger) for logger in loggers}) < len(loggers):
        raise ValueError(f"loggers must be of different classes, got {loggers!r}")
