"""Runs that the commands look at."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import CURVES, command, words


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 5 steps with checkpoints 2, 4 and 5, validated at each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = "--num_steps 5 --checkpoint_every 2 --val_split val --val_every 2 --val_tasks 3"
    assert command("train", *CURVES, "--run_dir", run, *words(flags)) == 0
    return run


@pytest.fixture
def run(finished, here):
    """A copy of it."""
    subprocess.run(["cp", "-r", finished, here / "run"], check=True)
    return here / "run"
