"""Docstrings as they are written here, for Sphinx.

Ours are plain text: code stands in single backticks, formulas and programs are indented, sections
such as `Args:` list names, and facts such as `Cost:` begin a line. Nothing else is markup: * and |
and _ are themselves.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from typing import Any

from sphinx.pycode import ModuleAnalyzer

from metadist.cli.catalogue import FACTS
from metadist.exports import imported

SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:")
FACT = re.compile(rf"({'|'.join(FACTS)}): +(.*)")
ENTRY = re.compile(r"([\w*][\w., *]*): +(.*)")


def to_rst(lines: list[str]) -> list[str]:
    """A docstring, whose indentation is removed, as reStructuredText."""
    written: list[str] = []
    for block in _blocks(lines):
        written += [*_rst(block), ""]
    return written


def entries(doc: str) -> dict[str, list[str]]:
    """What the section Args of a docstring says of each name."""
    found: dict[str, list[str]] = {}
    for block in _blocks(doc.splitlines()):
        if block[0] == "Args:":
            for names, said in _entries(block):
                found |= dict.fromkeys(names.split(", "), said)
    return found


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs; sections with all their lines; what is indented, with its empty lines."""
    blocks: list[list[str]] = []
    after_empty = True
    for line in lines:
        is_indented = line.startswith(" ")
        is_inside = (
            is_indented and blocks and (blocks[-1][0] in SECTIONS or blocks[-1][0][0] == " ")
        )
        if blocks and line not in SECTIONS and (is_inside or not after_empty):
            blocks[-1].append(line)
        elif line:
            blocks.append([line])
        after_empty = not line
    return [block if block[-1] else block[:-1] for block in blocks]


def _rst(block: list[str]) -> list[str]:
    head = block[0]
    if head in SECTIONS:
        written = [f".. rubric:: {head[:-1]}", ""]
        for names, said in _entries(block):
            body = textwrap.indent("\n".join(to_rst(said)), "    ").splitlines()
            written += [f"``{names}``", *body, ""] if names else to_rst(said)
        return written
    if head.startswith(" "):
        return ["::", "", *textwrap.indent(textwrap.dedent("\n".join(block)), "    ").splitlines()]
    if not FACT.match(head):
        text = "\n".join(map(_escaped, block))
        return text.replace("\n* ", "\n\n* ").splitlines()  # a list begins behind an empty line
    fields = []
    for line in block:
        fact = FACT.match(line)
        fields.append(f":{fact[1]}: {_escaped(fact[2])}" if fact else f"    {_escaped(line)}")
    return fields


def _entries(block: list[str]) -> list[tuple[str, list[str]]]:
    """The names of a section, and the lines on each; text without a name has an empty one."""
    found: list[tuple[str, list[str]]] = []
    for line in textwrap.dedent("\n".join(block[1:])).splitlines():
        entry = ENTRY.match(line)
        if entry:
            found.append((entry[1], [entry[2]]))
        elif found and found[-1][0]:
            found[-1][1].append(line.removeprefix("    "))
        else:
            found.append(("", [line]))
    return found


def _escaped(text: str) -> str:
    """Text in which only single backticks, and the bullet of a list, mean something."""
    bullet = "* " if text.startswith("* ") else ""
    parts = text[len(bullet) :].split("`")
    if len(parts) % 2 == 0:  # one backtick has no partner on its line
        return re.sub(r"([\\*_|`])", r"\\\1", text)
    for number, part in enumerate(parts):
        parts[number] = f"``{part}``" if number % 2 else re.sub(r"([\\*_|])", r"\\\1", part)
    return bullet + "".join(parts)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "data":  # an object has no docstring: it is that of its class, dict for example
        package, _, own = name.rpartition(".")
        home = imported(ast.parse(inspect.getsource(sys.modules[package]))).get(own, package)
        lines[:] = ModuleAnalyzer.for_module(home).find_attr_docs()["", own]
    lines[:] = to_rst(lines)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
