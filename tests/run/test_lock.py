"""The lock of a run folder: one process at a time, and none that is gone stands in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from typing import Any

import fsspec
import pytest

from metadist.run import lock, processes
from metadist.run.files import LOCK
from metadist.run.lock import Holder, RunLock, RunLocked, holder_of
from metadist.run.storage import Folder
from tests.helpers import make_trainer

GONE = 2**22 + 1
"""No process has this number."""


@pytest.fixture(params=["file", "memory"])
def folder(request, tmp_path, monkeypatch):
    """A run folder that does not exist yet."""
    monkeypatch.setattr(lock, "SILENT_S", 0.4)
    monkeypatch.setattr(lock, "SETTLE_S", 0.01)
    if request.param == "file":
        yield Folder(tmp_path / "a" / "run")
        return
    name = uuid.uuid4().hex
    yield Folder(f"memory://{name}/run")
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


def write(folder: Folder, holder: Holder) -> None:
    folder.write(LOCK, json.dumps(asdict(holder)).encode())


def test_a_second_lock_is_refused_and_names_the_first(folder):
    first, second = RunLock(folder), RunLock(folder)
    first.acquire()
    with pytest.raises(
        RunLocked,
        match=rf"run_dir must be free, got '.*run', on which process {os.getpid()} on .* works "
        r"since .* \(last sign of life .*\): wait for it, stop it, or choose another folder. If "
        r"it is surely gone, remove .*run/lock.json",
    ):
        second.acquire()
    second.release()
    first.check()
    holder = holder_of(folder)
    assert holder is not None and holder.is_alive()
    first.release()
    first.release()
    assert holder_of(folder) is None
    second.acquire()
    second.release()


def test_a_lock_leaves_no_folder_that_it_made(folder, tmp_path):
    taken = RunLock(folder)
    taken.acquire()
    taken.release()
    assert list(tmp_path.iterdir()) == []


HERE = Holder.here()


@pytest.mark.parametrize(
    "holder",
    [
        replace(HERE, pid=GONE),
        replace(HERE, pid=os.getppid(), started="1"),
        replace(HERE, token="of a lock that was lost"),
        replace(HERE, host="elsewhere", time="2020-01-01T00:00:00+00:00"),
    ],
    ids=["killed", "another process of that number", "its own", "silent for years"],
)
def test_a_lock_of_a_process_that_is_gone_is_taken_over_at_once(folder, holder, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 60.0)
    write(folder, holder)
    said: list[str] = []
    taken = RunLock(folder, said.append)
    taken.acquire()
    taken.release()
    assert [f"taking over from process {holder.pid} on {holder.host}" in text for text in said] == [
        True
    ]


def test_a_process_that_was_killed_and_not_yet_waited_for_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = replace(HERE, pid=process.pid, started=processes.started(process.pid))
    assert holder.is_alive()
    process.kill()
    deadline = time.monotonic() + 10
    while holder.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not holder.is_alive()
    process.wait()


def test_a_process_that_is_hidden_is_neither_alive_nor_gone(monkeypatch):
    monkeypatch.setattr(processes, "started", lambda pid: "")
    holder = replace(HERE, pid=os.getppid(), time=lock._now())
    assert holder.is_alive() is None
    assert not processes.is_gone(
        {"host": holder.host, "boot": holder.machine, "pid": holder.pid, "started": holder.started}
    )


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"machine": "another container"}])
def test_a_stranger_is_waited_for_and_taken_over_if_silent(folder, change):
    write(folder, replace(HERE, **change, time=lock._now()))
    said: list[str] = []
    taken = RunLock(folder, said.append)
    taken.acquire()
    taken.release()
    assert "waiting 0.4 s for its death" in said[0] and "taking over" in said[1]


@pytest.mark.parametrize("hours", [0, 5], ids=["in time", "whose clock is slow"])
def test_a_stranger_with_a_sign_of_life_is_alive(folder, hours):
    def sign() -> None:
        seen = datetime.now(timezone.utc) - timedelta(hours=hours)
        write(folder, replace(HERE, host="elsewhere", time=seen.isoformat()))

    sign()
    beat = threading.Timer(0.15, sign)
    beat.start()
    with pytest.raises(RunLocked, match=r"on which process .* on elsewhere works since"):
        RunLock(folder).acquire()
    beat.join()


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_damaged_lock_is_waited_for(folder, data):
    folder.write(LOCK, data)
    said: list[str] = []
    taken = RunLock(folder, said.append)
    taken.acquire()
    assert "is locked by somebody" in said[0]
    taken.release()


def test_a_holder_gives_signs_of_life_and_notices_when_it_was_taken_over(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    taken = RunLock(folder)
    taken.acquire()
    first = holder_of(folder)
    assert first is not None
    deadline = time.monotonic() + 10
    while holder_of(folder) in (first, None) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = holder_of(folder)
    assert found is not None and found.token == first.token and found.time > first.time
    other = replace(first, host="elsewhere", token="other")
    while (found := holder_of(folder)) is None or found.token != "other":
        write(folder, other)
    time.sleep(0.1)
    with pytest.raises(RunLocked, match="on elsewhere works"):
        taken.check()
    taken.release()
    assert holder_of(folder) == other, "it is not ours to remove"


def test_of_many_that_come_at_once_one_wins(folder):
    locks = [RunLock(folder) for _ in range(8)]
    outcomes: list[Any] = []

    def acquire(each: RunLock) -> None:
        try:
            each.acquire()
            outcomes.append(each)
        except RunLocked:
            outcomes.append(None)

    threads = [threading.Thread(target=acquire, args=(each,)) for each in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [each for each in outcomes if each]
    assert len(winners) == 1 if folder.local else len(winners) <= 1
    for each in locks:
        each.release()


def test_a_run_that_was_taken_over_writes_no_more_checkpoints(tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, checkpoint_every=2)

    def on_step(report: Any) -> bool:
        if report.step.version == 3:
            holder = holder_of(Folder(run))
            assert holder is not None
            write(Folder(run), replace(holder, host="elsewhere", token="other"))
        return True

    with pytest.raises(RunLocked, match="on elsewhere works"):
        trainer.fit(9, on_step)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["step-00000000", "step-00000002"]


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{1}/./run", "{1}//run", "file://{0}"])
def test_a_folder_at_work_is_refused_however_it_is_written(tmp_path, spelling):
    run = tmp_path / "run"
    second = make_trainer(run_dir=spelling.format(run, tmp_path))

    def on_step(report: Any) -> bool:
        second.restore()
        with pytest.raises(RunLocked, match="run_dir must be free"):
            second.fit(5)
        return True

    make_trainer(run_dir=run).fit(1, on_step)
    assert not (run / LOCK).exists()
    second.restore()
    second.fit(2)
