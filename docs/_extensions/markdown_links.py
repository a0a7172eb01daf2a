"""Pages are written for GitHub; the site leads their links to where it has the same.

What lies outside of docs/ is on GitHub, and each algorithm has a page of its own.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

from metadist.cli.names import named

REPOSITORY = "https://github.com/metadist/metadist/blob/main/"
COMMAND = re.compile(
    r"(metadist|scripts/\S+|pip|ray|git|python|\.venv/\S+|tensorboard|nvidia-smi|[A-Z_]+=\S+) "
)


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


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _read)
    app.connect("doctree-read", _highlight_commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
