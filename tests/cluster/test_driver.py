"""The driver of a run on Ray, or its head, is killed: checkpoints are what it goes on from."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.processes import Script
from tests.helpers import CURVES, Outcome, becomes, finish, last_state, processes_with, start, words

# In one process tasks would go together otherwise, and their sums round differently.
OPTIONS = words("--num_steps 200 --checkpoint_every 10 --tasks_per_lease 1")
TRAIN = ["-m", "metadist", "train", *CURVES, *OPTIONS]
ON_RAY = [*TRAIN, "--run_dir", "run", *words("--executor ray --executor.workers.num_workers 2")]
LONG_S = 300  # nothing but a fault takes so long


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint; -1 if there is none."""
    manifests = (run / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=-1)


def await_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return when the run has a checkpoint of that step or a later one."""
    becomes(lambda: newest(run) >= step or process.poll() is not None, LONG_S)


def resume(here: Path, **variables: str) -> Outcome:
    """`metadist resume`, which must succeed."""
    arguments = ["-m", "metadist", "resume", "--run_dir", "run"]
    outcome = finish(start(arguments, here, **variables), LONG_S)
    assert outcome.code == 0, outcome.err
    assert (here / "run" / "result.json").exists()
    return outcome


def whole_run(here: Path) -> object:
    """What a run in one process, which nothing disturbs, ends with."""
    assert finish(start([*TRAIN, "--run_dir", "whole"], here), LONG_S).code == 0
    return last_state(here / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_is_resumed_to_the_bytes_of_one_process(tmp_path):
    mark = f"METADIST_TEST={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    process = start(ON_RAY, tmp_path, **{name: value})
    run = tmp_path / "run"
    try:
        await_step(process, run, 20)
    finally:
        process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert not (run / "result.json").exists()
    # What it started goes with it.
    assert becomes(lambda: not processes_with(mark), LONG_S)
    resume(tmp_path)
    assert last_state(run) == whole_run(tmp_path)


HEAD = """
import os, sys, time
os.environ["RAY_AUTH_MODE"] = "disabled"
from ray.cluster_utils import Cluster
node = dict(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
for port in sys.argv[1:]:
    node["ray_client_server_port"] = int(port)
print(Cluster(initialize_head=True, head_node_args=node).address, flush=True)
time.sleep(10_000)
"""


@contextmanager
def head(*, client_port: int | None = None) -> Iterator[dict[str, str]]:
    """A head with two CPUs, all of it killed at the end; the variables that lead a driver to it.

    Where it listens for Ray's clients, they lead there.
    """
    with tempfile.TemporaryDirectory() as home:
        script = Script(HEAD, home, *([str(client_port)] if client_port else []))
        assert script.process.stdout is not None
        try:
            address = script.process.stdout.readline().strip()
            assert address, "the head did not start"
            if client_port:
                address = f"ray://127.0.0.1:{client_port}"
            yield {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        finally:
            script.stop()


@pytest.mark.slow
@pytest.mark.parametrize("with_driver", [True, False], ids=["and its driver", "alone"])
@pytest.mark.timeout(1800)
def test_a_run_goes_on_from_its_checkpoints_on_a_new_head(tmp_path, with_driver):
    seed = random.randrange(1000)
    print("seed", seed)  # noqa: T201
    steps = random.Random(seed).sample(range(100), 2)
    run = tmp_path / "run"
    arguments = ON_RAY
    for step in sorted(steps):
        with head() as variables:
            process = start(arguments, tmp_path, **variables)
            await_step(process, run, step)
            if with_driver:
                process.kill()
        # A driver that has lost its head ends too, and says so.
        outcome = finish(process, LONG_S)
        assert outcome.code == (-signal.SIGKILL if with_driver else 1), outcome.err
        assert step <= newest(run) < 200, outcome.err
        arguments = ["-m", "metadist", "resume", "--run_dir", "run"]
    with head() as variables:
        assert f"continuing run from step-{newest(run):08d}" in resume(tmp_path, **variables).out
    assert last_state(run) == whole_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.timeout(1800)
def test_a_signal_ends_a_run_on_rays_client_with_a_checkpoint(tmp_path, sent, code):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "run"
    with head(client_port=port) as variables:
        process = start([*ON_RAY, "--quiet", "false"], tmp_path, **variables)
        await_step(process, run, 10)
        process.send_signal(sent)
        outcome = finish(process, LONG_S)
        assert outcome.code == code, outcome.err
        assert f"saved step-{newest(run):08}" in outcome.err
        resume(tmp_path, **variables)
    assert last_state(run) == whole_run(tmp_path)
