"""Meta-SGD: MAML that learns a rate for every element of the inner variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithms.parts.unrolling import Unrolling


@dataclass(frozen=True)
class MetaSGD(Unrolling):
    """Meta-SGD.

        y_{t+1} = y_t - rates * g_y(x, y_t);    h = d f(x, y_T) / d (x, start, rates)

    ITD whose inner rates are outer variables, one per element of y. `inner_lr` is the initial
    value of all rates; a rate may become negative.

    Family: Through the inner loop.
    For: any smooth one; new tasks with a learned start.
    Cost: T G + F + T (H + J).
    State: y.
    Memory: that of ITD, and one y of rates.
    Use: few-shot tasks, few inner steps.
    Breaks: with as many rates as weights it overfits few training tasks.
    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
    2017.
    Differs: any number of inner steps, where the paper has one; all rates begin equal.
    """

    learn_lr: Literal["no", "per_tensor", "per_element"] = "per_element"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_lr != "per_element":
            raise ValueError(
                f"learn_lr must be 'per_element' in MetaSGD, got {self.learn_lr!r}: ITD has the "
                "other choices"
            )
