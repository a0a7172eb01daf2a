"""`scripts/chaos`: kills a run at random, and compares what it ends with."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from metadist.run.reading import find_events
from metadist.run.storage import Folder
from tests.helpers import CURVES, becomes, environment, finish, start, words

FILE = Path(__file__).parents[2] / "scripts" / "reliability" / "chaos.py"


@pytest.fixture(scope="module")
def chaos():
    spec = importlib.util.spec_from_file_location("chaos", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("has_actors", "expected"),
    [(True, {"worker": 3, "server": 2, "driver": 2}), (False, {"driver": 7})],
)
def test_a_plan_has_as_many_of_each_kind(chaos, has_actors, expected):
    deeds = chaos.plan(7, 9, 2.0, 5, has_actors)
    signals = dict.fromkeys(chaos.SENT, 1) | {"SIGINT": 2, "SIGTERM": 2}
    assert Counter(deed.kind for deed in deeds) == expected | signals
    assert deeds == chaos.plan(7, 9, 2.0, 5, has_actors) != chaos.plan(7, 9, 2.0, 6, has_actors)


def test_a_plan_may_have_no_deed_for_the_driver(chaos):
    kinds = Counter(deed.kind for deed in chaos.plan(2, 0, 2.0, 5, True))
    assert kinds == {"worker": 1, "server": 1}


def test_the_last_event_tells_whether_a_stopped_run_has_saved(chaos, tmp_path):
    run = chaos.Disturbed(tmp_path / "config.yaml", tmp_path, [], random.Random(0), None, 0.0)
    events = tmp_path / "events.jsonl"
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    for event, step, expected in (
        ("checkpoint_written", 7, True),
        ("checkpoint_written", 9, False),
        ("run_finished", 7, True),
        ("run_interrupted", 7, False),
    ):
        events.write_text(json.dumps({"event": event, "step": step}) + "\n")
        assert run._has_saved() == expected


def test_processes_are_told_apart_by_their_titles(chaos):
    lines = {2: "ray::Worker.compute", 3: "ray::ParameterServer", 4: "ray::IDLE", 5: "raylet"}
    assert chaos.victims_of("worker", lines) == [2]
    assert chaos.victims_of("server", lines) == [3]


def test_children_of_children_are_found(chaos):
    source = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], text=True)"
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE)
    try:
        while not any("input()" in line for line in chaos.descendants(process.pid).values()):
            assert process.poll() is None
    finally:
        process.communicate(b"\n")
    assert chaos.descendants(process.pid) == {}


STEPS = "--num_steps 600 --checkpoint_every 10 --tasks_per_lease 1"
"""On Ray a lease of all tasks would leave one worker alone."""


@pytest.fixture
def whole(tmp_path):
    """An undisturbed run in this folder, called `whole`."""
    train = ["-m", "metadist", "train", *CURVES, *words(STEPS)]
    assert finish(start([*train, "--run_dir", "whole"], tmp_path), 300).code == 0
    return tmp_path / "whole"


def call(whole: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FILE, "whole", *flags],
        cwd=whole.parent,
        env=environment(whole.parent),
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_is_killed_and_ends_with_the_same_bytes(whole):
    flags = "--kills 3 --signals 1 --every 2 --one_cluster -- --executor ray"
    found = call(whole, *words(flags))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 x worker, 1 x server, 1 x driver, 1 x SIGINT" in found.stdout
    assert "same bytes, no run lost" in found.stdout
    assert [path.name for path in whole.parent.glob("whole-chaos*")] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_another_result_is_found_and_kept(whole):
    found = call(whole, *words("--kills 1 --signals 0 -- --outer_optimizer.lr 0.02"))
    assert found.returncode == 1, found.stdout + found.stderr
    assert "DIFFERENT: outer" in found.stdout
    assert (whole.parent / "whole-chaos-1").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_with_other_leases_are_not_compared(whole):
    found = call(whole, *words("--kills 1 --signals 0 -- --tasks_per_lease 2"))
    assert found.returncode == 1, found.stdout + found.stderr
    assert "NOT COMPARABLE: tasks_per_lease is 2 here and 1 in the undisturbed run" in found.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_interrupts_while_the_server_is_replaced_leave_a_checkpoint(chaos, tmp_path):
    flags = words("--num_steps 100000 --checkpoint_every 10 --executor ray --run_dir run")
    process = start(["-m", "metadist", "train", *CURVES, *flags], tmp_path)
    run = tmp_path / "run"
    assert becomes(lambda: chaos.newest_step(run) >= 20 or process.poll() is not None, 300)
    for pid in chaos.victims_of("server", chaos.descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    found = finish(process, 300)
    assert found.code == 130, found.out + found.err
    events = find_events(Folder(run))[0]
    assert [each["event"] for each in events[-2:]] == ["run_interrupted", "checkpoint_written"]
    assert "server_recovered" not in {each["event"] for each in events}
    assert 20 <= chaos.newest_step(run) == events[-1]["step"] < 100_000


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    found = subprocess.run(
        [sys.executable, FILE, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 2
    assert "must be the folder of a finished run" in found.stderr
