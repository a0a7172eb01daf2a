"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MANY = 40
"""From so many names on, a message does not list them all."""


def plain(name: str) -> str:
    """A name without what is easily forgotten: case, underscores and hyphens."""
    return name.lower().replace("_", "").replace("-", "")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like `name`; None if none is."""
    by_plain = {plain(other): other for other in names}
    found = get_close_matches(plain(name), by_plain, n=1, cutoff=0.6)
    return by_plain[found[0]] if found else None


def one_of(field: str, value: str, names: Iterable[str]) -> str:
    """The message that `field` must be one of `names`; the nearest first."""
    names = list(names)
    found = nearest(value, names)
    meant = "" if found is None else f": did you mean {found}?"
    return f"{field} must be one of {', '.join(names)}, got {value!r}{meant}"
