"""The examples run as they stand; here with fewer steps, and what they learn is checked."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name, **options: importlib.import_module(name).main(**options)


def test_few_shot(run):
    assert run("few_shot", num_steps=4, num_test_tasks=10) > 0.25


def test_your_own_sampler(run, capsys):
    assert run("your_own_sampler", num_steps=20, num_test_tasks=40) > 0.5
    assert "accuracy on new tasks: 0." in capsys.readouterr().out


def test_your_own_problem(run):
    penalties = run("your_own_problem", num_steps=40)
    assert penalties[:5].mean() < penalties[5:].mean() / 3


def test_equilibrium_model(run):
    assert run("equilibrium_model", num_steps=60) > 0.7


def test_hyper_cleaning(run):
    metrics = run("hyper_cleaning", num_steps=40)
    assert metrics["precision"] > 0.8
    assert metrics["test_accuracy"] > 0.85


def test_continual_learning(run):
    metrics = run("continual_learning", num_tasks=2, per_task=150)
    assert metrics["accuracy"] > 0.3
    assert metrics["forgetting"] < 0.2


def test_architecture_search(run, tmp_path):
    """On digits, which need no download."""
    pytest.importorskip("matplotlib")
    small = {"num_steps": 3, "dataset": "digits", "num_images": 64, "num_test": 64, "epochs": 1}
    accuracy = run("architecture_search", run_dir=str(tmp_path / "run"), **small)
    assert 0 <= accuracy <= 1
    assert (tmp_path / "run" / "cell.png").read_bytes().startswith(b"\x89PNG")
