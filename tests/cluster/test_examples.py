"""examples/on_a_cluster.py runs, and gives what examples/few_shot.py gives."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.usefixtures("free_cluster")
def test_on_a_cluster(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    options = {"num_steps": 2, "num_test_tasks": 4}
    on_ray = importlib.import_module("on_a_cluster").main(**options)
    assert on_ray == importlib.import_module("few_shot").main(**options)
