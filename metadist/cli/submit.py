"""`metadist submit`."""

from __future__ import annotations

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.run.uris import check_no_secret


def parser() -> Parser:
    """Options of `metadist submit`."""
    parser = Parser(
        prog="metadist submit",
        usage="metadist submit [options] -- --run_dir FOLDER --sampler NAME [options of train]",
        description="Run `metadist train` as a job of a Ray cluster and follow it; with a run_dir "
        "that a job is at work on, follow that one. Its exit code is that of the run.",
    )
    parser.add_argument(
        "--address",
        type=str,
        default="http://127.0.0.1:8265",
        help="The address of Ray's dashboard.",
    )
    parser.add_argument(
        "--working_dir",
        type=str | None,
        default=".",
        help="The folder with your modules, which is shipped and in which the job runs. null: ship "
        "nothing; this is the head node, and the job runs in this folder.",
    )
    parser.add_argument(
        "--exclude",
        type=list[str],
        default=[],
        help="Names or patterns of files and folders in it that are not shipped.",
    )
    parser.add_argument(
        "--ship_metadist",
        type=bool,
        default=False,
        help="Ship this metadist too; the nodes need PyTorch and Ray themselves.",
    )
    parser.add_argument("--follow", type=bool, default=True, help="Print what the run prints.")
    parser.add_argument("flags", nargs="+", help="After --, the options of `metadist train`.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist submit`; the exit code is that of the run."""
    from metadist.cli import train
    from metadist.cluster.jobs.submit import submit

    run_dir = train.parser().parse_args(config.flags).run_dir
    if not run_dir:
        raise ValueError("run_dir must name a folder on the cluster, got none: pass --run_dir")
    check_no_secret(run_dir, "run_dir")
    if not any(flag.startswith("--if_exists") for flag in config.flags):
        config.flags = [*config.flags, "--if_exists", "continue"]
    job = submit(
        ["train", *config.flags],
        run_dir,
        config.address,
        working_dir=config.working_dir,
        exclude=config.exclude,
        ship_metadist=config.ship_metadist,
    )
    found = "at work on this run_dir already, with the options it was started with"
    print(f"job {job.id}: {'started' if job.is_new else found}")
    print(f"TensorBoard, where the run folder is: tensorboard --logdir {run_dir}")
    print(f"to stop it: ray job stop --address {config.address} {job.id}", flush=True)
    if not config.follow:
        return 0
    try:
        job.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"job {job.id} still runs; submit the same again to follow it", flush=True)
        raise
    print(f"job {job.id} {job.ending()}")
    return job.exit_code()
