"""`metadist data list | fetch`."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from metadist.cli.parsing import Parser


def parser() -> Parser:
    """Options of `metadist data`."""
    parser = Parser(
        prog="metadist data",
        description="`metadist data list` shows what can be downloaded, `metadist data fetch NAME` "
        "downloads it, compares its checksums, and lays it out as torchvision expects it.",
    )
    parser.add_argument("action", choices=["list", "fetch"], help="What to do.")
    parser.add_argument("name", nargs="?", help="The name of a data set.")
    parser.add_argument(
        "--root", type=str | None, help="The folder of data sets; by default $METADIST_DATA."
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist data`; exit code 1 if a data set cannot be downloaded."""
    from rich.console import Console
    from rich.table import Table

    from metadist.tasks.data import sources

    if config.action == "list":
        if config.name is not None:
            raise ValueError(f"name must not be given with list, got {config.name!r}")
        table = Table("name", "files", "licence")
        for name, source in sources.SOURCES.items():
            table.add_row(name, "\n".join(source.files), source.licence)
        Console().print(table)
        print(f"below {sources.data_root(config.root)}")
        return 0
    if config.name is None:
        raise ValueError(f"name must be one of {', '.join(sources.SOURCES)}, got none")
    try:
        root = sources.fetch(config.name, config.root)
    except sources.FetchError as error:
        print(f"metadist data: failed: {error}", file=sys.stderr)
        return 1
    print(f"{config.name} is below {root}")
    return 0
