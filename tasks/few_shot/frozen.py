"""Baselines on features that are not trained: the body is a constant, x is one number."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from metadist.checks.values import check
from metadist.task import Batch, Task
from metadist.tasks.few_shot.closed_form import ProtoNet
from metadist.tasks.few_shot.heads import num_classes, prototypes
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.tasks.network import last_registered
from metadist.trees import Params, dot

SCALE, DECAY = "frozen.log_scale", "frozen.log_decay"


class NearestCentroid(ProtoNet):
    """The class whose mean is nearest, in the features of the model as it is.

    What `ProtoNet` gains over it is what training the features gains. x is the logarithm of a
    factor of the logits, which changes the loss and not the accuracy.

    Args:
        model: With the weights that its features are to have: at random, or pre-trained. The last
            layer is linear. A copy of it is frozen.
        batch_encode: As for `FewShotProblem`.

    Source: the nearest-centroid baseline of Chen et al., "A closer look at few-shot
    classification", ICLR 2019, without fine-tuning.
    """

    def __init__(self, model: nn.Module, batch_encode: Literal["auto"] | bool = "auto") -> None:
        super().__init__(_frozen(model), batch_encode)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {SCALE: torch.zeros(())}

    def head_of(self, outer: Params, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = prototypes(features, targets)
        scale = outer[SCALE].exp()
        return scale * weight, scale * bias

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        return super().module({}, inner, task)


class LinearProbe(FewShotProblem):
    """Logistic regression from weights 0 on the features of the model as it is.

    The inner loop fits it: `ITD(inner_steps=20, inner_lr=0.4)`. x is the logarithm of its weight
    decay. A task may have any number of classes.

    Args:
        model: As for `NearestCentroid`.
        batch_encode: As for `FewShotProblem`.
        decay: The weight decay at the start, > 0.

    Source: the baseline of Chen et al., "A closer look at few-shot classification", ICLR 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_encode: Literal["auto"] | bool = "auto",
        decay: float = 1e-3,
    ) -> None:
        check("decay", decay, gt=0)
        super().__init__(_frozen(model), "head", batch_encode=batch_encode, head_start="prototypes")
        self.decay = decay

    def init_outer(self, generator: torch.Generator) -> Params:
        return {DECAY: torch.tensor(math.log(self.decay))}

    def head_of(self, outer: Params, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight = features.new_zeros(num_classes(targets), features.shape[1])
        return weight, weight.new_zeros(len(weight))

    def encode(self, outer: Params, task: Task) -> Params:
        return {**super().encode(outer, task), DECAY: outer[DECAY]}

    def encode_tasks(self, outer: Params, tasks: Task) -> Params:
        found = super().encode_tasks(outer, tasks)
        return {**found, DECAY: outer[DECAY].expand(len(next(iter(found.values()))))}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return super().inner_loss(context, inner, batch) + context[DECAY].exp() / 2 * dot(
            inner, inner
        )

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        return super().module({}, inner, task)

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "head start": "zero"}


def _frozen(model: nn.Module) -> nn.Module:
    """A copy of the model in which only the last layer is trainable."""
    model = copy.deepcopy(model)
    leaves = list(model.parameters())
    if not any(leaf.requires_grad for leaf in leaves):  # frozen already: the last layer of all
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
    head = last_registered(model)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name.startswith(f"{head}."))
    return model
