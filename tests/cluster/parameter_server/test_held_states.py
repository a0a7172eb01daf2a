"""Kept states that stay on the workers: the bytes of one process, and no travelling."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.algorithms import ITD
from metadist.cluster import RayExecutor, Server, Workers
from metadist.step_rules import Adam
from tests.cluster.toy import (
    FewLines,
    happens_first,
    local_run,
    make_workload,
    state_bytes,
)


@dataclass(frozen=True)
class DeadlyAt(FewLines):
    """Kills its process when it samples a task of `deaths` for the so-many-th time in all."""

    folder: str = ""
    deaths: tuple[tuple[int, int], ...] = ()

    def sample(self, index: int) -> Any:
        if self.folder:
            count = 1
            while not happens_first(self.folder, f"task-{index}-{count}"):
                count += 1
            if (index, count) in self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


def keeping(sampler: Any = None) -> Any:
    steps = Adam(0.01, eps=1e-3, clip_norm=1.0, carry=True)
    return replace(
        make_workload(),
        sampler=sampler or FewLines(),
        algorithm=ITD(3, inner_optimizer=steps),
        keep_state=True,
    )


HELD = {"state": "worker", "server": Server(snapshot_every=3)}


def test_states_that_stay_have_the_bytes_of_one_process(executor):
    expected, local = local_run(8, keeping())
    running = executor(keeping(), **HELD)
    reports = list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(local_run(4, keeping())[0])
    middle = running.state()
    reports += running.run(8)
    assert [report.step for report in reports] == [report.step for report in local]
    found = running.state()
    assert state_bytes(found) == state_bytes(expected)
    assert sorted(found.states) == [0, 1, 2, 3]
    running = executor(keeping(), middle, **HELD)
    list(running.run(8))
    assert state_bytes(running.state()) == state_bytes(expected)
