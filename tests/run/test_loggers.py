"""Numbers go to all loggers, once each, also after interruptions and failures."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.loggers import CSVLogger, LoggedRun, Logger, MlflowLogger, WandbLogger
from metadist.loggers.sent import Sent
from metadist.run.status import run_status
from metadist.run.storage import Folder
from tests.helpers import assert_undisturbed, curves, make_trainer, read_events

Rows = list[tuple[int, str, float]]


def csv_rows(folder: Path) -> Rows:
    with (folder / "metrics.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["step", "name", "value"]
    return [(int(step), name, float(value)) for step, name, value in table[1:]]


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB, behind W&B's seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = (1 << 15) - at % (1 << 15)
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_rows(folder: Path) -> Rows:
    """The rows of all parts of an offline run, and that they are of one run."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits for the process that writes the files
    found: Rows = []
    parts = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {part.name for part in parts} == {f"run-{identity(folder, 'wandb')}.wandb"}
    for part in parts:
        for data in records_of(part.read_bytes()):
            record = Record.FromString(data)
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            values = {name: json.loads(item.value_json) for name, item in items.items()}
            if "outer_step" in values:
                step = values.pop("outer_step")
                found += [
                    (step, name, value)
                    for name, value in values.items()
                    if isinstance(value, (int, float)) and not name.startswith("_")
                ]
    return found


def mlflow_rows(folder: Path) -> Rows:
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    number = client.get_experiment_by_name("metadist").experiment_id
    (run,) = client.search_runs([number])
    assert run.info.run_id == identity(folder, "mlflow")
    assert run.info.status == "FINISHED" and run.data.params["meta_batch_size"] == "4"
    names = run.data.metrics
    history = [
        metric for name in names for metric in client.get_metric_history(run.info.run_id, name)
    ]
    return [(metric.step, metric.key, metric.value) for metric in history]


def identity(folder: Path, service: str) -> str:
    return str(json.loads((folder / f"{service}.json").read_text())["id"])


def make(kind: str, folder: Path) -> tuple[Logger, Any]:
    """(a logger of that kind, what reads its rows from the run folder)."""
    if kind == "csv":
        return CSVLogger(), csv_rows
    pytest.importorskip(kind)
    if kind == "wandb":
        return WandbLogger(), wandb_rows
    return MlflowLogger(tracking_uri=f"file:{folder / 'mlruns'}"), mlflow_rows


