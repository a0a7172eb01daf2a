"""`tune`: hyperparameters by Ray Tune, every trial a training that can be paused and resumed."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metadist.checks.values import require_integer
from metadist.cluster.actors.connection import check_room, connected
from metadist.cluster.actors.options import JOB_UNUSED, Workers, refuse_unused
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.compare.run import Contender
from metadist.executor import StepReport
from metadist.run.storage import Folder

STEP, METRICS = "step", "metrics"
"""The outer step, among the metrics of a report, and the list of their names."""

DOMAINS = {
    "uniform": "uniform", "loguniform": "loguniform", "quniform": "quniform", "normal": "randn",
    "randint": "randint", "lograndint": "lograndint", "choice": "choice", "grid": "grid_search",
}  # fmt: skip
"""The kinds of a space, and Ray Tune's names of them. `choice` and `grid` take one list."""

CHANGING = ("pbt", "pbt_replay", "pb2")
"""Schedulers that change the hyperparameters of a running training."""

Make = Callable[[Mapping[str, Any], str], Contender]


class Trial(NamedTuple):
    """One trial: its values, its last report, and its error if it failed."""

    values: dict[str, Any]
    metrics: dict[str, Any]
    error: str | None


class Tuned(NamedTuple):
    """All trials, and the best of them by the last report; None if no trial has reported."""

    best: Trial | None
    trials: list[Trial]


