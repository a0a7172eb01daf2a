"""`metadist compare`."""

from __future__ import annotations

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import search_parser


def parser() -> Parser:
    """Options of `metadist compare`."""
    from metadist.cluster import Workers

    parser = search_parser(
        "compare",
        "Train several methods on one problem, each on the same budget and several "
        "seeds; write tables and curves. The same command again continues what was interrupted "
        "or failed, and repeats nothing. Exit code 1: a run has failed; the others are in the "
        "tables. See docs/compare.md.",
        "entries, a budget, options of `metadist train`",
    )
    parser.add_argument(
        "--workers",
        type=Workers | None,
        default=None,
        help="Processes of Ray for runs side by side: --workers.num_workers 4, "
        "--workers.cpus_per_worker, --workers.gpus_per_worker; by default one run after another in "
        "this process.",
    )
    parser.add_argument("--plots", type=bool, default=True, help="Draw curves (with matplotlib).")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist compare`; exit code 1 if a run has failed."""
    from metadist.cli.comparing import compare

    return compare(config)
