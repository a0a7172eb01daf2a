"""`run_status`: what the folder of a run tells, while it goes on and after."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from metadist.run.files import CHECKPOINTS
from metadist.run.status import NUM_NAMED, RunStatus, run_status
from metadist.run.storage import Folder
from tests.helpers import (
    Recording,
    becomes,
    curves,
    finish,
    interrupt_at,
    latest_scalars,
    make_trainer,
    read_events,
    start,
    store_of,
)
from tests.run.test_monitor import events, scalars


def shown(status: RunStatus, width: int = 80) -> str:
    """What a terminal shows, with the lines of one row joined."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    return "\n".join(lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 6 steps with two validations."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(
        executor=Recording(),
        run_dir=folder,
        val_sampler=curves("val"),
        val_every=3,
        val_tasks=4,
        checkpoint_every=2,
        log_every=2,
    ).fit(6)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewrite(run: Path, keep: int, *more: dict[str, Any]) -> None:
    """Leave the first events of a run, and add `more` a second later."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines()[:keep]
    moment = datetime.fromisoformat(json.loads(lines[-1])["time"]) + timedelta(seconds=1)
    lines += [json.dumps({"time": moment.isoformat(), **event}) for event in more]
    path.write_text("\n".join(lines) + "\n")


def test_a_finished_run_at_a_glance(finished):
    status = run_status(finished)
    assert (status.state, status.is_well, status.step, status.until_step) == (
        "finished",
        True,
        6,
        6,
    )
    assert status.left_s is None and status.damaged == []
    store = store_of(finished)
    assert (status.newest, status.best) == (store.load()[0], store.best())
    assert list(status.checkpoints) == store.names()
    assert status.events == read_events(Folder(finished))
    text = shown(status)
    loss = scalars(events(finished / "tensorboard"))["loss/train"][6]
    val = store.load()[1].score
    assert val is not None
    for part in (
        f"run         {finished}"[:80],
        "state       finished, last wrote ",
        "step        6 of 6\n",
        "executor    local, bsp, cpu\n",
        " tasks/s, at step 6\n",
        f"training    loss {loss:.4g} (before ",
        f"validation  loss {-val:.4g} +- ",
        "step-00000006 (score ",
        "step 6 run_finished",
    ):
        assert part in text, (part, text)
    assert "losses" not in text and "error" not in text


def test_scalars_are_the_newest_of_tensorboard(finished):
    found = latest_scalars(Folder(finished / "tensorboard"))
    expected = scalars(events(finished / "tensorboard"))
    assert {tag: (scalar.step, scalar.value) for tag, scalar in found.items()} == {
        tag: max(values.items()) for tag, values in expected.items()
    }
    assert all(abs(scalar.time - time.time()) < 3600 for scalar in found.values())


def test_scalars_of_steps_that_are_taken_again_are_left_out(tmp_path):
    before = SummaryWriter(str(tmp_path))
    for step in range(1, 10):
        before.add_scalar("loss/train", 100 + step, step)
        if step in (3, 8):
            before.add_scalar("loss/val", step, step)
    before.close()
    after = SummaryWriter(str(tmp_path), purge_step=6)
    after.add_scalar("loss/train", 206, 6)
    after.close()
    files = sorted(tmp_path.iterdir())
    files[1].rename(files[0].with_name(files[0].name + "1"))  # written within the same second
    found = latest_scalars(Folder(tmp_path))
    assert found["loss/train"][:2] == (206, 6)
    assert found["loss/val"][:2] == (3, 3)


def test_half_a_record_is_being_written(finished, tmp_path):
    (path,) = (finished / "tensorboard").iterdir()
    whole = path.read_bytes()
    newest = latest_scalars(Folder(finished / "tensorboard"))
    for cut in (1, 5, 17, len(whole) - 3, len(whole)):
        (tmp_path / path.name).write_bytes(whole[: len(whole) - cut])
        assert set(latest_scalars(Folder(tmp_path))) <= set(newest)
    (tmp_path / path.name).write_bytes(whole + struct.pack("<Q", 1 << 60) + bytes(20))
    assert latest_scalars(Folder(tmp_path)) == newest


def test_a_run_that_has_not_ended_is_running_until_it_is_silent_for_long(run):
    rewrite(run, 3)
    last = max(scalar.time for scalar in latest_scalars(Folder(run / "tensorboard")).values())
    status = run_status(run, now=last + 20)
    assert (status.state, status.is_well, round(status.age_s)) == ("running", True, 20)
    assert "running, last wrote 20 s ago" in shown(status)
    status = run_status(run, now=last + 301)
    assert (status.state, status.is_well, status.left_s) == ("stale", False, None)
    assert "stale, last wrote 5.0 min ago" in shown(status)
    assert run_status(run, stale_s=400, now=last + 301).state == "running"
    assert run_status(run, now=last - 9).age_s == 0  # another machine's clock


def test_the_rest_is_told_at_the_speed_since_the_last_start(run):
    path = run / "events.jsonl"
    began = json.loads(path.read_text().splitlines()[0]) | {"until_step": 12}
    path.write_text(json.dumps(began) + "\n")
    last = max(scalar.time for scalar in latest_scalars(Folder(run / "tensorboard")).values())
    status = run_status(run, now=last)
    took = last - datetime.fromisoformat(began["time"]).timestamp()
    assert status.left_s == pytest.approx(took, rel=0.01)
    assert "step        6 of 12, about " in shown(status)


def test_an_interrupted_and_a_failed_run_say_so(tmp_path):
    trainer = make_trainer(executor=Recording(interrupt_at(3)), run_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(6)
    status = run_status(tmp_path)
    assert (status.state, status.is_well, status.step) == ("interrupted", False, 3)
    assert status.newest == "step-00000003" and status.best is None
    rewrite(tmp_path, 1, {"event": "run_failed", "step": 2, "error": "OSError: " + 300 * "no "})
    status = run_status(tmp_path)
    assert (status.state, status.is_well) == ("failed", False)
    assert "error       OSError: no no no" in shown(status)
    # A new start is a new state.
    rewrite(tmp_path, 2, {"event": "run_started", "step": 2, "until_step": 9})
    assert run_status(tmp_path).state == "running"


def test_what_was_lost_is_counted_over_the_whole_run(run):
    lost = {"event": "worker_lost", "step": 2, "num_lost": 2, "num_workers": 1}
    again = {"event": "lease_reissued", "step": 2, "leases": [8, 9, 11]}
    dropped = {"event": "task_dropped", "step": 3, "tasks": list(range(100, 180))}
    rewrite(run, 2, lost, again, dropped, {**lost, "num_lost": 1})
    text = shown(run_status(run))
    assert "losses      3 workers lost, 3 leases re-issued, 80 tasks dropped" in text
    assert "step 2 lease_reissued leases=8,9,11" in text
    assert "task_dropped tasks=100,101," in text


def test_who_holds_the_states_of_tasks_is_told(run):
    before = {"event": "states_held", "step": 0, "workers": ["worker-0: 0, 1"]}
    now = {**before, "step": 2, "workers": ["worker-0: 0", "worker-1: 1"]}
    rewrite(run, 1, before, now)
    assert "states      of tasks, on worker-0: 0; worker-1: 1" in shown(run_status(run))


def test_a_damaged_checkpoint_is_named(run):
    (run / "checkpoints" / "step-00000006" / "state.json").write_text("{}")
    status = run_status(run)
    assert status.damaged == ["step-00000006"] and status.newest == "step-00000004"
    assert "damaged: step-00000006" in shown(status)
    rewrite(run, 1)
    assert "being written or damaged: step-00000006" in shown(run_status(run, stale_s=1e9))


@pytest.mark.parametrize("width", [80, 60])
def test_many_workers_and_long_names_fit_on_the_screen(tmp_path, width):
    folder = tmp_path / ("long-" * 40)
    writer = SummaryWriter(str(folder / "tensorboard"))
    for number in range(300):
        writer.add_scalar(f"workers/tasks_per_second/worker-{number}", 1.5, 1)
    writer.add_scalar("workers/number", 300, 1)
    writer.close()
    text = shown(run_status(folder), width).replace("\n", "")
    assert "worker-0 1.5" in text and f"and {300 - NUM_NAMED} more" in " ".join(text.split())


def test_a_run_of_an_older_version_has_no_events(run):
    (run / "events.jsonl").unlink()
    status = run_status(run)
    assert (status.state, status.step, status.until_step) == ("running", 6, None)
    (run / "result.json").write_text('{"num_steps": 6, "num_tasks": 24, "num_dropped": 0}')
    status = run_status(run)
    assert (status.state, status.until_step) == ("finished", 6)
    assert "result      24 tasks in 0 s, 0 dropped" in shown(status)


def test_a_run_folder_may_be_at_any_uri(finished):
    memory = fsspec.filesystem("memory")
    memory.put(str(finished), "/elsewhere", recursive=True)
    try:
        there, here = run_status("memory://elsewhere", now=0), run_status(finished, now=0)
    finally:
        memory.rm("/elsewhere", recursive=True)
    assert there == replace(here, run="memory://elsewhere")


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_a_folder_without_a_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir must be the folder of a run .*, got '.*" + name):
        run_status(tmp_path / name)


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"it holds runs: a, b; give one$"):
        run_status(tmp_path)


def test_stale_s_must_be_positive(run):
    with pytest.raises(ValueError, match="stale_s must be > 0, got 0"):
        run_status(run, stale_s=0)


ENDLESS = """
import sys
from tests.helpers import make_trainer, curves
make_trainer(
    run_dir=sys.argv[1], checkpoint_every=2, keep_checkpoints=1, log_every=1,
    val_sampler=curves("val"), val_every=3, val_tasks=2,
).fit(1_000_000)
"""


def test_a_run_can_be_looked_at_while_it_writes(tmp_path):
    run = tmp_path / "run"
    process = start(["-c", ENDLESS, run], tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    try:
        assert becomes(lambda: (run / "events.jsonl").exists(), 60), process.poll()
        steps: list[int] = []
        begin = datetime.now(timezone.utc)
        while len(steps) < 100 or steps[-1] - steps[0] < 20:
            status = run_status(run)
            assert status.state == "running" and status.until_step == 1_000_000, shown(status)
            steps.append(status.step)
            assert steps == sorted(steps)
            assert (datetime.now(timezone.utc) - begin).total_seconds() < 60
        assert status.newest is not None and "training    loss " in shown(status)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        finish(process)
    status = run_status(run)
    assert (status.state, status.is_well) == ("killed", False)
    path = run / "events.jsonl"
    began = json.loads(path.read_text().splitlines()[0])
    # Another process that has the number by now, one whose end cannot be told from here.
    for there, state in (
        ({"pid": os.getpid()}, "killed"),
        ({"host": "elsewhere"}, "running"),
        ({"boot": "before"}, "running"),
        ({"pid": None}, "running"),
        ({"pid": -1}, "running"),
        ({"pid": 1 << 40}, "running"),
    ):
        path.write_text(json.dumps(began | there) + "\n")
        assert run_status(run).state == state, there
    assert run_status(run, now=time.time() + 301).state == "stale"


def test_a_run_that_waits_for_workers_is_one(tmp_path):
    (tmp_path / "config.yaml").touch()
    status = run_status(tmp_path)
    assert (status.state, status.is_well, status.step) == ("waiting", True, 0)
    assert "state       waiting" in shown(status)
