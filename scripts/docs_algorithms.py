"""Write the table and the sections of docs/algorithms.md from the docstrings of the algorithms.

.venv/bin/python scripts/docs_algorithms.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS
from metadist.cli.catalogue import FACTS, FAMILIES, LEGEND, brief, facts, title

PAGE = Path(__file__).resolve().parents[1] / "docs" / "algorithms.md"
MARK = "<!-- From here on written by scripts/docs_algorithms.py from the docstrings. -->\n"
TABLE = {"lower problem": "For", "cost": "Cost", "state": "State", "when": "Use"}


def page(text: str) -> str:
    """`text` with everything after MARK written anew."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} must contain the line {MARK!r}")
    for cls in ALGORITHMS.values():
        if brief(cls, "Family") not in FAMILIES:
            raise ValueError(
                f"Family of {cls.__name__} must be one of {', '.join(FAMILIES)}, "
                f"got {brief(cls, 'Family')!r}"
            )
    parts = [head + MARK, "# All at a glance\n", _wrap(LEGEND) + "\n", _table()]
    for family in FAMILIES:
        parts.append(f"# {family}\n")
        parts += (_section(cls) for cls in _members(family))
    return "\n".join(parts)


def _members(family: str) -> list[type[Algorithm]]:
    return [cls for cls in ALGORITHMS.values() if brief(cls, "Family") == family]


def _table() -> str:
    columns = ["name", "method", *TABLE]
    rows = [columns, ["---"] * len(columns)]
    for family in FAMILIES:
        for cls in _members(family):
            name = cls.__name__.lower()
            cells = (brief(cls, fact) for fact in TABLE.values())
            rows.append([f"[{name}](#{name})", title(cls), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _section(cls: type[Algorithm]) -> str:
    bullets = []
    for fact, text in facts(cls).items():
        if fact not in ("Family", "For", "Use"):  # these are in headings and in the table
            bullets.append(_wrap(f"* **{fact}:** {text}", indent="  "))
    paragraphs = [f"## {cls.__name__}", f"**{title(cls)}.**", _body(cls), "\n".join(bullets)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _body(cls: type[Algorithm]) -> str:
    """Formulas and prose: the docstring without its first line, Args and facts."""
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")[1:]
    kept = []
    for paragraph in paragraphs:
        first = paragraph.partition(":")[0]
        if first != "Args" and first not in FACTS:
            kept.append(paragraph)
    return "\n\n".join(kept)


def _wrap(text: str, indent: str = "") -> str:
    # No line may begin with an operator, which Markdown reads as the bullet of a list.
    glued = re.sub(r" ([-+*]) ", "\0\\1 ", text)
    lines = textwrap.wrap(
        glued, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
