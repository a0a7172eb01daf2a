"""Which of the examples that have arrived a memory holds, as a function of how many there were.

A learner that goes through its data once keeps a few examples. Here nothing is kept: what a memory
of `size` slots holds after n arrivals is computed from n, so a stream that replays it is a pure
function of the step. Slot s holds arrival number `at(n)[s]`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metadist.checks.values import require_integer
from metadist.tasks.data.random import Random

MemoryKind = Literal["ring", "reservoir"]


class Ring:
    """The last `size` arrivals: number i lies in slot i modulo `size`."""

    def __init__(self, size: int) -> None:
        require_integer("size", size, 0)
        self._size = size

    def at(self, num_arrivals: int) -> NDArray[np.int64]:
        """The arrivals held after so many, by slot, int64 (min(size, num_arrivals),)."""
        held = np.arange(max(0, num_arrivals - self._size), num_arrivals)
        return np.roll(held, num_arrivals % max(1, self._size))


class Reservoir:
    """A uniform choice of `size` of all arrivals so far.

    Arrival i >= size takes a slot drawn from 0 .. i, and is dropped where that is no slot.

    Args:
        size: The number of slots, >= 0.
        num_arrivals: The most there will be.
        draws: Where the slots come from.

    Source: Vitter, Random sampling with a reservoir (1985), algorithm R.
    """

    def __init__(self, size: int, num_arrivals: int, draws: Random) -> None:
        require_integer("size", size, 0)
        require_integer("num_arrivals", num_arrivals, 0)
        numbers = np.arange(num_arrivals)
        drawn = draws.words(num_arrivals) % (numbers + 1).astype(np.uint64)
        slots = np.where(numbers < size, numbers, drawn.astype(np.int64))
        self._taken = [np.flatnonzero(slots == slot) for slot in range(size)]

    def at(self, num_arrivals: int) -> NDArray[np.int64]:
        """The arrivals held after so many, by slot, int64 (min(size, num_arrivals),)."""
        last = [int(np.searchsorted(taken, num_arrivals)) - 1 for taken in self._taken]
        held = [taken[i] for taken, i in zip(self._taken, last, strict=True) if i >= 0]
        return np.array(held, dtype=np.int64)
