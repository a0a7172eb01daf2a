"""Parsers of options and YAML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from metadist.cli.help import class_help, command_help
from metadist.cli.names import expand, expand_names, expand_tree

MAX_CONFIG_BYTES = 1 << 20


class Parser(ArgumentParser):
    """Says what is wrong, without two screens of usage before it.

    Args:
        positional: The option that may also be given as the one argument without a name.
        required: Options that the help calls required, beside those that jsonargparse does.
    """

    def __init__(
        self, *args: Any, positional: str = "", required: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self.positional = positional
        self.required = required
        self.sections: Mapping[str, Sequence[str]] = {}
        """The options under each heading of the help; all others come at its end."""
        self.first: dict[str, str] = {}
        """Options that come before all flags, which name classes by default. A default in the usual
        sense would fill in the values of its class, of which those that another class knows too
        would stay when that one is named."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        args = expand_names(sys.argv[1:] if args is None else list(args))
        if self._show_help(args):
            sys.exit(0)
        if self.positional:
            args = name_positional(self.positional, args)
        first = {option: expand(option, name) for option, name in self.first.items()}
        for option in self.first:
            whole = option.rpartition(".")[0]
            if whole and last_named(whole, args) not in (None, first[whole]):
                # It would stay where another class, with a default of its own, takes it too.
                del first[option]
        pairs = [part for pair in first.items() for part in pair]
        return super().parse_args([*pairs, *args], *rest, **options)

    def _show_help(self, args: list[str]) -> bool:
        """Whether a help was asked for; then it is printed."""
        for number, argument in enumerate(args):
            option, equals, value = argument.partition("=")
            if argument in ("-h", "--help"):
                print(command_help(self), end="")
                return True
            if option.startswith("--") and option.endswith(".help"):
                after = [value] if equals else args[number + 1 :]
                try:
                    print(class_help(self, option[2:].removesuffix(".help"), after), end="")
                except ValueError as error:
                    self.error(str(error))
                return True
        return False

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # a parser of nested arguments: the outermost one reports it
            super().error(message, ex)
        print(f"{self.prog}: error: {readable(message)}", file=sys.stderr)
        print(f"`{self.prog} --help` shows the options", file=sys.stderr)
        sys.exit(2)


def name_positional(option: str, args: list[str]) -> list[str]:
    """Arguments with `--option=` before the one that has no name.

    argparse has optional positionals too, but takes them for absent when flags come first.
    """
    named = []
    is_value = False
    for argument in args:
        if argument.startswith("-"):
            is_value = "=" not in argument and argument not in ("-h", "--help")
        elif not is_value:
            argument = f"--{option}={argument}"
        else:
            is_value = False
        named.append(argument)
    return named


def last_named(name: str, args: list[str]) -> str | None:
    """The class that flags, or a config among them, name last for the option `name` (--problem)."""
    found = None
    for option, following in pairwise([*args, ""]):
        option, equals, value = option.partition("=")
        value = value if equals else following
        if option == name:
            found = value
        elif option == "--config":
            with suppress(ValueError):  # which the parser reports
                inline = value.startswith("{")  # JSON, from metadist.cli.train.parse_training
                tree = expand_tree(json.loads(value)) if inline else read_yaml(value)
                named = tree.get(name.removeprefix("--"), {})
                found = named.get("class_path", found) if isinstance(named, dict) else named
    return found


def readable(message: str) -> str:
    """An error of jsonargparse without what only its authors need."""
    lines = []
    for line in message.splitlines():
        if line.strip().startswith(("Given value type:", "Subtypes:", "Given value:")):
            continue
        if "Does not validate against any of the Union" in line or line.strip() == "Errors:":
            continue
        if "Expected a <class 'NoneType'>" in line or "Expected a path but" in line:
            continue
        line = re.sub(
            r"Import path does not correspond to a subclass of (.*)",
            r"must name a class that has \1, and this one has not",
            line,
        )
        if line.strip():
            lines.append(line)
    return "\n".join(lines)


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: expand_tree(_load_yaml(text)), exceptions=(yaml.YAMLError,))


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file, short names of classes written out.

    Raises:
        ValueError: it cannot be read, or holds no options.
    """
    try:
        text = Path(path).read_text()
        check_yaml(text)
        tree: dict[str, Any] = expand_tree(_load_yaml(text))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config must be a YAML file of options, got {path!r}: {error}") from error
    return tree


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is no mapping, or that aliases make endless or huge."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError("it holds itself")
            return known
        sizes[id(node)] = None
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        total = sizes[id(node)] = 1 + sum(map(size, parts))
        return total

    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("no mapping of options to values")
    if size(root) > MAX_CONFIG_BYTES:
        raise ValueError("aliases that make it huge")
