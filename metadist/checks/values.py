"""Rules for single values, each with its error: field, rule, value."""

from __future__ import annotations

import numpy as np

_WORD = 2**64


def require_integer(name: str, value: object, minimum: int) -> None:
    """Nothing, or a ValueError that names the field, its rule and its value."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def require_word(name: str, value: object) -> None:
    """Nothing, or a ValueError: `value` must be an integer in [0, 2^64)."""
    require_integer(name, value, 0)
    if value >= _WORD:  # type: ignore[operator]
        raise ValueError(f"{name} must be an integer < 2**64, got {value!r}")
