"""Searching, retraining, and what else a problem goes through: reports, resumes, Ray."""

from __future__ import annotations

import math

import pytest
import torch

from metadist import CheckpointStore, OuterOptimizer, Trainer
from metadist.algorithms import BOME, DARTS, F2SA, MEHA, SAMA, T1T2
from metadist.cli import main
from metadist.tasks import (
    ArchitectureSearch,
    Genotype,
    ImageData,
    Network,
    Supernet,
    check_sampler,
    retrain,
)
from metadist.trees import dot


def problem(**options) -> ArchitectureSearch:
    return ArchitectureSearch(Supernet(channels=2, cells="NR", nodes=1), **options)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData("digits", num_train=60, num_val=50, num_test=40)


def test_the_images_are_different_and_the_seed_says_which(data):
    parts = [data.train.pixels, data.val.pixels, data.test.pixels]
    assert [len(part) for part in parts] == [60, 50, 40]
    assert len({image.tobytes() for part in parts for image in part}) == 150
    other = ImageData("digits", num_train=60, num_val=50, num_test=40, seed=1)
    assert not torch.equal(other.sample(0).support.tensors[0], data.sample(0).support.tensors[0])
    check_sampler(data)


def test_images_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"num_val \(beside num_train\) must be <= "):
        ImageData("digits", num_train=1000, num_val=1000, num_test=40)


def test_the_losses_are_cross_entropies_and_the_inner_one_has_the_decay(data):
    search = problem(weight_decay=0.5)
    x = search.init_outer(torch.Generator().manual_seed(0))
    y = search.init_inner(x, data.sample(0))
    assert set(x) == {"normal", "reduction"} and not set(x) & set(y)
    batch = data.sample(0).query
    outer, inner = search.outer_loss(x, y, batch), search.inner_loss(x, y, batch)
    torch.testing.assert_close(inner, outer + 0.25 * dot(y, y))
    loss, metrics = search.loss_and_metrics(x, y, batch)
    assert loss == outer and metrics == search.metrics(x, y, batch)


METHODS = [
    DARTS(inner_steps=1, inner_lr=0.05),
    T1T2(inner_steps=1, inner_lr=0.05),
    SAMA(inner_steps=1, inner_lr=0.05),
    BOME(inner_steps=1, inner_lr=0.05, y_lr=0.05),
    F2SA(inner_steps=1, inner_lr=0.05, lam=10.0),
    MEHA(inner_lr=0.05, y_lr=0.05, gamma=10.0, c=1.0, c_power=0.0),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_search(method, data):
    search = problem()
    trainer = Trainer(search, data, method, batch_size=16, quiet=True)
    start = trainer.outer
    trainer.fit(2)
    assert all(trainer.outer[name].isfinite().all() for name in start)
    assert all(not torch.equal(trainer.outer[name], start[name]) for name in start)
    assert isinstance(search.genotype(trainer.outer), Genotype)


def test_a_search_learns(data):
    """f falls, and it falls by the architecture too."""
    trainer = Trainer(
        problem(),
        data,
        DARTS(inner_steps=1, inner_lr=0.5),
        outer_optimizer=OuterOptimizer(lr=0.05),
        batch_size=50,
        quiet=True,
    )
    start = trainer.outer
    trainer.fit(30)
    query = data.sample(0).query
    f = trainer.problem.outer_loss(trainer.outer, trainer.inner(0), query)
    assert f < 0.7 * math.log(10)
    assert f < trainer.problem.outer_loss(start, trainer.inner(0), query) - 0.1


def test_a_resumed_search_has_the_same_bytes(data, tmp_path):
    def trainer(run_dir):
        method = DARTS(inner_steps=1, inner_lr=0.05)
        return Trainer(problem(), data, method, batch_size=16, run_dir=run_dir, quiet=True)

    whole = trainer(None)
    whole.fit(4)
    trainer(tmp_path).fit(2)
    resumed = trainer(tmp_path)
    resumed.restore()
    resumed.fit(4)
    for name in whole.outer:
        assert torch.equal(whole.outer[name], resumed.outer[name])
    for name, leaf in whole.inner(0).items():
        assert torch.equal(leaf, resumed.inner(0)[name])


def test_the_cells_of_a_run_are_its_artifacts(data):
    pytest.importorskip("matplotlib")
    search = problem()
    x = search.init_outer(torch.Generator().manual_seed(0))
    files = search.artifacts(x, search.init_inner(x, data.sample(0)))
    assert Genotype.from_json(files["genotype.json"].decode()) == search.genotype(x)
    assert files["genotype.png"].startswith(b"\x89PNG")


def test_a_genotype_is_retrained_alike_for_a_seed(data):
    genotype = Genotype.random(0, nodes=1)

    def accuracy(seed):
        return retrain(genotype, data, 4, "NR", epochs=12, batch_size=20, lr=0.1, seed=seed)

    before = torch.random.get_rng_state()
    first = accuracy(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == accuracy(0) > 0.4
    assert {accuracy(1), accuracy(2)} != {first}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"batch_size": 111}, "batch_size must be <= 110, the training and validation images"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"cells": "N"}, "cells must be letters N"),
    ],
)
def test_retraining_that_is_refused(options, message, data):
    with pytest.raises(ValueError, match=message):
        retrain(Genotype.random(0), data, **options)


def test_the_network_has_running_statistics():
    network = Network(Genotype.random(0), channels=2).eval()
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_a_search_by_the_command_line(tmp_path):
    command = (
        "train --problem architecture_search --problem.supernet.channels 2 "
        "--problem.supernet.cells NR --problem.weight_decay 0.01 --sampler image_data "
        "--sampler.dataset digits --sampler.num_train 60 --sampler.num_val 50 "
        "--sampler.num_test 40 --algorithm darts --algorithm.inner_steps 1 --num_steps 2 "
        f"--batch_size 16 --run_dir {tmp_path}/run"
    )
    assert main(command.split()) == 0
    outer = CheckpointStore(f"{tmp_path}/run/checkpoints").load()[1].state.outer
    assert set(outer) == {"normal", "reduction"}
    written = sorted((tmp_path / "run" / "artifacts").glob("*/genotype.json"))
    assert Genotype.from_json(written[-1].read_text()) == problem().genotype(outer)
