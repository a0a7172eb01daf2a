"""`metadist report`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import run_parser


def parser() -> Parser:
    """Options of `metadist report`."""
    parser = run_parser(
        "report",
        "Write one HTML page about a run, or about a comparison: results with intervals, curves, "
        "sample tasks, learned weights, what was lost or dropped, protocol, settings and "
        "environment. It loads nothing and can be mailed. The run may be running or damaged; what "
        "is missing is listed.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        metavar="FILE",
        help="The file to write; by default report.html in the folder.",
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist report`."""
    from metadist.compare.plan import COMPARISON
    from metadist.report import comparison_page, run_page
    from metadist.run.storage import Folder

    if config.output and (config.output.endswith("/") or Path(config.output).is_dir()):
        raise ValueError(f"output must be a file, got the folder {config.output!r}: name one in it")
    folder = Folder(config.run_dir)
    make = comparison_page if COMPARISON in folder.names() else run_page
    page = make(config.run_dir).encode()
    output = config.output or f"{folder.uri.rstrip('/')}/report.html"
    parent, slash, name = output.rpartition("/")
    Folder(parent or slash or ".").write(name, page)
    print(f"{output}: {len(page) / 1e3:.0f} kB")
    return 0
