"""`tune`: hyperparameters by Ray Tune, trial by trial; what it cannot search is refused."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import SOBA
from metadist.cli import main
from metadist.cluster import Workers, tune
from metadist.cluster.jobs.tune import Tuned
from metadist.compare import Contender, kept_metrics
from metadist.tasks import FixedTasks
from tests.helpers import words
from tests.problems import Quadratic, quadratic_task


def training(values: Any, run_dir: str, notes: str | None = None, fatal: int = 0) -> Contender:
    """SOBA on a quadratic; notes the steps, and kills its process once at the step `fatal`."""
    trainer = Trainer(
        Quadratic(2, 4),
        FixedTasks([quadratic_task(0)]),
        SOBA(inner_lr=values["inner_lr"]),
        outer_optimizer=OuterOptimizer("sgd", lr=values.get("outer_lr", 0.05)),
        quiet=True,
        run_dir=run_dir,
        checkpoint_every=10**9,
    )

    def metrics() -> dict[str, float]:
        if notes is not None:
            seen = Path(notes).read_text().split() if Path(notes).exists() else []
            if fatal == trainer.version and str(fatal) not in seen:
                Path(notes).write_text(" ".join([*seen, str(fatal)]))
                os.kill(os.getpid(), signal.SIGKILL)
            Path(notes).write_text(" ".join([*seen, str(trainer.version)]))
        return kept_metrics(trainer)

    return Contender(trainer, metrics, lambda: {"test_last": 1.0})


def search(folder: Path, make: Any = training, space: Any = None, **options: Any) -> Tuned:
    space = space or {"inner_lr": {"grid": [0.001, 0.2, 0.02]}}
    chosen = {"num_steps": 8, "evaluate_every": 2, "num_samples": 1, "verbose": 0}
    return tune(make, space, folder, **{**chosen, **options})


def expected(inner_lr: float, tmp_path: Path, steps: int = 8) -> dict[str, float]:
    run = training({"inner_lr": inner_lr}, str(tmp_path / f"plain-{inner_lr}"))
    run.trainer.fit(steps)
    return run.metrics()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray Tune and what it imports
def test_trials_under_a_scheduler_report_stop_early_and_the_best_is_found(ray_session, tmp_path):
    asha = {"name": "asha", "grace_period": 2, "reduction_factor": 2}
    space = {"inner_lr": {"choice": [0.2]}, "outer_lr": {"grid": [1e-1, 1e-9, 1e-3]}}
    # One at a time: who reports first is never stopped, whoever that is.
    options: dict[str, Any] = {"space": space, "scheduler": asha, "workers": Workers(1)}
    found = search(tmp_path / "asha", **options)
    assert len(found.trials) == 3 and all(trial.error is None for trial in found.trials)
    assert {trial.values["inner_lr"] for trial in found.trials} == {0.2}
    steps = [trial.metrics["step"] for trial in found.trials]
    assert set(steps) <= {2, 4, 8} and min(steps) < 8 == max(steps)
    assert found.best is not None
    assert found.best.metrics["query_loss"] == min(t.metrics["query_loss"] for t in found.trials)
    # The same search again changes nothing: all trials have ended.
    again = search(tmp_path / "asha", **options)
    assert again.best == found.best
    assert sorted(again.trials, key=str) == sorted(found.trials, key=str)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_as_many_trials_run_at_once_as_there_are_workers(ray_session, tmp_path):
    notes = tmp_path / "notes"

    def make(values: Any, run_dir: str) -> Contender:
        with notes.open("a") as file:
            file.write("begins ")

        def test() -> dict[str, float]:
            with notes.open("a") as file:
                file.write("ends ")
            return {}

        return training(values, run_dir)._replace(last_metrics=test)

    search(tmp_path / "out", make, {"inner_lr": {"grid": [0.1, 0.2, 0.3]}}, workers=Workers(1))
    assert notes.read_text().split() == ["begins", "ends"] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trial_that_died_goes_on_from_its_last_report(ray_session, tmp_path):
    notes = tmp_path / "notes"
    make = functools.partial(training, notes=str(notes), fatal=6)
    space = {"inner_lr": {"grid": [0.2]}}
    first = search(tmp_path / "out", make, space)
    assert first.best is None and first.trials[0].error
    assert notes.read_text().split() == ["2", "4", "6"]
    again = search(tmp_path / "out", make, space)
    assert notes.read_text().split() == ["2", "4", "6", "6", "8"]
    assert again.best is not None and again.best.error is None
    metrics = expected(0.2, tmp_path)
    assert again.best.metrics == {**metrics, "test_last": 1.0, "step": 8}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_a_config_that_trains(ray_session, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {
        "sampler": {"class_path": "sinusoid", "init_args": {"k_shot": 5, "k_query": 5}},
        "val_split": "val",
        "val_tasks": 3,
        "problem": {
            "class_path": "few_shot",
            "init_args": {
                "loss": "mse",
                "model": {"class_path": "mlp", "init_args": {"hidden": [4]}},
            },
        },
        "meta_batch_size": 2,
        "algorithm": {"class_path": "itd", "init_args": {"inner_steps": 2}},
        "num_steps": 2,
        "evaluate_every": 1,
        "num_samples": 1,
        "space": {"algorithm.inner_lr": {"grid": [1e-9, 0.05]}},
    }
    Path("tune.yaml").write_text(yaml.safe_dump(config))
    assert main(["tune", "tune.yaml", "--run_dir", "out", "--verbose", "0"]) == 0
    out = capsys.readouterr().out
    assert "metadist train --config out/best.yaml --run_dir runs/NAME" in out
    trials = json.loads(Path("out/trials.json").read_text())
    losses = {t["values"]["algorithm.inner_lr"]: t["metrics"]["query_loss"] for t in trials}
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    assert best["algorithm"]["init_args"]["inner_lr"] == min(losses, key=lambda lr: losses[lr])
    assert main(["train", "--config", "out/best.yaml", *words("--run_dir run --num_steps 1")]) == 0
    # Another config is not for this folder.
    Path("tune.yaml").write_text(yaml.safe_dump({**config, "num_steps": 3}))
    assert main(["tune", "tune.yaml", "--run_dir", "out"]) == 2
    assert "num_steps was 2, is 3" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"num_samples": "3"}, "num_samples must be an integer >= 1, got '3'"),
        (
            {"workers": Workers(min_workers=1)},
            "min_workers must be None with tune, which does not use it, got 1: leave it out",
        ),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"space": {"x": {"gauss": [0, 1]}}}, "space of x must be one of uniform, loguniform"),
        ({"space": {"x": 3}}, "space of x must be one of"),
        ({"space": {"x": {"uniform": 3}}}, "uniform of x must have a list, got 3"),
        ({"space": {"x": {"loguniform": [0, 1]}}}, "loguniform of x must fit, got"),
        ({"space": {"x": {"uniform": [1, 2, 3, 4]}}}, "uniform of x must fit"),
        ({"scheduler": {"name": "none"}}, "scheduler.name must be one of fifo, .*, got 'none'"),
        ({"scheduler": 3}, "scheduler.name must be one of fifo, .*, got 3"),
        ({"scheduler": {"name": "pbt"}}, "scheduler must not be one of pbt, .*, got 'pbt'"),
        ({"scheduler": {"name": "asha", "speed": 3}}, "scheduler asha must be usable, got .*speed"),
        ({"search": {"name": "psychic"}}, "search.name must be one of .*, got 'psychic'"),
        ({"search": {"name": "random", "speed": 1}}, "search random must be usable, got .*speed"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_ray_is_started(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": None}, "space must map options to what is tried of them, got None"),
        ({"evaluate_every": None}, "evaluate_every must be given in outer steps, got none"),
        ({"space": {"algorithm.inner_speed": {"grid": [1]}}}, "space of algorithm.inner_speed: "),
        ({"space": {"algorithm.inner_lr": {"uniform": ["a", "b"]}}}, "space of algorithm.inner_lr"),
        ({"scheduler": {"name": "x"}}, "scheduler.name must be one of fifo"),
        ({"run_dir": "x"}, "config must not have run_dir: every trial has its own"),
        ({"val_split": None}, "tune.yaml: val_split or val_sampler must be given, got neither"),
        ({"executor": "ray"}, "executor must be local with num_workers=2"),
    ],
)
def test_a_config_that_cannot_be_searched_is_refused(
    tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    tree: dict[str, Any] = {
        "sampler": "sinusoid",
        "val_split": "val",
        "evaluate_every": 1,
        "space": {"algorithm.inner_lr": {"uniform": [0, 1]}},
        **changes,
    }
    Path("tune.yaml").write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
    assert main(["tune", "tune.yaml", "--run_dir", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