def tune(
    make: Make,
    space: Mapping[str, Mapping[str, Any]],
    folder: str | Path,
    *,
    num_steps: int,
    evaluate_every: int,
    metric: str = "query_loss",
    mode: str = "min",
    num_samples: int = 10,
    scheduler: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    workers: Workers = Workers(),
    address: str | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> Tuned:
    """Search for good hyperparameters with Ray Tune; called again, it resumes.

        tune(make, {"lr": {"loguniform": [1e-4, 1.0]}}, "runs/search", num_steps=500,
             evaluate_every=50, num_samples=20, scheduler={"name": "asha"})

    Args:
        make: Returns the training with these values and this `run_dir`, and how it is judged.
        space: What to try, by name: {"uniform": [0, 1]}, {"choice": ["adam", "sgd"]}, and so on
            (see `DOMAINS`); of {"grid": [...]} all values are tried, `num_samples` times.
        folder: The folder for everything Ray Tune writes, on storage that all nodes see.
        num_steps: The outer steps of a trial.
        evaluate_every: The outer steps between reports. Each comes with a checkpoint.
        metric: the metric to go by.
        mode: whether a "min" or "max" of it is better.
        num_samples: The number of trials, or of repetitions of a grid.
        scheduler: One of Ray Tune's schedulers and its options, {"name": "asha", ...}, by default
            with outer steps as time; None: every trial runs to its end.
        search: One of Ray Tune's searchers and its options, {"name": "optuna", ...}; None: random.
        workers: How many trials run at a time, and what is reserved for each.
        address: The address of the cluster, see `RayExecutor`.
        seed: The seed of the random search.
        verbose: How much Ray Tune prints, 0 to 3.

    Raises:
        ValueError: The search cannot be made, or Ray Tune is not installed.
    """
    params, config = plan(
        space,
        num_steps=num_steps,
        evaluate_every=evaluate_every,
        metric=metric,
        mode=mode,
        num_samples=num_samples,
        scheduler=scheduler,
        search=search,
        workers=workers,
        seed=seed,
    )
    api = _ray_tune()
    # By value, as the user's modules are not installed where the trial runs.
    trial = partial(_trial, payload=pickle_by_value((make, num_steps, evaluate_every, metric)))
    trainable = api.with_resources(trial, workers.bundle)
    uri = Folder(folder)
    place = str(uri.local.absolute()) if uri.local is not None else uri.uri.rstrip("/")
    parent, _, name = place.rpartition("/")
    with connected(address, workers.num_cpus):
        check_room(workers.bundle, f"num_workers={workers.num_workers}")
        if api.Tuner.can_restore(place):
            tuner = api.Tuner.restore(
                place, trainable, resume_unfinished=True, resume_errored=True, param_space=params
            )
        else:
            run = api.RunConfig(
                name=name,
                storage_path=parent,
                verbose=verbose,
                checkpoint_config=api.CheckpointConfig(num_to_keep=1),
            )
            tuner = api.Tuner(trainable, param_space=params, tune_config=config, run_config=run)
        return _tuned(tuner.fit(), metric, mode)


def plan(
    space: Mapping[str, Mapping[str, Any]],
    *,
    num_steps: int,
    evaluate_every: int,
    metric: str = "query_loss",
    mode: str = "min",
    num_samples: int = 10,
    scheduler: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    workers: Workers = Workers(),
    seed: int = 0,
) -> tuple[dict[str, Any], Any]:
    """(parameter space, `TuneConfig`) of Ray Tune; arguments and errors as in `tune`."""
    api = _ray_tune()
    from ray.tune.search import Searcher

    for name, value in (
        ("num_steps", num_steps),
        ("evaluate_every", evaluate_every),
        ("num_samples", num_samples),
    ):
        require_integer(name, value, 1)
    refuse_unused(workers, "tune", JOB_UNUSED)
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    if not isinstance(metric, str):
        raise ValueError(f"metric must be the name of a metric, got {metric!r}")
    searcher = _searcher(search, seed, workers.num_workers)
    config = api.TuneConfig(
        metric=metric,
        mode=mode,
        num_samples=num_samples,
        # Of what draws its trials beforehand Ray Tune ignores this number.
        max_concurrent_trials=workers.num_workers if isinstance(searcher, Searcher) else None,
        scheduler=_scheduler(scheduler, num_steps),
        search_alg=searcher,
    )
    return {name: _domain(api, name, spec) for name, spec in space.items()}, config


def _trial(values: Mapping[str, Any], payload: bytes) -> None:
    """One trial, in a process of its own."""
    from ray import cloudpickle, tune

    make, num_steps, evaluate_every, metric = cloudpickle.loads(payload)
    with tempfile.TemporaryDirectory(prefix="metadist-") as folder:
        run_dir = Path(folder) / "run"
        given = tune.get_checkpoint()
        if given is not None:
            given.to_directory(run_dir / "checkpoints")
        contender = make(values, str(run_dir))
        trainer = contender.trainer
        if given is not None:
            trainer.restore()

        def on_step(report: StepReport) -> bool:
            step = report.step.version
            is_due = step % evaluate_every == 0 or step == num_steps
            if is_due and trainer.save() == step:
                metrics = contender.metrics()
                if metric not in metrics:
                    raise ValueError(f"metric must be one of {', '.join(metrics)}, got {metric!r}")
                if step == num_steps:
                    metrics |= contender.last_metrics()
                saved = tune.Checkpoint.from_directory(str(run_dir / "checkpoints"))
                # Under one name, to be told from what Ray Tune adds.
                tune.report({**metrics, STEP: step, METRICS: [*metrics, STEP]}, checkpoint=saved)
            return True

        if trainer.version < num_steps:
            trainer.fit(num_steps, on_step)


def _tuned(results: Any, metric: str, mode: str) -> Tuned:
    trials = [
        Trial(
            dict(result.config or {}),
            {name: result.metrics[name] for name in (result.metrics or {}).get(METRICS, [])},
            None if result.error is None else str(result.error).strip().splitlines()[-1],
        )
        for result in results
    ]
    sign = 1 if mode == "min" else -1
    good = [trial for trial in trials if trial.error is None and metric in trial.metrics]
    finite = [trial for trial in good if trial.metrics[metric] * sign < float("inf")]
    return Tuned(min(finite, key=lambda t: sign * t.metrics[metric], default=None), trials)


def _ray_tune() -> Any:
    try:
        from ray import tune
    except ImportError as error:
        raise ValueError(
            f"Ray Tune must be installed, got: {error}. pip install 'metadist[tune]'"
        ) from error
    return tune


def _domain(api: Any, name: str, spec: Any) -> Any:
    """The domain from which Ray Tune samples a value."""
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in DOMAINS:
        raise ValueError(
            f"space of {name} must be one of {', '.join(DOMAINS)} with its arguments, as in "
            f"{{uniform: [0, 1]}}, got {spec!r}"
        )
    ((kind, arguments),) = spec.items()
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{kind} of {name} must have a list, got {arguments!r}")
    function = getattr(api, DOMAINS[kind])
    try:
        return function(arguments) if kind in ("choice", "grid") else function(*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} of {name} must fit, got {arguments!r}: {error}") from error


def _scheduler(given: Mapping[str, Any] | None, num_steps: int) -> Any:
    from ray.tune.schedulers import SCHEDULER_IMPORT, FIFOScheduler

    if given is None:
        return FIFOScheduler()
    known = {**SCHEDULER_IMPORT, "asha": SCHEDULER_IMPORT["async_hyperband"]}
    known = {name: cls for name, cls in known.items() if name not in CHANGING}
    name = given.get("name") if isinstance(given, Mapping) else given
    if name in CHANGING:
        raise ValueError(
            f"scheduler must not be one of {', '.join(CHANGING)}, got {name!r}: they change "
            "hyperparameters of a running training, and a checkpoint is bound to its"
        )
    return _make("scheduler", known, given, {"time_attr": STEP, "max_t": num_steps})


def _searcher(given: Mapping[str, Any] | None, seed: int, at_once: int) -> Any:
    from ray.tune.search import SEARCH_ALG_IMPORT

    defaults = {"random_state": seed, "max_concurrent": at_once}
    chosen = {"name": "random"} if given is None else given
    return _make("search", SEARCH_ALG_IMPORT, chosen, defaults)


def _make(
    field: str, known: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Any:
    """An object of Ray Tune by name; options that its class does not know are refused."""
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if name not in known:
        raise ValueError(f"{field}.name must be one of {', '.join(known)}, got {name!r}")
    cls = known[name]
    try:
        cls = cls() if inspect.isfunction(cls) else cls  # imported where it is needed
        takes = inspect.signature(cls).parameters
        return cls(**{k: v for k, v in defaults.items() if k in takes} | options)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise ValueError(f"{field} {name} must be usable, got {options}: {error}") from error
