"""`metadist inspect`."""

from __future__ import annotations

import re

from metadist import CheckpointStore
from tests.cli.helpers import damage, flat


def test_inspect_shows_the_checkpoints_and_what_is_in_one(cli, run):
    out = flat(cli.good("inspect", run))
    best = CheckpointStore(str(run / "checkpoints")).best()
    for step in (2, 4, 5):
        mark = "good, best" if f"step-{step:08d}" == best else "good"
        assert re.search(rf"step-{step:08d} -\d+\.\d{{4}} {mark} ", out), out
    assert "step-00000005: outer step 5, next lease 20" in out
    assert "seed: 0" in out and "'name': 'adam'" in out
    assert "outer.features.0.weight (8, 1) float32 8" in out
    assert "optimizer.exp_avg (25,) float32 25" in out
    named = cli.good("inspect", run, "--checkpoint", "step-00000002")
    assert "step-00000002: outer step 2, next lease 8" in named
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
