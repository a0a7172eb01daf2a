"""`metadist inspect`."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from metadist.outer import OuterState
from metadist.run.checkpoint import Checkpoint
from metadist.run.text import MAX_CHARS, printable
from tests.cli.helpers import damage, flat
from tests.helpers import store_of


def test_inspect_shows_the_checkpoints_and_what_is_in_one(cli, run):
    out = flat(cli.good("inspect", run))
    best = store_of(run).best()
    for step in (2, 4, 5):
        mark = "good, best" if f"step-{step:08d}" == best else "good"
        assert re.search(rf"step-{step:08d} -\d+\.\d{{4}} {mark} ", out), out
    assert "step-00000005: outer step 5, next lease 5" in out
    assert "seed: 0" in out and "OuterOptimizer(name='adam', " in out
    assert "outer.features.0.weight (8, 1) float32 8" in out
    assert "optimizer.exp_avg (25,) float32 25" in out
    named = cli.good("inspect", run, "--checkpoint", "step-00000002")
    assert "step-00000002: outer step 2, next lease 2" in named
    assert "step-00000002: outer step 2" in cli.good(
        *("inspect", run / "checkpoints", "--checkpoint", "step-00000002")
    )


def test_inspect_fails_if_a_checkpoint_is_damaged(cli, run):
    damage(run, 5)
    code, out, _ = cli("inspect", run)
    assert code == 1
    assert "is damaged: state.json must have" in flat(out)
    assert "step-00000004: outer step 4" in out
    for step in (2, 4):
        damage(run, step)
    code, _, err = cli("inspect", run)
    assert code != 0 and "no good checkpoint in" in err
    code, _, err = cli("inspect", ".")
    assert code == 2 and "run_dir must be a folder with checkpoints, got '.'" in err


HOSTILE = [
    "w[/b]",
    "[red]w",
    "\x1b]0;t\x07\x1b[2J",
    "a\nb\r",
    "\u202eevil\u2066",
    "\x9b31m",
    "\u200b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_from_a_folder_reaches_the_terminal_as_it_is(cli, tmp_path, name):
    state = OuterState({name: torch.zeros(2)}, {name: torch.zeros(2)}, 1, 0, (), {}, {})
    store = store_of(tmp_path)
    store.save(Checkpoint(state, {"note": name, name: 1}))
    event = {"time": "2026-11-28T06:00:00+00:00", "step": 1}
    lines = [
        event | {"event": "run_started", "executor": name, name: name},
        event | {"event": "checkpoint_skipped", "checkpoint": name, "reason": name},
        event | {"event": name},
        event | {"event": "run_failed", "error": name},
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    for tag in (f"workers/tasks_per_second/{name}", "tasks/per_second", "workers/number"):
        writer.add_scalar(tag, 1.0, 1)
    writer.close()
    escaped = printable(name)
    for command in ("inspect", "status"):
        code, out, err = cli(command, tmp_path)
        assert (code, err) == (int(command == "status"), "")
        assert all(char.isprintable() for char in out.replace("\n", ""))
        assert escaped in out
    _, _, err = cli("inspect", tmp_path, "--checkpoint", f"x{name}")
    assert all(char.isprintable() for char in err.replace("\n", ""))


def test_a_long_text_is_cut():
    assert printable("x" * 9999) == "x" * MAX_CHARS + "..."
    assert printable("\ud800é\t日本") == "\\ud800é\\t日本"
