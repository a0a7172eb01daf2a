"""`Followed`: whole numbers whose influence on a computation is watched, and what comes of them.

Most of a lease is the same from step to step but for a few whole numbers: the outer step, the
counters of kept states. Python computes with them, so whoever records what tensors do would record
the rates of one step and repeat them for ever. Given as followed numbers they tell what they are
used for: in arithmetic with a tensor they become an input of what is recorded, and whatever Python
wants to know of them, to compare or to count, becomes a condition under which the record holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

MOST = 1024
"""Inputs of one dtype in a recording."""

Formula = Callable[[Sequence[int]], Any]
"""How a number is computed from those that a recording began with."""


class Buffers:
    """The memory of inputs, by dtype: made outside of what is recorded, or it would be too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._views: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def of(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """All of them, each of shape ()."""
        if dtype not in self._views:
            self._views[dtype] = torch.zeros(MOST, dtype=dtype, device=self._device).unbind()
        return self._views[dtype]

    def write(self, dtype: torch.dtype, numbers: Sequence[Any]) -> None:
        """Fill the first ones; nothing waits."""
        buffer = self._views[dtype][0].as_strided((len(numbers),), (1,))
        values = torch.tensor(numbers, dtype=dtype, pin_memory=buffer.is_cuda)
        buffer.copy_(values, non_blocking=True)


class Recording:
    """What a function has made of the numbers it was given.

    Args:
        numbers: The numbers.
        buffers: Where tensors find them.
    """

    def __init__(self, numbers: Sequence[int], buffers: Buffers) -> None:
        def at(place: int) -> Formula:
            return lambda numbers: numbers[place]

        self.numbers = [Followed(self, number, at(i)) for i, number in enumerate(numbers)]
        self._conditions: list[tuple[Formula, Any]] = []
        self._inputs: dict[torch.dtype, list[Formula]] = {}
        self._buffers = buffers

    def require(self, formula: Formula, value: Any) -> None:
        """Note that the record holds where the formula gives this value."""
        self._conditions.append((formula, value))

    def add_input(self, formula: Formula, dtype: torch.dtype) -> Tensor:
        """A tensor of shape () that has the number, whatever it is."""
        formulas = self._inputs.setdefault(dtype, [])
        formulas.append(formula)
        if len(formulas) > MOST:
            raise RuntimeError(f"a lease must have at most {MOST} numbers that change, got more")
        return self._buffers.of(dtype)[len(formulas) - 1]

    def holds(self, numbers: Sequence[int]) -> bool:
        """Whether other numbers lead to the same computation."""
        return all(formula(numbers) == value for formula, value in self._conditions)

    def fill(self, numbers: Sequence[int]) -> None:
        """Compute the inputs from these numbers."""
        for dtype, formulas in self._inputs.items():
            self._buffers.write(dtype, [formula(numbers) for formula in formulas])


class Followed:
    """A number of a recording, now `value`.

    No subclass of int or float, since torch would read those without asking.
    """

    def __init__(self, recording: Recording, value: Any, formula: Formula) -> None:
        self._recording = recording
        self._value = value
        self._formula = formula
        self._inputs: dict[torch.dtype, Tensor] = {}

    def known(self) -> Any:
        """The number itself, which from now on is a condition."""
        self._recording.require(self._formula, self._value)
        return self._value

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The number as an input of the record, shape ()."""
        if dtype not in self._inputs:
            self._inputs[dtype] = self._recording.add_input(self._formula, dtype)
        return self._inputs[dtype]

    def beside(self, other: Tensor) -> Tensor:
        """The number as a tensor that leaves `other` its dtype, as a number of Python does."""
        keeps = other.is_floating_point() or isinstance(self._value, int)
        return self.tensor(other.dtype if keeps else torch.get_default_dtype())

    def __bool__(self) -> bool:
        return bool(call(operator.ne, self, 0).known())

    def __hash__(self) -> int:
        return hash(self.known())

    def __int__(self) -> int:
        whole: int = call(int, self).known()
        return whole

    def __index__(self) -> int:
        return operator.index(self.known())

    def __float__(self) -> float:
        return float(self.known())

    def __format__(self, form: str) -> str:
        return format(self.known(), form)

    def __str__(self) -> str:
        return str(self.known())


def call(function: Callable[..., Any], *numbers: Any) -> Any:
    """`function(*numbers)` of Python's numbers, which is followed where one of them is."""
    followed = [number for number in numbers if isinstance(number, Followed)]
    if not followed:
        return function(*numbers)

    def value_of(number: Any) -> Any:
        return number._value if isinstance(number, Followed) else number

    def formula(given: Sequence[int]) -> Any:
        values = (n._formula(given) if isinstance(n, Followed) else n for n in numbers)
        return function(*values)

    return Followed(followed[0]._recording, function(*map(value_of, numbers)), formula)


def filled(like: Tensor, shape: tuple[int, ...], number: Any, dtype: torch.dtype) -> Tensor:
    """`like.new_full(shape, number, dtype)`, also of a number that is followed."""
    if isinstance(number, Followed):
        return number.tensor(dtype).expand(shape)
    return like.new_full(shape, number, dtype=dtype)


def _arithmetic(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Any, Any], Any]:
    def method(self: Followed, other: Any) -> Any:
        if isinstance(other, Tensor):
            mine: Any = self.beside(other)
        elif isinstance(other, int | float | Followed):
            mine = self
        else:
            return NotImplemented
        pair = (other, mine) if swapped else (mine, other)
        return function(*pair) if isinstance(other, Tensor) else call(function, *pair)

    return method


def _comparison(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Followed, other: Any) -> Any:
        if not isinstance(other, int | float | Followed):
            return NotImplemented
        return call(function, self, other).known()

    return method


def _alone(self: Followed, function: Callable[[Any], Any]) -> Any:
    return call(function, self)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _function = getattr(operator, _name)
    setattr(Followed, f"__{_name}__", _arithmetic(_function, swapped=False))
    setattr(Followed, f"__r{_name}__", _arithmetic(_function, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Followed, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name in ("neg", "abs"):
    setattr(Followed, f"__{_name}__", partialmethod(_alone, getattr(operator, _name)))
