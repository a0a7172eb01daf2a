"""scripts/experiments/continual_mnist.py, on digits of 8 x 8."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).resolve().parents[3] / "scripts" / "experiments" / "continual_mnist.py"
SCRIPT: dict[str, Any] = runpy.run_path(str(FILE))
SETTING = SCRIPT["Setting"]("digits", num_tasks=2, per_task=60, num_test=50, width=16)


def test_baselines_train_on_what_they_are_named_after():
    stream, _ = SETTING.start(0)
    whole = stream.whole()
    step = stream.steps_per_stage + 2 * 3  # the second stage, its fourth batch
    none, replay, joint = (
        SCRIPT["_batches"](name, stream, whole, 0, step) for name in ("none", "replay", "joint")
    )
    assert torch.equal(none[0].tensors[0], whole.tensors[0][90:100])
    assert torch.equal(replay[0].tensors[0], none[0].tensors[0])
    support, query, _ = stream.sample_at(0, step)
    held = len(support.index) - 9 + len(query.index)
    assert len(replay[1].index) == held
    assert len(joint[0].index) == 74
    assert joint[0].tensors[1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", SCRIPT["METHODS"])
def test_methods_run(name):
    matrix = SCRIPT["bilevel"](SCRIPT["METHODS"][name], 0, SETTING)
    assert [len(row) for row in matrix.rows] == [1, 2]


def test_a_baseline_is_reported_as_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SCRIPT["main"].__globals__, "Setting", lambda num_tasks: SETTING)
    output = tmp_path / "lines"
    monkeypatch.setattr("sys.argv", ["x", "replay", "--seeds", "1", "--output", str(output)])
    SCRIPT["main"]()
    row = json.loads(output.read_text())
    assert (row["method"], row["seed"]) == ("replay", 1)
    assert row["accuracy"] > 0.1
    assert json.loads(capsys.readouterr().out) == row
    monkeypatch.setattr("sys.argv", ["x", "nothing"])
    with pytest.raises(SystemExit):
        SCRIPT["main"]()
    assert "methods must be of none, replay, joint, CTN" in capsys.readouterr().err
