"""The random numbers of a task, the same on every platform."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from metadist.checks.values import normal_form, require_word


@lru_cache(maxsize=256)
def split_number(split: str) -> int:
    """A 64-bit number for the name of a split, the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(normal_form(split).encode()).digest()[:8], "little")


class Random:
    """The random numbers of one task: a pure function of (seed, split, index).

    Philox4x64-10, keyed by seed and split, with the index in the highest word of its counter: no
    two tasks share a number. Only raw 64-bit words are taken from NumPy, and everything else is
    derived from them here, so that neither the platform nor the version of NumPy matters
    (NumPy promises a fixed stream for bit generators, but not for `Generator`).

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """

    def __init__(self, seed: int, split: str, index: int) -> None:
        require_word("index", index)
        key = np.array([seed, split_number(split)], dtype=np.uint64)
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        self._philox = np.random.Philox(key=key, counter=counter)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words, uniform on [0, 2^64)."""
        return self._philox.random_raw(count)

    def uniform(self, low: float, high: float, count: int) -> NDArray[np.float64]:
        """`count` numbers, uniform on [low, high)."""
        unit = (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit

    def choose(self, size: int, count: int) -> list[int]:
        """`count` different positions of `size`, in random order; cost independent of `size`."""
        moved: dict[int, int] = {}  # Fisher-Yates on a list 0 .. size-1 that is never written down
        chosen = []
        for step, word in enumerate(self.words(count).tolist()):
            position = step + word % (size - step)
            chosen.append(moved.get(position, position))
            moved[position] = moved.get(step, step)
        return chosen
