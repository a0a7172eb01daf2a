"""`metadist export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import add_adaptation, output_file, run_parser

if TYPE_CHECKING:
    from torch import Tensor, nn

    from metadist.cli.trained import Trained
    from metadist.task import Task

PROGRAM, WEIGHTS = ".pt2", ".safetensors"


def parser() -> Parser:
    """Options of `metadist export`."""
    parser = run_parser("export", "Adapt to one task, and write the model as plain torch.")
    parser.add_argument(
        "--support",
        type=str | None,
        metavar="FOLDER",
        help="A folder of images for each class, to adapt to; without it, a task of the run's own "
        "data.",
    )
    parser.add_argument(
        "--task",
        type=int | None,
        help="The number of this task; by default 0, the first one.",
    )
    parser.add_argument(
        "--split",
        type=str | None,
        help="The split that this task is of; by default the training's.",
    )
    add_adaptation(parser)
    parser.add_argument(
        "--output",
        type=str,
        required=True,
        metavar="FILE",
        help=f"FILE{PROGRAM} is the whole program, which torch.export.load reads without metadist; "
        f"FILE{WEIGHTS} its weights by name.",
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist export`."""
    from metadist.cli import train
    from metadist.cli.images import support_of
    from metadist.cli.trained import load
    from metadist.inference import inputs_of
    from metadist.sampler import num_tasks_of
    from metadist.task import Batch, Task

    if not config.output.endswith((PROGRAM, WEIGHTS)):
        raise ValueError(f"output must end in {PROGRAM} or {WEIGHTS}, got {config.output!r}")
    if config.support is not None:
        for name in ("task", "split"):
            if config[name] is not None:
                raise ValueError(f"{name} must not be given beside support, got {config[name]!r}")
    output = output_file("output", config.output)
    saved = train.saved_config(config.run_dir)
    if config.split is not None:
        train.set_split(saved, config.split)
    trained = load(saved, config)
    task: Task | Batch
    if config.support is None:
        number = config.task or 0
        task, classes = _task_of(trained, number), None
        of = "the training" if config.split is None else f"split {config.split!r}"
        adapted_to = f"task {number} of {of}"
        if config.task is None and num_tasks_of(trained.sampler) is None:
            adapted_to += "; --task, --split or --support choose another"
    else:
        support = support_of(trained, config.support)
        task, classes = support.task, support.classes
        adapted_to = f"{', '.join(support.classes)} of {config.support}"
    module = trained.export(task).cpu()
    inputs = inputs_of(task.support if isinstance(task, Task) else task)
    _write(module, inputs, output, {"classes": json.dumps(classes)})
    print(f"{config.run_dir} {trained.checkpoint}, {trained.version} outer steps: {output}")
    print(f"adapted to {adapted_to}")
    return 0


def _task_of(trained: Trained, number: int) -> Task:
    """A task of the run's data, by its number."""
    from metadist.sampler import num_tasks_of, sample_task

    num_tasks = num_tasks_of(trained.sampler)
    if number < 0 or (num_tasks is not None and number >= num_tasks):
        known = "" if num_tasks is None else f" and < the {num_tasks} tasks of the run's data"
        raise ValueError(f"task must be >= 0{known}, got {number}")
    return sample_task(trained.sampler, number, trained.last_step)


def _write(module: nn.Module, inputs: Tensor, output: Path, notes: dict[str, str]) -> None:
    if output.suffix == WEIGHTS:
        from safetensors.torch import save_model

        save_model(module, str(output), metadata=notes)
        return
    import torch

    size = torch.export.Dim("examples", min=1, max=1 << 30)
    example = inputs.float() if inputs.is_floating_point() else inputs
    program = torch.export.export(module, (example,), dynamic_shapes=({0: size},))
    torch.export.save(program, str(output), extra_files=notes)
