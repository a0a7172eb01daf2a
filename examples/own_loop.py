"""The hypergradients of metadist inside a training loop of your own."""

import torch

from metadist import adapt, task_hypergradients
from metadist.algorithms import ITD
from metadist.models import MLP
from metadist.tasks import FewShotProblem, Sinusoid


def main(num_steps: int = 500) -> float:
    """The loss on ten new sines after adaptation to ten points of each; half a minute."""
    torch.manual_seed(0)  # for the initial weights
    problem = FewShotProblem(MLP(in_features=1, out_features=1), loss="mse")  # your nn.Module
    algorithm = ITD(inner_steps=5, inner_lr=0.01)
    sines = Sinusoid(k_shot=10)

    start = problem.init_outer(torch.Generator().manual_seed(0))
    outer = {name: leaf.clone() for name, leaf in start.items()}  # plain tensors, yours from here
    optimizer = torch.optim.Adam(outer.values(), lr=1e-2)
    for step in range(num_steps):
        tasks = [sines.sample(16 * step + number) for number in range(16)]
        found = task_hypergradients(problem, algorithm, outer, tasks)
        for name, leaf in outer.items():
            leaf.grad = found.total[name] / found.num_tasks  # found.total is a sum over the tasks
        optimizer.step()

    losses = []
    for index in range(10):
        task = Sinusoid(k_shot=10, seed=1).sample(index)
        inner = adapt(problem, algorithm, outer, task)
        context = problem.encode(outer, task)
        losses.append(problem.outer_loss(context, inner, task.query).item())
    print(f"loss on new sines after adaptation: {sum(losses) / 10:.3f}")
    return sum(losses) / 10


if __name__ == "__main__":
    main()
