"""`metadist list`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from metadist.algorithms import ALGORITHMS
from metadist.cli.catalogue import cards, classes
from metadist.cli.names import KINDS, named
from metadist.cli.parsing import Parser


def list_parser() -> ArgumentParser:
    """Options of `metadist list`."""
    parser = Parser(
        prog="metadist list",
        allow_abbrev=False,
        description="Show what has a short name; of algorithms also the paper, cost and use.",
    )
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="what to show in full")
    return parser


def list_names(config: Namespace) -> int:
    """Run `metadist list`."""
    console = Console()
    if config.kind == "algorithms":
        console.print(cards(ALGORITHMS, console.width))
    elif config.kind is not None:
        console.print(classes(named(config.kind)))
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for kind, (_, option) in KINDS.items():
            table.add_row(kind, option, ", ".join(named(kind)))
        console.print(table)
        console.print("`metadist list KIND` tells more.", highlight=False)
    return 0
