"""Write the table and the sections of docs/algorithms.md from the docstrings of the algorithms.

.venv/bin/python scripts/docs_algorithms.py
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from metadist.cli.catalogue import FACTS, FAMILIES, LEGEND, brief, facts, title
from metadist.cli.classes import PublicClass
from metadist.cli.names import named

PAGE = Path(__file__).resolve().parents[1] / "docs" / "algorithms.md"
MARK = "<!-- From here on written by scripts/docs_algorithms.py from the docstrings. -->\n"
TABLE = {"lower problem": "For", "cost": "Cost", "state": "State", "when": "Use"}


def page(text: str) -> str:
    """`text` with everything after MARK written anew."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} must contain the line {MARK!r}")
    for cls in named("algorithms").values():
        if brief(cls.doc, "Family") not in FAMILIES:
            raise ValueError(
                f"Family of {cls.name} must be one of {', '.join(FAMILIES)}, "
                f"got {brief(cls.doc, 'Family')!r}"
            )
    parts = [head + MARK, "# All at a glance\n", _wrap(LEGEND) + "\n", _table()]
    for family in FAMILIES:
        parts.append(f"# {family}\n")
        parts += (_section(cls) for cls in members(family))
    return "\n".join(parts)


def members(family: str) -> list[PublicClass]:
    return [cls for cls in named("algorithms").values() if brief(cls.doc, "Family") == family]


def _table() -> str:
    columns = ["name", "method", *TABLE]
    rows = [columns, ["---"] * len(columns)]
    for family in FAMILIES:
        for cls in members(family):
            name = cls.name.lower()
            cells = (brief(cls.doc, fact) for fact in TABLE.values())
            rows.append([f"[{name}](#{name})", title(cls.doc), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _section(cls: PublicClass) -> str:
    bullets = []
    for fact, text in facts(cls.doc).items():
        if fact not in ("Family", "For", "Use"):  # these are in headings and in the table
            bullets.append(_wrap(f"* **{fact}:** {text}", indent="  "))
    paragraphs = [f"## {cls.name}", f"**{title(cls.doc)}.**", body(cls), "\n".join(bullets)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def body(cls: PublicClass) -> str:
    """Formulas and prose: the docstring without its first line, Args and facts."""
    paragraphs = cls.doc.split("\n\n")[1:]
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
