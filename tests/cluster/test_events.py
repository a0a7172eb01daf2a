"""A run on Ray tells the same events as one in this process, and what it lost beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metadist import LocalExecutor, Trainer
from metadist.cluster import (
    RayExecutor,
    Workers,
)
from metadist.executor import Executor
from metadist.run.status import run_status
from metadist.run.storage import Folder
from tests.cluster.toy import ADAM, Deadly, OneStep, Regression
from tests.helpers import read_events


def told(folder: Path, executor: Executor, deaths: str) -> list[tuple[Any, ...]]:
    """(event, step) and what is told beside, of a run whose worker may die at task 9."""
    indices = (9,) if deaths else ()
    Trainer(
        Regression(),
        Deadly(indices=indices, folder=deaths or None),
        OneStep(),
        outer_optimizer=ADAM,
        meta_batch_size=4,
        checkpoint_every=2,
        executor=executor,
        run_dir=folder,
        quiet=True,
    ).fit(4)
    found = []
    for event in read_events(Folder(folder)):
        del event["time"]
        found.append((event.pop("event"), event.pop("step"), event))
    return found


@pytest.mark.filterwarnings("ignore:these outer variables got no hypergradient")  # `idle`
def test_a_lost_worker_is_told_with_its_leases(free_cluster, tmp_path):
    local = told(tmp_path / "local", LocalExecutor(), "")
    executor = RayExecutor(Workers(num_workers=2, start_timeout_s=600))
    remote = told(tmp_path / "ray", executor, str(tmp_path))
    losses = [line for line in remote if line[0] in ("worker_lost", "lease_reissued")]
    # The lease of task 9 is of the third step, and with its worker another may wait.
    assert [line[:2] for line in losses] == [("worker_lost", 3), ("lease_reissued", 3)]
    assert losses[0][2]["num_lost"] == 1
    assert 9 in losses[1][2]["leases"]
    assert [line for line in remote[1:] if line not in losses] == local[1:]
    assert local[0][2]["until_step"] == remote[0][2]["until_step"] == 4
    assert (remote[0][2]["executor"], remote[0][2]["num_workers"]) == ("ray", "2")
    status = run_status(tmp_path / "ray")
    assert (status.state, status.step, status.newest) == ("finished", 4, "step-00000004")
