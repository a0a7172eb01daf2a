"""`metadist submit`."""

from __future__ import annotations

import inspect

from jsonargparse import ArgumentParser, Namespace

from metadist.cli.names import expand_names
from metadist.cli.parsing import Parser
from metadist.cli.training import train_parser
from metadist.cluster.jobs.submit import submit as submit_job


def submit_parser() -> ArgumentParser:
    """Options of `metadist submit`."""
    parser = Parser(
        prog="metadist submit",
        allow_abbrev=False,
        description="Run `metadist train` as a job of a Ray cluster and follow it; with a run_dir "
        "that a job is at work on, follow that one. Its exit code is that of the run.",
    )
    parser.add_argument(
        "--address", type=str, default="http://127.0.0.1:8265", help="of Ray's dashboard"
    )
    parser.add_function_arguments(
        submit_job, skip={"arguments", "run_dir", "address"}, fail_untyped=False
    )
    parser.add_argument("--follow", type=bool, default=True, help="print what the run prints")
    parser.add_argument("flags", nargs="+", help="after --, the options of `metadist train`")
    return parser


def submit(config: Namespace) -> int:
    """Run `metadist submit`; the exit code is that of the run."""
    run = train_parser().parse_args(expand_names(config.flags))
    if not run.run_dir:
        raise ValueError("run_dir must name a folder on the cluster, got none: pass --run_dir")
    if not any(flag.startswith("--if_exists") for flag in config.flags):
        config.flags = [*config.flags, "--if_exists", "continue"]
    options = {
        key: value
        for key, value in config.items()
        if key in inspect.signature(submit_job).parameters
    }
    job = submit_job(["train", *config.flags], run.run_dir, **options)
    found = "at work on this run_dir already, with the options it was started with"
    print(f"job {job.id}: {'started' if job.is_new else found}")
    print(f"TensorBoard, where the run folder is: tensorboard --logdir {run.run_dir}")
    print(f"to stop it: ray job stop --address {config.address} {job.id}", flush=True)
    if not config.follow:
        return 0
    try:
        job.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"job {job.id} goes on; submit the same again to follow it", flush=True)
        raise
    print(f"job {job.id} {job.ending()}")
    return job.exit_code()
