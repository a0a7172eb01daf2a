"""A user's own folder: a class with `sample(index)` that derives from nothing, and a script."""

from __future__ import annotations

import importlib
import runpy
import shutil
import sys
import uuid
from pathlib import Path

import pytest

from metadist.checks.sampler import check_sampler
from tests.helpers import (
    PLUGIN,
    CommandLine,
    becomes,
    finish,
    last_state,
    processes_with,
    start,
    words,
)

FLAGS = words(
    "train --sampler my_tasks.MySampler --sampler.init_args.n_way 3 --problem.model mlp "
    "--problem.model.in_features 2 --problem.model.out_features 3 --problem.model.hidden [8] "
    "--algorithm.inner_steps 2 --meta_batch_size 8 --tasks_per_lease 2 --num_steps 4"
)
RAY = words("--executor ray --executor.workers.num_workers 2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the user's folder, with the process in it; their modules are forgotten after."""
    mine = tmp_path / "mine"
    shutil.copytree(PLUGIN, mine, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(mine)
    yield mine
    for name in ("my_tasks", "my_noise", "train_mine"):
        sys.modules.pop(name, None)


def local_run(folder: Path, cli: CommandLine) -> Path:
    cli.good(*FLAGS, "--run_dir", "local")
    return folder / "local"


def test_it_trains_from_the_command_line_and_in_a_script_to_the_same_bytes(
    folder, cli, monkeypatch
):
    state = last_state(local_run(folder, cli))
    monkeypatch.setattr(sys, "argv", ["train_mine.py", "scripted", "local"])
    monkeypatch.syspath_prepend(folder)
    runpy.run_path("train_mine.py", run_name="__main__")
    assert last_state(folder / "scripted") == state


def test_it_is_found_by_name_when_a_run_is_judged_and_continued(folder, cli):
    local_run(folder, cli)
    assert "continuing local from step-00000004" in cli.good(
        *("resume", "--run_dir", "local", "--num_steps", "6")
    )
    out = cli.good("evaluate", "--run_dir", "local", "--num_tasks", "5", *FLAGS[1:5])
    assert "sampler: MySampler(n_way=3, k_shot=3, k_query=4, spread=0.3)" in out
    code, _, err = cli("evaluate", "--run_dir", "local")
    assert code == 2
    assert "sampler must have an argument split to be judged on 'test', my_tasks.MySampler" in err


def test_it_keeps_the_contract_of_a_sampler(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    cls = importlib.import_module("my_tasks").MySampler
    report = check_sampler(cls(n_way=3), num_tasks=10)
    assert (report.n_way, report.distinct_tasks, report.processes) == (3, 10, True)
    assert cls.__bases__ == (object,)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "metadist", *FLAGS, *RAY, "--run_dir", "far"], id="command line"),
        pytest.param(["train_mine.py", "far", "ray"], id="script", marks=pytest.mark.slow),
    ],
)
def test_on_ray_it_gives_the_bytes_of_one_process_and_leaves_no_process(folder, cli, command):
    state = last_state(local_run(folder, cli))
    mark = uuid.uuid4().hex
    outcome = finish(start(command, folder, METADIST_TEST=mark), timeout_s=400)
    assert outcome.code == 0, outcome.err
    assert last_state(folder / "far") == state
    assert becomes(lambda: not processes_with(f"METADIST_TEST={mark}"))


def test_options_of_a_policy_in_a_file_of_its_own_keep_their_types(folder, cli):
    flags = words("--executor ray --executor.policy my_policies.Patient --executor.policy.size")
    found = cli(*FLAGS, *flags, "abc", "--run_dir", "run")
    assert found.code == 2 and "executor.policy.size must be an integer, got 'abc'" in found.err
