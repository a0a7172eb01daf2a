"""Continual learning on permuted MNIST: bilevel methods and what they must beat, with one network.

    .venv/bin/python scripts/experiments/continual_mnist.py --seeds 0 1 2 --output results.jsonl
    .venv/bin/python scripts/experiments/continual_mnist.py replay CTN --num_tasks 10

Each run prints a line of JSON; the methods are in METHODS and BASELINES. A seed is that of the
permutations, the images and the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metadist import Algorithm, Batch, OuterOptimizer, Trainer, TrainingDiverged
from metadist.algorithms import BOME, F2SA, ITD, MEHA, SAMA
from metadist.tasks import (
    AccuracyMatrix,
    ContextualNetwork,
    ContinualLearning,
    JudgeAfterEachTask,
    PermutedImages,
)
from metadist.tasks.continual.problem import FIELDS
from metadist.tasks.data.random import Random
from metadist.trees import add, detach, gradients, leaves


class Method(NamedTuple):
    """A bilevel method, and the rate of SGD on x."""

    algorithm: Algorithm
    outer_lr: float


METHODS = {
    "CTN": Method(ITD(inner_steps=1, inner_lr=0.1, first_order=True), 0.05),
    "ITD": Method(ITD(inner_steps=1, inner_lr=0.1), 0.05),
    "BOME": Method(BOME(inner_steps=1, inner_lr=0.2, y_lr=0.2), 0.1),
    "MEHA": Method(
        MEHA(inner_steps=1, inner_lr=0.1, y_lr=0.1, gamma=10.0, c=1.0, c_power=0.0), 0.1
    ),
    "SAMA": Method(SAMA(inner_steps=1, inner_lr=0.1), 0.05),
    "F2SA": Method(F2SA(inner_steps=1, inner_lr=0.1, lam=1.0), 0.05),
}
"""With the rates that were best on other permutations (seed 100), see docs/experiments.md."""
JOINT = 74
"""Ten new examples and 64 replayed ones."""
BASELINES = {"none": 0.1, "replay": 0.1, "joint": 0.1}
"""The rate of SGD on x and y together."""


class Setting(NamedTuple):
    """A stream without its seed, and the size of the network."""

    dataset: str = "mnist"
    num_tasks: int = 20
    per_task: int = 1000
    num_test: int = 2000
    width: int = 256

    def start(self, seed: int) -> tuple[PermutedImages, ContinualLearning]:
        """The stream, and the problem with the initial weights of a seed."""
        stream = PermutedImages(
            self.dataset,
            num_tasks=self.num_tasks,
            per_task=self.per_task,
            num_test=self.num_test,
            seed=seed,
        )
        size = stream.sample(0).support.tensors[0][0].numel()
        torch.manual_seed(seed)
        network = ContextualNetwork(size, width=self.width, num_tasks=self.num_tasks)
        return stream, ContinualLearning(network)


def bilevel(method: Method, seed: int, setting: Setting) -> AccuracyMatrix:
    """The accuracies of a bilevel method."""
    stream, problem = setting.start(seed)
    trainer = Trainer(
        problem,
        stream,
        method.algorithm,
        outer_optimizer=OuterOptimizer("sgd", lr=method.outer_lr),
        log_every=stream.steps_per_stage,
        allow_equal_examples=True,
        quiet=True,
        seed=seed,
    )
    judge = JudgeAfterEachTask(trainer)
    trainer.fit(stream.num_steps, judge)
    return judge.matrix


def baseline(name: str, lr: float, seed: int, setting: Setting) -> AccuracyMatrix:
    """The accuracies of plain SGD on all weights, x and y, with as many updates.

    "none" sees the new examples alone; "replay" also what a bilevel method replays and what it has
    for the outer loss, as one memory; "joint" as many random examples of all tasks at every step.
    """
    stream, problem = setting.start(seed)
    x = problem.init_outer(torch.Generator())
    y = problem.init_inner(x, stream.sample(0))
    whole = stream.whole()
    rows = []
    for step in range(stream.num_steps):
        at_x, at_y = leaves(x), leaves(y)
        batches = _batches(name, stream, whole, seed, step)
        losses = [problem.outer_loss(at_x, at_y, batch) for batch in batches]
        g_x, g_y = gradients([torch.stack(losses).sum()], [None], at_x, at_y)
        x, y = detach(add(at_x, g_x, -lr)), detach(add(at_y, g_y, -lr))
        stage, within = divmod(step + 1, stream.steps_per_stage)
        if not within:
            rows.append(tuple(stream.accuracies(problem, x, y, stage)))
    return AccuracyMatrix(tuple(rows))


def _batches(name: str, stream: PermutedImages, whole: Batch, seed: int, step: int) -> list[Batch]:
    """The examples of a step: the loss is the sum of their mean losses."""
    if name == "joint":
        chosen = Random(seed, "joint", step).choose(len(whole.index), JOINT)
        return [whole.take(torch.tensor(chosen))]
    # With the example that a bilevel method has in the outer loss alone.
    first = step // stream.updates * stream.batch
    new = whole.take(torch.arange(first, first + stream.batch))
    if name == "none":
        return [new]
    support, query, _ = stream.sample_at(0, step)
    is_new = support.fields(*FIELDS)[2]
    old = support.take((~is_new).nonzero()[:, 0])
    columns = zip(old.tensors, query.tensors, strict=True)
    memory = Batch.of(*map(torch.cat, columns))._replace(names=query.names)
    return [new, memory]


def main() -> None:
    """Run the methods asked for, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs: dict[str, Callable[[int, Setting], AccuracyMatrix]] = {
        **{name: partial(baseline, name, lr) for name, lr in BASELINES.items()},
        **{name: partial(bilevel, method) for name, method in METHODS.items()},
    }
    parser.add_argument("methods", nargs="*", metavar="method", help=f"{', '.join(runs)}; all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num_tasks", type=int, default=20)
    parser.add_argument("--output", type=Path, help="a file to append the lines to")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(runs):
        parser.error(f"methods must be of {', '.join(runs)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.methods or runs:
            began = time.process_time()
            row: dict[str, Any] = {"method": name, "seed": seed, "num_tasks": options.num_tasks}
            try:
                matrix = runs[name](seed, Setting(num_tasks=options.num_tasks))
                row |= {metric: round(value, 4) for metric, value in matrix.metrics().items()}
            except TrainingDiverged as error:  # the other methods are still of interest
                row["diverged"] = str(error)
            row["cpu_s"] = round(time.process_time() - began, 1)
            line = json.dumps(row)
            print(line, flush=True)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
