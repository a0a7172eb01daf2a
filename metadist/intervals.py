"""`Interval`: a mean with its 95 % confidence interval by Student's t."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """A mean over tasks and the half width of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.half_width:.4f}"


def mean_interval(values: list[float]) -> Interval:
    """The mean of `values` (at least 2) and the half width of its 95 % t-interval."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, student_t(count - 1) * math.sqrt(variance / count))


@lru_cache
def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection on its distribution function."""

    def upper_tail(t: float) -> float:
        # Simpson's rule on x = sqrt(degrees) tan(angle), where the density is cos^(degrees-1).
        angle = math.atan(t / math.sqrt(degrees))
        steps = 2000
        width = angle / steps
        heights = [math.cos(width * i) ** (degrees - 1) for i in range(steps + 1)]
        area = heights[0] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]) + heights[-1]
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        return 0.5 - area * width / 3 * scale / math.sqrt(math.pi)

    low, high = NormalDist().inv_cdf(0.975), 13.0  # 12.71 with one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle) > 0.025 else (low, middle)
    return (low + high) / 2
