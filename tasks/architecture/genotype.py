"""Cells as the search finds them: which operations join which nodes.

A cell has the inputs 0 and 1, the outputs of the two cells before it, and nodes 2, 3, ... A node is
the sum of two edges from earlier ones; the output of the cell is all its nodes, concatenated.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from metadist.checks.values import require_integer
from metadist.tasks.data.random import Random

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The operations that an edge may have, in the order of the columns of x."""
INPUTS = 2


class Edge(NamedTuple):
    """An operation on the output of `source`: 0 and 1 are the inputs of the cell, 2 its node 0."""

    operation: str
    source: int


Cell = tuple[tuple[Edge, Edge], ...]
"""The two edges of each node."""


def num_edges(nodes: int) -> int:
    """The number of edges of a cell in which a node has an edge from all before it."""
    return sum(INPUTS + node for node in range(nodes))


def first_edge(node: int) -> int:
    """The row of x that belongs to the edge from input 0 to `node`; the other sources follow."""
    return num_edges(node)


@dataclass(frozen=True)
class Genotype:
    """The normal and the reduction cell of a network; the latter halves the side of the images.

        genotype = problem.genotype(trainer.outer)
        genotype.plot("cells.png")
        accuracy = retrain(genotype, data)

    Args:
        normal, reduction: For each node its two edges, which come from different sources.

    Raises:
        ValueError: An edge has an unknown operation or source, or a cell has no nodes.
    """

    normal: Cell
    reduction: Cell

    def __post_init__(self) -> None:
        for field in ("normal", "reduction"):
            cell = tuple(tuple(Edge(*edge) for edge in node) for node in getattr(self, field))
            _check_cell(field, cell)
            object.__setattr__(self, field, cell)
        if len(self.normal) != len(self.reduction):
            raise ValueError(
                f"both cells must have as many nodes, got {len(self.normal)} in normal and "
                f"{len(self.reduction)} in reduction"
            )

    @classmethod
    def derive(cls, outer: Mapping[str, Tensor]) -> Genotype:
        """The cells that `outer` is for most, as DARTS derives them.

        Each node keeps the two edges with the largest weight of an operation other than "none",
        the softmax over all operations being the weights, and on each of them that operation. Of
        equal weights the first counts.

        Args:
            outer: "normal" and "reduction", each of shape (edges, operations).

        Source: Liu, Simonyan, Yang, DARTS (ICLR 2019), section 2.4.
        """
        return cls(*(_derived(outer[field]) for field in ("normal", "reduction")))

    @classmethod
    def random(cls, seed: int, nodes: int = 2) -> Genotype:
        """Cells drawn uniformly: two sources for each node, an operation but "none" for each.

        Args:
            seed: 0 <= seed < 2^64.
            nodes: The nodes of a cell, >= 1.
        """
        require_integer("nodes", nodes, 1)
        draws = Random(seed, "genotype", 0)
        cells = []
        for _ in range(2):
            cell = []
            for node in range(nodes):
                sources = sorted(draws.choose(INPUTS + node, 2))
                drawn = [1 + word % (len(OPERATIONS) - 1) for word in draws.words(2).tolist()]
                names = [OPERATIONS[number] for number in drawn]
                cell.append((Edge(names[0], sources[0]), Edge(names[1], sources[1])))
            cells.append(tuple(cell))
        return cls(*cells)

    def to_json(self) -> str:
        """The cells as JSON: for each node two pairs (operation, source)."""
        return json.dumps({"normal": self.normal, "reduction": self.reduction}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """The cells that `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            cells: dict[str, Any] = json.loads(text)
            return cls(normal=cells["normal"], reduction=cells["reduction"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                "a genotype must be JSON of the fields normal and reduction, each a list of two "
                f"pairs [operation, source] for each node, got {text[:80]!r}"
            ) from error

    def plot(self, path: str | Path) -> None:
        """Write `png` to a file."""
        Path(path).write_bytes(self.png())

    def png(self) -> bytes:
        """A drawing of both cells, a PNG.

        Raises:
            ValueError: There is no matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError(
                "a genotype must not be drawn without matplotlib: pip install 'metadist[plots]'"
            ) from error
        width = 3 + 2 * len(self.normal)
        picture = Figure(figsize=(width, 7), layout="constrained")
        for panel, field in zip(picture.subplots(2, 1), ("normal", "reduction"), strict=True):
            _draw(panel, field, getattr(self, field))
        stream = io.BytesIO()
        picture.savefig(stream, format="png", dpi=100, metadata={"Software": None})
        return stream.getvalue()


def _check_cell(field: str, cell: Sequence[Sequence[Edge]]) -> None:
    if not cell:
        raise ValueError(f"{field} must have a node, got none")
    for number, node in enumerate(cell):
        sources = {edge.source for edge in node}
        if len(node) != 2 or len(sources) != 2 or not sources <= set(range(INPUTS + number)):
            raise ValueError(
                f"node {number} of {field} must have two edges from different sources in 0 .. "
                f"{INPUTS + number - 1}, got sources {[edge.source for edge in node]}"
            )
        for edge in node:
            if edge.operation not in OPERATIONS[1:]:
                raise ValueError(
                    f"an operation of {field} must be one of {', '.join(OPERATIONS[1:])}, got "
                    f"{edge.operation!r}"
                )


def _derived(alphas: Tensor) -> Cell:
    weights = alphas.detach().softmax(-1)[:, 1:].tolist()  # without "none"
    cell: list[tuple[Edge, Edge]] = []
    while first_edge(len(cell)) < len(weights):
        start, num_sources = first_edge(len(cell)), INPUTS + len(cell)
        rows = weights[start : start + num_sources]
        # sorted is stable: of equal edges the first.
        strongest = sorted(range(num_sources), key=lambda source: -max(rows[source]))[:2]
        edges = []
        for source in sorted(strongest):
            best = max(range(len(OPERATIONS) - 1), key=rows[source].__getitem__)
            edges.append(Edge(OPERATIONS[1 + best], source))
        cell.append((edges[0], edges[1]))
    return tuple(cell)


def _draw(panel: Any, title: str, cell: Cell) -> None:
    """One cell, from its inputs at the left to its output at the right."""
    places = [(0.0, 1.0), (0.0, -1.0)]
    names = ["previous\nbut one", "previous"]
    for number in range(len(cell)):
        places.append((2.0 * (number + 1), 0.6 * (-1) ** number))
        names.append(str(number))
    output = (2.0 * (len(cell) + 1), 0.0)
    for number, node in enumerate(cell):
        for operation, source in node:
            _arrow(panel, places[source], places[INPUTS + number], operation)
        _arrow(panel, places[INPUTS + number], output, "")
    for place, name in zip([*places, output], [*names, "output"], strict=True):
        panel.text(*place, name, ha="center", va="center", bbox={"fc": "w", "boxstyle": "round"})
    panel.set_xlim(-1, output[0] + 1)
    panel.set_ylim(-1.5, 1.5)
    panel.set_title(title)
    panel.axis("off")


def _arrow(panel: Any, start: tuple[float, float], end: tuple[float, float], label: str) -> None:
    style = {"arrowstyle": "->", "color": "C0" if label else "0.7", "shrinkA": 18, "shrinkB": 14}
    panel.annotate("", xy=end, xytext=start, arrowprops=style)
    if label:
        middle = (0.55 * start[0] + 0.45 * end[0], 0.55 * start[1] + 0.45 * end[1])
        box = {"fc": "w", "ec": "none", "pad": 0.5, "alpha": 0.8}
        panel.text(*middle, label, ha="center", va="center", fontsize=8, bbox=box)
