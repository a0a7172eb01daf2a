"""A bilevel problem of your own: a penalty for each feature of a ridge regression."""

import torch
from torch import Tensor

from metadist import Batch, OuterOptimizer, Params, Problem, Task, Trainer, check_hypergradient
from metadist.algorithms import AID
from metadist.tasks import FixedTasks

NUM_FEATURES = 20  # of which the first five matter


class Ridge(Problem):
    """x holds the logarithm of each penalty; y holds the weights of the regression."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"log_penalty": torch.full((NUM_FEATURES,), -3.0)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"weights": torch.zeros_like(outer["log_penalty"])}

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        return (inputs @ inner["weights"] - targets).square().mean()

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        penalty = context["log_penalty"].exp() @ inner["weights"].square()
        return self.outer_loss(context, inner, batch) + penalty

    def project_outer(self, outer: Params) -> Params:
        return {"log_penalty": outer["log_penalty"].clamp(max=0.0)}  # inner_lr is for these only


def draw(number: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, NUM_FEATURES, generator=random)
    return Batch.of(inputs, inputs[:, :5].sum(1) + torch.randn(number, generator=random))


def main(num_steps: int = 200) -> Tensor:
    """The learned penalties; seconds on one core."""
    data = FixedTasks([Task(support=draw(40, seed=0), query=draw(200, seed=1), id=0)])
    algorithm = AID(inner_steps=20, inner_lr=0.1)
    print(check_hypergradient(Ridge(), data, algorithm))  # before you trust a run
    trainer = Trainer(Ridge(), data, algorithm, outer_optimizer=OuterOptimizer("adam", lr=0.1))
    trainer.fit(num_steps)
    penalties = trainer.outer["log_penalty"].exp()
    print(f"features that matter: {penalties[:5].mean():.4f}, others: {penalties[5:].mean():.4f}")
    return penalties


if __name__ == "__main__":
    main()
