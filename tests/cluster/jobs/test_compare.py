"""`metadist compare` with runs on Ray: the same results, and losses that are made good."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.cli import main
from metadist.cluster import ClusterError, ResourcesError, Workers
from metadist.cluster.jobs.parallel import in_parallel
from tests.cluster.processes import CLUSTER, Script
from tests.compare.test_compare import CONFIG, MINE


def fatal_at_first(path: str) -> int:
    """The number of the call; the first one ends its process."""
    calls = int(Path(path).read_text()) + 1 if Path(path).exists() else 1
    Path(path).write_text(str(calls))
    if calls == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls


def always_fatal(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refusing(number: int) -> int:
    if number == 2:
        raise LookupError(f"no {number}")
    return number * number


def test_calls_go_several_at_a_time_and_errors_are_raised(ray_session):
    found = dict(in_parallel(refusing, [0, 1, 3], Workers(2)))
    assert found == {0: 0, 1: 1, 2: 9}
    assert list(in_parallel(refusing, [], Workers(2))) == []
    with pytest.raises(LookupError, match="no 2"):
        list(in_parallel(refusing, [1, 2], Workers(2)))
    with pytest.raises(ValueError, match="show_output must be False with runs side by side"):
        list(in_parallel(refusing, [1], Workers(show_output=True)))
    with pytest.raises(ResourcesError, match=r"num_workers=2 must have nodes with CPU: 1 and GPU"):
        list(in_parallel(refusing, [1], Workers(2, gpus_per_worker=1.0)))


@pytest.mark.slow
def test_a_call_whose_process_dies_is_made_again_and_given_up_at_last(ray_session, tmp_path):
    assert list(in_parallel(fatal_at_first, [str(tmp_path / "calls")], Workers(1))) == [(0, 2)]
    ((position, error),) = in_parallel(always_fatal, [""], Workers(1))
    assert position == 0 and isinstance(error, ClusterError)
    assert "the process of the call died" in str(error)


def results(folder: str) -> list[dict[str, Any]]:
    """Without what a clock says."""
    lines = Path(folder, "results.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def test_runs_on_ray_are_those_of_this_process(ray_session, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    config = {**CONFIG, "budget": {"calls": 60}, "evaluations": 2, "seeds": [0]}
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    here = ["compare", "config.yaml", "--plots", "false", "--run_dir"]
    assert main([*here, "out", "--workers.num_workers", "2"]) == 0
    assert "runs/SOBA/seed-0: " in capsys.readouterr().out
    assert main([*here, "plain"]) == 0
    assert results("out") == results("plain") and len(results("out")) == 6
    # What is done needs no process.
    assert main([*here, "out", "--workers.num_workers", "2"]) == 0
    assert results("out") == results("plain")


NODES = (
    CLUSTER
    + """
import threading
from pathlib import Path
from metadist.cli import main
os.environ["RAY_ADDRESS"] = cluster.address
added = cluster.add_node(num_cpus=1, **node)

def lose():
    while len(list(Path("out").glob("runs/*/seed-*/records.jsonl"))) < 2:
        time.sleep(0.01)
    cluster.remove_node(added, allow_graceful=False)

losing = threading.Thread(target=lose)
losing.start()
here = ["compare", "config.yaml", "--plots", "false", "--run_dir"]
print("exit", main([*here, "out", "--workers.num_workers", "2"]), flush=True)
losing.join()
cluster.shutdown()
del os.environ["RAY_ADDRESS"]
print("exit", main([*here, "plain"]), flush=True)
"""
)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_on_two_nodes_survive_the_loss_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    config = {**CONFIG, "budget": {"calls": 8_000}, "evaluations": 20}
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    output, _ = Script(NODES, str(tmp_path)).finish(timeout_s=600)
    assert [line for line in output.splitlines() if line.startswith("exit")] == ["exit 0"] * 2
    assert results("out") == results("plain") and len(results("out")) == 84
