"""A deep equilibrium model: its layer runs until nothing changes, and is differentiated there."""

import torch
from torch import Tensor

from metadist import Batch, OuterOptimizer, Params, Problem, Task, Trainer, evaluate
from metadist.algorithms import AID

NUM_STATES = 24


class Equilibrium(Problem):
    """x holds the weights; y holds the states of a batch of examples, h = tanh(W h + U input + b).

    The support set has the inputs, the query set the labels. |W| < 1 makes the layer a contraction.
    """

    def init_outer(self, generator: torch.Generator) -> Params:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weights = {"weights": normal(NUM_STATES, NUM_STATES), "inputs": normal(2, NUM_STATES)}
        return {**weights, "bias": normal(NUM_STATES), "readout": normal(NUM_STATES, 2)}

    def encode(self, outer: Params, task: Task) -> Params:
        weights = outer["weights"]
        return {**outer, "weights": 0.9 * weights / torch.linalg.matrix_norm(weights)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"states": outer["bias"].new_zeros(len(task.support.index), NUM_STATES)}

    def inner_map(self, context: Params, inner: Params, batch: Batch) -> Params:
        driven = batch.tensors[0] @ context["inputs"] + context["bias"]
        return {"states": (inner["states"] @ context["weights"] + driven).tanh()}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        moved = self.inner_map(context, inner, batch)["states"]
        return (moved - inner["states"]).square().mean()  # only reported

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        logits = inner["states"] @ context["readout"]
        return torch.nn.functional.cross_entropy(logits, batch.tensors[0])

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        chosen = (inner["states"] @ context["readout"]).argmax(1)
        return {"accuracy": (chosen == batch.tensors[0]).float().mean()}


class Rings:
    """Batches of 64 points in the plane; the label says whether one is in the ring."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sample(self, index: int) -> Task:
        random = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        points = 1.5 * torch.randn(64, 2, generator=random)
        radius = points.norm(dim=1)
        return Task(Batch.of(points), Batch.of(((radius > 1) & (radius < 2)).long()), index)


def main(num_steps: int = 300) -> float:
    """The accuracy on new points; a quarter of a minute on one core."""
    problem, algorithm = Equilibrium(), AID(inner_steps=30, solver="fixed_point", adjoint_steps=30)
    trainer = Trainer(
        problem, Rings(seed=0), algorithm, outer_optimizer=OuterOptimizer("adam", lr=0.02)
    )
    trainer.fit(num_steps)
    test = evaluate(problem, Rings(seed=1), algorithm, trainer.outer, 20)
    print(f"accuracy on new points: {test.metrics['query_accuracy']}")
    return test.metrics["query_accuracy"].mean


if __name__ == "__main__":
    main()
