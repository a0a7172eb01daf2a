"""`metadist resume`."""

from __future__ import annotations

from jsonargparse import Namespace

from metadist.cli.names import ExecutorBase
from metadist.cli.parsing import Parser
from metadist.cli.runs import add_checkpoint, run_parser


def parser() -> Parser:
    """Options of `metadist resume`."""
    parser = run_parser("resume", "Continue a run from its newest good checkpoint.")
    add_checkpoint(parser)
    parser.add_argument(
        "--num_steps", type=int | None, help="Outer steps in all; by default as before."
    )
    parser.add_subclass_arguments(
        ExecutorBase, "executor", required=False, help="Where it runs; by default as before."
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist resume`."""
    from metadist.cli import train

    saved = train.saved_config(config.run_dir)
    if config.num_steps is not None:
        saved.num_steps = config.num_steps
    if config.executor is not None:
        saved.executor = config.executor
    trainer, samplers = train.build(saved)
    return train.continue_run(saved, trainer, samplers, config.checkpoint)
