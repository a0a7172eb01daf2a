"""Splits of classes into train, val and test: read from a file, never drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path

import numpy as np

from metadist.checks.paths import absent
from metadist.checks.values import normal_form

Splits = Mapping[str, Sequence[str | int]]


def read_splits(splits: str | Path | Splits) -> Splits:
    """The class names (or integer labels) of each split, from a JSON file or a mapping.

    The form is `{"train": ["a", "b"], "val": ["c"], "test": ["d"]}`; splits may have any names.

    Raises:
        ValueError: no such file, not JSON, or not of this form.
    """
    if isinstance(splits, Mapping):
        content: object = splits
        source = "splits"
    elif not isinstance(splits, str | Path):
        raise ValueError(
            f"splits must be a JSON file or a mapping, got {type(splits).__name__}: pass the "
            'classes of each split, {"train": [...], "val": [...], "test": [...]}'
        )
    else:
        source = f"splits file {splits}"
        path = Path(splits)
        if not path.is_file():
            raise ValueError(
                f"splits must be a JSON file or a mapping, got {splits}: {absent(path, 'file')}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{source} must be JSON: {error}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} must map split names to lists of classes, got {content!r:.80}")
    for name, classes in content.items():
        listed = isinstance(classes, Sequence) and not isinstance(classes, str)
        if not listed or not classes or not all(map(_is_name, classes)):
            raise ValueError(
                f"{source}: split {name!r} must be a non-empty list of class names or integer "
                f"labels, got {classes!r:.80}"
            )
    return content


def _is_name(value: object) -> bool:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)


def _plain(class_: str | int) -> str | int:
    """A name in one Unicode form, a label as Python's integer."""
    return normal_form(class_) if isinstance(class_, str) else int(class_)


def packaged_splits(file_name: str) -> Splits:
    """The splits of a data set that this package fixes, `tasks/data/splits/<file_name>`."""
    text = (resources.files("metadist.tasks") / "data" / "splits" / file_name).read_text(
        encoding="utf-8"
    )
    content: Splits = json.loads(text)
    return content


def require_split(split: str, names: Sequence[str]) -> None:
    """Raise ValueError, with the existing splits, unless `split` is one of them."""
    if split not in names:
        raise ValueError(f"split must be one of {', '.join(names)}, got {split!r}")


def select_classes(splits: Splits, split: str, known: Mapping[str | int, int]) -> list[int]:
    """The labels of the classes of one split, after checking all splits.

    Args:
        splits: The splits, as `read_splits` returns them.
        split: The one wanted.
        known: The label behind each class name, and behind each integer that is a label.

    Raises:
        ValueError: no such split, a class that does not exist, or a class that is in two splits.
    """
    require_split(split, list(splits))
    known = {_plain(class_): label for class_, label in known.items()}
    splits = {name: list(map(_plain, classes)) for name, classes in splits.items()}
    unknown = [class_ for class_ in chain(*splits.values()) if class_ not in known]
    if unknown:
        raise ValueError(
            f"splits must name existing classes, got {_some(unknown)}; the classes are "
            f"{_some(list(known))}"
        )
    owner: dict[int, str] = {}
    for name, classes in splits.items():
        for class_ in classes:
            if known[class_] in owner:
                raise ValueError(
                    f"splits must be disjoint, got class {class_!r} in {owner[known[class_]]!r} "
                    f"and {name!r}: list each class once"
                )
            owner[known[class_]] = name
    return [known[class_] for class_ in splits[split]]


def _some(items: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(repr(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, ... ({len(items)} in all)"
