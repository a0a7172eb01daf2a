"""Rules for values, each declared with its field; an error says field, rule and value.

For example::

    @dataclass(frozen=True)
    class Loop:
        inner_steps: int = rule(5, ge=1)

        def __post_init__(self) -> None:
            check_fields(self)  # "inner_steps must be >= 1, got 0"
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

_WORD = 2**64


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a value must be.

    Args:
        ge, gt, le, lt: Bounds of a number. Without an upper one it must be finite.
        one_of: All values there are.
        none: What None stands for, for example "for no limit", or "" where that is plain;
            None: it is refused.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    one_of: tuple[Any, ...] | None = None
    none: str | None = None

    def check(self, field: str, value: Any, *, is_integer: bool = False) -> None:
        """Nothing, or a ValueError with the field, this rule and the value."""
        if value is None and self.none is not None:
            return
        if not self._holds(value):
            words = self._words(value)
            if self.one_of is None and not is_number(value) and not words.startswith("a "):
                words = f"{'an integer' if is_integer else 'a number'} {words}"
            raise ValueError(f"{field} must be {words}, got {value!r}")
        if is_integer and not isinstance(value, int | np.integer):
            raise ValueError(f"{field} must be an integer {self._words(0)}, got {value!r}")

    def _holds(self, value: Any) -> bool:
        if self.one_of is not None:
            return value in self.one_of
        if not is_number(value):
            return False
        # NaN compares as False with everything, so every rule refuses it.
        return bool(
            value > -math.inf
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (value < math.inf if self.le is None else value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def _words(self, value: Any) -> str:
        none = "" if self.none is None else f" or None {self.none}".rstrip()
        if self.one_of is not None:
            return f"one of {self.one_of}{none}"
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is not None and high is not None:
            left, right = "(" if self.ge is None else "[", ")" if self.le is None else "]"
            return f"in {left}{low}, {high}{right}{none}"
        assert high is None, "a rule has a lower bound, both, or none"
        if low is None:
            return f"a finite number{none}"
        finite = " and finite" if isinstance(value, float) else ""
        return f"{'>' if self.ge is None else '>='} {low}{finite}{none}"


def rule(default: Any, **limits: Any) -> Any:
    """A field of a dataclass with this default and a `Rule`, which `check_fields` reads."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**limits)})


def plain(value: Any) -> Any:
    """A scalar of NumPy as Python's, which has the same repr and JSON everywhere."""
    return value.item() if isinstance(value, np.generic) else value


def check_fields(record: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose rule its value breaks.

    A field of type bool is True or False, without a rule too. Scalars of NumPy become those of
    Python.
    """
    for field in dataclasses.fields(record):
        if isinstance(value := getattr(record, field.name), np.generic):
            object.__setattr__(record, field.name, value.item())
        value = getattr(record, field.name)
        if field.type in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if "rule" in field.metadata:
            is_integer = field.type in (int, "int", "int | None")
            field.metadata["rule"].check(field.name, value, is_integer=is_integer)


def check(field: str, value: Any, *, is_integer: bool = False, **limits: Any) -> Any:
    """`value`, as a scalar of Python; ValueError if it breaks `limits`, which are as of `Rule`."""
    value = plain(value)
    Rule(**limits).check(field, value, is_integer=is_integer)
    return value


def normal_form(name: str) -> str:
    """The name in one Unicode form (NFC): what looks the same compares equal."""
    return unicodedata.normalize("NFC", name)


def require_integer(name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer >= `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def require_number(**values: object) -> None:
    """Raise ValueError unless each of `values` is a number, which a boolean is not."""
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r}")


def is_number(value: object) -> bool:
    """Whether it is a number, NaN included; a boolean is none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def require_bool(**values: object) -> None:
    """Raise ValueError unless each of `values` is a boolean: the text "false" counts as True."""
    for name, value in values.items():
        if not isinstance(plain(value), bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def require_word(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer in [0, 2^64)."""
    require_integer(name, value, 0)
    if value >= _WORD:  # type: ignore[operator]
        raise ValueError(f"{name} must be an integer < 2**64, got {value!r}")
