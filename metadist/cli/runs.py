"""What the commands on an existing run share."""

from __future__ import annotations

from metadist.cli.parsing import Parser


def run_parser(command: str, description: str) -> Parser:
    """Options that the commands on an existing run share."""
    parser = Parser(prog=f"metadist {command}", description=description, positional="run_dir")
    parser.add_argument(
        "--run_dir", type=str, metavar="FOLDER", required=True, help="The folder of the run."
    )
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        help="The name of a checkpoint, or 'best'; by default the newest good one.",
    )
    return parser
