"""Every config of an experiment is one that `metadist compare` takes, and is in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadist.cli.contenders import check_contender, contender
from metadist.cli.parsing import read_yaml
from metadist.cli.train import parse_training
from metadist.cluster import Workers
from metadist.compare.plan import Comparison, merge
from tests.tasks.helpers import write_tree

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "scripts" / "experiments").glob("*.yaml"))


def small(comparison, folder):
    """Options that make the data of a comparison small, so that none of it must be fetched."""
    kind = named(comparison.shared["sampler"])
    few_shot = {
        "meta_batch_size": 1,
        "problem": {"init_args": {"model": {"init_args": {"width": 4}}}},
    }
    sizes = ("num_train", "num_val", "num_test")
    if kind == "CorruptedImages":
        linear = {"class_path": "linear", "init_args": {"in_features": 64}}
        return {
            "sampler": {
                "init_args": {"dataset": "digits", "num_selection": 0, **dict.fromkeys(sizes, 60)}
            },
            "problem": {"init_args": {"num_examples": 60, "model": linear}},
        }
    if kind == "ImageData":
        images = {"dataset": "digits", "num_train": 64, "num_val": 64, "num_test": 64}
        network = {"channels": 2, "cells": "NR", "nodes": 1, "in_channels": 1}
        return {
            "sampler": {"init_args": images},
            "problem": {"init_args": {"supernet": {"init_args": network}}},
        }
    if kind == "TextFeatures":
        for label in "abcdefghi":
            (folder / label).mkdir()
            for number in range(16):
                words = (
                    f"{label}{label} word{number % 3} another{number} {'common ' * (number + 1)}"
                )
                (folder / label / f"{number}.txt").write_text(words)
        parts = {"num_train": 80, "num_val": 60, "num_selection": 1, "num_test": 1}
        return {"sampler": {"init_args": {"source": str(folder), "min_df": 1, **parts}}}
    if kind.startswith("LancBiO"):
        size = {"init_args": {"size": 40}}
        return {"sampler": size, "problem": size}
    if kind in ("ImageFolder", "FC100"):
        for split in ("train", "val", "test"):
            write_tree(folder / split, [f"{split} {c}" for c in "abcde"], 10, mode="RGB")
        arguments = {"root": str(folder), "k_shot": 5, "k_query": 5, "image_size": 16}
        tree = {"class_path": "metadist.tasks.ImageFolder", "init_args": arguments}
        model = {"model": {"init_args": {"width": 4, "image_size": 16}}}
        return {**few_shot, "sampler": tree, "problem": {"init_args": model}}
    return few_shot if kind == "Glyphs" else {}


def named(value):
    """The class of a sampler in a config."""
    path = value if isinstance(value, str) else value["class_path"]
    return path.rpartition(".")[2]


@pytest.mark.filterwarnings("ignore:these outer variables got no hypergradient")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_one_of_a_comparison_and_takes_steps(path, tmp_path):
    """All entries are parsed, the first makes two steps, on small data of the same kind."""
    comparison = Comparison.of(read_yaml(str(path)))
    (tmp_path / "data").mkdir()
    changes = small(comparison, tmp_path / "data")
    for entry in comparison.entries:
        # The first point: all others have the same options.
        run = comparison.runs(entry)[0]
        check_contender(merge(run.options, changes), run.point, workers=Workers())
    run = comparison.runs(next(iter(comparison.entries)))[0]
    options = merge(run.options, changes)
    trainer = contender(options, run.values, str(tmp_path / "run")).trainer
    before = {name: leaf.clone() for name, leaf in trainer.outer.items()}
    trainer.fit(2)
    assert all(leaf.isfinite().all() for leaf in trainer.outer.values())
    assert any(not leaf.equal(before[name]) for name, leaf in trainer.outer.items())
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
