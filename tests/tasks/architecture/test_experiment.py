"""scripts/experiments/nas_fashion.py, on digits and in seconds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "experiments" / "nas_fashion.py"

SMALL = (
    "--dataset digits --num_images 40 --num_test 50 --batch_size 16 --channels 2 --cells NR "
    "--nodes 1 --num_steps 1 --epochs 1 --seeds 1 --random 1"
)


@pytest.mark.filterwarnings("ignore:these outer variables got no hypergradient")
def test_what_is_missing_is_run_and_shown(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    file = tmp_path / "runs.jsonl"
    command = [str(file), *SMALL.split()]
    main([*command, "--methods", "MEHA", "random cells"])
    first = file.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["method"] for line in lines] == ["MEHA", "random cells"]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    main([*command, "--methods", "DARTS", "MEHA"])
    (added,) = file.read_text().removeprefix(first).splitlines()
    assert json.loads(added)["method"] == "DARTS"
    main([str(file), "--table"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("DARTS", "MEHA", "random cells"))
