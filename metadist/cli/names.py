"""Short names of classes: what the public packages export, by one rule.

There is no table: a class has a short name as soon as its package exports it. Its methods tell its
kind, and its own name becomes the short one: `HyperCleaning` is `hyper_cleaning`,
`FewShotProblem` is `few_shot`, `LancBiOData` is `lancbio_data`, `CIFARFS` is `cifarfs`.
Case, underscores and hyphens do not matter in what users write.
"""

from __future__ import annotations

import re
from abc import ABC
from functools import cache
from typing import Any, NamedTuple

from metadist.cli.classes import Parameter, PublicClass, public_classes
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


class Kind(NamedTuple):
    """Classes that stand for one another.

    Args:
        options: The options that name one, the shortest way to it first.
        modules: Where the classes are exported.
        methods: What each of them has.
        suffix: The end of a class name that the short name leaves out.
    """

    options: tuple[str, ...]
    modules: tuple[str, ...]
    methods: tuple[str, ...]
    suffix: str = ""


ALGORITHM = ("init", "estimate", "adapt")
PROBLEM = ("init_outer", "init_inner", "inner_loss", "outer_loss")
EXECUTOR = ("start", "run", "state", "close")
POLICY = ("leases_to_apply", "may_issue")
STEP_RULE = ("start", "step", "lr_at")
LOGGER = ("open", "log_scalars", "rewind")

SamplerBase = _any_with("Tasks", "sample")
ProblemBase = _any_with("Problem", *PROBLEM)
ExecutorBase = _any_with("Executor", *EXECUTOR)

KINDS = {
    "algorithms": Kind(("algorithm",), ("metadist.algorithms",), ALGORITHM),
    "problems": Kind(("problem",), ("metadist.tasks",), PROBLEM, "Problem"),
    "models": Kind(
        ("problem.model",), ("metadist.models", "metadist.tasks"), ("forward",), "Classifier"
    ),
    "samplers": Kind(
        ("sampler", "val_sampler", "test_sampler"), ("metadist.tasks",), ("sample",), "Sampler"
    ),
    "executors": Kind(("executor",), ("metadist", "metadist.cluster"), EXECUTOR, "Executor"),
    "policies": Kind(("executor.policy",), ("metadist.cluster",), POLICY),
    "step_rules": Kind(("algorithm.inner_optimizer",), ("metadist",), STEP_RULE),
    "loggers": Kind(("loggers",), ("metadist.loggers",), LOGGER, "Logger"),
    "weights": Kind(("problem.weights",), ("metadist.tasks",), ("init", "of", "scores")),
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


def named(kind: str) -> dict[str, PublicClass]:
    """The classes of a kind by short name."""
    found: dict[str, PublicClass] = {}
    for module in KINDS[kind].modules:
        found |= _named_in(module, kind)
    return dict(sorted(found.items()))


def class_path(kind: str, name: str) -> str | None:
    """The class path of a short name, or of a bare class name; None if no class has it."""
    for module in KINDS[kind].modules:
        for short, cls in _named_in(module, kind).items():
            if plain(name) in (plain(short), plain(cls.name)):
                return f"{module}.{cls.name}"
    return None


@cache
def _named_in(module: str, kind: str) -> dict[str, PublicClass]:
    """The classes of a kind that text can describe: they require no object."""
    found = {}
    for cls in public_classes(module).values():
        required = [parameter for parameter in cls.parameters() if parameter.is_required]
        # What models need follows from the tasks; a layer, which has sizes, is no model.
        is_describable = all(map(_can_be_written, required)) and (kind != "models" or not required)
        if cls.has(KINDS[kind].methods) and is_describable:
            found[short_name(cls.name, KINDS[kind].suffix)] = cls
    return found


def _can_be_written(parameter: Parameter) -> bool:
    is_text = not parameter.types.isdisjoint(
        {"bool", "int", "float", "str", "Path", "Sequence[str]"}
    )
    return is_text or kind_of(parameter.name) is not None


def expand(option: str, name: str) -> str:
    """The class path of a short name given for an option; any other text as it is."""
    kind = kind_of(option.removeprefix("--"))
    if kind == "loggers" and not option.endswith(".class_path"):  # the one option that is a list
        return _expand_list(kind, name)
    if kind is None or name == "null" or not re.fullmatch(r"[\w-]+", name):
        return name
    return class_path(kind, name) or name


def _expand_list(kind: str, text: str) -> str:
    """The class paths of "csv" or "[csv, wandb]" as a list; any other text as it is."""
    listed = re.fullmatch(r"\[?([\w., -]+)\]?", text)
    if listed is None or text == "null":
        return text
    names = [name.strip() for name in listed[1].split(",")]
    return f"[{', '.join(class_path(kind, name) or name for name in names)}]"


def expand_tree(tree: Any, option: str = "") -> Any:
    """A tree of options with the short names of classes written out; it is what `option` holds."""
    if isinstance(tree, str):
        return expand(option, tree)
    if isinstance(tree, list):
        # A list of names elsewhere is a mistake, whose message repeats it as it is.
        inside = f"{option}.class_path" if kind_of(option) == "loggers" else ""
        return [expand_tree(item, inside if isinstance(item, str) else option) for item in tree]
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
