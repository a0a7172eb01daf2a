"""Callbacks see all that happens, change nothing, and are named where they fail."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from metadist import Callback, CallbackError, EvaluationReport, OuterOptimizer, StepReport
from metadist.run.storage import Folder
from tests.helpers import curves, exact_state, make_trainer, read_events, store_of


class Watching(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.losses: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.seen.append(("step", report.step.version))
        self.losses += [report.metrics["query_loss"]] if report.metrics else []

    def on_evaluation(self, report: EvaluationReport) -> None:
        self.seen.append((report.split, report.step))


def trainer_of(**changes: Any):
    given: dict[str, Any] = {"val_sampler": curves("val"), "val_every": 2, "val_tasks": 2}
    return make_trainer(**given | changes)


def test_steps_and_evaluations_come_in_order(tmp_path):
    watching = Watching()
    trainer = trainer_of(callbacks=[watching], run_dir=tmp_path, log_every=2)
    trainer.fit(3)
    trainer.record("test", trainer.test(curves("test"), 3))
    assert watching.seen == [
        *(("step", 1), ("step", 2), ("val", 2), ("step", 3), ("val", 3), ("test", 3)),
    ]
    assert len(watching.losses) == 2


class Meddling(Callback):
    def on_step(self, report: StepReport) -> None:
        for mapping in (report.results[0].metrics, report.results[0].calls):
            with pytest.raises(TypeError):
                cast(Any, mapping)["query_loss"] = -1.0

    def on_evaluation(self, report: EvaluationReport) -> None:
        report.result.metrics.clear()


def test_a_callback_changes_nothing(tmp_path):
    watching = Watching()
    meddled = trainer_of(callbacks=[Meddling(), watching], run_dir=tmp_path / "a")
    meddled.fit(3)
    plain = trainer_of(run_dir=tmp_path / "b")
    plain.fit(3)
    assert exact_state(meddled) == exact_state(plain)
    best = [store_of(tmp_path / name).load()[1].score for name in "ab"]
    assert best[0] == best[1] is not None


class Failing(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, report: StepReport) -> None:
        if report.step.version == self.at:
            raise KeyError("mine")

    def on_evaluation(self, report: EvaluationReport) -> None:
        if self.at == 0:
            raise OSError("full")


@pytest.mark.parametrize(
    ("at", "step", "message"),
    [
        (3, 3, "callback Failing.on_step must not raise, got at step 3 KeyError: 'mine'"),
        (0, 2, "callback Failing.on_evaluation must not raise, got at step 2 OSError: full"),
    ],
)
def test_an_exception_ends_the_run_with_a_checkpoint_and_the_name(tmp_path, at, step, message):
    with pytest.raises(CallbackError, match=message) as raised:
        trainer_of(callbacks=[Failing(at)], run_dir=tmp_path).fit(5)
    assert raised.value.__cause__ is not None
    name, _ = store_of(tmp_path).load()
    assert name == f"step-{step:08d}"
    (event,) = [e for e in read_events(Folder(tmp_path)) if e["event"] == "run_failed"]
    assert message in event["error"]
    resumed = trainer_of(run_dir=tmp_path)
    resumed.restore()
    resumed.fit(5)
    whole = trainer_of()
    whole.fit(5)
    assert exact_state(resumed) == exact_state(whole)


def test_commands_continue_a_run_without_a_callback_that_text_cannot_describe(tmp_path):
    class Local(Callback):
        """Of no module's top level."""

    trainer_of(callbacks=[Local()], run_dir=tmp_path).fit(1)
    config = (tmp_path / "config.yaml").read_text()
    assert "# not called by commands: callbacks[0], a class" in config
    assert "# unknown: callbacks" not in config and '"callbacks": []' in config


def test_only_false_ends_a_run_within_on_step():
    assert make_trainer().fit(2, lambda report: None).num_steps == 2
    assert make_trainer().fit(2, lambda report: False).num_steps == 1
    assert make_trainer().fit(2, lambda report: cast(Any, np.bool_(False))).num_steps == 1


def test_settings_tell_the_schedule_of_the_outer_optimizer():
    schedule = OuterOptimizer(schedule="linear", schedule_steps=9, options={"betas": (0.5, 0.9)})
    found = make_trainer(outer_optimizer=schedule).settings()
    assert (found["outer schedule"], found["outer schedule_steps"]) == ("linear", 9)
    assert found["outer options"] == "{'betas': (0.5, 0.9)}"
    assert not {"outer clip_norm", "outer warmup_steps"} & found.keys()
