"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

METHODS = {
    "maml": "itd with --problem.adapt all",
    "anil": "itd with --problem.adapt head",
    "fomaml": "itd with --algorithm.first_order true",
    "protomaml": "itd with --problem.head_start prototypes",
    "protonet": "--problem proto_net",
    "r2d2": "--problem ridge_head",
}
"""Methods that are known by names which are none of ours, and what they are here."""


def plain(name: str) -> str:
    """A name without what is easily forgotten: case, underscores and hyphens."""
    return name.lower().replace("_", "").replace("-", "")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like `name`; None if none is."""
    by_plain = {plain(other): other for other in names}
    found = get_close_matches(plain(name), by_plain, n=1, cutoff=0.6)
    return by_plain[found[0]] if found else None


def one_of(
    field: str, value: str, names: Iterable[str], or_else: str = "", shown_by: str = ""
) -> str:
    """The message that `field` must be one of `names`: the nearest and who shows all, or all."""
    names = list(names)
    found = nearest(value, names)
    meant = "" if found is None else f": did you mean {found}?"
    listed = f"`{shown_by}`" if shown_by and meant else ", ".join(names)
    listed += f" or {or_else}" if or_else else ""
    return f"{field} must be one of {listed}, got {value!r}{meant}"
