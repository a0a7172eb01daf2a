"""Problems whose head is known in closed form: baselines without an inner loop."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.checks.values import check
from metadist.task import Batch, Task
from metadist.tasks.few_shot.heads import ridge
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import Params, dot


class ProtoNet(FewShotProblem):
    """Prototypical networks: the class whose mean is nearest, in features that are learned.

    The head is that of `FewShotProblem(head_start="prototypes")` and stays as it starts: the inner
    loss is 0. So any algorithm that trains the start will do, `ITD(inner_steps=1)` is the cheapest;
    a task may have any number of classes.

    Args:
        model, batch_encode: As for `FewShotProblem`; the last layer is linear.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017.
    """

    def __init__(self, model: nn.Module, batch_encode: Literal["auto"] | bool = "auto") -> None:
        super().__init__(model, "head", batch_encode=batch_encode, head_start="prototypes")

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return 0 * dot(inner, inner)


class RidgeHead(ProtoNet):
    """R2D2: ridge regression on the support set as the head, in features that are learned.

        W = argmin_W |f W^T - one-hot|^2 + lambda |W|^2,   logits = scale f W^T + offset

    lambda, scale and offset are learned with the features.

    Args:
        model, batch_encode: As for `FewShotProblem`; the last layer is linear.
        strength: The value of lambda at the start, > 0.
        scale: That of the scale.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form
    solvers", ICLR 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_encode: Literal["auto"] | bool = "auto",
        strength: float = 1.0,
        scale: float = 10.0,
    ) -> None:
        check("strength", strength, gt=0)
        check("scale", scale)
        super().__init__(model, batch_encode)
        self.strength = strength
        self.scale = scale

    def init_outer(self, generator: torch.Generator) -> Params:
        return {
            **super().init_outer(generator),
            "ridge.log_strength": torch.tensor(math.log(self.strength)),
            "ridge.scale": torch.tensor(float(self.scale)),
            "ridge.offset": torch.zeros(()),
        }

    def head_of(self, outer: Params, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight = ridge(features, targets, outer["ridge.log_strength"].exp())
        return outer["ridge.scale"] * weight, outer["ridge.offset"].expand(len(weight))

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        weights = {name: leaf for name, leaf in outer.items() if not name.startswith("ridge.")}
        return super().module(weights, inner, task)
