"""Cells: derived, drawn at random, written and drawn."""

from __future__ import annotations

import json

import pytest
import torch

from metadist.tasks import Genotype
from metadist.tasks.architecture.genotype import OPERATIONS, Edge

EDGES = [("sep_conv_3x3", 0), ("skip", 1)]


def test_the_two_strongest_edges_of_each_node_with_their_strongest_operation():
    alphas = torch.zeros(5, 8)
    # Node 0 has rows 0 and 1, node 1 rows 2, 3 and 4.
    alphas[0, OPERATIONS.index("dil_conv_5x5")] = 1
    alphas[1, OPERATIONS.index("max_pool_3x3")] = 2
    alphas[2, OPERATIONS.index("skip")] = 3
    # The softmax counts, not the logit: here "none" takes nearly all of the weight.
    alphas[3, OPERATIONS.index("sep_conv_5x5")] = 4
    alphas[3, 0] = 9
    alphas[4, OPERATIONS.index("avg_pool_3x3")] = 1
    genotype = Genotype.derive({"normal": alphas, "reduction": torch.zeros(5, 8)})
    assert genotype.normal == (
        (Edge("dil_conv_5x5", 0), Edge("max_pool_3x3", 1)),
        (Edge("skip", 0), Edge("avg_pool_3x3", 2)),
    )
    first = OPERATIONS[1]  # of equal weights the first
    assert genotype.reduction == (
        (Edge(first, 0), Edge(first, 1)),
        (Edge(first, 0), Edge(first, 1)),
    )


def test_random_cells_are_those_of_the_seed_and_have_all_operations():
    drawn = [Genotype.random(seed, nodes=4) for seed in range(30)]
    assert drawn[3] == Genotype.random(3, nodes=4)
    assert len(set(drawn)) == 30
    edges = [
        edge for g in drawn for cell in (g.normal, g.reduction) for node in cell for edge in node
    ]
    assert {edge.operation for edge in edges} == set(OPERATIONS[1:])
    assert {edge.source for edge in edges} == {0, 1, 2, 3, 4}


def test_json_round_trip():
    genotype = Genotype.random(0, nodes=3)
    assert Genotype.from_json(genotype.to_json()) == genotype


def test_a_drawing_of_both_cells(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    genotype = Genotype.random(0, nodes=4)
    genotype.plot(tmp_path / "cells.png")
    assert image.imread(tmp_path / "cells.png").std() > 0.05
    assert genotype.png() == (tmp_path / "cells.png").read_bytes()


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        ([], "normal must have a node, got none"),
        (
            [[("none", 0), ("skip", 1)]],
            "an operation of normal must be one of max_pool_3x3, .*'none'",
        ),
        ([[("skip", 0), ("skip", 2)]], r"node 0 of normal .* in 0 .. 1, got sources \[0, 2\]"),
        ([[("skip", 1), ("skip", 1)]], r"two edges from different sources .* \[1, 1\]"),
        ([EDGES, EDGES], "as many nodes, got 2 in normal and 1 in reduction"),
    ],
)
def test_what_is_no_genotype(normal, message):
    text = json.dumps({"normal": normal, "reduction": [EDGES]})
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", '{"normal": []}', '{"normal": 1, "reduction": 2}'])
def test_other_text_is_refused(text):
    with pytest.raises(
        ValueError, match="a genotype must be JSON of the fields normal and reduction"
    ):
        Genotype.from_json(text)
