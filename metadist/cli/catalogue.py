"""What can be named on the command line, as text for a terminal of any width."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metadist.cli.classes import PublicClass

LEGEND = (
    "Cost is per outer step and task: G = grad_y g, Gx = grad_x g, F = both gradients of f, "
    "H = H v, J = J v, H_f and J_f those of f; T inner steps, Q adjoint steps, b directions, "
    "k columns, m vectors of a window, q a probability. "
    "State is what a task keeps from one outer step to the next beside x."
)

FACTS = ("Family", "For", "Cost", "State", "Memory", "Use", "Breaks", "Source", "Differs")
"""The paragraphs of an algorithm's docstring that are read, see `metadist.Algorithm`."""

FAMILIES = (
    "Through the inner loop",
    "Implicit differentiation",
    "Stochastic",
    "First derivatives of g",
    "Heuristic",
)
"""What "Family" may be, in the order of docs/algorithms.md."""

WIDE = 150
"""Columns from which on the cards are one table."""


def cards(algorithms: Mapping[str, PublicClass], width: int) -> RenderableType:
    """The algorithms at a glance, by short name, for a terminal of `width` columns."""
    legend = Text(LEGEND, style="dim")
    if width < WIDE:
        return Group(*(_block(name, cls.doc) for name, cls in algorithms.items()), legend)
    table = Table(show_lines=True, expand=True)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("method", ratio=5)
    table.add_column("lower problem", ratio=3)
    table.add_column("cost", ratio=3)
    table.add_column("state", ratio=2)
    table.add_column("when", ratio=5)
    for name, cls in algorithms.items():
        method = Text(title(cls.doc)).append(f"\n{brief(cls.doc, 'Source')}", style="dim")
        columns = (Text(brief(cls.doc, fact)) for fact in ("For", "Cost", "State", "Use"))
        table.add_row(Text(name, style="bold"), method, *columns)
    return Group(table, legend)


def classes(named: Mapping[str, PublicClass]) -> Table:
    """Short names with the first line of each class's docstring."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, cls in named.items():
        table.add_row(Text(name, style="bold"), Text(cls.summary))
    return table


def title(doc: str) -> str:
    """The first line of a docstring, without the period."""
    return doc.partition("\n")[0].removesuffix(".")


def facts(doc: str) -> dict[str, str]:
    """The paragraphs of a docstring that start with one of `FACTS`, each as one line."""
    found: dict[str, str] = {}
    current = None
    for line in doc.splitlines():
        name, _, text = line.partition(": ")
        if name in FACTS and text:
            current = name
            found[current] = text
        elif not line:
            current = None
        elif current is not None:
            found[current] += f" {line}"
    return found


def brief(doc: str, fact: str) -> str:
    """The first sentence of a fact, without the period; empty where the docstring has none."""
    return facts(doc).get(fact, "").partition(". ")[0].removesuffix(".")


def _block(name: str, doc: str) -> RenderableType:
    head = Text(name, style="bold").append(f"  {title(doc)}", style="not bold")
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(width=7, justify="right", style="dim", no_wrap=True)
    labels = {"paper": "Source", "when": "Use", "for": "For", "cost": "Cost", "state": "State"}
    for label, fact in labels.items():
        if text := brief(doc, fact):
            table.add_row(label, Text(text))
    return Group(head, table, "")
