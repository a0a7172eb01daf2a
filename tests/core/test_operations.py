"""How many operations a lease asks of a GPU, and that asking for fewer changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metadist import task_hypergradients, trees
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BDA, BOME, ITD, MEHA, SOBA, Reptile
from metadist.compute import Compute
from metadist.step_rules import SGD, Adam
from tests.helpers import exact_regression, fused
from tests.problems import assert_close, generator

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"

# By leaf, and fused; in a loop and under vmap. Lower one of them where fewer are needed.
COUNTS: list[tuple[str, str, bool, int, int]] = [
    ("Conv4", "MAML", False, 3377, 1355),
    ("Conv4", "MAML", True, 2389, 1561),
    ("Conv4", "ANIL", False, 479, 371),
    ("Conv4", "AID", False, 821, 727),
    ("Conv4", "LancBiO", False, 1055, 957),
    ("Conv4", "BOME", False, 467, 345),
    ("MLP", "MAML", False, 626, 461),
    ("MLP", "AID", True, 434, 424),
]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import operations

    return operations


@pytest.mark.parametrize(("model", "lease", "vectorize", "by_leaf", "together"), COUNTS)
def test_a_lease_has_no_more_operations(operations, model, lease, vectorize, by_leaf, together):
    assert operations.counted(model, lease, vectorize).total() <= by_leaf
    with fused():
        assert operations.counted(model, lease, vectorize).total() <= together


ALGORITHMS: list[Algorithm] = [
    ITD(3, inner_optimizer=SGD(0.01, momentum=0.9, clip_norm=1.0)),
    ITD(3, inner_optimizer=Adam(0.01)),
    ITD(3, 0.01, engine="unrolled"),
    AID(3, 0.01, adjoint_steps=3),
    BDA(3, 0.01),
    BOME(3, 0.01),
    MEHA(3, 0.01, y_lr=0.01),
    SOBA(inner_lr=0.01),
    Reptile(3, 0.01),
]


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_fused_trees_give_the_same(algorithm, vectorize):
    problem, outer, tasks = exact_regression(algorithm, k=4)

    def total() -> Any:
        return task_hypergradients(
            *(problem, algorithm, outer, tasks),
            compute=Compute(vectorize=vectorize, batch_size=3),
            is_checked=True,
        ).total

    expected = total()
    with fused():
        assert_close(total(), expected, 1e-10)


def test_fused_arithmetic_has_the_bytes_of_leaf_by_leaf():
    first, second = (
        {
            "a": torch.randn(5, 2, generator=generator(n)),
            "b": torch.randn(3, generator=generator(n)),
        }
        for n in (0, 1)
    )
    rates = {"a": torch.tensor(0.3), "b": torch.rand(3)}

    def all_of_it() -> list[trees.Params]:
        return [
            trees.add(first, second),
            trees.add(first, second, -0.3),
            trees.add(first, second, torch.tensor(0.7)),
            trees.sub(first, second),
            trees.scale(first, 3),
            trees.multiply(rates, first),
            trees.zeros_like(first),
        ]

    expected, dot = all_of_it(), trees.dot(first, second)
    with fused():
        together, dot_together = all_of_it(), trees.dot(first, second)
    for found, tree in zip(together, expected, strict=True):
        for name, leaf in tree.items():
            assert trees.same_bytes(found[name], leaf)
    torch.testing.assert_close(dot_together, dot)
