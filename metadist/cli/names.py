"""Short names of classes: what the public packages export, by one rule.

There is no table: a class has a short name as soon as its package exports it. Its methods or base
class tell its kind, and its own name becomes the short one: `HyperCleaning` is `hyper_cleaning`,
`FewShotProblem` is `few_shot`, `LancBiOData` is `lancbio_data`, `CIFARFS` is `cifarfs`.
Case, underscores and hyphens do not matter in what users write.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from metadist.cli.suggestions import plain


def _any_with(title: str, *methods: str) -> Any:
    """A base class of every class with these methods: users need not derive from ours."""

    class Base(ABC):  # noqa: B024  # it is its subclass hook
        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            return all(callable(getattr(other, name, None)) for name in methods)

    Base.__name__ = ", ".join(methods)  # for the message that a class has not all of them
    Base.__doc__ = title
    return Base


SamplerBase = _any_with("Tasks", "sample")
ProblemBase = _any_with("Problem", "init_outer", "init_inner", "inner_loss", "outer_loss")
ExecutorBase = _any_with("Executor", "start", "run", "state", "close")
PolicyBase = _any_with("Policy", "leases_to_apply", "may_issue")


class Kind(NamedTuple):
    """Classes that stand for one another.

    Args:
        options: The options that name one, the shortest way to it first.
        modules: Where the classes are exported, in the order in which they are searched: Ray is
            imported only for what is found nowhere else.
        base: Their base class, or its path where importing it takes long.
        suffix: The end of a class name that the short name leaves out.
    """

    options: tuple[str, ...]
    modules: tuple[str, ...]
    base: Any
    suffix: str


KINDS = {
    "algorithms": Kind(
        options=("algorithm",),
        modules=("metadist.algorithms",),
        base="metadist.algorithm.Algorithm",
        suffix="",
    ),
    "problems": Kind(
        options=("problem",), modules=("metadist.tasks",), base=ProblemBase, suffix="Problem"
    ),
    "models": Kind(
        options=("problem.model",),
        modules=("metadist.models", "metadist.tasks"),
        base="torch.nn.Module",
        suffix="Classifier",
    ),
    "samplers": Kind(
        options=("sampler", "val_sampler", "test_sampler"),
        modules=("metadist.tasks",),
        base=SamplerBase,
        suffix="Sampler",
    ),
    "executors": Kind(
        options=("executor",),
        modules=("metadist", "metadist.cluster"),
        base=ExecutorBase,
        suffix="Executor",
    ),
    "policies": Kind(
        options=("executor.policy",), modules=("metadist.cluster",), base=PolicyBase, suffix=""
    ),
}


def kind_of(option: str) -> str | None:
    """The kind of class that an option names, such as `problem.model`; None: it names none."""
    last = option.removesuffix(".class_path").rpartition(".")[2]
    for kind, (options, *_) in KINDS.items():
        if last in (name.rpartition(".")[2] for name in options):
            return kind
    return None


def short_name(cls_name: str, suffix: str = "") -> str:
    """The short name of a class: words of three letters and more are set apart, but acronyms."""
    bare = cls_name.removesuffix(suffix) or cls_name
    return re.sub(r"(?<=.)(?=[A-Z][a-z]{2,}([A-Z][a-z]{2}|$))", "_", bare).lower()


def named(kind: str) -> dict[str, type]:
    """The classes of a kind by short name."""
    found: dict[str, type] = {}
    for module in KINDS[kind].modules:
        found |= _named_in(module, kind)
    return dict(sorted(found.items()))


def class_path(kind: str, name: str) -> str | None:
    """The class path of a short name, or of a bare class name; None if no class has it."""
    for module in KINDS[kind].modules:
        for short, cls in _named_in(module, kind).items():
            if plain(name) in (plain(short), plain(cls.__name__)):
                return f"{module}.{cls.__name__}"
    return None


@cache
def _named_in(module: str, kind: str) -> dict[str, type]:
    _, _, base, suffix = KINDS[kind]
    if isinstance(base, str):
        where, _, name = base.rpartition(".")
        base = getattr(import_module(where), name)
    package = import_module(module)
    exported = [getattr(package, name) for name in package.__all__]
    return {
        short_name(cls.__name__, suffix): cls
        for cls in exported
        if inspect.isclass(cls) and issubclass(cls, base) and _can_be_named(cls)
    }


def _can_be_named(cls: type) -> bool:
    """Whether text can describe one: it is not abstract, and requires no object."""
    if inspect.isabstract(cls) or getattr(cls, "_is_protocol", False):
        return False
    return all(map(_can_be_written, inspect.signature(cls).parameters.values()))


def _can_be_written(parameter: inspect.Parameter) -> bool:
    is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    if is_variadic or parameter.default is not parameter.empty or kind_of(parameter.name):
        return True
    # As text: a generated __init__ may have annotations of names that its module lacks.
    hints = inspect.formatannotation(parameter.annotation).strip("'").split(" | ")
    return not {"bool", "int", "float", "str", "Path"}.isdisjoint(hints)


def expand(option: str, name: str) -> str:
    """The class path of a short name given for an option; any other text as it is."""
    kind = kind_of(option.removeprefix("--"))
    if kind is None or name == "null" or not re.fullmatch(r"[\w-]+", name):
        return name
    return class_path(kind, name) or name


def expand_tree(tree: Any, option: str = "") -> Any:
    """A tree of options with the short names of classes written out; it is what `option` holds."""
    if isinstance(tree, str):
        return expand(option, tree)
    if not isinstance(tree, dict):
        return tree
    return {
        key: expand_tree(value, f"{option}.{key}" if key == "class_path" else str(key))
        for key, value in tree.items()
    }


def expand_names(arguments: list[str]) -> list[str]:
    """Arguments with the short names of classes written out."""
    expanded = []
    option = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            option = "" if equals else flag
            argument = f"{flag}={expand(flag, value)}" if equals else flag
        elif option:
            argument = expand(option, argument)
            option = ""
        expanded.append(argument)
    return expanded
