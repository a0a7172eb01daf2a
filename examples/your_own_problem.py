"""A bilevel problem of your own: a penalty for each feature of a ridge regression."""

import torch

from metadist import Batch, Params, Problem, Task, check_hypergradient
from metadist.algorithms import AID
from metadist.tasks import OneTask


class Ridge(Problem):  # x: the logarithm of each penalty; y: the weights of the regression
    def init_outer(self, generator: torch.Generator) -> Params:
        return {"log_penalty": torch.full((8,), -3.0)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"weights": torch.zeros_like(outer["log_penalty"])}

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        return (batch.tensors[0] @ inner["weights"] - batch.tensors[1]).square().mean()

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        penalty = context["log_penalty"].exp() @ inner["weights"].square()
        return self.outer_loss(context, inner, batch) + penalty


x = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
y = x[:, :3].sum(1) + torch.randn(240, generator=torch.Generator().manual_seed(1))
data = OneTask((x[:40], y[:40]), (x[40:], y[40:]))  # training and validation data
algorithm = AID(inner_steps=200, inner_lr=0.2, adjoint_steps=20)
error = check_hypergradient(Ridge(), data, algorithm, repeats=[]).error
print(f"relative error of the hypergradient: {error:.0e}")
