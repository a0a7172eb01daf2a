"""What is wrong with options, in the words of all other messages: field, rule, value, way out.

jsonargparse reports an error as a tree over many lines, with the types of Python and every member
of a union; here it becomes one sentence that names the option, the nearest name and all there are.
"""

from __future__ import annotations

import ast
import inspect
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metadist.cli.help import shown
from metadist.cli.names import kind_of, named
from metadist.cli.suggestions import METHODS, nearest, one_of, plain

if TYPE_CHECKING:
    from metadist.cli.parsing import Parser

TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
}
PARTS = ("class_path", "init_args")
CLASS = "a short name, a class path, or a mapping with class_path and init_args"
NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value type:|Expected a path but"
    r"|Expected a <class 'NoneType'>|Subclass types expect|a class path|a dict with"
)


class Report(NamedTuple):
    """What a report of jsonargparse says.

    Args:
        field: The option, with dots between its parts; empty for those of the command.
        cls: The path of the class whose option it is; empty for none.
        value: What was given, as text; None if the report does not tell.
        details: All other lines.
    """

    field: str
    cls: str
    value: str | None
    details: tuple[str, ...]


def explain(error: Exception, parser: Parser, args: Sequence[str] = ()) -> str:
    """An error of jsonargparse, as a user wants to read it.

    `args` name classes whose options may be meant.
    """
    report = _read(str(error))
    field, _, value, details = report
    if failure := raised_by_module(error):
        field = field or "every class path"  # of those in a list it does not tell
        return f"{field} must be importable, got {value + ': ' if value else ''}{failure}"
    text = "\n".join(details)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        option = found[1].partition("=")[0]
        if not option.startswith("--"):
            return f"arguments must begin with --, got {option!r}"
        return _unknown_of_command(option.removeprefix("--"), parser, args)
    if found := re.search(r"Option '(.+)' is not accepted", text):
        if report.cls:
            return _unknown_of_class(found[1], report)
        return _unknown_of_command(found[1], parser, args)
    if found := re.search(r"Group '(.+)' does not accept option '(.+)'", text):
        return _unknown_of_command(f"{found[1]}.{found[2]}", parser, args)
    if found := re.search(r"arguments are required: (.+)", text):
        names = [f"{field}.{name}".lstrip(".") for name in found[1].split(", ")]
        value = "NAME" if kind_of(names[0]) else "VALUE"
        option = f"--{names[0]} {value}"
        without = [action.dest for action in shown(parser) if not action.option_strings]
        if names[0] in (parser.positional, *without):
            option = f"{parser.prog} {names[0].upper()}"
        return f"{' and '.join(names)} must be given: pass {option}"
    if found := re.search(r"argument (--\S+): expected one argument", text):
        return f"{found[1].removeprefix('--')} must have a value: pass {found[1]} VALUE"
    if found := re.search(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)", text):
        # argparse takes the value of an unknown option for the argument that it misses.
        for argument in args:
            option = argument.partition("=")[0]
            if option.startswith("--") and option not in parser._option_string_actions:
                return _unknown_of_command(option.removeprefix("--"), parser, args)
        return one_of(found[1], found[2], found[3].replace("'", "").split(", "))
    kind = kind_of(field)
    if (found := re.search(r"Expected a dot import path string: (.+)", text)) and kind is not None:
        command = f"metadist list {kind}"
        if method := METHODS.get(plain(found[1])):
            given = f"got {found[1]!r}, which is {method}"
            return f"{field} must be one of `{command}` or a class path, {given}"
        return one_of(field, found[1], named(kind), "a class path", command)
    if "Expected an instantiatable class" in text and kind is not None:
        choices = ", ".join(named(kind))
        return f"{field} must be one of {choices}, got options of it alone: pass --{field} NAME"
    if found := re.search(r"Import path (\S+ )?does not correspond to a subclass of (.*)", text):
        what = "a subclass of" if found[2][0].isupper() else "a class that has"
        return f"{field} must name {what} {found[2]}, got {value or found[1].strip()}"
    if found := re.search(
        r"(?:no signature found for|unsupported input: class=)[^<]*<(.*?)>", text
    ):
        return (
            f"{field} must name a class or function whose parameters Python can list, got "
            f"{value or found[1]}: give it an __init__ of its own, or name a function that makes it"
        )
    if re.search(r"Not a valid subclass of|Unexpected import path format", text):
        return _no_class(field, str(value))
    if types := re.findall(r"Expected an? (<class '[\w.]+'>|typing\.\S*\[.*?\])", text):
        return _wrong_type(field, types, value)
    if re.match(r"No module named|module .* has no attribute", text):
        way_out = f"; put the module into {Path.cwd()} or PYTHONPATH" if "named" in text else ""
        return (
            f"{field} must be a class path that can be imported, got {report.cls}: {text}{way_out}"
        )
    return f"{field}: {text}" if field else text


