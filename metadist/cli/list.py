"""`metadist list`."""

from __future__ import annotations

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from metadist.cli.catalogue import cards, classes
from metadist.cli.names import KINDS, named
from metadist.cli.parsing import Parser


def parser() -> Parser:
    """Options of `metadist list`."""
    parser = Parser(
        prog="metadist list",
        description="List what has a short name, each with one line; of algorithms also the paper, "
        "the cost and when to use them.",
    )
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="What to list in full.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist list`."""
    console = Console()
    if config.kind == "algorithms":
        console.print(cards(named(config.kind), console.width))
    elif config.kind is not None:
        console.print(classes(named(config.kind)))
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for kind, (options, *_) in KINDS.items():
            table.add_row(kind, f"--{options[0]}", ", ".join(named(kind)))
        console.print(table)
        console.print("`metadist list KIND` says more about each.", highlight=False)
    return 0
