"""Every event that matters is a line in the run folder and a record in the log."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

import pytest

from metadist import TrainingDiverged
from metadist.outer import LeaseResult
from metadist.run.events import EventLog
from metadist.run.storage import Folder
from tests.helpers import (
    Recording,
    Spoiled,
    assert_undisturbed,
    curves,
    interrupt_at,
    make_trainer,
    read_events,
)
from tests.run.test_monitor import report, result

OF_PROCESS = ("time", "host", "boot", "pid", "started", "software")


def told(path) -> list[tuple[Any, ...]]:
    """(event, step, everything else) of each line."""
    return [
        (e.pop("event"), e.pop("step"), {k: v for k, v in e.items() if k not in OF_PROCESS})
        for e in read_events(Folder(path.parent))
    ]


LOCAL = {"executor": "local", "policy": "bsp", "device": "cpu", "precision": "highest"}


def test_a_run_tells_how_it_began_went_and_ended(tmp_path):
    before = datetime.now(timezone.utc)
    path = tmp_path / "run" / "events.jsonl"
    trainer = make_trainer(
        sampler=Spoiled(curves(), broken=(5, 6)),
        val_sampler=curves("val"),
        val_every=2,
        val_tasks=3,
        checkpoint_every=3,
        executor=Recording(),
        run_dir=path.parent,
    )
    trainer.fit(4)
    lines = told(path)
    scores = [about.pop("score") for _, _, about in lines if "score" in about]
    assert lines == [
        ("run_started", 0, {"until_step": 4, **LOCAL}),
        ("checkpoint_written", 0, {"checkpoint": "step-00000000"}),
        ("task_dropped", 2, {"tasks": [5, 6]}),
        ("checkpoint_written", 2, {"checkpoint": "step-00000002"}),
        ("checkpoint_written", 3, {"checkpoint": "step-00000003"}),
        ("checkpoint_written", 4, {"checkpoint": "step-00000004"}),
        ("run_finished", 4, {}),
    ]
    assert scores[0] is scores[2] is None and scores[3] == trainer.test(curves("val"), 3).score
    times = [datetime.fromisoformat(event["time"]) for event in read_events(Folder(path.parent))]
    assert times == sorted(times)
    assert abs((times[0] - before).total_seconds()) < 60


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "events.jsonl"
    stopped = make_trainer(
        executor=Recording(interrupt_at(3)), run_dir=tmp_path, checkpoint_every=2
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(6)
    *_, first, second, last = told(path)
    # The checkpoint of step 2 is written beside the training, and may end after the interruption.
    assert ("run_interrupted", 2, {}) in (first, second)  # the report of step 3 was never told
    assert last == ("checkpoint_written", 3, {"checkpoint": "step-00000003", "score": None})
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    with path.open("a") as stream:
        stream.write('{"time": "2026-')  # as a process leaves it that was killed while it wrote
    num_before = len(read_events(Folder(path.parent)))

    resumed = make_trainer(executor=Recording(), run_dir=tmp_path, checkpoint_every=2)
    resumed.restore()
    resumed.fit(4)
    skipped, *rest = told(path)[num_before:]
    assert skipped[:2] == ("checkpoint_skipped", 2)
    assert skipped[2]["checkpoint"] == "step-00000003" and "damaged" in skipped[2]["reason"]
    assert rest == [
        ("run_started", 2, {"until_step": 4, **LOCAL}),
        ("checkpoint_written", 4, {"checkpoint": "step-00000004", "score": None}),
        ("run_finished", 4, {}),
    ]


def test_a_failed_run_tells_why(tmp_path):
    trainer = make_trainer(
        sampler=Spoiled(curves(), broken=range(4, 99)), run_dir=tmp_path, max_dropped=4
    )
    with pytest.raises(TrainingDiverged) as raised:
        trainer.fit(9)
    assert told(tmp_path / "events.jsonl")[-2:] == [
        ("task_dropped", 2, {"tasks": [4, 5, 6, 7]}),
        ("run_failed", 2, {"error": f"TrainingDiverged: {raised.value}"}),
    ]


def test_losses_and_repetitions_of_a_step_are_one_line_each(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.report(report(1, [result(0, 4, {})]))
    assert not path.exists()
    found = report(
        7,
        [LeaseResult(3, 0, 1, (12, 13), {}, 0, 0)],
        lost_workers=2,
        reissued=(3, 5),
        lost_servers=1,
    )
    log.report(found._replace(step=found.step._replace(repeated=(2,))))
    assert told(path) == [
        ("worker_lost", 7, {"num_lost": 2, "num_workers": 2}),
        ("server_recovered", 7, {"num_lost": 1}),
        ("lease_reissued", 7, {"leases": [3, 5]}),
        ("contribution_repeated", 7, {"leases": [2]}),
        ("task_dropped", 7, {"tasks": [12, 13]}),
    ]


def test_the_logger_is_told_the_same_with_or_without_a_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO, "metadist.run")
    for folder in (None, tmp_path):
        caplog.clear()
        make_trainer(run_dir=folder, sampler=Spoiled(curves(), broken=(2,))).fit(1)
        levels = [(record.levelname, record.run_event["event"]) for record in caplog.records]
        written = [("INFO", "checkpoint_written")] if folder else []
        assert levels == [
            ("INFO", "run_started"),
            *written,
            ("WARNING", "task_dropped"),
            *written,
            ("INFO", "run_finished"),
        ]
    assert [json.loads(record.getMessage()) for record in caplog.records] == read_events(
        Folder(tmp_path)
    )


def test_an_event_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    def block(report):
        if report.step.version == 1:
            (tmp_path / "run" / "events.jsonl").unlink()
            (tmp_path / "run" / "events.jsonl").mkdir()

    trainer = make_trainer(executor=Recording(block), run_dir=tmp_path / "run")
    trainer.fit(3)
    assert_undisturbed(trainer, 3)
    assert "cannot write to" in caplog.text


def test_json_has_no_nan(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("checkpoint_written", checkpoint="step-00000001", score=float("nan"))
    assert told(tmp_path / "events.jsonl")[0][2]["score"] is None


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "5\n[]\n", "\xff\xfe\n", '{"event": "x", "step": 1}\n', "{}\n", '{"a'],
    ids=repr,
)
def test_what_is_no_event_is_passed_over(tmp_path, text):
    path = tmp_path / "events.jsonl"
    assert read_events(Folder(path.parent)) == []
    path.write_bytes(text.encode("latin1"))
    assert read_events(Folder(path.parent)) == []
    EventLog(path).write("run_finished")
    assert told(path) == [("run_finished", 0, {})]
