"""The experiment on sources of news, in small, with texts that need no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def experiment() -> Any:
    """The script as a module."""
    path = ROOT / "scripts" / "experiments" / "lm_sources.py"
    spec = importlib.util.spec_from_file_location("lm_sources", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spoilt_sources_lose_their_weight_in_60_steps(experiment: Any) -> None:
    prose = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("running", "problems"))
    text, length = prose.encode("ascii", "ignore"), experiment.LENGTH
    rows = [text[start : start + length] for start in range(0, len(text) - length, length)][:480]
    texts = {f"part {i}": b"".join(rows[i::4]) for i in range(4)}
    setting = experiment.Setting(rows=80, held_out=20, steps=60, batch_size=16, retrain_steps=0)
    experiment.LLAMA |= {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    result = experiment.run(["F2SA"], [0], setting, texts)
    assert result["separated"]["F2SA"] == [True]
    assert result["share_of_spoilt"]["F2SA"][0] < 0.15
