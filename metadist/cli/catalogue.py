"""What can be named on the command line, as text for a terminal of any width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metadist.algorithm import Algorithm, Card
from metadist.cli.help import summary

LEGEND = (
    "Cost is per outer step and task: G = grad_y g, Gx = grad_x g, F = both gradients of f, "
    "H = H v, J = J v; T inner steps, Q adjoint steps, b directions, k columns, m vectors of a "
    "window, q a probability. "
    "State is what a task keeps from one outer step to the next beside x."
)

WIDE = 150
"""Columns from which on the cards are one table."""


def cards(algorithms: Mapping[str, type[Algorithm]], width: int) -> RenderableType:
    """The cards of `algorithms`, by short name, for a terminal of `width` columns."""
    named = {name: card_of(cls) for name, cls in algorithms.items()}
    legend = Text(LEGEND, style="dim")
    if width < WIDE:
        return Group(*(_block(name, card) for name, card in named.items()), legend)
    table = Table(show_lines=True)
    for heading, ratio in (
        *(("algorithm", None), ("method", 4), ("lower problem", 3), ("cost", 3), ("state", 2)),
        ("when", 5),
    ):
        table.add_column(heading, ratio=ratio, no_wrap=ratio is None)
    for name, card in named.items():
        method = Text(card.title).append(f"\n{card.source}", style="dim")
        facts = (Text(fact) for fact in (card.problems, card.cost, card.state, card.use))
        table.add_row(Text(name, style="bold"), method, *facts)
    return Group(table, legend)


def card_of(algorithm: type[Algorithm]) -> Card:
    """The card of a class; of one without a card, the first line of its docstring."""
    return Card(*algorithm.card) if algorithm.card else Card(summary(algorithm), *[""] * 5)


def classes(named: Mapping[str, type]) -> Table:
    """Short names with the first line of each class's docstring."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, cls in named.items():
        table.add_row(Text(name, style="bold"), Text(summary(cls)))
    return table


def _block(name: str, card: Card) -> RenderableType:
    head = Text(name, style="bold").append(f"  {card.title}", style="not bold")
    facts = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    facts.add_column(width=7, justify="right", style="dim", no_wrap=True)
    for label, fact in _facts(card):
        facts.add_row(label, Text(fact))
    return Group(head, facts, "")


def _facts(card: Card) -> Iterator[tuple[str, str]]:
    for label, fact in (
        ("paper", card.source),
        ("when", card.use),
        ("for", card.problems),
        ("cost", card.cost),
        ("state", card.state),
    ):
        if fact:
            yield label, fact
