"""The options of what is trained, and the objects they name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from jsonargparse import Namespace

from metadist.algorithm import Algorithm
from metadist.cli.mistakes import parameters_of
from metadist.cli.names import ProblemBase, SamplerBase, kind_of
from metadist.cli.parsing import Parser
from metadist.cli.sizes import are_open, fill
from metadist.task import Shardable, Stream, Task, sample_task


def add_config(parser: Parser) -> None:
    """Add the option that names a YAML file."""
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="A YAML file with any of these options."
    )


def add_workload(parser: Parser) -> None:
    """Add the options of what is solved, on what tasks, by which method."""
    parser.add_subclass_arguments(
        SamplerBase, "sampler", required=True, help="The sampler of the training tasks."
    )
    parser.add_subclass_arguments(
        ProblemBase, "problem", required=True, help="The problem that every task poses."
    )
    parser.add_subclass_arguments(
        Algorithm, "algorithm", required=True, help="The method that estimates hypergradients."
    )
    parser.takes_sizes = True
    parser.first |= {
        "--problem": "few_shot",
        "--problem.model": "conv4",
        "--algorithm": "itd",
    }


def instantiate(config: Namespace, parser: Parser, only: str | None = None) -> Namespace:
    """The objects that a config names; `only` that of one option."""
    # Null is what jsonargparse lets pass for any option of a file.
    for key, default in parser.get_defaults().items():
        if default is not None and key in config and config[key] is None:
            raise ValueError(f"{key} must be a value, got null: leave it out for {default!r}")
    _check_nulls("sampler", config.get("sampler"))
    optimizer = config.get("outer_optimizer", Namespace())
    if not isinstance(optimizer, Namespace):  # which the parser lets pass
        raise ValueError(f"outer_optimizer must be a mapping of its options, got {optimizer!r}")
    if are_open(config):
        fill(config, _first_task(_make(config, parser, "sampler").sampler))
    for key, value in vars(config).items():
        _check_nulls(key, value)
    return _make(config, parser, only)


def _first_task(sampler: Any) -> Task | None:
    """A task of a sampler, for its sizes; None if it fails, which is reported with its checks."""
    # No process may hold the whole of the first kind; other classes come later in the second.
    if isinstance(sampler, Shardable | Stream):
        return None
    try:
        task = sample_task(sampler, 0)
    except Exception:  # noqa: BLE001  # see above
        return None
    return task if isinstance(task, Task) else None


def _make(config: Namespace, parser: Parser, only: str | None) -> Namespace:
    if only is not None:
        config = config.clone()
        for key in list(config.keys(branches=True)):
            if kind_of(key) and "." not in key and key != only:
                config[key] = None
    torch.manual_seed(config.seed)  # the model's initial weights
    try:
        return parser.instantiate(config)
    except ValueError as error:
        raise ValueError(parser.explained(error)) from error


def _check_nulls(field: str, value: Any) -> None:
    """Raise ValueError for null among the options of a class, where the class does not allow it."""
    if not isinstance(value, Namespace) or "class_path" not in value:
        return
    given = vars(value.get("init_args") or Namespace())
    for parameter in parameters_of(value.class_path):
        inner = f"{field}.{parameter.name}"
        _check_nulls(inner, given.get(parameter.name))
        hint = inspect.formatannotation(parameter.annotation)
        is_null = parameter.name in given and given[parameter.name] is None
        if is_null and re.search(r"None|Optional|Any|_empty", hint) is None:
            raise ValueError(f"{inner} must be a value, got null: leave it out or give one")
