"""Every config of an experiment is one that `metadist compare` takes, and is in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadist.cli.contenders import check_contender
from metadist.cli.parsing import read_yaml
from metadist.cli.train import parse_training
from metadist.cluster import Workers
from metadist.compare.plan import Comparison

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "scripts" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_parsed_and_its_head_says_what_it_is(path):
    comparison = Comparison.of(read_yaml(str(path)))
    for entry in comparison.entries:
        # The first point: all others have the same options.
        run = comparison.runs(entry)[0]
        check_contender(run.options, run.point, workers=Workers())
    head = path.read_text().partition("\n\n")[0]
    assert all(f"\n# {word}" in head for word in ("Paper", "Known: ", "Tuned: "))
    assert path.stem in (ROOT / "docs" / "experiments.md").read_text()


def test_a_problem_has_the_model_of_its_own_class_by_default():
    options = {
        "sampler": {"class_path": "corrupted_images", "init_args": {"dataset": "digits"}},
        "problem": {"class_path": "hyper_cleaning"},
        "run_dir": "x",
    }
    parsed = parse_training(options, {"problem.init_args.num_examples": 5})
    assert parsed.problem.init_args.model is None  # and not few_shot's conv4


def test_there_are_configs():
    assert len(CONFIGS) >= 10
