"""Public classes as their sources tell. Nothing is imported: torch and Ray take seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import metadist
from metadist.exports import imported

ROOT = Path(metadist.__file__).parent


class Parameter(NamedTuple):
    """What a class is made from."""

    name: str
    types: frozenset[str]
    is_required: bool


class PublicClass:
    """A class of metadist.

    Args:
        nodes: Its definition, and those of its bases in metadist.
    """

    def __init__(self, nodes: tuple[ast.ClassDef, ...]) -> None:
        self.name = nodes[0].name
        self.doc = ast.get_docstring(nodes[0]) or ""
        self.summary = self.doc.partition("\n")[0]
        self._nodes = nodes

    def has(self, methods: tuple[str, ...]) -> bool:
        """Whether it has all these methods, and can be made: none of its own is abstract."""
        found: dict[str, ast.FunctionDef] = {}
        for node in self._nodes:
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found.setdefault(item.name, item)
        is_abstract = any(_has_decorator(method, "abstractmethod") for method in found.values())
        is_protocol = "Protocol" in map(ast.unparse, self._nodes[0].bases)
        return set(methods) <= set(found) and not is_abstract and not is_protocol

    def parameters(self) -> list[Parameter]:
        """What it is made from, as its `__init__` or the fields of a dataclass tell."""
        fields: dict[str, Parameter] = {}
        for node in reversed(self._nodes):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    fields = {found.name: found for found in _arguments(item.args)}
                elif isinstance(item, ast.AnnAssign) and _has_decorator(node, "dataclass"):
                    field = _parameter(ast.unparse(item.target), item.annotation, item.value)
                    fields[field.name] = field
        return list(fields.values())


def public_classes(package: str) -> Mapping[str, PublicClass]:
    """The classes that a package exports, or that a module defines, by name."""
    tree = _tree(package)
    homes = imported(tree, as_itself=True)
    homes |= dict.fromkeys(_definitions(package), package)
    found = {}
    for name, module in homes.items():
        if nodes := tuple(_with_bases(module, name)):
            found[name] = PublicClass(nodes)
    return found


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


@cache
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef)}


@cache
def _imported(module: str) -> dict[str, str]:
    return imported(_tree(module))


def _with_bases(module: str, name: str) -> Iterator[ast.ClassDef]:
    """The definition of a class, then those of its bases; none for what is no class of ours."""
    if module.partition(".")[0] == "metadist" and name in _definitions(module):
        node = _definitions(module)[name]
        yield node
        for base in map(ast.unparse, node.bases):
            yield from _with_bases(_imported(module).get(base, module), base)


def _arguments(arguments: ast.arguments) -> Iterator[Parameter]:
    given = arguments.posonlyargs + arguments.args
    num_required = len(given) - len(arguments.defaults)
    defaults = [*[None] * num_required, *arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip(given + arguments.kwonlyargs, defaults, strict=True):
        if argument.arg != "self":
            yield _parameter(argument.arg, argument.annotation, default)


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    types = "" if annotation is None else ast.unparse(annotation)
    return Parameter(name, frozenset(types.split(" | ")), is_required=default is None)


def _has_decorator(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(name in ast.unparse(decorator) for decorator in node.decorator_list)
