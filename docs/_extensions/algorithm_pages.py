"""A page for each algorithm: what its docstring says, its hyperparameters and its source.

docs/algorithms.md has the sections one below the other, for GitHub; on the site it ends with the
table.
"""

from __future__ import annotations

import ast
import inspect
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

from plain_docstrings import entries

from metadist import algorithms
from metadist.cli.catalogue import FAMILIES, facts, title
from metadist.cli.classes import PublicClass
from metadist.cli.names import named

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms"
WRITTEN = runpy.run_path(str(DOCS.parent / "scripts" / "docs_algorithms.py"))

PAGE = """# {name}

**{title}.** {use}

{said}

::::{{grid}} 1 1 2 2
:gutter: 3

:::{{grid-item-card}} What it costs
{costs}
:::

:::{{grid-item-card}} When it breaks
{breaks}
:::
::::

{origin}

In a terminal: `metadist train --algorithm {short}`; `--algorithm.help {short}` shows its options.

## Hyperparameters

```{{eval-rst}}
.. autoclass:: metadist.algorithms.{name}
   :no-members:
```

## Source

All of `algorithms/{file}` but the docstring. The names are those of
[the algorithms](../algorithms.md): `h_v` is H v, `f_y` the gradient of f in y.

```{{literalinclude}} ../../algorithms/{file}
:language: python
:lines: {lines}
```
"""


def page(cls: PublicClass) -> str:
    """The page of one algorithm, in Markdown."""
    file = Path(inspect.getfile(getattr(algorithms, cls.name))).name
    known = facts(cls.doc)
    return PAGE.format(
        name=cls.name,
        short=cls.name.lower(),
        title=title(cls.doc),
        use=f"Use it for {known['Use']}" if "Use" in known else "",
        said=WRITTEN["body"](cls),
        costs=_bullets(known, "For", "Cost", "State", "Memory"),
        breaks=known["Breaks"],
        origin=_bullets(known, "Source", "Differs"),
        file=file,
        lines=_lines(DOCS.parent / "algorithms" / file, cls.name),
    )


def _bullets(known: dict[str, str], *names: str) -> str:
    return "\n".join(f"* **{name}:** {known[name]}" for name in names if name in known)


def _lines(file: Path, name: str) -> str:
    """The lines of a file that are not the docstring of class `name`."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            docstring = node.body[0]
            return f"1-{docstring.lineno - 1},{(docstring.end_lineno or 0) + 2}-"
    raise ValueError(f"{file} has no class {name}")


def write_pages(app: Any, config: Any) -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = {f"{cls.name.lower()}.md": page(cls) for cls in named("algorithms").values()}
    for file in FOLDER.glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for name, text in pages.items():
        file = FOLDER / name
        if not file.exists() or file.read_text() != text:  # what is unchanged is not read again
            file.write_text(text)


def shorten(app: Any, docname: str, source: list[str]) -> None:
    """The page of all algorithms ends with the table, and lists the pages of its members."""
    if docname == "algorithms":
        text = source[0]
        text = text[: text.index(f"\n# {FAMILIES[0]}\n")]
        source[0] = text.replace("\n# ", "\n## ")  # a page has one title
        for family in FAMILIES:
            names = [cls.name.lower() for cls in WRITTEN["members"](family)]
            listed = "\n".join(f"algorithms/{name}" for name in names)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {family}\n\n{listed}\n```\n"


def keep_hyperparameters(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Of the docstring of an algorithm, what it takes: the rest is said on its page."""
    if name.rpartition(".")[0] == "metadist.algorithms" and what == "class":
        said: dict[str, list[str]] = {}
        for base in reversed(obj.__mro__):
            said |= entries((inspect.getdoc(base) if "__doc__" in vars(base) else "") or "")
        lines[:] = ["Args:"]
        for field in fields(obj):
            first, *rest = said[field.name]
            lines += [f"    {field.name}: {first}", *(f"        {line}" for line in rest)]


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", write_pages)
    app.connect("source-read", shorten, priority=400)
    app.connect("autodoc-process-docstring", keep_hyperparameters, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
