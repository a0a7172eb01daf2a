"""Parsers of options and YAML."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader

from metadist.checks.paths import absent
from metadist.cli.help import class_help, command_help, shown
from metadist.cli.mistakes import explain, options_of, raised_by_module
from metadist.cli.names import expand, expand_names, expand_tree, kind_of
from metadist.cli.sizes import leave_open, without_open
from metadist.run.files import MAX_CONFIG_BYTES
from metadist.run.uris import check_no_secrets


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
        self.other_keys: Sequence[str] = ()
        """Keys that a file may have beside the options."""
        self.sections: Mapping[str, Sequence[str]] = {}
        """The options under each heading of the help; all others come at its end."""
        self.first: dict[str, str] = {}
        """Options that come before all flags, which name classes by default. A default in the usual
        sense would fill in the values of its class, of which those that another class knows too
        would stay when that one is named."""
        self.fill_sizes: Callable[[Any, Parser], None] | None = None
        """Takes sizes that are not given from the tasks, see `metadist.cli.sizes`; until then they
        are open. None: there are none."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        args = classes_first(expand_names(sys.argv[1:] if args is None else list(args)))
        if not self.exit_on_error:  # its caller explains the error
            return self._parse(args, *rest, **options)
        self.exit_on_error = False
        try:
            if self._show_help(args):
                sys.exit(0)
            for option, file in pairwise(args):
                if option == "--config":
                    read_yaml(file)
            if self.positional:
                args = name_positional(self.positional, args)
            return self._parse(args, *rest, **options)
        except ArgumentError as error:
            message = self.explained(error, args)
        except ValueError as error:
            message = str(error)
        finally:
            self.exit_on_error = True
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        print(f"`{self.prog} --help` shows the options", file=sys.stderr)
        sys.exit(2)

    def explained(self, error: Exception, args: Sequence[str] = ()) -> str:
        """An error of parsing these arguments, for users."""
        message = explain(error, self, args)
        file = self._file_in(args)
        return f"{file}: {message}" if file else message

    def class_options(self, args: Sequence[str]) -> list[str]:
        """The options of the classes that arguments name, such as `algorithm.inner_lr`."""
        found = []
        for action in shown(self):
            if kind_of(action.dest):
                option = f"--{action.dest}"
                path = last_named(option, args) or expand(option, self.first.get(option, ""))
                found += [f"{action.dest}.{name}" for name in options_of(path)]
        return found

    def _parse(self, args: list[str], *rest: Any, **options: Any) -> Any:
        first = {option: expand(option, name) for option, name in self.first.items()}
        for option in self.first:
            whole = option.rpartition(".")[0]
            if whole and last_named(whole, args) not in (None, first[whole]):
                # It would stay where another class, with a default of its own, takes it too.
                del first[option]
        pairs = [part for pair in first.items() for part in pair]
        printing: list[str] = []
        if self.fill_sizes is not None and last_named("--sampler", args) is not None:
            args, printing = without_print(args)
        try:
            found = super().parse_args([*pairs, *args], *rest, **options)
        except Exception as error:
            if isinstance(error, ArgumentError) or not raised_by_module(error):
                raise
            raise ArgumentError(None, str(error)) from error  # as it does for classes in no list
        if self.fill_sizes is not None:
            given = super().parse_args([*pairs, *args], *rest, **{**options, "defaults": False})
            leave_open(found, given)
        # Also those of files: a run keeps its options, and prints some of them.
        check_no_secrets([f"--{name}={value}" for name, value in found.items()])
        if printing:
            self._print_sized(found, printing[-1].partition("=")[2].split(","))
        return found

    def _print_sized(self, config: Any, flags: Sequence[str]) -> None:
        """Print a config with the sizes that follow from the tasks, and end the program."""
        assert self.fill_sizes is not None
        try:
            self.fill_sizes(config, self)
        except Exception as error:  # noqa: BLE001  # data is elsewhere, or cannot be fetched
            config, names = without_open(config)
            note = f"left out, since they follow from the tasks: {', '.join(names)} ({error})"
            print(f"{self.prog}: {note}", file=sys.stderr)
        kinds = {"skip_default": False, "skip_unset": False}
        if unknown := set(flags) - {"", *kinds}:
            raise ValueError(f"print_config must be one of {', '.join(kinds)}, got {unknown.pop()}")
        kinds |= {flag: True for flag in flags if flag}
        print(self.dump(config, skip_validation=True, **kinds), end="")
        self.exit()

    def _file_in(self, args: Sequence[str]) -> str | None:
        """The file named by --config that is wrong; None if other arguments are."""
        for number, (option, file) in enumerate(pairwise(args)):
            if option == "--config" and not file.startswith("{"):
                if self._is_refused(args[:number]):
                    return None
                if self._is_refused(args[: number + 2]):
                    return file
        return None

    def _is_refused(self, args: Sequence[str]) -> bool:
        try:
            self._parse(without_print(args)[0])
        except ArgumentError as error:
            return "required: " not in str(error) or "class_path" in str(error)
        except ValueError:  # refused for another reason than the one that is looked for
            return False
        return False

    def _show_help(self, args: list[str]) -> bool:
        """Whether a help was asked for; then it is printed."""
        for number, argument in enumerate(args):
            option, equals, value = argument.partition("=")
            if argument in ("-h", "--help"):
                print(command_help(self), end="")
                return True
            if option.startswith("--") and option.endswith(".help"):
                after = [value] if equals else args[number + 1 :]
                print(class_help(self, option[2:].removesuffix(".help"), after), end="")
                return True
        return False


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
    if sum(argument.partition("=")[0] == f"--{option}" for argument in named) > 1:
        raise ValueError(f"{option} must be given once, got {' '.join(args)}")
    return named


