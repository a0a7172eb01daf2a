"""`metadist train`."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentError, Namespace

from metadist.checks.losses import check_losses
from metadist.checks.sampler import check_sampler
from metadist.cli.names import ExecutorBase, SamplerBase
from metadist.cli.parsing import Parser, check_yaml
from metadist.cli.workload import add_config, add_workload, instantiate
from metadist.evaluation import EvaluationResult
from metadist.optimizer import OuterOptimizer
from metadist.problem import Problem, has_few_shot_classes
from metadist.run.checkpoint import CheckpointStore
from metadist.run.files import CHECKPOINTS, CONFIG, MAX_CONFIG_BYTES, RESULT
from metadist.run.rebuild import require_known, require_same
from metadist.run.storage import Folder, write_json
from metadist.run.text import printable
from metadist.sampler import TaskSampler, require_steps
from metadist.trainer import Trainer

SECTIONS = {
    "What is trained": ("sampler", "problem", "algorithm", "keep_state"),
    "The run": ("run_dir", "num_steps", "seed", "config", "print_config", "if_exists"),
    "Outer steps": ("meta_batch_size", "outer_optimizer"),
    "Validation and test": (
        *("val_split", "val_sampler", "val_every", "val_tasks", "eval_inner_steps"),
        *("test_split", "test_sampler", "test_tasks"),
    ),
    "Computation": (
        *("executor", "tasks_per_lease", "compute", "batch_size", "vectorize", "chunk_size"),
        "num_threads",
    ),
    "Checkpoints and logs": (
        *("checkpoint_every", "checkpoint_every_s", "checkpoint_async"),
        *("keep_checkpoints", "keep_every"),
        *("log_every", "loggers", "callbacks", "quiet"),
    ),
}
"""The headings of the help, and the options below each."""


def parser() -> Parser:
    """Options of `metadist train`."""
    parser = Parser(
        prog="metadist train",
        description="Train on tasks; write checkpoints and TensorBoard events; test at the end.",
        required=("sampler", "run_dir"),
    )
    parser.sections = SECTIONS
    add_config(parser)
    parser.add_argument(
        "--run_dir", type=str, metavar="FOLDER", help="A new folder for all that the run writes."
    )
    parser.add_argument("--num_steps", type=int, default=1000, help="Outer steps.")
    parser.add_argument(
        "--seed", type=int, default=0, help="The seed of the model's weights and mini-batches."
    )
    add_workload(parser)
    for split in ("val", "test"):
        parser.add_subclass_arguments(
            SamplerBase, f"{split}_sampler", required=False, help=f"The sampler of {split} tasks."
        )
        parser.add_argument(
            f"--{split}_split",
            type=str | None,
            help=f"In place of {split}_sampler: `sampler` with this value of its argument split.",
        )
    parser.add_class_arguments(OuterOptimizer, "outer_optimizer")
    parser.add_subclass_arguments(
        ExecutorBase, "executor", required=True, help="Where tasks are computed."
    )
    parser.first["--executor"] = "local"
    parser.add_class_arguments(
        Trainer,
        skip={
            "problem", "sampler", "algorithm", "outer_optimizer", "seed", "executor", "run_dir",
            "val_sampler", "config",
        },
    )  # fmt: skip
    parser.add_argument("--test_tasks", type=int, default=600, help="Tasks of the final test.")
    parser.add_argument(
        "--if_exists",
        type=Literal["refuse", "continue"],
        default="refuse",
        help="What to do if run_dir holds a run: continue it from its newest good checkpoint with "
        "these options, or, if it is finished, report that.",
    )
    return parser


def parse_training(
    options: Mapping[str, Any], flags: Mapping[str, Any], other_keys: Sequence[str] = ()
) -> Namespace:
    """The config of a training: `options` as in YAML, and `flags` by flat name, which count more.

    `other_keys` may stand beside the options where they were read. A ValueError says what is wrong.
    """
    arguments = ["--config", json.dumps(options)]
    for name, value in flags.items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments.append(f"--{name}={text}")
    trying = parser()
    trying.exit_on_error = False
    trying.other_keys = other_keys
    try:
        return trying.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(trying.explained(error, arguments)) from error


def run(config: Namespace) -> int:
    """Run `metadist train`."""
    if not config.run_dir:
        raise ValueError("run_dir must name a new folder, got none: pass --run_dir runs/NAME")
    trainer, samplers = build(config)
    if config.if_exists == "continue" and CONFIG in Folder(config.run_dir).names():
        return continue_run(config, trainer, samplers)
    return fit(config, trainer, samplers)


def continue_run(
    config: Namespace, trainer: Trainer, samplers: dict[str, Any], checkpoint: str | None = None
) -> int:
    store = CheckpointStore((Folder(config.run_dir) / CHECKPOINTS).uri)
    if checkpoint is None and store.is_bare():  # it was killed before it could write one
        return fit(config, trainer, samplers)
    name = trainer.restore(checkpoint)
    report_skipped(trainer.skipped)
    print(f"continuing {config.run_dir} from {name}")
    if trainer.version >= config.num_steps and RESULT in Folder(config.run_dir).names():
        print(
            f"nothing to do: {trainer.version} outer steps are taken, num_steps={config.num_steps}"
        )
        return 0
    return fit(config, trainer, samplers)


def build(config: Namespace) -> tuple[Trainer, dict[str, Any]]:
    """(the trainer, the samplers by split); everything is checked, nothing is started."""
    options_of = parser()
    objects = instantiate(config, options_of)
    samplers = {"train": objects.sampler}
    for split in ("val", "test"):
        given, name = objects[f"{split}_sampler"], config[f"{split}_split"]
        if given is not None and name is not None:
            raise ValueError(
                f"{split}_split must not be given beside {split}_sampler, got {name!r}"
            )
        if name is not None:
            other = config.clone()
            set_split(other, name)
            given = instantiate(other, options_of, "sampler").sampler
        if given is not None:
            samplers[split] = given
    if "test" in samplers:
        if config.test_tasks < 2:
            raise ValueError(f"test_tasks must be >= 2 for an interval, got {config.test_tasks}")
        check_sampler(
            samplers["test"],
            2,
            processes=False,
            allow_equal_examples=config.allow_equal_examples,
            few_shot_classes=has_few_shot_classes(objects.problem),
        )
    options = {
        key: value for key, value in objects.items() if key in inspect.signature(Trainer).parameters
    }
    options["val_sampler"] = samplers.get("val")
    options["outer_optimizer"] = objects.outer_optimizer
    options["config"] = options_of.dump(config, skip_unset=False)
    trainer = Trainer(**options)
    require_rebuilt(config.run_dir, trainer.problem, lambda: trainer.sampler)
    if "test" in samplers:
        check_losses(
            trainer.problem,
            samplers["test"],
            trainer.outer,
            "test_sampler",
            trainer.workload.compute,
        )
    return trainer, samplers


def require_rebuilt(run_dir: str, problem: Problem, sampler: Callable[[], TaskSampler]) -> None:
    """Raise ValueError if a run was made in Python, of other objects than these."""
    folder = Folder(run_dir)
    if CONFIG in folder.names():
        text = folder.read(CONFIG, MAX_CONFIG_BYTES).decode()
        require_same(text, problem, sampler, run_dir)


def set_split(config: Namespace, split: str) -> None:
    """Let `sampler` draw from another split."""
    arguments = config.sampler.init_args if "init_args" in config.sampler else Namespace()
    if "split" not in arguments:
        raise ValueError(
            f"sampler must have an argument split to be judged on {split!r}, "
            f"{config.sampler.class_path} has none: name another sampler instead"
        )
    config.sampler.init_args.split = split


def fit(config: Namespace, trainer: Trainer, samplers: dict[str, Any]) -> int:
    try:
        return _fit_and_test(config, trainer, samplers)
    except (ValueError, OSError, SystemExit):
        if not trainer.has_started:
            raise
        # Not about the input of the command: somebody's code failed while it ran.
        traceback.print_exc()
        return 1


def _fit_and_test(config: Namespace, trainer: Trainer, samplers: dict[str, Any]) -> int:
    if "test" in samplers:
        require_steps("num_steps", config.num_steps, samplers["test"])
    result = trainer.fit(config.num_steps)
    summary: dict[str, Any] = {
        "num_steps": result.num_steps,
        "num_tasks": result.num_tasks,
        "num_dropped": result.num_dropped,
        "seconds": round(result.seconds, 3),
        "best": result.best,
        "calls": result.calls,
        "settings": trainer.settings(),
    }
    print(
        f"trained {result.num_steps} outer steps, {result.num_tasks} tasks in "
        f"{result.seconds:.0f} s ({result.num_tasks / result.seconds:.1f} tasks/s), "
        f"{result.num_dropped} dropped"
    )
    try:
        if "test" in samplers:
            name = trainer.restore("best") if result.best else f"step {result.num_steps}"
            tested = trainer.test(samplers["test"], config.test_tasks)
            print(f"test at {name}:")
            print_evaluation(tested)
            trainer.record("test", tested)
            summary["test"] = {"checkpoint": name, **tested.to_json()}
    finally:  # the training has ended well, whatever the test finds
        write_json(f"{config.run_dir.rstrip('/')}/{RESULT}", summary)
    print(f"run folder: {config.run_dir}")
    print(f"TensorBoard: tensorboard --logdir {config.run_dir}")
    return 0


def print_evaluation(result: EvaluationResult) -> None:
    print(f"  {result.headline}, 95 % interval")
    for name, interval in result.metrics.items():
        print(f"  {name}: {interval}")
    for name, value in result.protocol.items():
        print(f"  {name}: {value}")


def report_skipped(skipped: dict[str, str]) -> None:
    for reason in skipped.values():
        print(f"skipped: {printable(reason, lines=True)}", file=sys.stderr)


def saved_config(run_dir: str) -> Namespace:
    """The options that a run was started with."""
    options_of = parser()
    options_of.exit_on_error = False
    try:
        text = Folder(run_dir).read(CONFIG, MAX_CONFIG_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"run_dir must be a folder with a {CONFIG}, got {run_dir!r}: give the run_dir of "
            "`metadist train`"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG} of run {run_dir!r} cannot be read: {error}") from error
    require_known(text, run_dir)
    try:
        check_yaml(text)
        config = options_of.parse_string(text)
    except Exception as error:
        raise ValueError(
            f"{CONFIG} of run {run_dir!r} must be as `metadist train` wrote it: "
            f"{options_of.explained(error)}"
        ) from error
    config.run_dir = run_dir
    return config
