"""Models by the name of what builds them: a few bytes of text in place of all their weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from metadist.checks.values import require_word


class ModelFactory:
    """A model that every process builds for itself, in place of one that is sent to it.

        model = ModelFactory("my_package.models.build", {"width": 256})

    It travels as text and is built once in a process. The function is imported by its name, so it
    must be in a module that every worker can import, and give the same weights everywhere: it runs
    from the seed, and what it gives is compared with what the driver had.

    Args:
        build: The full name of a function or class that returns an `nn.Module`.
        arguments: Its keyword arguments: numbers, texts, and lists and dicts of these.
        seed: The seed of torch's random numbers while it runs, 0 <= seed < 2^64.

    Raises:
        ValueError: A name that is no import path, arguments that are no text.
    """

    def __init__(
        self, build: str, arguments: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        if not isinstance(build, str) or not all(part.isidentifier() for part in build.split(".")):
            raise ValueError(
                f"build must be the full name of a function, 'package.module.function', got "
                f"{build!r}: a factory travels as text"
            )
        if "." not in build:
            raise ValueError(
                f"build must name the module too, 'package.module.{build}', got {build!r}"
            )
        require_word("seed", seed)
        self.build, self.arguments, self.seed = build, dict(arguments or {}), seed
        self.key()

    def key(self) -> str:
        """What is built, as text: equal keys mean equal models.

        Raises:
            ValueError: An argument is no text, number, list or dict.
        """
        try:
            return json.dumps([type(self).__qualname__, vars(self)], sort_keys=True)
        except TypeError as error:
            raise ValueError(
                f"arguments must be numbers, texts, and lists and dicts of these, got {error}: a "
                "factory travels as text; build the object inside the function"
            ) from error

    def with_seed(self, seed: int) -> ModelFactory:
        """The same factory with another seed."""
        require_word("seed", seed)
        other = copy.copy(self)
        other.seed = seed
        return other

    def __call__(self) -> nn.Module:
        """A new model, with the same weights each time; torch's own random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.make()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self} must build an nn.Module, got {type(model).__name__}")
        return model

    def make(self) -> nn.Module:
        """The model, by random numbers of torch's global generator."""
        module, _, name = self.build.rpartition(".")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"build must name a function that this machine can import, got {self.build!r} "
                f"({error}): install its package on every machine"
            ) from error
        made: nn.Module = function(**self.arguments)
        return made

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({self.build!r}, {arguments})"
