"""A run on Ray tells the same events as one in this process, and what it lost beside."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from metadist import Callback, LocalExecutor, StepReport, Trainer
from metadist.cluster import RayExecutor, Workers
from metadist.executor import Executor
from metadist.loggers import CSVLogger
from metadist.run.status import run_status
from metadist.run.storage import Folder
from tests.cluster.toy import ADAM, Deadly, OneStep, Regression
from tests.helpers import read_events


class Noting(Callback):
    """Writes down each step and the process that it is called in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, report: StepReport) -> None:
        with (self.folder / "noted.txt").open("a") as stream:
            stream.write(f"{report.step.version} {os.getpid()}\n")


def logged(folder: Path) -> dict[tuple[str, str], str]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return {(row["step"], row["name"]): row["value"] for row in csv.DictReader(stream)}


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
        loggers=[CSVLogger()],
        callbacks=[Noting(folder)],
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
    here = [f"{step} {os.getpid()}" for step in (1, 2, 3, 4)]
    assert (tmp_path / "ray" / "noted.txt").read_text().splitlines() == here
    alone, rows = logged(tmp_path / "local"), logged(tmp_path / "ray")
    assert ("3", "workers/lost") in rows and ("1", "workers/number") in rows
    assert not any(name.startswith("workers/") for _, name in alone)
    timed = "tasks/per_second"
    expected = {key: float(value) for key, value in alone.items() if key[1] != timed}
    assert expected.keys() >= {("4", "outer/hypergradient_norm")}
    found = {key: float(rows[key]) for key in expected}
    assert found == pytest.approx(expected, rel=1e-5)  # leases of other sizes round otherwise
    status = run_status(tmp_path / "ray")
    assert (status.state, status.step, status.newest) == ("finished", 4, "step-00000004")