def without_print(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments without `--print_config`, those that ask for it)."""
    asking = [arg for arg in args if arg.partition("=")[0] == "--print_config"]
    return [arg for arg in args if arg not in asking], asking


def classes_first(args: list[str]) -> list[str]:
    """Arguments in an order in which a class is named before its options; files stay in place."""
    options = args[: args.index("--")] if "--" in args else args
    units: list[list[str]] = []
    for argument in options:
        if argument.startswith("--") or not units:
            units.append([])
        units[-1].append(argument)
    places = []
    num_files = 0
    for unit in units:
        option = unit[0].partition("=")[0].removeprefix("--")
        num_files += option == "config"
        # A file comes before what follows it, `executor` before `executor.policy`, that before all.
        rank = option.count(".") if kind_of(option) else math.inf
        places.append((num_files, -1 if option == "config" else rank))
    order = sorted(range(len(units)), key=lambda number: places[number])
    return [argument for number in order for argument in units[number]] + args[len(options) :]


def last_named(name: str, args: Sequence[str]) -> str | None:
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


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: expand_tree(_load_yaml(text)), exceptions=(yaml.YAMLError,))


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file, short names of classes written out.

    Raises:
        ValueError: it cannot be read, or holds no options.
    """
    if not Path(path).exists():
        reason = absent(Path(path), "file")
        raise ValueError(f"config must be a YAML file of options, got {path!r}: {reason}")
    try:
        text = Path(path).read_text()
        check_yaml(text)
        tree: dict[str, Any] = expand_tree(_load_yaml(text))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        message = f"config must be a YAML file of options, got {path!r}: {reason}"
        raise ValueError(message) from error
    return tree


@contextmanager
def errors_of(file: str) -> Iterator[None]:
    """Errors within name the file that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _require_different(names: Sequence[yaml.Node]) -> None:
    lines: dict[str, int] = {}
    for name in names:
        if not isinstance(name, yaml.ScalarNode):
            continue
        line = name.start_mark.line + 1
        if name.value in lines:
            raise ValueError(
                f"it has {name.value} twice, in lines {lines[name.value]} and {line}: remove one"
            )
        lines[name.value] = line


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is no mapping, has a name twice, or is endless or huge."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError("it holds itself")
            return known
        sizes[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _require_different([name for name, _ in node.value])
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        total = sizes[id(node)] = 1 + sum(map(size, parts))
        return total

    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("no mapping of options to values")
    if size(root) > MAX_CONFIG_BYTES:
        raise ValueError("aliases that make it huge")