def raised_by_module(error: BaseException | None) -> str:
    """What the import of a module raised, and where, if that is why there is `error`; or empty."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, SyntaxError):
            return f"SyntaxError: {error}"
        if any(frame.name == "<module>" for frame in frames):
            place = f"{frames[-1].filename}, line {frames[-1].lineno}"
            return f"{type(error).__name__}: {error} ({place})"
        error = error.__cause__
    return ""


def _read(message: str) -> Report:
    path, details = [], []
    cls, value = "", None
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if found := re.match(r'Parser key "(.*?)":', line):
            path.append(found[1])
            line = line[found.end() :].strip()
        if found := re.match(r"Problem with given class_path '(.*)':", line):
            cls = found[1]
        elif found := re.match(r"Given value: (.*)", line):
            value = value or _unwrapped(found[1])
        elif line and not NOISE.match(line):
            if found := re.search(r"Got value: (.*)", line):
                value = found[1]
            details.append(line)
    details = list(dict.fromkeys(details))  # members of a union may say the same
    return Report(field=".".join(path), cls=cls, value=value, details=tuple(details))


def _unwrapped(value: str) -> str:
    """What was given for `--problem.model.width`, of which jsonargparse shows its own record."""
    found = re.match(r"NestedArg\(key='.*', val='(.*)'\)", value)
    return found[1] if found else value


def _unknown_of_class(option: str, report: Report) -> str:
    name = report.cls.rpartition(".")[2]
    names = options_of(report.cls)
    found = nearest(option, names)
    others = named(kind_of(report.field) or "") if found is None else {}
    having = [
        short for short, cls in others.items() if option in (p.name for p in cls.parameters())
    ]
    known = name if report.cls.startswith("metadist.") else report.cls
    help_of = f"metadist train --{report.field}.help {known}"
    rest = f", but of {' and '.join(having)}" if having else _meant(found, names, help_of)
    return f"{report.field}.{option} is no option of {name}{rest}"


def _unknown_of_command(option: str, parser: Parser, args: Sequence[str]) -> str:
    names = [action.dest for action in shown(parser)]
    group, _, last = option.rpartition(".")
    members = [name.rpartition(".")[2] for name in names if name.startswith(f"{group}.")]
    if group and members:
        return f"{option} is no option of {group}{_meant(nearest(last, members), members)}"
    by_last = {name.rpartition(".")[2]: name for name in [*parser.class_options(args), *names]}
    top = list(dict.fromkeys(name.partition(".")[0] for name in [*names, *parser.other_keys]))
    head, dot, rest = option.partition(".")
    found = by_last.get(option) or nearest(head, top)
    if found and dot:
        found = f"{found}.{rest}"
    behind = ""
    if "flags" in top and found is None:
        behind = "; options of `metadist train` come behind --"
    return f"{option} is no option of {parser.prog}{_meant(found, top)}{behind}"


def _meant(found: str | None, names: Sequence[str], help_of: str = "") -> str:
    """The option that was meant, and what shows all; all where none is near."""
    if not names:
        return ", which has none"
    if found is None:
        return f". It has {', '.join(names)}"
    return f": did you mean {found}?" + (f" `{help_of}` shows all" if help_of else "")


def _no_class(field: str, value: str) -> str:
    with suppress(ValueError, SyntaxError):
        given = ast.literal_eval(value)
        for key in given if isinstance(given, dict) else ():
            if key not in PARTS:
                keys = one_of(f"the keys of {field}", key, PARTS)
                return keys if nearest(key, PARTS) else f"{keys}: name the class by class_path"
    return f"{field} must be {CLASS}, got {_quoted(value)}"


def _quoted(value: str) -> str:
    return repr(value) if re.match(r"[A-Za-z_]", value) else value


def _wrong_type(field: str, types: list[str], value: str | None) -> str:
    words = []
    choices: list[str] = []
    for text in types:
        if found := re.match(r"<class '(?:\w+\.)*(\w+)'>", text):
            words.append(TYPES.get(found[1], found[1]))
        elif found := re.match(r"typing\.Literal\[(.*)\]", text):
            choices += [choice.strip("'") for choice in found[1].split(", ")]
            words.append(f"one of {found[1]}")
        else:
            words.append(text.removeprefix("typing."))
    meant = nearest(str(value), choices)
    hint = f": did you mean {meant!r}?" if meant else ""
    if not hint and words == ["a list"] and value is not None:
        hint = f": pass --{field} [{value}]"
    return f"{field} must be {' or '.join(words)}, got {_quoted(str(value))}{hint}"


def options_of(path: str) -> list[str]:
    """The options of a class; none if it cannot be imported."""
    with suppress(ImportError, AttributeError, ValueError, TypeError):
        return [parameter.name for parameter in parameters_of(path)]
    return []


def parameters_of(path: str) -> list[inspect.Parameter]:
    """The parameters by which a class is made."""
    module, _, name = path.rpartition(".")
    cls: Any = getattr(import_module(module), name)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(cls).parameters.values() if p.kind not in variadic]
