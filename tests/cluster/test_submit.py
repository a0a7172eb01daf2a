"""`ray job submit` and `ray submit`, for real, on a simulated host with token authentication."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadist import CheckpointStore

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]

TASKS = """
import torch
from metadist import Batch, Task

class Blobs:
    def __init__(self, n_way: int = 4):
        self.n_way = n_way

    def sample(self, index):
        random = torch.Generator().manual_seed(index)
        means = 2 * torch.randn(self.n_way, 3, generator=random)
        labels = torch.arange(self.n_way)
        sets = [means + torch.randn(self.n_way, 3, generator=random) for _ in range(2)]
        return Task(Batch.of(sets[0], labels), Batch.of(sets[1], labels), index)
"""
FLAGS = [
    *("--sampler", "my_tasks.Blobs", "--sampler.n_way", "3", "--num_steps", "4"),
    *("--problem.model", "mlp", "--problem.model.in_features", "3"),
    *("--problem.model.out_features", "3"),
]


def missing() -> str:
    """What this machine lacks for a host of its own; empty if nothing."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        return "the right to make namespaces"
    for tool in ("sshd", "ssh", "rsync", "ip"):
        if not (shutil.which(tool) or Path("/usr/sbin", tool).exists()):
            return tool
    return ""


@pytest.fixture
def work() -> Iterator[Path]:
    """A short path, because those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="md", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing()), reason=f"a simulated host needs {missing()}")
def test_both_ways_to_submit_train_with_the_users_own_sampler(work):
    (work / "user").mkdir()
    (work / "user" / "my_tasks.py").write_text(TASKS)
    script = str(Path(__file__).with_name("submit.sh"))
    bin_folder = str(Path(sys.executable).parent)
    run = subprocess.run(
        [*UNSHARE, "bash", script, str(work), str(ROOT), bin_folder, *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    states = []
    for name in ("job", "submit"):
        folder = work / "runs" / name
        assert json.loads((folder / "result.json").read_text())["num_steps"] == 4
        states.append(CheckpointStore(str(folder / "checkpoints")).load()[1].state)
    first, second = states
    assert all(bool((first.outer[name] == second.outer[name]).all()) for name in first.outer)
    _, _, refused = run.stdout.partition("== refused")
    assert "run_dir must be a new or empty folder" in refused
