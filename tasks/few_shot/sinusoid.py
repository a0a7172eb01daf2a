"""Sinusoid regression: the smallest meta-learning problem there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import is_number, require_integer, require_word
from metadist.task import Batch, Task
from metadist.tasks.data.random import Random


@dataclass(frozen=True)
class Sinusoid:
    """A sampler of regression tasks y = a sin(x - p), without noise.

    A task draws a and p uniformly from `amplitude` and `phase`, and every x uniformly from
    `domain`. The tensors of both sets are x float32 (k, 1) and y float32 (k, 1); all x of a task
    are different. x is the same on every machine, y up to rounding of sin().

    Args:
        k_shot: Support points >= 1.
        k_query: Query points >= 1.
        seed: 0 <= seed < 2^64.
        split: Any name; all splits have one distribution and share no random number.
        amplitude: Lowest and highest a.
        phase: Lowest and highest p, in radians.
        domain: Lowest and highest x.

    Raises:
        ValueError: a number is not positive, or an interval is empty.

    Source: Finn et al., Model-agnostic meta-learning (2017), section 5.1.
    """

    k_shot: int = 10
    k_query: int = 15
    seed: int = 0
    split: str = "train"
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    domain: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        require_integer("k_shot", self.k_shot, 1)
        require_integer("k_query", self.k_query, 1)
        require_word("seed", self.seed)
        for name in ("amplitude", "phase", "domain"):
            interval = getattr(self, name)
            pair = isinstance(interval, tuple | list) and len(interval) == 2
            pair = pair and all(is_number(end) and math.isfinite(end) for end in interval)
            if not pair or interval[0] > interval[1]:
                raise ValueError(f"{name} must be (low, high) with low <= high, got {interval!r}")

    def sample(self, index: int) -> Task:
        """The task number `index`, 0 <= index < 2^64."""
        draws = Random(self.seed, self.split, index)
        amplitude = draws.uniform(*self.amplitude, 1)
        phase = draws.uniform(*self.phase, 1)
        x = self._different_points(draws)
        y = (amplitude * np.sin(x.astype(np.float64) - phase)).astype(np.float32)
        points = torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None]

        def batch(part: slice) -> Batch:
            tensors: list[Tensor] = [values[part].clone() for values in points]
            return Batch.of(*tensors)

        return Task(batch(slice(None, self.k_shot)), batch(slice(self.k_shot, None)), int(index))

    def _different_points(self, draws: Random) -> NDArray[np.float32]:
        x = draws.uniform(*self.domain, self.k_shot + self.k_query).astype(np.float32)
        for _ in range(100):  # a point in both sets would be a leak
            again = np.ones(len(x), dtype=bool)
            again[np.unique(x, return_index=True)[1]] = False
            if not again.any():
                return x
            x[again] = draws.uniform(*self.domain, int(again.sum())).astype(np.float32)
        raise ValueError(
            f"domain must hold k_shot + k_query = {len(x)} different float32 numbers, got "
            f"{self.domain!r}: widen it"
        )
