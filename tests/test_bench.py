"""The measuring of scripts/bench: ways must agree, missing ones are named, memory is real."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def contest(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import contest

    return contest


def result(value):
    return lambda: lambda: torch.tensor([3.0, value])


def absent():
    importlib.import_module("not_installed_anywhere")


def rows(table):
    """The cells of each row by the name of its way."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: row[1:] for row in zip(*columns, strict=True)}


def test_ways_in_turns(contest):
    ways = {"metadist": result(4.0), "by hand": result(4.0), "peer": result(5.0), "gone": absent}
    given = contest.Contest(title="toy", baseline="by hand", ways=ways)
    found = rows(contest.run_contest("toy", given, repeats=2, threads=1))
    assert found["metadist"][-1] == "0e+00"
    assert found["peer"][-1] == "2e-01!"  # 1 of |(3, 4)| = 5: another result than the baseline's
    assert found["gone"][0] == "not installed (not_installed_anywhere)"


def test_another_result_of_ours_is_refused(contest):
    ways = {"metadist": result(4.1), "by hand": result(4.0)}
    given = contest.Contest(title="toy", baseline="by hand", ways=ways)
    with pytest.raises(SystemExit, match=r"metadist differs from by hand by 2.0e-02"):
        contest.run_contest("toy", given, repeats=1, threads=1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_of_a_second_call(contest):
    code = (
        "import contest, torch\n"
        "def job(): sum(torch.ones(1 << 20) for _ in range(3)); return None\n"  # 4 MB each
        "contest.print_peak_memory(job)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **contest.MEMORY_ENVIRONMENT, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 7 < float(run.stdout) < 20  # two or three of them at once, whatever the first call left
