"""`metadist data fetch | list`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from metadist.cli.parsing import Parser


def data_parser() -> ArgumentParser:
    """Options of `metadist data`."""
    parser = Parser(
        prog="metadist data",
        allow_abbrev=False,
        description="`list` what can be fetched, or `fetch NAME` one of them: checked "
        "by its checksums, and laid out as torchvision expects it.",
    )
    parser.add_argument("action", choices=["list", "fetch"], help="what to do")
    parser.add_argument("name", nargs="?", help="which data set")
    parser.add_argument("--root", type=str | None, help="folder of data sets; else the default one")
    return parser


def data(config: Namespace) -> int:
    """Run `metadist data`; exit code 1 if a data set cannot be had."""
    from metadist.tasks.data import sources as data_sources

    if config.action == "list":
        if config.name is not None:
            raise ValueError(f"name must not be given with list, got {config.name!r}")
        table = Table("name", "files", "licence")
        for name, source in data_sources.SOURCES.items():
            table.add_row(name, "\n".join(source.files), source.licence)
        Console().print(table)
        print(f"below {data_sources.data_root(config.root)}")
        return 0
    if config.name is None:
        raise ValueError(f"name must be one of {', '.join(data_sources.SOURCES)}, got none")
    try:
        root = data_sources.fetch(config.name, config.root)
    except data_sources.FetchError as error:
        print(f"metadist data: failed: {error}", file=sys.stderr)
        return 1
    print(f"{config.name} is below {root}")
    return 0
