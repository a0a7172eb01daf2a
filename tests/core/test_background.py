"""Checkpoints that are written beside the training: whole, one at a time, and never in silence."""

from __future__ import annotations

import sys
import threading
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from metadist import CheckpointStore, LocalExecutor, TrainingDiverged
from metadist.run.background import Background
from metadist.run.files import LOCK
from metadist.run.storage import Folder
from tests.helpers import exact_state, finish, last_state, make_trainer, read_events, start

NUM_STEPS = 6
FIT = {"checkpoint_every": 2, "keep_checkpoints": 2, "keep_every": 4}


class Gate:
    """Writes of checkpoints after the first wait here until it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.num_running = Counter[bool]()
        self.most = 0
        self.is_open = threading.Event()
        self.fails_at: int | None = None
        save = CheckpointStore.save

        def gated(store: CheckpointStore, checkpoint: Any) -> str:
            step = checkpoint.state.version
            self.begun.append(step)
            self.num_running[True] += 1
            self.most = max(self.most, self.num_running[True])
            try:
                assert step == 0 or self.is_open.wait(60)
                if step == self.fails_at:
                    self.fails_at = None
                    raise OSError("the share is away")
                return save(store, checkpoint)
            finally:
                self.num_running[True] -= 1

        monkeypatch.setattr(CheckpointStore, "save", gated)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    if request.param == "file":
        yield str(tmp_path / "run")
        return
    name = uuid.uuid4().hex
    yield f"memory://{name}/run"
    Folder("memory://").remove(name)


def checkpoints(run_dir: str) -> dict[str, bytes]:
    folder = Folder(f"{run_dir}/checkpoints")
    return {
        f"{name}/{file}": folder.read(f"{name}/{file}", 1 << 30)
        for name in folder.names()
        for file in (folder / name).names()
    }


def test_training_goes_on_beside_a_write_and_the_next_one_waits(place, gate, tmp_path):
    def on_step(report: Any) -> bool:
        if report.step.version == 4:
            assert gate.begun == [0, 2] and gate.num_running[True] == 1
            gate.is_open.set()
        return True

    trainer = make_trainer(run_dir=place, **FIT)
    trainer.fit(NUM_STEPS, on_step)
    assert (gate.begun, gate.most) == ([0, 2, 4, 6], 1)
    written = [e for e in read_events(Folder(place)) if e["event"] == "checkpoint_written"]
    assert [event["step"] for event in written] == [0, 2, 4, 6]
    make_trainer(run_dir=tmp_path / "waiting", checkpoint_async=False, **FIT).fit(NUM_STEPS)
    found = checkpoints(place)
    assert found == checkpoints(str(tmp_path / "waiting"))
    assert {path[:13] for path in found} == {"step-00000004", "step-00000006"}


def test_without_it_training_waits_for_each_checkpoint(gate, tmp_path):
    gate.is_open.set()

    def on_step(report: Any) -> bool:
        assert gate.begun == [0, 2, 4][: (report.step.version + 1) // 2]
        assert gate.num_running[True] == 0
        return True

    make_trainer(run_dir=tmp_path, checkpoint_async=False, **FIT).fit(NUM_STEPS, on_step)


@pytest.mark.parametrize("step", [2, 6])
def test_a_write_that_fails_ends_the_run_at_the_next_step(gate, tmp_path, step, capsys):
    gate.fails_at = step
    steps = []

    def on_step(report: Any) -> bool:
        steps.append(report.step.version)
        return True

    gate.is_open.set()
    trainer = make_trainer(run_dir=tmp_path, quiet=False, **FIT)
    with pytest.raises(OSError, match="the share is away"):
        trainer.fit(NUM_STEPS, on_step)
    # The thread may take a moment longer than a step; then the next checkpoint finds the failure.
    newest = trainer.version
    assert newest in ({2: (3, 4), 6: (6,)}[step]) and steps[-1] in (newest, newest - 1)
    assert f"ended by an error at step {newest}, saved step-0000000{newest}" in (
        capsys.readouterr().err
    )
    assert last_state(tmp_path) == exact_state(trainer)
    assert read_events(Folder(tmp_path))[-2]["event"] == "run_failed"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError(), SystemExit(0), TrainingDiverged()], ids=repr
)
def test_every_way_out_waits_for_the_write(gate, tmp_path, monkeypatch, error, fails, capsys):
    wait = Background.wait
    gate.fails_at = 2 if fails else None

    def opening(background: Background) -> None:
        gate.is_open.set()
        wait(background)

    def on_step(report: Any) -> bool:
        if report.step.version == 3:
            monkeypatch.setattr(Background, "wait", opening)
            monkeypatch.setattr(Background, "check", lambda background: None)
            raise error
        return True

    with pytest.raises(type(error)) as caught:
        make_trainer(run_dir=tmp_path, quiet=False, **FIT).fit(NUM_STEPS, on_step)
    assert caught.value is error and gate.most == 1
    err = capsys.readouterr().err
    assert ("a checkpoint could not be written: the share is away" in err) == fails
    newest = 3 if not isinstance(error, TrainingDiverged) else 0 if fails else 2
    whole = make_trainer(run_dir=tmp_path)
    whole.restore()
    assert whole.version == newest and not (tmp_path / LOCK).exists()
    assert not [thread for thread in threading.enumerate() if "metadist-save" in thread.name]


def test_a_callback_that_saves_has_its_checkpoint_when_that_returns(gate, tmp_path):
    gate.is_open.set()
    trainer = make_trainer(run_dir=tmp_path, **FIT)

    def on_step(report: Any) -> bool:
        assert trainer.save() == report.step.version
        assert last_state(tmp_path) == exact_state(trainer)
        return True

    trainer.fit(3, on_step)


def test_a_node_that_will_stop_makes_a_checkpoint_due(tmp_path):
    class Draining(LocalExecutor):
        def run(self, until_version):
            for report in super().run(until_version):
                yield report._replace(is_draining=report.step.version == 3)

    make_trainer(run_dir=tmp_path, checkpoint_every=None, executor=Draining()).fit(5)
    events = [(e["event"], e["step"]) for e in read_events(Folder(tmp_path))]
    assert ("node_draining", 3) in events
    assert [step for event, step in events if event == "checkpoint_written"] == [0, 3, 5]


KILLED = """
import os, random, signal, sys, time
import torch
from metadist import CheckpointError, CheckpointStore
from tests.helpers import read_events, last_state, make_trainer

