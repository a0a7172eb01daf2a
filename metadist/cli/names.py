"""What has a short name, and how short names become class paths."""

from __future__ import annotations

import importlib
from abc import ABC
from typing import Any

import torch

from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS

NAMES = {
    **{name: f"metadist.algorithms.{cls.__name__}" for name, cls in ALGORITHMS.items()},
    "local": "metadist.executor.LocalExecutor",
    "ray": "metadist.cluster.RayExecutor",
    "data_parallel": "metadist.cluster.DataParallelExecutor",
    "bsp": "metadist.cluster.BSP",
    "ssp": "metadist.cluster.SSP",
    "asp": "metadist.cluster.ASP",
    "buffered": "metadist.cluster.Buffered",
    "few_shot": "metadist.tasks.FewShotProblem",
    "conv4": "metadist.models.Conv4",
    "resnet12": "metadist.models.ResNet12",
    "mlp": "metadist.models.MLP",
    "linear": "metadist.tasks.LinearClassifier",
    "glyphs": "metadist.tasks.Glyphs",
    "sinusoid": "metadist.tasks.Sinusoid",
    "omniglot": "metadist.tasks.Omniglot",
    "cifar_fs": "metadist.tasks.CIFARFS",
    "fc100": "metadist.tasks.FC100",
    "image_folder": "metadist.tasks.ImageFolder",
    "hyper_cleaning": "metadist.tasks.HyperCleaning",
    "class_weights": "metadist.tasks.ClassWeights",
    "loss_weighting": "metadist.tasks.LossWeighting",
    "corrupted_images": "metadist.tasks.CorruptedImages",
    "long_tail": "metadist.tasks.LongTail",
    "text_regularisation": "metadist.tasks.TextRegularisation",
    "text_features": "metadist.tasks.TextFeatures",
    "quadratics": "metadist.tasks.Quadratics",
    "quadratic_data": "metadist.tasks.QuadraticData",
    "lancbio_synthetic": "metadist.tasks.LancBiOSynthetic",
    "lancbio_data": "metadist.tasks.LancBiOData",
    "amigo_toy": "metadist.tasks.AmigoToy",
    "coreset": "metadist.tasks.Coreset",
    "degenerate": "metadist.tasks.Degenerate",
    "lasso": "metadist.tasks.Lasso",
    "merely_convex": "metadist.tasks.MerelyConvex",
    "minimax": "metadist.tasks.Minimax",
    "pbgd_toy": "metadist.tasks.PBGDToy",
    "penalty_toy": "metadist.tasks.PenaltyToy",
    "sine": "metadist.tasks.Sine",
    "no_data": "metadist.tasks.NoData",
}
"""Short names of class paths."""


def _any_with(title: str, *methods: str) -> type:
    """A base class of every class with these methods: users need not derive from ours.

    `title` is the heading of its options in the help.
    """

    class Base(ABC):  # noqa: B024  # it is its subclass hook
        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            return all(callable(getattr(other, name, None)) for name in methods)

    Base.__name__ = " ".join(methods)  # for the message of `readable`
    Base.__doc__ = title
    return Base


SamplerBase: Any = _any_with("Tasks", "sample")

ProblemBase: Any = _any_with("Problem", "init_outer", "init_inner", "inner_loss", "outer_loss")

ExecutorBase: Any = _any_with("Executor", "start", "run", "state", "close")

PolicyBase: Any = _any_with("Policy", "leases_to_apply", "may_issue")

KINDS: dict[str, tuple[type, str]] = {
    "algorithms": (Algorithm, "--algorithm"),
    "problems": (ProblemBase, "--problem"),
    "models": (torch.nn.Module, "--problem.model"),
    "samplers": (SamplerBase, "--sampler"),
    "executors": (ExecutorBase, "--executor"),
    "policies": (PolicyBase, "--executor.policy"),
}
"""What has short names: its base class and its option."""

SAMPLERS = ("sampler", "val_sampler", "test_sampler")

CLASS_OPTIONS = (*SAMPLERS, "problem", "algorithm", "executor", "policy", "model")


def named(kind: str) -> dict[str, type]:
    """The classes of a kind by short name."""
    found: dict[str, type] = {}
    for name, path in NAMES.items():
        module, _, attribute = path.rpartition(".")
        cls = getattr(importlib.import_module(module), attribute)
        if issubclass(cls, KINDS[kind][0]):
            found[name] = cls
    return found


def expand_tree(tree: Any) -> Any:
    """A tree of options with the short names of classes written out."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: expand_tree(value) for key, value in tree.items()}
    for key in (*CLASS_OPTIONS, "class_path"):
        if isinstance(tree.get(key), str):
            tree[key] = NAMES.get(tree[key], tree[key])
    return tree


def expand_names(arguments: list[str]) -> list[str]:
    """Arguments with the short names of classes written out."""
    expanded = []
    is_class = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if is_class:
            argument = NAMES.get(argument, argument)
        elif equals and option.removeprefix("--").rpartition(".")[2] in CLASS_OPTIONS:
            argument = f"{option}={NAMES.get(value, value)}"
        is_class = (
            not equals
            and option.startswith("--")
            and (option.removeprefix("--").rpartition(".")[2] in (*CLASS_OPTIONS, "class_path"))
        )
        expanded.append(argument)
    return expanded
