"""`metadist check-hypergradient`."""

from __future__ import annotations

import inspect
import sys

from jsonargparse import Namespace
from rich.console import Console

from metadist.checks.hypergradient import check_hypergradient
from metadist.cli.parsing import Parser
from metadist.cli.workload import add_config, add_workload, instantiate


def parser() -> Parser:
    """Options of `metadist check-hypergradient`."""
    parser = Parser(
        prog="metadist check-hypergradient",
        description="Compare an algorithm's hypergradient with exact derivatives, on one task.",
        required=("sampler",),
    )
    add_config(parser)
    add_workload(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="The seed of the model's weights and mini-batches."
    )
    parser.add_argument(
        "--batch_size", type=int | None, help="Examples per draw; by default whole sets."
    )
    parser.add_function_arguments(
        check_hypergradient, skip={"problem", "tasks", "algorithm", "outer"}
    )
    parser.add_argument(
        "--max_error",
        type=float | None,
        help="Exit with 1 if the error is larger: against the unrolled map for an algorithm that "
        "trains the start of adaptation, else against the solution.",
    )
    return parser


def run(config: Namespace) -> int:
    """Run `metadist check-hypergradient`; exit code 1 if --max_error is exceeded."""
    if config.max_error is not None and not config.max_error >= 0:
        raise ValueError(f"max_error must be >= 0, got {config.max_error}")
    objects = instantiate(config, parser())
    accepted = inspect.signature(check_hypergradient).parameters
    options = {key: value for key, value in objects.items() if key in accepted}
    options["compute"] = objects.compute.given(batch_size=config.batch_size, seed=config.seed)
    report = check_hypergradient(tasks=objects.sampler, **options)
    Console().print(report)
    if config.max_error is None or report.error <= config.max_error:
        return 0
    is_judged = any(comparison.judged for comparison in report.comparisons)
    print(
        f"metadist check-hypergradient: failed: the error against {report.measure} must be <= "
        f"max_error = {config.max_error:g}, got {report.error:.3g}"
        + ("" if is_judged else ": that reference is not known here, see the note"),
        file=sys.stderr,
    )
    return 1
