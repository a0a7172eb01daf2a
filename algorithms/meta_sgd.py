"""Meta-SGD: MAML that learns a rate for every number of the inner variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.algorithm import Card
from metadist.algorithms.itd import ITD


@dataclass(frozen=True)
class MetaSGD(ITD):
    """Meta-SGD: `ITD` whose inner rates are outer variables, one per number of y.

        y_{t+1} = y_t - rates * grad_y g(x, y_t);    h = d f(x, y_T) / d (x, start, rates)

    `inner_lr` is where the rates begin; everything else is as in ITD. A rate may become
    negative.

    Cost: that of ITD. Memory: that of ITD, and one y of rates.
    Breaks: with as many rates as weights it overfits few training tasks.
    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
    2017. Differs from it in: any number of inner steps, the paper has one; rates begin equal.
    """

    card = Card(
        title="Meta-SGD",
        source="Li, Zhou, Chen, Li, 2017",
        problems="any; new tasks with a learned start",
        cost="T G + F + T (H + J)",
        state="y",
        use="few-shot tasks, few inner steps",
    )

    learn_lr: Literal["no", "per_tensor", "per_element"] = "per_element"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_lr != "per_element":
            raise ValueError(
                f"learn_lr must be 'per_element' in MetaSGD, got {self.learn_lr!r}: ITD has the "
                "other choices"
            )
