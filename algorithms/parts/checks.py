"""Rules for hyperparameters; each raises ValueError with the field, its rule and its value."""

from __future__ import annotations

import math
from typing import Any


def check_sgd(inner_steps: int, inner_lr: float, momentum: float) -> None:
    """Raise ValueError for hyperparameters that no inner SGD can run with."""
    check_at_least("inner_steps", inner_steps, 1)
    check_positive("inner_lr", inner_lr)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise ValueError unless value >= least and finite."""
    if not least <= value < math.inf:
        finite = " and finite" if isinstance(value, float) else ""
        raise ValueError(f"{field} must be >= {least}{finite}, got {value}")


def check_positive(field: str, value: float) -> None:
    """Raise ValueError unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        raise ValueError(f"{field} must be > 0 and finite, got {value}")


def check_within(field: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{field} must be in [{low}, {high}], got {value}")


def check_choice(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{field} must be one of {choices}, got {value!r}")
