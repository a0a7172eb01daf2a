"""`metadist train | submit | resume | evaluate | inspect | status | check-hypergradient | list`.

The one module that knows all layers. Everything that is trained is named by class path and built
by jsonargparse from YAML and flags; the config is kept in the run folder.

Exit codes: 0 done; 1 the run or the check failed; 2 the input was refused, nothing was started;
130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint written.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
import traceback
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from rich.console import Console
from rich.table import Table

from metadist import __version__
from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS
from metadist.catalogue import cards, classes
from metadist.checkpoint import CheckpointError, CheckpointStore, check_same_model
from metadist.cluster import ClusterError
from metadist.cluster.submit import submit as submit_job
from metadist.evaluation import EvaluationResult, evaluate
from metadist.hypergradient_check import check_hypergradient
from metadist.lease import Workload
from metadist.outer import OuterOptimizer
from metadist.preflight import check_losses, initial_outer
from metadist.sampler_check import check_sampler
from metadist.status import RESULT, run_status
from metadist.storage import Folder, write_json
from metadist.trainer import CONFIG, Trainer, TrainingDiverged, headline

NAMES = {
    **{name: f"metadist.algorithms.{cls.__name__}" for name, cls in ALGORITHMS.items()},
    "local": "metadist.executor.LocalExecutor",
    "ray": "metadist.cluster.RayExecutor",
    "few_shot": "metadist.tasks.FewShotProblem",
    "conv4": "metadist.models.Conv4",
    "resnet12": "metadist.models.ResNet12",
    "mlp": "metadist.models.MLP",
    "glyphs": "metadist.tasks.Glyphs",
    "sinusoid": "metadist.tasks.Sinusoid",
    "omniglot": "metadist.tasks.Omniglot",
    "cifar_fs": "metadist.tasks.CIFARFS",
    "fc100": "metadist.tasks.FC100",
    "image_folder": "metadist.tasks.ImageFolder",
    "linear": "metadist.tasks.LinearClassifier",
    "hyper_cleaning": "metadist.tasks.HyperCleaning",
    "class_weights": "metadist.tasks.ClassWeights",
    "loss_weighting": "metadist.tasks.LossWeighting",
    "corrupted_images": "metadist.tasks.CorruptedImages",
    "long_tail": "metadist.tasks.LongTail",
    "text_regularisation": "metadist.tasks.TextRegularisation",
    "text_features": "metadist.tasks.TextFeatures",
    "quadratics": "metadist.tasks.Quadratics",
    "quadratic_data": "metadist.tasks.QuadraticData",
    "lancbio_synthetic": "metadist.tasks.LancBiOSynthetic",
    "lancbio_data": "metadist.tasks.LancBiOData",
    "amigo_toy": "metadist.tasks.AmigoToy",
    "coreset": "metadist.tasks.Coreset",
    "degenerate": "metadist.tasks.Degenerate",
    "lasso": "metadist.tasks.Lasso",
    "merely_convex": "metadist.tasks.MerelyConvex",
    "minimax": "metadist.tasks.Minimax",
    "pbgd_toy": "metadist.tasks.PBGDToy",
    "penalty_toy": "metadist.tasks.PenaltyToy",
    "sine": "metadist.tasks.Sine",
    "no_data": "metadist.tasks.NoData",
}
"""Short names of class paths."""

MAX_CONFIG_BYTES = 1 << 20


def _any_with(title: str, *methods: str) -> type:
    """A base class of every class with these methods: users need not derive from ours.

    `title` is the heading of its options in the help.
    """

    class Base(ABC):  # noqa: B024  # it is its subclass hook
        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            return all(callable(getattr(other, name, None)) for name in methods)

    Base.__name__ = " ".join(methods)  # for the message of `_readable`
    Base.__doc__ = title
    return Base


SamplerBase: Any = _any_with("Tasks", "sample")
ProblemBase: Any = _any_with("Problem", "init_outer", "init_inner", "inner_loss", "outer_loss")
ExecutorBase: Any = _any_with("Executor", "start", "run", "state", "close")

KINDS: dict[str, tuple[type, str]] = {
    "algorithms": (Algorithm, "--algorithm"),
    "problems": (ProblemBase, "--problem"),
    "models": (torch.nn.Module, "--problem.model"),
    "samplers": (SamplerBase, "--sampler"),
    "executors": (ExecutorBase, "--executor"),
}
"""What has short names: its base class and its option."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one call of the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Users' modules beside their script or in the folder they are in, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parsers = {name: make() for name, (make, _) in COMMANDS.items()}
    top = argparse.ArgumentParser(
        prog="metadist",
        description="Distributed meta-learning and bilevel optimisation.",
        epilog="`metadist COMMAND --help` tells the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"metadist {__version__}")
    top.add_argument("command", choices=list(COMMANDS), help="what to do")
    command = top.parse_args(arguments[:1]).command
    config = parsers[command].parse_args(_expand_names(arguments[1:]))
    try:
        with _terminate_as_interrupt() as stopped_by:
            try:
                return COMMANDS[command][1](config, parsers["train"])
            except KeyboardInterrupt:
                return 128 + stopped_by()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"metadist {command}: error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, ClusterError, FloatingPointError) as error:
        print(f"metadist {command}: failed: {error}", file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001  # the last place; the user sees all of it
        traceback.print_exc()
        return 1


def train_parser() -> _Parser:
    """Options of `metadist train`."""
    parser = _Parser(
        prog="metadist train",
        allow_abbrev=False,
        description="Meta-train, write checkpoints and TensorBoard events, evaluate at the end.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--run_dir", type=str, help="new folder for everything the run writes")
    parser.add_argument("--num_steps", type=int, default=1000, help="outer steps")
    parser.add_argument("--seed", type=int, default=0, help="of model, tasks' draws and order")
    _add_workload(parser)
    for split in ("val", "test"):
        parser.add_subclass_arguments(
            SamplerBase, f"{split}_sampler", required=False, help=f"{split} tasks"
        )
        parser.add_argument(
            f"--{split}_split",
            type=str | None,
            help=f"instead of {split}_sampler: `sampler` with this value of its argument split",
        )
    parser.add_class_arguments(OuterOptimizer, "outer_optimizer")
    parser.add_subclass_arguments(
        ExecutorBase, "executor", required=True, help="where it runs; this process by default"
    )
    parser.first += ["--executor", NAMES["local"]]
    parser.add_class_arguments(
        Trainer,
        skip={
            "problem", "sampler", "algorithm", "outer_optimizer", "seed", "executor", "run_dir",
            "val_sampler", "config",
        },
    )  # fmt: skip
    parser.add_argument("--test_tasks", type=int, default=600, help="tasks of the final test")
    parser.add_argument(
        "--if_exists",
        type=Literal["refuse", "continue"],
        default="refuse",
        help="what to do if run_dir holds a run: continue it from its newest good checkpoint with "
        "these options, or, if it is finished, say so",
    )
    return parser


def _add_workload(parser: _Parser) -> None:
    """Options of what is solved, on what tasks, by which method."""
    parser.add_subclass_arguments(
        SamplerBase, "sampler", required=True, help="training tasks: a class with sample(index)"
    )
    parser.add_subclass_arguments(
        ProblemBase, "problem", required=True, help="what is solved; few_shot with conv4 by default"
    )
    parser.add_subclass_arguments(
        Algorithm, "algorithm", required=True, help="by which method; itd by default"
    )
    parser.first += ["--problem", NAMES["few_shot"], "--problem.model", NAMES["conv4"]]
    parser.first += ["--algorithm", NAMES["itd"]]


def run_parser(command: str, description: str) -> ArgumentParser:
    """Options that the commands on an existing run share."""
    parser = _Parser(prog=f"metadist {command}", allow_abbrev=False, description=description)
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
    parser = _Parser(
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


def check_parser() -> ArgumentParser:
    """Options of `metadist check-hypergradient`."""
    parser = _Parser(
        prog="metadist check-hypergradient",
        allow_abbrev=False,
        description="Compare an algorithm's hypergradient with exact derivatives, on one task.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_workload(parser)
    parser.add_function_arguments(
        check_hypergradient, skip={"problem", "tasks", "algorithm", "outer"}
    )
    parser.add_argument(
        "--max_error",
        type=float | None,
        help="exit with 1 if the error is larger, against the unrolled map for an algorithm that "
        "trains the start of adaptation, else against the solution",
    )
    return parser


def submit_parser() -> ArgumentParser:
    """Options of `metadist submit`."""
    parser = _Parser(
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


def list_parser() -> ArgumentParser:
    """Options of `metadist list`."""
    parser = _Parser(
        prog="metadist list",
        allow_abbrev=False,
        description="Show what has a short name; of algorithms also the paper, cost and use.",
    )
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="what to show in full")
    return parser


def train(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist train`."""
    if not config.run_dir:
        raise ValueError("run_dir must name a new folder, got none: pass --run_dir runs/NAME")
    trainer, samplers = _build(config, parser)
    if config.if_exists == "continue" and CONFIG in Folder(config.run_dir).names():
        return _continue(config, trainer, samplers)
    return _fit(config, trainer, samplers)


def resume(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist resume`."""
    run = _saved_config(config.run, parser)
    if config.num_steps is not None:
        run.num_steps = config.num_steps
    if config.executor is not None:
        run.executor = config.executor
    trainer, samplers = _build(run, parser)
    return _continue(run, trainer, samplers, config.checkpoint)


def _continue(
    run: Namespace, trainer: Trainer, samplers: dict[str, Any], checkpoint: str | None = None
) -> int:
    name = trainer.restore(checkpoint)
    _say_skipped(trainer.skipped)
    print(f"continuing {run.run_dir} from {name}")
    if trainer.version >= run.num_steps and RESULT in Folder(run.run_dir).names():
        print(f"nothing to do: {trainer.version} outer steps are taken, num_steps={run.num_steps}")
        return 0
    return _fit(run, trainer, samplers)


def evaluate_run(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist evaluate`."""
    run = _saved_config(config.run, parser)
    if config.sampler is not None:
        run.sampler = config.sampler
    else:
        _set_split(run, config.split)
    objects = _instantiate(run, parser)
    store = CheckpointStore((Folder(config.run) / "checkpoints").uri)
    name, checkpoint = store.load(config.checkpoint)
    _say_skipped(store.skipped)
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
    _print_evaluation(result)
    if config.output:
        write_json(config.output, {"checkpoint": name, **result.to_json()})
    return 0


def inspect_run(config: Namespace, parser: ArgumentParser) -> int:
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


def show_status(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist status`; exit code 1 if the run has stopped before its end."""
    found = run_status(config.run, config.stale_s)
    Console().print(found)
    return 0 if found.is_well else 1


def check(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist check-hypergradient`; exit code 1 if --max_error is exceeded."""
    if config.max_error is not None and not config.max_error >= 0:
        raise ValueError(f"max_error must be >= 0, got {config.max_error}")
    objects = _instantiate(config, check_parser())
    options = inspect.signature(check_hypergradient).parameters
    report = check_hypergradient(
        tasks=objects.sampler, **{key: value for key, value in objects.items() if key in options}
    )
    Console().print(report)
    if config.max_error is not None and not report.error <= config.max_error:
        judged = any(comparison.judged for comparison in report.comparisons)
        print(
            f"metadist check-hypergradient: failed: the error against {report.measure} must be <= "
            f"max_error = {config.max_error:g}, got {report.error:.3g}"
            + ("" if judged else ": that reference is not known here, see the note"),
            file=sys.stderr,
        )
        return 1
    return 0


def list_names(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist list`."""
    console = Console()
    if config.kind == "algorithms":
        console.print(cards(ALGORITHMS, console.width))
    elif config.kind is not None:
        console.print(classes(_named(config.kind)))
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for kind, (_, option) in KINDS.items():
            table.add_row(kind, option, ", ".join(_named(kind)))
        console.print(table)
        console.print("`metadist list KIND` tells more.", highlight=False)
    return 0


def submit(config: Namespace, parser: ArgumentParser) -> int:
    """Run `metadist submit`; the exit code is that of the run."""
    run = parser.parse_args(_expand_names(config.flags))
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


def _named(kind: str) -> dict[str, type]:
    """The classes of a kind by short name."""
    found: dict[str, type] = {}
    for name, path in NAMES.items():
        module, _, cls = path.rpartition(".")
        named = getattr(importlib.import_module(module), cls)
        if issubclass(named, KINDS[kind][0]):
            found[name] = named
    return found


COMMANDS: dict[str, Any] = {
    "train": (train_parser, train),
    "resume": (resume_parser, resume),
    "evaluate": (evaluate_parser, evaluate_run),
    "inspect": (inspect_parser, inspect_run),
    "status": (status_parser, show_status),
    "check-hypergradient": (check_parser, check),
    "submit": (submit_parser, submit),
    "list": (list_parser, list_names),
}


class _Parser(ArgumentParser):
    """Says what is wrong, without two screens of usage before it; `first` come before all flags.

    So classes are named by default. A default in the usual sense would fill in the values of its
    class, of which those that another class knows too would stay when that one is named.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.first: list[str] = []

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_args([*self.first, *args], *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # a parser of nested arguments: the outermost one tells
            super().error(message, ex)
        print(f"{self.prog}: error: {_readable(message)}", file=sys.stderr)
        print(f"`{self.prog} --help` tells the options", file=sys.stderr)
        sys.exit(2)


def _readable(message: str) -> str:
    """An error of jsonargparse without what only its authors need."""
    lines = []
    for line in message.splitlines():
        if line.strip().startswith(("Given value type:", "Subtypes:", "Given value:")):
            continue
        if "Does not validate against any of the Union" in line or line.strip() == "Errors:":
            continue
        if "Expected a <class 'NoneType'>" in line or "Expected a path but" in line:
            continue
        line = re.sub(
            r"Import path does not correspond to a subclass of (.*)",
            r"must name a class that has \1, and this one has not",
            line,
        )
        if line.strip():
            lines.append(line)
    return "\n".join(lines)


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: _expand_tree(_load_yaml(text)), exceptions=(yaml.YAMLError,))

SAMPLERS = ("sampler", "val_sampler", "test_sampler")
CLASS_OPTIONS = (*SAMPLERS, "problem", "algorithm", "executor", "model")


def _expand_tree(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    tree = {key: _expand_tree(value) for key, value in tree.items()}
    for key in (*CLASS_OPTIONS, "class_path"):
        if isinstance(tree.get(key), str):
            tree[key] = NAMES.get(tree[key], tree[key])
    return tree


def _expand_names(arguments: list[str]) -> list[str]:
    """Arguments with the short names of classes written out."""
    expanded = []
    is_class = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if is_class:
            argument = NAMES.get(argument, argument)
        elif equals and option.removeprefix("--").rpartition(".")[2] in CLASS_OPTIONS:
            argument = f"{option}={NAMES.get(value, value)}"
        is_class = (
            not equals
            and option.startswith("--")
            and (option.removeprefix("--").rpartition(".")[2] in (*CLASS_OPTIONS, "class_path"))
        )
        expanded.append(argument)
    return expanded


def _build(config: Namespace, parser: ArgumentParser) -> tuple[Trainer, dict[str, Any]]:
    """(the trainer, the samplers by split); everything is checked, nothing is started."""
    objects = _instantiate(config, parser)
    samplers = {"train": objects.sampler}
    for split in ("val", "test"):
        given, name = objects[f"{split}_sampler"], config[f"{split}_split"]
        if given is not None and name is not None:
            raise ValueError(
                f"{split}_split must not be given beside {split}_sampler, got {name!r}"
            )
        if name is not None:
            other = config.clone()
            _set_split(other, name)
            given = _instantiate(other, parser, only="sampler").sampler
        if given is not None:
            samplers[split] = given
    if "test" in samplers:
        if config.test_tasks < 2:
            raise ValueError(f"test_tasks must be >= 2 for an interval, got {config.test_tasks}")
        check_sampler(
            samplers["test"], 2, processes=False, allow_equal_examples=config.allow_equal_examples
        )
    options = {
        key: value for key, value in objects.items() if key in inspect.signature(Trainer).parameters
    }
    options["val_sampler"] = samplers.get("val")
    options["outer_optimizer"] = objects.outer_optimizer
    options["config"] = parser.dump(config, skip_unset=False)
    trainer = Trainer(**options)
    if "test" in samplers:
        check_losses(trainer.problem, samplers["test"], trainer.outer, "test_sampler")
    return trainer, samplers


def _instantiate(config: Namespace, parser: ArgumentParser, only: str | None = None) -> Namespace:
    torch.manual_seed(config.seed)  # the model's initial weights
    optimizer = config.get("outer_optimizer", Namespace())
    if not isinstance(optimizer, Namespace):  # which the parser lets pass
        raise ValueError(f"outer_optimizer must be a mapping of its options, got {optimizer!r}")
    if only is not None:
        config = config.clone()
        for key in CLASS_OPTIONS:
            if key in config and key != only:
                config[key] = None
    try:
        return parser.instantiate(config)
    except ValueError as error:
        raise ValueError(_readable(str(error))) from error


def _fit(config: Namespace, trainer: Trainer, samplers: dict[str, Any]) -> int:
    try:
        return _fit_and_test(config, trainer, samplers)
    except (ValueError, OSError):
        if not trainer.has_started:
            raise
        # Not about the input of the command: somebody's code failed while it ran.
        traceback.print_exc()
        return 1


def _fit_and_test(config: Namespace, trainer: Trainer, samplers: dict[str, Any]) -> int:
    result = trainer.fit(config.num_steps)
    summary: dict[str, Any] = {
        "num_steps": result.num_steps,
        "num_tasks": result.num_tasks,
        "num_dropped": result.num_dropped,
        "seconds": round(result.seconds, 3),
        "best": result.best,
        "settings": trainer.settings(),
    }
    print(
        f"trained {result.num_steps} outer steps, {result.num_tasks} tasks in "
        f"{result.seconds:.0f} s ({result.num_tasks / result.seconds:.1f} tasks/s), "
        f"{result.num_dropped} dropped"
    )
    if "test" in samplers:
        name = trainer.restore("best") if result.best else f"step {result.num_steps}"
        tested = trainer.test(samplers["test"], config.test_tasks)
        print(f"test at {name}:")
        _print_evaluation(tested)
        trainer.record("test", tested)
        summary["test"] = {"checkpoint": name, **tested.to_json()}
    write_json(f"{config.run_dir.rstrip('/')}/{RESULT}", summary)
    print(f"run folder: {config.run_dir}")
    print(f"TensorBoard: tensorboard --logdir {config.run_dir}")
    return 0


def _saved_config(run: str, parser: ArgumentParser) -> Namespace:
    try:
        text = Folder(run).read(CONFIG, MAX_CONFIG_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"run must be a folder with a config.yaml, got {run!r}: give the run_dir of "
            "`metadist train`"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG} of run {run!r} cannot be read: {error}") from error
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        _check_yaml(text)
        config = parser.parse_string(text)
    except Exception as error:
        raise ValueError(
            f"{CONFIG} of run {run!r} must be as `metadist train` wrote it, got:\n"
            f"{_readable(str(error))}"
        ) from error
    finally:
        parser.exit_on_error = exits
    config.run_dir = run
    return config


def _check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is no mapping, or that aliases make endless or huge."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError("it holds itself")
            return known
        sizes[id(node)] = None
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        total = sizes[id(node)] = 1 + sum(map(size, parts))
        return total

    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("no mapping of options to values")
    if size(root) > MAX_CONFIG_BYTES:
        raise ValueError("aliases that make it huge")


def _set_split(config: Namespace, split: str) -> None:
    """Let `sampler` draw from another split."""
    arguments = config.sampler.init_args if "init_args" in config.sampler else Namespace()
    if "split" not in arguments:
        raise ValueError(
            f"sampler must have an argument split to be judged on {split!r}, "
            f"{config.sampler.class_path} has none: name another sampler instead"
        )
    config.sampler.init_args.split = split


def _print_evaluation(result: EvaluationResult) -> None:
    print(f"  {headline(result)}, 95 % interval")
    for name, interval in result.metrics.items():
        print(f"  {name}: {interval}")
    for name, value in result.protocol.items():
        print(f"  {name}: {value}")


def _say_skipped(skipped: dict[str, str]) -> None:
    for reason in skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)


@contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], int]]:
    """SIGTERM stops a run as Ctrl-C does; gives the number of the signal that came."""
    received = signal.SIGINT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield lambda: int(received)
    finally:
        signal.signal(signal.SIGTERM, before)
