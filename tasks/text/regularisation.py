"""Classification of texts by many sparse features, each with a regularisation strength to learn.

Shape letters: n texts, m largest number of terms of a text, D features (terms), C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.checks.values import check, require_integer, require_number
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.text.sparse import sparse_matmul
from metadist.trees import Params

FIELDS = "columns", "values", "targets"


class TextRegularisation(Problem):
    """Multinomial logistic regression whose L2 penalties are learned, one for each feature.

        g = mean CE(X y) + 1/2 sum_d exp(x_d) |y_d|^2,    f = mean validation CE(X y)

    Examples are `columns` (n, m), `values` (n, m) and `targets` (n,): sparse rows, see
    `sparse_matmul`; y is (D, C), from 0.

        data = TextFeatures("news_articles")
        problem = TextRegularisation(data.num_features, data.num_classes)
        trainer = Trainer(problem, data, SOBA(inner_lr=10.0, adjoint_lr=10.0),
                          outer_optimizer=OuterOptimizer("adam", lr=0.1))
        trainer.fit(500)
        data.solution_metrics(problem, trainer.outer, trainer.inner(0))

    Args:
        num_features, num_classes: The sizes D and C.
        per_feature: True: one strength for each feature; False: one for all.
        strength: Exp(x_d) at the start, > 0.
        max_strength: Exp(x_d) is kept below it, >= strength. Gradient steps on y diverge where
            inner_lr * exp(x_d) > 2, and x_d of a useless term would grow for ever.

    Source: Grazzi et al. (2020), section 4.2, and Ji et al., stocBiO (2021). Differs from theirs by
    a shift of x: they divide the penalty by D C.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        per_feature: bool = True,
        strength: float = 1e-3,
        max_strength: float = 0.1,
    ) -> None:
        require_integer("num_features", num_features, 1)
        require_integer("num_classes", num_classes, 2)
        check("strength", strength, gt=0)
        require_number(max_strength=max_strength)
        if not strength <= max_strength < math.inf:
            raise ValueError(
                f"max_strength must be >= strength ({strength}) and finite, got {max_strength}"
            )
        self.num_features = num_features
        self.num_classes = num_classes
        self.per_feature = per_feature
        self.strength = strength
        self.max_strength = max_strength

    def init_outer(self, generator: torch.Generator) -> Params:
        size = self.num_features if self.per_feature else 1
        return {"log_strengths": torch.full((size,), math.log(self.strength))}

    def init_inner(self, outer: Params, task: Task) -> Params:
        shape = (self.num_features, self.num_classes)
        return {"weight": outer["log_strengths"].new_zeros(shape)}

    def project_outer(self, outer: Params) -> Params:
        return {"log_strengths": outer["log_strengths"].clamp(max=math.log(self.max_strength))}

    def logits(self, inner: Params, batch: Batch) -> Tensor:
        """(n, C)."""
        columns, values, _ = batch.fields(*FIELDS)
        return sparse_matmul(columns, values, inner["weight"])

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.outer_loss(context, inner, batch) + self.penalty(context, inner)

    def penalty(self, context: Params, inner: Params) -> Tensor:
        """1/2 sum_d exp(x_d) |y_d|^2."""
        squares_D = inner["weight"].square().sum(1)
        return 0.5 * (context["log_strengths"].exp() * squares_D).sum()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(inner, batch), batch.fields(*FIELDS)[-1])

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        hits = self.logits(inner, batch).argmax(1) == batch.fields(*FIELDS)[-1]
        return {"accuracy": hits.double().mean()}
