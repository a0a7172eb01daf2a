"""`metadist compare`."""

from __future__ import annotations

from jsonargparse import Namespace

from metadist.cli.parsing import Parser


def parser() -> Parser:
    """Options of `metadist compare`."""
    from metadist.cluster import Workers

    parser = Parser(
        prog="metadist compare",
        description="Train several methods on one problem, each on the same budget and several "
        "seeds; write tables and curves. The same command again continues what was interrupted "
        "or failed, and repeats nothing. Exit code 1: a run has failed; the others are in the "
        "tables. See docs/compare.md.",
    )
    parser.add_argument(
        "config", type=str, help="A YAML file: entries, a budget, options of `metadist train`."
    )
    parser.add_argument(
        "--run_dir",
        type=str,
        metavar="FOLDER",
        required=True,
        help="The folder for all that the command writes.",
    )
    parser.add_argument(
        "--workers",
        type=Workers | None,
        default=None,
        help="Processes of Ray for runs side by side: --workers.num_workers 4, "
        "--workers.cpus_per_worker, --workers.gpus_per_worker; by default one run after another in "
        "this process.",
    )
    parser.add_argument(
        "--address",
        type=str | None,
        help="The address of a running Ray cluster; by default RAY_ADDRESS, or a new one here.",
    )
    parser.add_argument("--plots", type=bool, default=True, help="Draw curves (with matplotlib).")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist compare`; exit code 1 if a run has failed."""
    from metadist.cli.comparing import compare

    return compare(config)
