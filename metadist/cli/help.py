"""Help texts: of a command, and of a class that one of its options names.

jsonargparse prints every type and default in full and every class with its path; a newcomer needs
the short names, what is required, and where the rest is shown.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from metadist.cli.names import expand, kind_of, named
from metadist.cli.suggestions import one_of

if TYPE_CHECKING:
    from metadist.cli.parsing import Parser

INDENT = 26
"""Columns of the options; their help is to the right of it."""
MAX_NAMES = 6
"""The most short names that are shown beside an option."""


NOTE = (
    "NAME is a short name (`metadist list` shows them) or a class path. `{command} "
    "--{option}.help` lists the names for --{option}, `--{option}.help NAME` the options of one, "
    "which are written as --{option}.OPTION VALUE. `--OPTION.help` says more about any option."
)


class Entry(NamedTuple):
    """An option: `--flag VALUE`, what it is for, and "default: 3" and the like."""

    option: str
    text: str
    notes: Sequence[str] = ()


def command_help(parser: Parser) -> str:
    """The help of a command: of each option the first sentence."""
    width = _width()
    actions = shown(parser)
    lines = [_usage(parser, actions), "", *textwrap.wrap(parser.description or "", width)]
    for title, chosen in _sections(parser, actions):
        entries = [
            Entry(entry.option, _first_sentence(entry.text), entry.notes)
            for entry in _entries(parser, chosen)
        ]
        lines += ["", f"{title}:", *_block(entries, width)]
    if of_classes := [action.dest for action in actions if kind_of(action.dest)]:
        note = NOTE.format(command=parser.prog, option=of_classes[0])
        lines += ["", *textwrap.wrap(note, width, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def _sections(parser: Parser, actions: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """(heading, the options below it): those of `parser.sections`, and all others."""
    left = list(actions)
    for title, dests in parser.sections.items():
        chosen = [
            action for dest in dests for action in left if action.dest.partition(".")[0] == dest
        ]
        left = [action for action in left if action not in chosen]
        if chosen:
            yield title, chosen
    if left:
        yield "Other options" if parser.sections else "Options", left


def class_help(parser: Parser, option: str, args: list[str]) -> str:
    """The help of a class, as `--executor.help ray` asks for it: its docstring and options.

    Args:
        parser: The parser of the command.
        option: The option that names a class, such as `problem.model`, or a group of options.
        args: What was written after it, and all other arguments after that.
    """
    kind = kind_of(option)
    width = _width()
    if kind is None:
        return _group_help(parser, option, width)
    name = args[0] if args and not args[0].startswith("-") else None
    if name is None:
        lines = [f"--{option} NAME, one of:", ""]
        for short, cls in named(kind).items():
            lines += _block([Entry(short, cls.summary)], width)
        lines += ["", f"`--{option}.help NAME` shows the options of one."]
        return "\n".join(lines) + "\n"
    path = expand(option, name)
    if "." not in path:
        raise ValueError(one_of(option, name, named(kind)))
    cls = _imported(option, path)
    own = type(parser)(prog=parser.prog)
    try:
        own.add_class_arguments(cls, option, fail_untyped=False)
    except ValueError as error:
        raise ValueError(
            f"{option} must name a class whose parameters Python can list, got {path!r}: give it "
            "an __init__ of its own, or see the help of the class that it makes"
        ) from error
    text = inspect.cleandoc(cls.__doc__ or "")
    about = text.partition("\nArgs:")[0].partition("\nRaises:")[0].strip()
    lines = [f"--{option} {name}: {path}", "", *_reflowed(about, width)]
    for group in own._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if actions:
            inside = actions[0].dest.rpartition(".")[0]
            title = "Options" if inside == option else group.title
            entries = [_entry(own, action, with_names=True) for action in actions]
            lines += ["", f"{title}:", *_block(entries, width)]
    return "\n".join(lines) + "\n"


def _reflowed(text: str, width: int) -> Iterator[str]:
    """The lines of a docstring for a terminal; lists and formulas stay as they are."""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ""
        if re.search(r"^(\s|\* )", paragraph, re.MULTILINE):
            yield paragraph
        else:
            yield from textwrap.wrap(" ".join(paragraph.split()), width)


def shown(parser: Parser) -> list[Any]:
    """The options of a parser, as argparse keeps them."""
    return [action for action in parser._actions if _is_shown(action)]


def _group_help(parser: Parser, option: str, width: int) -> str:
    """The help of a single option, or of the options that begin with `option`."""
    actions = shown(parser)
    chosen = [a for a in actions if a.dest == option or a.dest.startswith(f"{option}.")]
    if not chosen:
        names = [action.dest for action in actions]
        raise ValueError(one_of("the option before .help", option, names))
    entries = (_entry(parser, action) for action in chosen)
    return "\n".join(_block(entries, width)) + "\n"


def _entries(parser: Parser, actions: Iterable[Any]) -> Iterator[Entry]:
    """The entries of actions; a group of nested ones is one entry."""
    for group, members in groupby(actions, key=lambda action: action.dest.rpartition(".")[0]):
        if group:
            names = ", ".join(action.dest.rpartition(".")[2] for action in members)
            yield Entry(f"--{group}.OPTION VALUE", f"{names}; see --{group}.help.")
        else:
            yield from (_entry(parser, action) for action in members)


def _entry(parser: Parser, action: Any, with_names: bool = False) -> Entry:
    if type(action).__name__ == "_ActionPrintConfig":
        return Entry("--print_config", "Print all options as YAML and exit.")
    text = action.help.rstrip(".") + "." if action.help else ""
    kind = kind_of(action.dest) if action.option_strings else None
    if with_names and kind is not None and len(named(kind)) <= MAX_NAMES:
        text = f"{text[:-1]}: {', '.join(named(kind))}."
    if not action.option_strings and action.choices:
        text = f"{text[:-1]}: {', '.join(action.choices)}."
    notes = ["required"] if action.required or action.dest in parser.required else []
    default = parser.first.get(f"--{action.dest}", action.default)
    if isinstance(default, (bool, int, float, str, tuple)) and default != argparse.SUPPRESS:
        notes.append(f"default: {_written(default)}")
    return Entry(_option(parser, action, kind), text, notes)


def _option(parser: Parser, action: Any, kind: str | None = None) -> str:
    """An option and its value, such as `--num_steps INT`."""
    if not action.option_strings:
        return str(action.metavar or action.dest.upper())
    option = action.option_strings[0]
    if action.nargs != 0:
        option += f" {_value(action, kind or kind_of(action.dest))}"
    return f"{action.dest.upper()}, {option}" if action.dest == parser.positional else option


def _value(action: Any, kind: str | None) -> str:
    if kind is not None:
        return "NAME"
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    hint = getattr(action, "_typehint", None)
    return _placeholder(hint) if hint is not None else action.dest.upper()


def _placeholder(hint: Any) -> str:
    if hint is bool:
        return "{true,false}"
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    names = {int: "INT", float: "FLOAT", str: "TEXT"}
    if hint in names:
        return names[hint]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if len(parts) == 1 and type(None) in get_args(hint):
        return _placeholder(parts[0])
    return "VALUE"


def _written(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _usage(parser: Parser, actions: list[Any]) -> str:
    if parser.usage:
        return f"usage: {parser.usage}"
    words = [f"usage: {parser.prog}"]
    for action in actions:
        if not action.option_strings:
            name = _option(parser, action)
            words.append(name if action.required else f"[{name}]")
        elif action.dest == parser.positional:
            words.append(action.dest.upper())
        elif action.required:
            words.append(_option(parser, action))
    for dest in parser.required:
        words += [_option(parser, action) for action in actions if action.dest == dest]
    return " ".join([*words, "[options]"])


def _first_sentence(text: str) -> str:
    end = re.search(r"[.;](?= [A-Z])|\.$", text)
    return text[: end.start()] + "." if end else text


def _is_shown(action: Any) -> bool:
    name = type(action).__name__
    # Short ones are of jsonargparse itself, for the shell.
    hidden = ("_ActionHelpClassPath", "_ActionConfigLoad", "_HelpAction", "ShtabAction")
    return name not in hidden and action.help != argparse.SUPPRESS


def _block(entries: Iterable[Entry], width: int) -> list[str]:
    """Lines with the options to the left and their texts to the right."""
    lines = []
    for option, text, notes in entries:
        if notes:
            # With spaces at which no line is broken.
            text += f" [{', '.join(notes)}]".replace(": ", ":\u00a0")
        found = textwrap.wrap(text, max(30, width - INDENT), break_on_hyphens=False) or [""]
        if len(option) <= INDENT - 4:
            lines.append(f"  {option:{INDENT - 2}}{found[0]}".rstrip())
            found = found[1:]
        else:
            lines.append(f"  {option}")
        lines += [" " * INDENT + line for line in found]
    return [line.replace("\u00a0", " ") for line in lines]


def _imported(option: str, path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} must be a class path, got {path!r}: {error}") from error
    except Exception as error:
        reason = f"its module raises {type(error).__name__}: {error}"
        raise ValueError(f"{option} must be a class path, got {path!r}: {reason}") from error


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 110)