torch.set_num_threads(1)
random.seed(1)
folder = sys.argv[1]
sync = os.fsync

def slow(number):
    time.sleep(random.uniform(0, 0.02))
    sync(number)

def train(told, num_steps):
    os.fsync = slow
    trainer = make_trainer(run_dir=folder, checkpoint_every=2, keep_checkpoints=1)
    try:
        trainer.restore()
    except CheckpointError:
        assert trainer.version == 0
    def on_step(report):
        os.write(told, bytes([report.step.version]))
        return True
    trainer.fit(num_steps, on_step)

store = CheckpointStore(folder + "/checkpoints")
newest, cut_short = 0, 0
for number in range(6):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        train(theirs, 255)
        os._exit(1)
    os.close(theirs)
    seen = b""
    for _ in range(random.randint(1, 9)):
        seen += os.read(ours, 1)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(ours, 255):
        seen += more
    os.close(ours)
    reached = seen[-1]
    cut_short += any(name != store.load()[0] for name in store.names()[-1:])
    step = store.load()[1].state.version
    due = (reached - 1) // 2 * 2  # its write has begun, so the one before it has ended
    assert max(newest, due - 2) <= step <= reached, (newest, due, step, reached)
    newest = step
    print(step, reached, flush=True)
print("cut short:", cut_short)
read, write = os.pipe()
train(write, newest + 4)
whole = make_trainer()
whole.fit(newest + 4)
from tests.helpers import read_events, exact_state
from pathlib import Path
assert last_state(Path(folder)) == exact_state(whole)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path):
    root = Path(__file__).resolve().parents[2]
    process = start(["-c", KILLED, tmp_path / "run"], tmp_path, PYTHONPATH=str(root))
    code, out, err = finish(process, 300)
    assert code == 0, out + err
    sys.stdout.write(out)
