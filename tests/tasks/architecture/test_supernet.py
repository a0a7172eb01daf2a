"""The supernet against the networks it holds, and its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metadist import Batch, check_hypergradient
from metadist.algorithms import ITD
from metadist.tasks import ArchitectureSearch, Genotype, Network, Supernet
from metadist.tasks.architecture.genotype import OPERATIONS, first_edge, num_edges
from metadist.tasks.architecture.network import REDUCTION, CellInNetwork, DerivedCell
from metadist.tasks.architecture.supernet import MixedCell, MixedEdges
from metadist.tasks.fixed import OneTask

SIZES: dict[str, Any] = {
    "channels": 4,
    "cells": "NRRN",
    "nodes": 3,
    "in_channels": 2,
    "num_classes": 3,
}
ALL = [Genotype.random(seed, nodes=3) for seed in range(12)]


def one_hot(genotype: Genotype) -> dict[str, torch.Tensor]:
    """Logits whose softmax is 1 for the operations of `genotype` and "none" elsewhere."""
    outer = {}
    for field in ("normal", "reduction"):
        cell = getattr(genotype, field)
        logits = torch.zeros(num_edges(len(cell)), len(OPERATIONS))
        chosen = torch.zeros(len(logits), dtype=torch.int64)
        for node, edges in enumerate(cell):
            for operation, source in edges:
                chosen[first_edge(node) + source] = OPERATIONS.index(operation)
        outer[field] = logits.scatter(1, chosen[:, None], 1e4)
    return outer


def copy_operation(mixed: MixedEdges, edge: int, name: str, target: torch.nn.Module) -> None:
    """Give an operation of a derived network the weights of one edge of a supernet."""
    targets = [leaf for module, leaf in target.named_parameters() if leaf.ndim == 4]
    if name == "skip" and mixed.stride > 1:
        half = len(targets[0])
        sources = [leaf[edge * half :][:half] for leaf in mixed.skip.parameters()]
    elif "conv" in name:
        kind, size = ("separable" if name[0] == "s" else "dilated"), name[-1]
        layers = getattr(mixed, f"{kind}_{size}")
        sources = []
        for layer in layers if kind == "separable" else [layers]:
            sources += [layer.depthwise[edge][:, None], layer.pointwise[edge][..., None, None]]
    else:
        sources = []
    with torch.no_grad():
        for leaf, source in zip(targets, sources, strict=True):
            leaf.copy_(source)


def derived(supernet: Supernet, genotype: Genotype) -> Network:
    """The network of `genotype` with the weights of `supernet`."""
    network = Network(genotype, **{field: SIZES[field] for field in SIZES if field != "nodes"})
    network.double()
    for kind, searched, found in zip(SIZES["cells"], supernet.placed, network.placed, strict=True):
        assert isinstance(searched, CellInNetwork) and isinstance(found, CellInNetwork)
        assert isinstance(searched.body, MixedCell) and isinstance(found.body, DerivedCell)
        reduction = kind == REDUCTION
        cell = genotype.reduction if reduction else genotype.normal
        for node, edges in enumerate(cell):
            for place, (operation, source) in enumerate(edges):
                number = node - max(0, source - 1)  # among the edges that leave the source
                mixed = searched.body.states[source]
                assert isinstance(mixed, MixedEdges)
                copy_operation(mixed, number, operation, found.body.edges[2 * node + place])
        for name in ("first", "second"):
            getattr(found, name).load_state_dict(getattr(searched, name).state_dict(), strict=False)
    network.stem.load_state_dict(supernet.stem.state_dict(), strict=False)
    network.head.load_state_dict(supernet.head.state_dict())
    return network


@pytest.mark.parametrize("genotype", ALL, ids=range(len(ALL)))
def test_at_a_one_hot_softmax_it_is_the_derived_network(genotype):
    supernet = Supernet(**SIZES, seed=1).double()
    images = torch.randn(6, 2, 15, 15, dtype=torch.float64)
    for name, logits in one_hot(genotype).items():
        getattr(supernet, name).data.copy_(logits)
    network = derived(supernet, genotype)
    torch.testing.assert_close(supernet(images), network(images), rtol=1e-10, atol=1e-10)
    assert Genotype.derive(one_hot(genotype)) == genotype


def test_every_operation_is_among_the_genotypes_compared():
    found = {
        edge.operation for g in ALL for cell in (g.normal, g.reduction) for e in cell for edge in e
    }
    assert found == set(OPERATIONS[1:])


def test_the_initial_weights_are_those_of_the_seed_and_nothing_else():
    before = torch.random.get_rng_state()
    first, second, other = (Supernet(**SIZES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    same = [
        torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True)
    ]
    assert all(same)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_hypergradient_in_float64():
    problem = ArchitectureSearch(Supernet(channels=2, cells="NR", nodes=1, num_classes=2))
    images = torch.randn(2, 12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 2
    data = OneTask(Batch.of(images[0], labels), Batch.of(images[1], labels))
    algorithm = ITD(inner_steps=2, inner_lr=0.05)
    report = check_hypergradient(problem, data, algorithm, repeats=[], max_dense=1)
    assert report.error < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": "NN"}, "cells must be letters N .normal. and R .reduction., each at least once"),
        ({"cells": "NRX"}, "got 'NRX': for example 'NRN'"),
        ({"channels": 3}, "channels must be even, got 3"),
        ({"nodes": 0}, "nodes must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Supernet(**options)
