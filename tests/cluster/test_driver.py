"""The driver of a run on Ray is killed: what it checkpointed is what the run goes on from."""

from __future__ import annotations

import signal
import uuid

import pytest

from tests.cluster.toy import wait_until
from tests.core.helpers import CURVES, finish, last_state, processes_with, start, words

TRAIN = ["-m", "metadist", "train", *CURVES, *words("--num_steps 200 --checkpoint_every 10")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_is_resumed_to_the_bytes_of_one_process(tmp_path):
    whole = start([*TRAIN, "--run_dir", "whole"], tmp_path)
    mark = f"METADIST_TEST={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    on_ray = [*TRAIN, "--run_dir", "run", *words("--executor ray --executor.num_workers 2")]
    process = start(on_ray, tmp_path, **{name: value})
    run = tmp_path / "run"
    try:
        manifest = run / "checkpoints" / "step-00000020" / "manifest.json"
        assert wait_until(lambda: manifest.exists() or process.poll() is not None, timeout_s=300)
    finally:
        process.kill()
        assert finish(whole, timeout_s=300).code == 0
    assert finish(process).code == -signal.SIGKILL
    assert not (run / "result.json").exists()
    # What it started goes with it.
    assert wait_until(lambda: not processes_with(mark), timeout_s=300)
    resumed = finish(start(["-m", "metadist", "resume", "--run", "run"], tmp_path), timeout_s=300)
    assert resumed.code == 0, resumed.err
    assert (run / "result.json").exists()
    assert last_state(run) == last_state(tmp_path / "whole")
