"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path

from metadist.cli.parsing import Parser


def run_parser(command: str, description: str) -> Parser:
    """The parser of a command on an existing run."""
    parser = Parser(prog=f"metadist {command}", description=description, positional="run_dir")
    add_run_dir(parser, "The folder of the run.")
    return parser


def add_run_dir(parser: Parser, text: str) -> None:
    """Add the option for a folder that must be given."""
    parser.add_argument("--run_dir", type=str, metavar="FOLDER", required=True, help=text)


def add_checkpoint(parser: Parser) -> None:
    """Add the option for a checkpoint of a run."""
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        help="The name of a checkpoint, or 'best'; by default the newest good one.",
    )


def add_adaptation(parser: Parser) -> None:
    """Add the options of how a trained run adapts: checkpoint, steps and device."""
    add_checkpoint(parser)
    parser.add_argument(
        "--inner_steps", type=int | None, help="Inner steps of adaptation; by default as trained."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")


def output_file(field: str, given: str) -> Path:
    """The file to write; raises ValueError unless it can be made, before any work."""
    path = Path(given)
    if not path.parent.is_dir():
        raise ValueError(f"{field} must be in a folder that exists, got {given!r}")
    if path.is_dir():
        raise ValueError(f"{field} must be a file, got the folder {given!r}: name a file in it")
    return path


def search_parser(command: str, description: str, config: str) -> Parser:
    """The parser of a command that trains several times, as a YAML file with `config` says."""
    parser = Parser(prog=f"metadist {command}", description=description)
    parser.add_argument("config", type=str, help=f"A YAML file: {config}.")
    add_run_dir(parser, "The folder for all that the command writes.")
    parser.add_argument(
        "--address",
        type=str | None,
        help="The address of a running Ray cluster; by default RAY_ADDRESS, or a new one here.",
    )
    return parser