@pytest.fixture(autouse=True)
def here_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def trainer_of(folder: Path, logger: Logger, **changes: Any):
    given: dict[str, Any] = {
        "run_dir": folder,
        "loggers": [logger],
        "val_sampler": curves("val"),
        "val_every": 2,
        "val_tasks": 2,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return make_trainer(**given | changes)


TIMED = ("tasks/per_second",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["csv", "wandb", "mlflow"])
def test_after_an_interruption_every_row_is_there_once(tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    logger, rows = make(kind, whole)
    trainer_of(whole, logger).fit(7)
    logger, rows = make(kind, cut)
    trainer_of(cut, logger).fit(5)
    # What a machine that died at step 5 leaves: a checkpoint of step 4 and rows beyond.
    (cut / "checkpoints" / "step-00000005" / "manifest.json").unlink()
    if kind == "csv":
        with (cut / "metrics.csv").open("a") as stream:
            stream.write("6,loss/tr")
    resumed = trainer_of(cut, make(kind, cut)[0])
    assert resumed.restore() == "step-00000004"
    resumed.fit(7)
    resumed.record("test", resumed.test(curves("test"), 3))

    found, expected = rows(cut), rows(whole)
    tested = [row for row in found if "/test" in row[1]]
    assert {name for _, name, _ in tested} >= {"loss/test", "width/loss/test"}
    found = [row for row in found if row not in tested and row[0] > 0]
    names = Counter((step, name) for step, name, _ in found)
    assert max(names.values()) == 1
    # The first process was told to end at step 5, and validated there.
    extra = {(5, name) for step, name in names if step == 5 and "/val" in name} - {
        (step, name) for step, name, _ in expected
    }
    kept = {(step, name): value for step, name, value in found if (step, name) not in extra}
    whole_rows = {(step, name): value for step, name, value in expected if step > 0}
    for timed in TIMED:
        assert {key for key in kept if key[1] == timed} == {
            key for key in whole_rows if key[1] == timed
        }
    assert {key: value for key, value in kept.items() if key[1] not in TIMED} == {
        key: value for key, value in whole_rows.items() if key[1] not in TIMED
    }
    assert len(kept) > 60


class Memory(Logger):
    """Keeps the scalars, and fails when it is told to."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.opened: list[int | None] = []
        self.is_broken = False
        self.ended: list[bool] = []

    def open(self, run: LoggedRun) -> None:
        self.opened.append(run.step)
        if self.is_broken:
            raise ConnectionError("no network")

    def log_scalars(self, step: int, values: Any) -> None:
        if self.is_broken:
            raise ConnectionError("no network")
        self.rows += [(step, name) for name in values]

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row[0] < step]

    def close(self, failed: bool = False) -> None:
        self.ended.append(failed)


def steps_of(logger: Memory) -> list[int]:
    return [step for step, name in logger.rows if name == "outer/lr"]


def test_a_logger_that_fails_is_reported_once_and_opened_again_at_a_checkpoint(tmp_path, capsys):
    logger = Memory()
    trainer = trainer_of(tmp_path, logger, quiet=False)

    def on_step(report: Any) -> bool:
        logger.is_broken = report.step.version in (2, 3, 4, 5)
        return True

    trainer.fit(8, on_step)
    # It breaks after step 2 and recovers after step 6, whose checkpoint opens it again.
    assert steps_of(logger) == [1, 2, 7, 8]
    assert sorted({*logger.opened}, key=str) == [0, 2, 4, 6]
    (event,) = [e for e in read_events(Folder(tmp_path)) if e["event"] == "logger_failed"]
    assert event["logger"] == "Memory" and event["error"] == "ConnectionError: no network"
    assert event["step"] == 2
    assert capsys.readouterr().err.count("rows of Memory are missing from here") == 1
    assert_undisturbed(trainer, 8)
    shown = dict(run_status(tmp_path)._rows())
    assert shown["logs"] == "Memory failed at step 2: ConnectionError: no network"


def test_a_new_run_does_not_begin_without_its_logger_and_a_resumed_one_does(tmp_path):
    logger = Memory()
    logger.is_broken = True
    message = "loggers must be able to begin, got from Memory ConnectionError: no network"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, logger).fit(2)
    logger.is_broken = False
    trainer_of(tmp_path, logger).fit(2)
    assert steps_of(logger) == [1, 2]
    logger.is_broken = True
    resumed = trainer_of(tmp_path, logger)
    resumed.restore()
    assert resumed.fit(4).num_steps == 4


def test_a_logger_learns_how_the_run_ended(tmp_path):
    logger = Memory()

    def on_step(report: Any) -> bool:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainer_of(tmp_path, logger).fit(2, on_step)
    assert logger.ended == [True]
    resumed = trainer_of(tmp_path, logger)
    resumed.restore()
    resumed.fit(2)
    assert logger.ended == [True, False]


def test_scalars_of_ones_own_are_logged_beside_the_others(tmp_path):
    trainer = trainer_of(tmp_path, CSVLogger())

    def on_step(report: Any) -> bool:
        trainer.log({"distance": report.step.version / 4, "query_loss": 3.0}, "solution")
        return True

    trainer.fit(2, on_step)
    rows = csv_rows(tmp_path)
    for row in ((1, "solution/distance", 0.25), (2, "solution/distance", 0.5)):
        assert rows.count(row) == 1
    assert (1, "loss/solution", 3.0) in rows
    with pytest.raises(ValueError, match="log must be called while fit runs, with a run_dir"):
        trainer.log({"a": 1.0})


def test_a_branch_is_another_run_of_a_service(tmp_path):
    run = LoggedRun(tmp_path, "file:///a/mine/", 4, {})
    assert run.name == "mine"
    sent = Sent("mine.json", run)
    sent.identity = "first"
    sent.keep(5, ["loss/train"])
    again = Sent("mine.json", run)
    assert again.identity == "first"
    assert again.unsent(5, {"loss/train": 1.0, "loss/val": 2.0}) == {"loss/val": 2.0}
    assert again.unsent(6, {"loss/train": 1.0}) == {"loss/train": 1.0}
    branch = Sent("mine.json", LoggedRun(tmp_path, "mine", 4, {}, is_branch=True))
    assert branch.identity is None and branch.unsent(5, {"loss/train": 1.0})


def test_going_back_abandons_what_a_service_has(tmp_path):
    branches = []

    class Watching(Memory):
        def open(self, run: LoggedRun) -> None:
            super().open(run)
            branches.append(run.is_branch)

    trainer_of(tmp_path, Watching(), keep_checkpoints=9).fit(4)
    back = trainer_of(tmp_path, Watching(), keep_checkpoints=9)
    back.restore("step-00000002")
    back.fit(3)
    onward = trainer_of(tmp_path, Watching(), keep_checkpoints=9)
    onward.restore()
    onward.fit(4)
    assert branches == [False, True, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loggers": ["csv"]}, "loggers must be a list of objects of classes derived from Logger"),
        ({"loggers": CSVLogger()}, "loggers must be a list of objects"),
        ({"loggers": [CSVLogger(), CSVLogger()]}, "loggers must be of different classes"),
        ({"loggers": [CSVLogger()], "run_dir": None}, "loggers must be empty without a run_dir"),
        ({"callbacks": [print]}, "callbacks must be a list of objects of classes derived from"),
    ],
)
def test_what_cannot_log_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"run_dir": tmp_path, **given})


@pytest.mark.parametrize(("cls", "extra"), [(WandbLogger, "wandb"), (MlflowLogger, "mlflow")])
def test_without_its_package_a_logger_says_what_to_install(monkeypatch, cls, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'metadist\[{extra}\]'"):
        cls()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": None}, "values in log must be numbers, got None for 'a': give a float"),
        ({"a": "1"}, "got '1' for 'a'"),
        ({"a": torch.zeros(2)}, "got a tensor (2,) for 'a'"),
        ({3: 1.0}, "names in log must be texts, got 3: log("),
    ],
)
def test_scalars_that_are_none_are_refused_where_they_are_logged(tmp_path, values, message):
    trainer = trainer_of(tmp_path, CSVLogger())

    def on_step(report: Any) -> None:
        trainer.log({"good": torch.tensor(1.0)})
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer.log(values)

    trainer.fit(1, on_step)
    assert (1, "mine/good", 1.0) in csv_rows(tmp_path)
