"""`metadist resume | evaluate | inspect | status`: the commands on an existing run."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from metadist.checks.preflight import initial_outer
from metadist.cli.names import ExecutorBase, SamplerBase
from metadist.cli.parsing import MAX_CONFIG_BYTES, Parser, check_yaml, instantiate, readable
from metadist.cli.training import (
    build,
    continue_run,
    print_evaluation,
    say_skipped,
    set_split,
    train_parser,
)
from metadist.evaluation import evaluate
from metadist.run.checkpoint import CheckpointError, CheckpointStore, check_same_model
from metadist.run.status import run_status
from metadist.run.storage import Folder, write_json
from metadist.trainer import CONFIG
from metadist.workload import Workload


def run_parser(command: str, description: str) -> ArgumentParser:
    """Options that the commands on an existing run share."""
    parser = Parser(prog=f"metadist {command}", allow_abbrev=False, description=description)
    parser.add_argument("--run", type=str, required=True, help="the run folder")
    parser.add_argument(
        "--checkpoint", type=str | None, help="name of a checkpoint, or 'best'; else the newest"
    )
    return parser


def resume_parser() -> ArgumentParser:
    """Options of `metadist resume`."""
    parser = run_parser("resume", "Continue a run from its newest good checkpoint.")
    parser.add_argument("--num_steps", type=int | None, help="outer steps in all; else as before")
    parser.add_subclass_arguments(
        ExecutorBase, "executor", required=False, help="where it runs; else as before"
    )
    return parser


def evaluate_parser() -> ArgumentParser:
    """Options of `metadist evaluate`."""
    parser = run_parser("evaluate", "Adapt to tasks of another split and report the accuracy.")
    parser.add_argument("--split", type=str, default="test", help="the split to judge on")
    parser.add_subclass_arguments(
        SamplerBase, "sampler", required=False, help="tasks to judge on, instead of --split"
    )
    parser.add_argument("--num_tasks", type=int, default=600, help="tasks")
    parser.add_argument("--inner_steps", type=int | None, help="of adaptation; else as trained")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--output", type=str | None, help="also write the result to this JSON file")
    return parser


def inspect_parser() -> ArgumentParser:
    """Options of `metadist inspect`."""
    return run_parser("inspect", "Show the checkpoints of a run and what is in one of them.")


def status_parser() -> ArgumentParser:
    """Options of `metadist status`."""
    parser = Parser(
        prog="metadist status",
        allow_abbrev=False,
        description="Show a running or finished run at a glance. Only its folder is read, wherever "
        "it runs. Exit codes: 0 it is running or finished; 1 it was interrupted, has failed, or "
        "has been silent for too long; 2 there is no run.",
    )
    parser.add_argument("run", type=str, help="the run folder")
    parser.add_argument(
        "--stale_s",
        type=float,
        default=300.0,
        help="seconds without a sign of life after which a run that has not ended is stale",
    )
    return parser


def resume(config: Namespace) -> int:
    """Run `metadist resume`."""
    run = saved_config(config.run)
    if config.num_steps is not None:
        run.num_steps = config.num_steps
    if config.executor is not None:
        run.executor = config.executor
    trainer, samplers = build(run)
    return continue_run(run, trainer, samplers, config.checkpoint)


def evaluate_run(config: Namespace) -> int:
    """Run `metadist evaluate`."""
    run = saved_config(config.run)
    if config.sampler is not None:
        run.sampler = config.sampler
    else:
        set_split(run, config.split)
    objects = instantiate(run, train_parser())
    store = CheckpointStore((Folder(config.run) / "checkpoints").uri)
    name, checkpoint = store.load(config.checkpoint)
    say_skipped(store.skipped)
    expected = initial_outer(
        objects.problem, Workload(objects.problem, objects.sampler, objects.algorithm), run.seed
    )
    check_same_model(checkpoint.state.outer, expected, f"{store.uri}/{name}")
    result = evaluate(
        objects.problem,
        objects.sampler,
        objects.algorithm,
        checkpoint.state.outer,
        config.num_tasks,
        inner_steps=run.eval_inner_steps if config.inner_steps is None else config.inner_steps,
        batch_size=run.batch_size,
        seed=run.seed,
        device=config.device,
    )
    print(f"{config.run} {name}, {checkpoint.state.version} outer steps")
    print_evaluation(result)
    if config.output:
        write_json(config.output, {"checkpoint": name, **result.to_json()})
    return 0


def inspect_run(config: Namespace) -> int:
    """Run `metadist inspect`; exit code 1 if a checkpoint is damaged."""
    store = CheckpointStore((Folder(config.run) / "checkpoints").uri)
    if not store.names():
        store = CheckpointStore(config.run)
    if not store.names():
        raise CheckpointError(f"run must be a folder with checkpoints, got {config.run!r}")
    damaged = 0
    table = Table("checkpoint", "score", "state", title=store.uri)
    for name in store.names():
        try:
            _, checkpoint = store.load(name)
        except CheckpointError as error:
            damaged += 1
            table.add_row(name, "", str(error))
        else:
            score = "" if checkpoint.score is None else f"{checkpoint.score:.4f}"
            table.add_row(name, score, "good" + (", best" if name == store.best() else ""))
    console = Console(soft_wrap=True)
    console.print(table)
    name, checkpoint = store.load(config.checkpoint)
    state = checkpoint.state
    console.print(f"{name}: outer step {state.version}, next lease {state.applied_below}")
    for key, value in checkpoint.info.items():
        console.print(f"  {key}: {value}", highlight=False)
    tensors = Table("tensor", "shape", "dtype", "numbers")
    for group, leaves in (("outer", state.outer), ("optimizer", state.optimizer)):
        for key, leaf in leaves.items():
            dtype = str(leaf.dtype).removeprefix("torch.")
            tensors.add_row(f"{group}.{key}", str(tuple(leaf.shape)), dtype, f"{leaf.numel():,}")
    console.print(tensors)
    return 1 if damaged else 0


def show_status(config: Namespace) -> int:
    """Run `metadist status`; exit code 1 if the run has stopped before its end."""
    found = run_status(config.run, config.stale_s)
    Console().print(found)
    return 0 if found.is_well else 1


def saved_config(run: str) -> Namespace:
    """The options that a run was started with."""
    parser = train_parser()
    parser.exit_on_error = False
    try:
        text = Folder(run).read(CONFIG, MAX_CONFIG_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"run must be a folder with a config.yaml, got {run!r}: give the run_dir of "
            "`metadist train`"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG} of run {run!r} cannot be read: {error}") from error
    try:
        check_yaml(text)
        config = parser.parse_string(text)
    except Exception as error:
        raise ValueError(
            f"{CONFIG} of run {run!r} must be as `metadist train` wrote it, got:\n"
            f"{readable(str(error))}"
        ) from error
    config.run_dir = run
    return config
