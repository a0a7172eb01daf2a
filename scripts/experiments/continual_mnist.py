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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist import Algorithm, Batch, OuterOptimizer, Params, Trainer
from metadist.algorithms import BOME, F2SA, ITD, MEHA, SAMA
from metadist.tasks import (
    AccuracyMatrix,
    ContextualNetwork,
    ContinualLearning,
    JudgeAfterEachTask,
    PermutedImages,
)
from metadist.tasks.data.random import Random
from metadist.trees import gradients, leaves


class Method(NamedTuple):
    """A bilevel method, and the rate of SGD on x."""

    algorithm: Algorithm
    outer_lr: float


METHODS = {
    "CTN": Method(ITD(inner_steps=1, inner_lr=0.1, first_order=True), 0.1),
    "ITD": Method(ITD(inner_steps=1, inner_lr=0.1), 0.1),
    "BOME": Method(BOME(inner_steps=1, inner_lr=0.1, y_lr=0.1), 0.1),
    "MEHA": Method(MEHA(inner_steps=1, inner_lr=0.1, y_lr=0.1), 0.1),
    "SAMA": Method(SAMA(inner_steps=1, inner_lr=0.1), 0.1),
    "F2SA": Method(F2SA(inner_steps=1, inner_lr=0.1), 0.1),
}
BASELINES = {"none": 0.1, "replay": 0.1, "joint": 0.1}
"""The rate of SGD on x and y together."""


def stream_of(seed: int, num_tasks: int) -> PermutedImages:
    """The stream of a seed."""
    return PermutedImages("mnist", num_tasks=num_tasks, seed=seed)


def problem_of(seed: int, num_tasks: int) -> ContinualLearning:
    """The problem, with the initial weights of a seed."""
    torch.manual_seed(seed)
    return ContinualLearning(ContextualNetwork(num_tasks=num_tasks))


def bilevel(method: Method, seed: int, num_tasks: int) -> AccuracyMatrix:
    """The accuracies of a bilevel method."""
    stream = stream_of(seed, num_tasks)
    trainer = Trainer(
        problem_of(seed, num_tasks),
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


def baseline(name: str, lr: float, seed: int, num_tasks: int) -> AccuracyMatrix:
    """The accuracies of plain SGD on all weights, with as many updates on as many examples.

    "none" sees the new examples alone; "replay" also what a bilevel method replays and what it has
    for the outer loss, as one memory; "joint" random examples of all tasks at every step.
    """
    stream, problem = stream_of(seed, num_tasks), problem_of(seed, num_tasks)
    x = problem.init_outer(torch.Generator())
    y = problem.init_inner(x, stream.sample(0))
    whole = stream.whole()
    rows = []
    for step in range(stream.num_steps):
        batches = _batches(name, stream, whole, seed, step)
        at_x, at_y = leaves(x), leaves(y)
        losses = [_loss(problem, at_x, at_y, batch) for batch in batches]
        g_x, g_y = gradients([torch.stack(losses).sum()], [None], at_x, at_y)
        x = {n: (leaf - lr * g_x[n]).detach() for n, leaf in at_x.items()}
        y = {n: (leaf - lr * g_y[n]).detach() for n, leaf in at_y.items()}
        stage, within = divmod(step + 1, stream.steps_per_stage)
        if not within:
            rows.append(tuple(stream.accuracies(problem, x, y, stage)))
    return AccuracyMatrix(tuple(rows))


def _loss(problem: ContinualLearning, x: Params, y: Params, batch: Batch) -> Tensor:
    targets = batch.fields("inputs", "stages", "is_new", "slots", "targets")[-1]
    return F.cross_entropy(problem.logits(x, y, batch), targets)


def _batches(name: str, stream: PermutedImages, whole: Batch, seed: int, step: int) -> list[Batch]:
    """The examples of a step: the loss is the sum of their mean losses."""
    if name == "joint":
        chosen = Random(seed, "joint", step).choose(len(whole.index), 74)
        return [whole.take(torch.tensor(chosen))]
    support, query, _ = stream.sample_at(0, step)
    is_new = support.fields("inputs", "stages", "is_new", "slots", "targets")[2]
    # The example of the batch that was put apart comes last in a ring that is not full.
    first = step // 2 * 10
    new = whole.take(torch.arange(first, first + 10))
    if name == "none":
        return [new]
    old = support.take((~is_new).nonzero()[:, 0])
    columns = zip(old.tensors, query.tensors, strict=True)
    memory = Batch.of(*map(torch.cat, columns))._replace(names=query.names)
    return [new, memory]


def main() -> None:
    """Run the methods asked for, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs: dict[str, Callable[[int, int], AccuracyMatrix]] = {
        **{name: partial(baseline, name, lr) for name, lr in BASELINES.items()},
        **{name: partial(bilevel, method) for name, method in METHODS.items()},
    }
    parser.add_argument("methods", nargs="*", choices=[[], *runs], help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num_tasks", type=int, default=20)
    parser.add_argument("--output", type=Path, help="a file to append the lines to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.methods or runs:
            began = time.process_time()
            matrix = runs[name](seed, options.num_tasks)
            row = {
                "method": name,
                "seed": seed,
                "num_tasks": options.num_tasks,
                **{metric: round(value, 4) for metric, value in matrix.metrics().items()},
                "cpu_s": round(time.process_time() - began, 1),
            }
            line = json.dumps(row)
            print(line, flush=True)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
