"""Pages are written for GitHub; the site leads their links to where it has the same.

What lies outside of docs/ is on GitHub, and each algorithm has a page of its own. Code that begins
with a public name, in pages and in docstrings, leads to the reference.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

from metadist.cli.names import named

REPOSITORY = "https://github.com/metadist/metadist/blob/main/"
COMMAND = re.compile(
    r"(metadist|scripts/\S+|pip|ray|git|python|\.venv/\S+|tensorboard|nvidia-smi|[A-Z_]+=\S+) "
)

PACKAGES = ("algorithms", "cluster", "compare", "loggers", "models", "tasks")


@cache
def public_names() -> dict[str, str]:
    """The full name of each public name, by it and by the bare name.

    Of bare names only those that nothing else has: `adapt` is an argument, and samplers have
    methods `solution_metrics`.
    """
    found = {}
    for package in ("metadist", *(f"metadist.{name}" for name in PACKAGES)):
        for name in import_module(package).__all__:
            found[f"{package}.{name}"] = f"{package}.{name}"
            if name != name.lower() or ("_" in name and package != "metadist.compare"):
                found[name] = f"{package}.{name}"
    return found


def for_site(text: str, page: str) -> str:
    """Markdown of a page with the links that the site has."""
    text = re.sub(r"\]\(((?:\.\./)+)", lambda m: _outside(m[1], page), text)
    names = {cls.name.lower() for cls in named("algorithms").values()}
    depth = "../" * page.count("/")

    def algorithm(match: re.Match[str]) -> str:
        if match[1] not in names:
            return match[0]
        return f"]({depth}algorithms/{match[1]}.md)"

    own = r"(?:algorithms\.md)?" if page == "algorithms" else r"(?:\.\./)*algorithms\.md"
    return re.sub(rf"\]\({own}#([\w-]+)\)", algorithm, text)


def _outside(up: str, page: str) -> str:
    is_outside = up.count("../") > page.count("/")
    return f"]({REPOSITORY}" if is_outside else f"]({up}"


def _read(app: Any, docname: str, source: list[str]) -> None:
    source[0] = for_site(source[0], docname)


def _highlight_commands(app: Any, doctree: nodes.document) -> None:
    for block in doctree.findall(nodes.literal_block):
        if "language" not in block and COMMAND.match(block.astext()):
            block["language"] = "bash"


def _link_names(app: Any, doctree: nodes.document) -> None:
    names = public_names()
    for code in list(doctree.findall(nodes.literal)):
        found = re.match(r"[\w.]*\w", code.astext())
        parts = found[0].split(".") if found else []
        target = names.get(".".join(parts)) or names.get(".".join(parts[:-1]))
        is_free = isinstance(code.parent, (nodes.paragraph, nodes.entry, nodes.emphasis))
        if target and is_free:
            options = {"refdomain": "py", "reftype": "obj", "reftarget": target}
            link = pending_xref("", refexplicit=True, refdoc=app.env.docname, **options)
            code.replace_self(link)
            link.append(code)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _read)
    app.connect("doctree-read", _highlight_commands)
    app.connect("doctree-read", _link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
