"""Sizes of our models and problems that are not given, from the tasks that they are trained on.

Between parsing and the making of objects such a size is None in the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from metadist.cli.mistakes import parameters_of

if TYPE_CHECKING:  # help shows without torch
    from metadist.task import Task

CLASSES = ("n_way", "num_classes", "out_features")
SIZES = (*CLASSES, "in_channels", "image_size", "in_features", "num_examples")


def without_open(config: Namespace) -> tuple[Namespace, list[str]]:
    """(a copy without the sizes that are open, their options)."""
    config, names = config.clone(), []
    for path, size, _ in list(_sizes(config)):
        if config[f"{path}.init_args.{size}"] is None:
            del config[f"{path}.init_args.{size}"]
            names.append(f"{path.replace('.init_args', '')}.{size}")
    return config, names


def leave_open(config: Namespace, given: Namespace) -> None:
    """Set the sizes in `config` that were not `given` to None."""
    for path, size, _ in _sizes(config):
        if f"{path}.init_args.{size}" not in given:
            config[f"{path}.init_args.{size}"] = None


def are_open(config: Namespace) -> bool:
    """Whether a size is to be filled in."""
    return any(config[f"{path}.init_args.{size}"] is None for path, size, _ in _sizes(config))


def fill(config: Namespace, task: Task | None) -> None:
    """Set the sizes that are None to those of a task, or to their defaults where it has none."""
    found = {} if task is None else sizes_of(task)
    for path, size, default in _sizes(config):
        if config[f"{path}.init_args.{size}"] is None:
            config[f"{path}.init_args.{size}"] = found.get(size, default)


def sizes_of(task: Task) -> dict[str, int]:
    """What a task says of the sizes that models and problems have, by name."""
    from metadist.task import targets_of

    inputs, targets = task.support.tensors[0], targets_of(task.support)
    sizes = {"num_examples": len(task.support.index)}
    if inputs.ndim > 1:
        sizes["in_features"] = inputs.shape[1:].numel()
    if inputs.ndim == 4:
        sizes["in_channels"] = inputs.shape[1]
        if inputs.shape[2] == inputs.shape[3]:
            sizes["image_size"] = inputs.shape[2]
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        others = targets_of(task.query)
        highest = max(int(labels.max()) for labels in (targets, others) if labels is not None)
        sizes |= dict.fromkeys(CLASSES, highest + 1)
    elif targets is not None and targets.ndim == 2:
        sizes["out_features"] = targets.shape[1]
    return sizes


def _sizes(config: Namespace) -> Iterator[tuple[str, str, int]]:
    """(the option of the class, the size, its default) of each size of our classes in a config."""
    for path in ("problem", "problem.init_args.model"):
        named = config.get(path)
        # What a class of somebody else's means by such a name is its own affair.
        if isinstance(named, Namespace) and str(named.get("class_path")).startswith("metadist."):
            arguments = named.get("init_args") or Namespace()
            for parameter in parameters_of(named.class_path):
                if parameter.name in SIZES and parameter.name in arguments:
                    yield path, parameter.name, parameter.default
