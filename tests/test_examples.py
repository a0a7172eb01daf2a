"""The examples run as they stand; here with fewer steps, and what they learn is checked."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import AID
from tests.tasks.helpers import write_tree

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


def test_your_own_problem(capsys):
    found = runpy.run_path(str(FOLDER / "your_own_problem.py"))
    assert float(capsys.readouterr().out.rpartition(": ")[2]) < 2e-9
    adam = OuterOptimizer("adam", lr=0.1)
    trainer = Trainer(
        found["Ridge"](), found["data"], AID(inner_lr=0.1), outer_optimizer=adam, quiet=True
    )
    trainer.fit(40)
    penalties = trainer.outer["log_penalty"].exp()
    assert penalties[:3].mean() < penalties[3:].mean() / 3
    assert len((FOLDER / "your_own_problem.py").read_text().splitlines()) <= 30


def test_own_loop(run):
    assert run("own_loop", num_steps=30) < run("own_loop", num_steps=0) - 0.2


def test_clean_a_csv(run, tmp_path):
    num_wrong, num_left_out = run("clean_a_csv", folder=str(tmp_path), num_steps=20)
    assert num_wrong == 96
    assert 80 < num_left_out < 130
    lines = (tmp_path / "cleaned.csv").read_text().splitlines()
    assert lines[0] == "length,width,species,weight"
    assert len(lines) == 1 + 300 - num_left_out


def test_own_images(run, tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "images", [f"class{i}" for i in range(12)], num_images=16, side=16)
    monkeypatch.chdir(tmp_path)
    run("own_images", root="images", num_steps=2, n_way=2, num_test_tasks=4)
    assert re.search(r"accuracy on new classes: 0\.\d+ \+- 0\.\d+", capsys.readouterr().out)
    module = torch.load("classifier.pt", weights_only=False)
    assert module(torch.zeros(4, 1, 16, 16)).shape == (4, 2)


def test_equilibrium_model(run):
    assert run("equilibrium_model", num_steps=60) > 0.7


def test_hyper_cleaning(run):
    metrics = run("hyper_cleaning", num_steps=40)
    assert metrics["precision"] > 0.8
    assert metrics["test_accuracy"] > 0.85


def test_language_model(run, tmp_path):
    pytest.importorskip("transformers")
    shares = run("language_model", folder=str(tmp_path), num_steps=8)
    assert shares["news"] > shares["web"] + 0.05
    assert (tmp_path / "model" / "model.safetensors").exists()


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
