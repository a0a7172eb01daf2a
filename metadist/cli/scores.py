"""`metadist scores`."""

from __future__ import annotations

import json

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import add_checkpoint, output_file


def parser() -> Parser:
    """Options of `metadist scores`."""
    about = "Write the learned weight of each source or example."
    parser = Parser(prog="metadist scores", description=about, positional="run_dir")
    parser.add_argument(
        *("--run_dir", "--run"), type=str, metavar="FOLDER", required=True, help="The run's folder."
    )
    add_checkpoint(parser)
    parser.add_argument("--task", type=int, default=0, help="The number of the task of the rows.")
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        metavar="FILE",
        help="A file of JSON lines, one for each source or training example.",
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist scores`."""
    from metadist.cli import train
    from metadist.cli.trained import load
    from metadist.problem import HasScores
    from metadist.sampler import sample_task

    out = output_file("out", config.out)
    saved = train.saved_config(config.run_dir)
    config.device, config.inner_steps = "cpu", None
    trained = load(saved, config)
    if not isinstance(trained.problem, HasScores):
        raise ValueError(
            f"the problem of {config.run_dir} must weight its data, got "
            f"{type(trained.problem).__name__}: its outer variable is no weight of examples; "
            "`metadist export` writes models"
        )
    task = sample_task(trained.sampler, config.task, trained.last_step)
    count = 0
    with out.open("w") as file:
        for score in trained.problem.scores(trained.outer, task):
            file.write(json.dumps(score) + "\n")
            count += 1
    print(f"{config.run_dir} {trained.checkpoint}, {trained.version} outer steps: {count} scores")
    return 0
