"""`metadist evaluate`."""

from __future__ import annotations

from dataclasses import replace

from jsonargparse import Namespace

from metadist.cli.names import ExecutorBase, SamplerBase, class_path
from metadist.cli.parsing import Parser
from metadist.cli.runs import add_checkpoint, run_parser


def parser() -> Parser:
    """Options of `metadist evaluate`."""
    parser = run_parser("evaluate", "Adapt to tasks of another split and report the metrics.")
    add_checkpoint(parser)
    parser.add_argument("--split", type=str, default="test", help="The split to evaluate on.")
    parser.add_subclass_arguments(
        SamplerBase,
        "sampler",
        required=False,
        help="Other tasks, in place of --split.",
    )
    parser.add_argument("--num_tasks", type=int, default=600, help="Tasks to evaluate on.")
    parser.add_argument(
        "--inner_steps", type=int | None, help="Inner steps of adaptation; by default as trained."
    )
    parser.add_subclass_arguments(
        ExecutorBase,
        "executor",
        required=False,
        help="Where tasks are computed: ray, by its workers, or, by default, local.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--output", type=str | None, help="A JSON file for the result.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist evaluate`."""
    from metadist.checks.preflight import initial_outer
    from metadist.cli import train
    from metadist.cli.workload import instantiate
    from metadist.evaluation import evaluate
    from metadist.run.checkpoint import CheckpointStore, check_same_model
    from metadist.run.files import CHECKPOINTS
    from metadist.run.storage import Folder, write_json
    from metadist.workload import Workload

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
    objects = instantiate(saved, train.parser())
    store = CheckpointStore((Folder(config.run_dir) / CHECKPOINTS).uri)
    name, checkpoint = store.load(config.checkpoint)
    train.report_skipped(store.skipped)
    compute = objects.compute.given(batch_size=saved.batch_size, seed=saved.seed)
    workload = Workload(objects.problem, objects.sampler, objects.algorithm, compute=compute)
    expected = initial_outer(workload)
    check_same_model(checkpoint.state.outer, expected, f"{store.uri}/{name}")
    result = evaluate(
        objects.problem,
        objects.sampler,
        objects.algorithm,
        checkpoint.state.outer,
        config.num_tasks,
        inner_steps=saved.eval_inner_steps if config.inner_steps is None else config.inner_steps,
        compute=replace(compute, device=config.device),
        executor=None if config.executor is None else objects.executor,
    )
    print(f"{config.run_dir} {name}, {checkpoint.state.version} outer steps")
    train.print_evaluation(result)
    if config.output:
        write_json(config.output, {"checkpoint": name, **result.to_json()})
    return 0
