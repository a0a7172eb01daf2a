"""Few-shot tasks of your own: any class with `sample(index)`, a pure function of the index."""

import torch

from metadist import Batch, OuterOptimizer, Task, Trainer, evaluate
from metadist.algorithms import ITD
from metadist.models import MLP
from metadist.tasks import FewShotProblem, check_sampler


class Blobs:
    """Each class is a Gaussian blob at a random place; a task has `n_way` of them."""

    def __init__(self, n_way: int = 5, spread: float = 2.0, seed: int = 0) -> None:
        self.n_way, self.spread, self.seed = n_way, spread, seed

    def sample(self, index: int) -> Task:
        """The task at `index`: one example of each class to adapt to, five to be judged on."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        means = self.spread * torch.randn(self.n_way, 8, generator=random)
        labels = torch.arange(self.n_way)
        support = means + torch.randn(self.n_way, 8, generator=random)
        query = means.repeat(5, 1) + torch.randn(5 * self.n_way, 8, generator=random)
        return Task(Batch.of(support, labels), Batch.of(query, labels.repeat(5)), index)


def main(num_steps: int = 200, num_test_tasks: int = 600) -> float:
    """The accuracy on new tasks; a minute on two cores."""
    torch.manual_seed(0)  # for the initial weights
    print(check_sampler(Blobs(), processes=False))  # pure, finite, of one shape?
    problem = FewShotProblem(MLP(in_features=8, out_features=5), adapt="all")
    algorithm = ITD(inner_steps=5, inner_lr=0.1)
    trainer = Trainer(
        problem, Blobs(), algorithm, outer_optimizer=OuterOptimizer(lr=3e-3), meta_batch_size=8
    )
    trainer.fit(num_steps)
    test = evaluate(problem, Blobs(seed=1), algorithm, trainer.outer, num_test_tasks)
    accuracy = test.metrics["query_accuracy"]
    print(f"accuracy on new tasks: {accuracy}")
    return accuracy.mean


if __name__ == "__main__":
    main()
