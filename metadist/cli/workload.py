"""The options of what is trained, and the objects they name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch
from jsonargparse import Namespace

from metadist.algorithm import Algorithm
from metadist.cli.mistakes import parameters_of
from metadist.cli.names import ProblemBase, SamplerBase, kind_of
from metadist.cli.parsing import Parser
from metadist.cli.sizes import are_open, fill
from metadist.sampler import Shardable, Stream, sample_task
from metadist.task import Task


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
    parser.fill_sizes = fill_sizes
    parser.first |= {
        "--problem": "few_shot",
        "--problem.model": "conv4",
        "--algorithm": "itd",
    }


def fill_sizes(config: Namespace, parser: Parser) -> None:
    """Set the sizes in `config` that are open to those of the tasks.

    Raises:
        ValueError: The sampler cannot be made.
    """
    if are_open(config):
        fill(config, _first_task(_make(config, parser, {"sampler"}).sampler))


def instantiate(config: Namespace, parser: Parser, *only: str) -> Namespace:
    """The objects that a config names; `only` those of some options, if any are named.

    A sampler is made once, since its data may be large; sizes that are open are filled in.
    """
    # Null is what jsonargparse lets pass for any option of a file.
    for key, default in parser.get_defaults().items():
        if default is not None and key in config and config[key] is None:
            raise ValueError(f"{key} must be a value, got null: leave it out for {default!r}")
    _check_nulls("sampler", config.get("sampler"))
    optimizer = config.get("outer_optimizer", Namespace())
    if not isinstance(optimizer, Namespace):  # which the parser lets pass
        raise ValueError(f"outer_optimizer must be a mapping of its options, got {optimizer!r}")
    kept = set(only) or {key for key in vars(config) if kind_of(key)}
    torch.manual_seed(config.seed)  # the model's initial weights
    sampler = None
    if are_open(config):
        sampler = _make(config, parser, {"sampler"}).sampler
        with torch.random.fork_rng(devices=[]):
            fill(config, _first_task(sampler))
        kept -= {"sampler"}
    for key, value in vars(config).items():
        _check_nulls(key, value)
    made = _make(config, parser, kept)
    if sampler is not None:
        made.sampler = sampler
    return made


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


def _make(config: Namespace, parser: Parser, kept: Collection[str]) -> Namespace:
    """The objects of the options in `kept`; None for all others that name a class."""
    config = config.clone()
    for key in vars(config):
        if kind_of(key) and key not in kept:
            config[key] = None
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
