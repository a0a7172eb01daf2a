"""`metadist evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import Namespace

from metadist.cli.names import ExecutorBase, SamplerBase, class_path
from metadist.cli.parsing import Parser
from metadist.cli.runs import add_adaptation, run_parser

if TYPE_CHECKING:
    from metadist.cli.trained import Trained
    from metadist.executor import Executor

MOST_CONFUSED = 8
"""How many pairs of classes are printed."""


def parser() -> Parser:
    """Options of `metadist evaluate`."""
    parser = run_parser("evaluate", "Adapt to tasks of another split and report the metrics.")
    add_adaptation(parser)
    parser.add_argument("--split", type=str, default="test", help="The split to evaluate on.")
    parser.add_subclass_arguments(
        SamplerBase,
        "sampler",
        required=False,
        help="Other tasks, in place of --split.",
    )
    parser.add_argument("--num_tasks", type=int, default=600, help="Tasks to evaluate on.")
    parser.add_subclass_arguments(
        ExecutorBase,
        "executor",
        required=False,
        help="Where tasks are computed: ray, by its workers, or, by default, local.",
    )
    parser.add_argument(
        "--try_inner_steps",
        type=list[int] | None,
        metavar="[5,10,20]",
        help="In place of --inner_steps: the one of these numbers that is best on --val_split.",
    )
    parser.add_argument(
        "--val_split", type=str, default="val", help="The split that chooses among them."
    )
    parser.add_argument("--val_tasks", type=int, default=100, help="Its tasks.")
    parser.add_argument(
        "--per_task",
        type=bool,
        default=False,
        help="Also the metrics of each task, and which classes were taken for which.",
    )
    parser.add_argument("--output", type=str | None, help="A JSON file for the result.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist evaluate`."""
    from metadist.cli import train
    from metadist.cli.trained import load
    from metadist.evaluation import evaluate
    from metadist.run.storage import write_json

    saved = train.saved_config(config.run_dir)
    if config.sampler is not None:
        saved.sampler = config.sampler
    else:
        train.set_split(saved, config.split)
    if config.executor is not None:
        if config.executor.class_path == class_path("executors", "data_parallel"):
            raise ValueError(
                "executor must be local or ray, got data_parallel, whose workers share one task: "
                "they would not work here"
            )
        saved.executor = config.executor
    trained = load(saved, config)
    inner_steps, chosen_by = trained.inner_steps, ""
    if config.try_inner_steps is not None:
        inner_steps, scores = _chosen(
            config, trained, trained.executor if config.executor else None
        )
        listed = ", ".join(f"{steps}: {score:.4f}" for steps, score in scores.items())
        chosen_by = f"inner_steps={inner_steps}, the best of {listed} on {config.val_split}"
    result = evaluate(
        trained.problem,
        trained.sampler,
        trained.algorithm,
        trained.outer,
        config.num_tasks,
        inner_steps=inner_steps,
        compute=trained.compute,
        executor=None if config.executor is None else trained.executor,
        step=trained.last_step,
        per_task=config.per_task,
    )
    print(f"{config.run_dir} {trained.checkpoint}, {trained.version} outer steps")
    if chosen_by:
        result.protocol["inner steps"] = chosen_by
    train.print_evaluation(result)
    for name, column in result.per_task.items():
        ordered = sorted(column)
        print(f"  {name} of tasks: {ordered[0]:.4f} .. {ordered[-1]:.4f}")
    if result.confusion:
        print("  most often taken for another class:")
    for true, predicted, count in result.confused()[:MOST_CONFUSED]:
        share = count / sum(result.confusion[true].values())
        print(f"    {true}  for  {predicted}: {count} times, {share:.1%} of its examples")
    if config.output:
        write_json(config.output, {"checkpoint": trained.checkpoint, **result.to_json()})
    return 0


def _chosen(
    config: Namespace, trained: Trained, executor: Executor | None
) -> tuple[int, dict[int, float]]:
    """The best number of inner steps on validation tasks, and the score of each."""
    from metadist.cli import train
    from metadist.cli.workload import instantiate
    from metadist.evaluation import best_inner_steps

    if config.inner_steps is not None:
        raise ValueError(
            f"inner_steps must not be given beside try_inner_steps, got {config.inner_steps}"
        )
    if config.sampler is None and config.split == config.val_split:
        raise ValueError(
            f"val_split must be another split than the one to evaluate on, got {config.val_split!r}"
        )
    saved = train.saved_config(config.run_dir)
    train.set_split(saved, config.val_split)
    return best_inner_steps(
        trained.problem,
        instantiate(saved, train.parser(), "sampler").sampler,
        trained.algorithm,
        trained.outer,
        config.try_inner_steps,
        config.val_tasks,
        compute=trained.compute,
        executor=executor,
    )
