"""What comes out of a run folder, as text that is safe to print."""

from __future__ import annotations

from typing import Any

from rich.text import Text

MAX_CHARS = 5000


def printable(value: Any, lines: bool = False) -> str:
    r"""A value as text in which only characters that can be seen are left as they are.

    Control sequences, line breaks, and marks that turn the direction of writing would change what
    a terminal shows elsewhere; they become escapes such as `\x1b`.

    Args:
        value: Anything; of a long text the beginning is shown.
        lines: Whether line breaks stay.
    """
    text = str(value)
    if len(text) > MAX_CHARS:
        text = f"{text[:MAX_CHARS]}..."
    kept = "\n" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode()
        for char in text
    )


def shown(value: Any) -> Text:
    """The same for rich, which takes no markup from it."""
    return Text(printable(value))
