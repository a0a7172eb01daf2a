"""Names that a package imports when they are first used: torch takes seconds to import, Ray one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def imported(tree: ast.Module, as_itself: bool = False) -> dict[str, str]:
    """The module that each name is imported from, of all or of those imported as themselves."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if not as_itself or alias.asname == alias.name:
                    found[alias.asname or alias.name] = node.module
    return found


def lazy(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """(`__all__`, `__getattr__`, `__dir__`) of a package that declares its names for type checkers.

    The names are those that its source imports as themselves below `if TYPE_CHECKING`, so a new one
    is one line, `from MODULE import NAME as NAME`.
    """
    module = sys.modules[package]
    homes = imported(ast.parse(Path(str(module.__file__)).read_text()), as_itself=True)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)
        return value

    return [*homes], get, lambda: [*vars(module), *homes]
