"""The names of scalars: TensorBoard has a section for each first part, by the alphabet."""

from __future__ import annotations

import re


def scalar_name(split: str, metric: str) -> str:
    """The name of a metric of a split among scalars: all accuracies, and all losses, in a group."""
    found = re.fullmatch(r"(query|support)_(accuracy|loss)(_before)?", metric)
    if found is None:
        return f"{split}/{metric}"
    which = "" if found[1] == "query" else "_support"
    return f"{found[2]}/{split}{which}{found[3] or ''}"


def width_name(name: str) -> str:
    """The name of the half width of the 95 % interval of a scalar."""
    return f"width/{name}"
