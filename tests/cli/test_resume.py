"""`metadist resume`: to the bytes of a run that was never stopped."""

from __future__ import annotations

import re

import pytest

from tests.cli.helpers import damage, saved
from tests.helpers import CURVES, contents, last_state, store_of, words


def test_resume_goes_on_to_the_bytes_of_an_undisturbed_run(cli, run, here):
    out = cli.good("resume", "run", "--num_steps", 8)
    assert "continuing run from step-00000005" in out
    flags = "--num_steps 8 --checkpoint_every 2 --val_split val --val_every 2 --val_tasks 3"
    cli.good("train", *CURVES, "--run_dir", "whole", *words(flags))
    assert last_state(run) == last_state(here / "whole")
    assert saved()["num_steps"] == 8


def test_resume_of_a_finished_run_changes_nothing(cli, run):
    before = contents(run)
    assert "nothing to do: 5 outer steps are taken, num_steps=5" in cli.good("resume", run)
    assert contents(run) == before


def test_resume_completes_a_run_that_was_stopped_before_its_result_was_written(cli, run):
    expected = saved()
    (run / "result.json").unlink()
    cli.good("resume", run)
    assert saved()["best"] == expected["best"]
    assert saved()["num_steps"] == 5


def test_resume_from_an_earlier_checkpoint_and_with_another_executor(cli, run):
    before = last_state(run)
    out = cli.good(
        *("resume", run, "--checkpoint", "step-00000002", "--executor", "local"),
        *("--num_steps", "6"),
    )
    assert "from step-00000002" in out
    assert store_of(run).load()[0] == "step-00000006"
    assert last_state(run) != before


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_damaged_checkpoint_is_named_and_skipped(cli, run, command):
    damage(run, 5)
    code, out, err = cli(command, run, *(["--num_tasks", 3] * (command == "evaluate")))
    assert code == 0
    assert re.search(r"(?m)^skipped: checkpoint .*step-00000005 is damaged: state.json", err)
    assert "step-00000004" in out
