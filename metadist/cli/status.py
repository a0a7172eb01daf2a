"""`metadist status`."""

from __future__ import annotations

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import run_parser


def parser() -> Parser:
    """Options of `metadist status`."""
    parser = run_parser(
        "status",
        "Show a running or finished run at a glance. Only its folder is read, wherever "
        "it runs. Exit codes: 0 it is running, about to, or finished; 1 it was interrupted or "
        "killed, has failed, or has been silent for too long; 2 there is no run; 3 files of it are "
        "damaged, so that what is shown may be incomplete.",
    )
    parser.add_argument(
        "--stale_s",
        type=float,
        default=300.0,
        help="Seconds without a sign of life after which a run that has not ended is stale.",
    )
    parser.add_argument(
        "--address",
        type=str | None,
        help="The address of Ray's dashboard. A job that waits there has no run folder yet: with "
        "the address it is found.",
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist status`; exit code 1 if the run has stopped before its end, 3 for damage."""
    from rich.console import Console

    from metadist.run.status import run_status
    from metadist.run.text import printable

    try:
        status = run_status(config.run_dir, config.stale_s)
    except ValueError:
        job = None
        if config.address is not None:
            from metadist.cluster.jobs.submit import newest_job

            job = newest_job(config.run_dir, config.address)
        if job is None:
            raise
        print(f"job {job.id}: {printable(job.ending())}; it has written nothing yet")
        return 1 if job.is_over() else 0
    Console().print(status)
    if status.is_damaged:
        return 3
    return 0 if status.is_well else 1
