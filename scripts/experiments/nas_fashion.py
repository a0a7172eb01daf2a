"""Does a search for cells find better networks than chance? Fashion-MNIST, small.

    .venv/bin/python scripts/experiments/nas_fashion.py runs/nas_fashion.jsonl
    .venv/bin/python scripts/experiments/nas_fashion.py runs/nas_fashion.jsonl --table

Paper: the search space and protocol of Liu, Simonyan, Yang, DARTS, ICLR 2019; MEHA (Liu et al.,
ICML 2024) searches it on CIFAR-10 with 8 cells of 16 channels, see nas_cifar10.yaml.
Known: nothing for this size. Li, Talwalkar (UAI 2019) find random cells to be hard to beat.
Tuned: nothing; the rates are those of DARTS' code, and weights of penalties those of the methods'
papers. All methods have the same inner step rule, batches, outer optimiser and number of steps.

Each search gives a genotype, which is trained from scratch as cells drawn at random are, and
tested on images that neither saw. Each run is one line of the file; lines that are there are not
computed again, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from metadist import SGD, Algorithm, OuterOptimizer, Trainer
from metadist.algorithms import BOME, DARTS, F2SA, MEHA, SAMA, T1T2
from metadist.intervals import mean_interval
from metadist.tasks import ArchitectureSearch, Genotype, ImageData, Supernet, retrain

METHODS: dict[str, Callable[[SGD], Algorithm]] = {
    "DARTS": lambda steps: DARTS(inner_steps=1, inner_optimizer=steps),
    "DARTS, plain SGD": lambda steps: DARTS(inner_steps=1, inner_optimizer=SGD(lr=steps.lr)),
    "T1T2": lambda steps: T1T2(inner_steps=1, inner_optimizer=steps),
    "SAMA": lambda steps: SAMA(inner_steps=1, inner_optimizer=steps),
    "BOME": lambda steps: BOME(inner_steps=1, inner_optimizer=steps, y_lr=steps.lr),
    "F2SA": lambda steps: F2SA(inner_steps=1, inner_optimizer=steps, lam=10.0),
    "MEHA": lambda steps: MEHA(
        inner_optimizer=steps, y_lr=steps.lr, gamma=10.0, c=1.0, c_power=0.0
    ),
}
RANDOM = "random cells"


def step_rule(lr: float, num_steps: int) -> SGD:
    """That of DARTS' code: momentum that continues, clipped gradients, a cosine."""
    return SGD(
        lr=lr, momentum=0.9, clip_norm=5.0, schedule="cosine", num_steps=num_steps, carry=True
    )


def search(method: str, data: ImageData, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The genotype that a method finds, the last f on all validation images, CPU seconds."""
    supernet = Supernet(options.channels, options.cells, options.nodes, seed=seed)
    problem = ArchitectureSearch(supernet)
    trainer = Trainer(
        problem,
        data,
        METHODS[method](step_rule(options.lr, options.num_steps)),
        outer_optimizer=OuterOptimizer(
            lr=options.outer_lr, options={"betas": (0.5, 0.999), "weight_decay": 1e-3}
        ),
        batch_size=options.batch_size,
        seed=seed,
        log_every=options.num_steps,
        quiet=True,
    )
    began = time.process_time()
    trainer.fit(options.num_steps)
    seconds = time.process_time() - began
    with torch.no_grad():
        parts = data.sample(0).query.take(torch.arange(min(options.num_images, 500)))
        loss = problem.outer_loss(trainer.outer, trainer.inner(0), parts)
    return {
        "genotype": json.loads(problem.genotype(trainer.outer).to_json()),
        "f": float(loss),
        "seconds": seconds,
    }


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the file."""
    data = ImageData(
        options.dataset,
        num_train=options.num_images,
        num_val=options.num_images,
        num_test=options.num_test,
        seed=seed % options.seeds,  # random cells see the images that the searches see
    )
    if method == RANDOM:
        genotype = Genotype.random(seed, options.nodes)
        found: dict[str, Any] = {"genotype": json.loads(genotype.to_json())}
    else:
        found = search(method, data, seed, options)
        genotype = Genotype.from_json(json.dumps(found["genotype"]))
    accuracies = []
    for retraining in range(options.retrainings):
        accuracies.append(
            retrain(
                genotype,
                data,
                options.channels,
                options.cells,
                epochs=options.epochs,
                seed=retraining,
            )
        )
    return {**found, "accuracy": sum(accuracies) / len(accuracies)}


def shown(values: list[float]) -> str:
    """The mean with its 95 % interval, which takes two values."""
    return str(mean_interval(values)) if len(values) > 1 else f"{values[0]:.4g}"


def table(lines: list[dict[str, Any]]) -> None:
    """Print the mean test accuracy of each method with its interval."""
    found = defaultdict(list)
    for line in lines:
        found[line["method"]].append(line)
    for method, runs in found.items():
        accuracy = shown([100 * run["accuracy"] for run in runs])
        text = f"{method:16} {len(runs)} runs, test accuracy {accuracy} %"
        if method != RANDOM:
            last = shown([run["f"] for run in runs])
            seconds = sum(run["seconds"] for run in runs) / len(runs)
            text += f", f of the supernet {last}, {seconds:.0f} s of CPU a search"
        print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the file, or print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON lines, one for each run")
    parser.add_argument("--table", action="store_true", help="print the results in the file")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, RANDOM])
    parser.add_argument("--seeds", type=int, default=3, help="searches of each method (3)")
    parser.add_argument("--random", type=int, default=9, help="random genotypes (9)")
    parser.add_argument("--num_steps", type=int, default=1500)
    parser.add_argument("--num_images", type=int, default=2000, help="for training, and as many")
    parser.add_argument("--num_test", type=int, default=10000)
    parser.add_argument("--dataset", default="fashion_mnist", help="see metadist.tasks.ImageData")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--cells", default="NRN")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.025)
    parser.add_argument("--outer_lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=20, help="of training from scratch")
    parser.add_argument("--retrainings", type=int, default=1, help="of each genotype, averaged")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.file.touch()
    lines = [json.loads(line) for line in options.file.read_text().splitlines()]
    if options.table:
        table(lines)
        return
    settings = {k: v for k, v in vars(options).items() if k not in WHAT_IS_RUN}
    done = [(line["method"], line["seed"], line["settings"]) for line in lines]
    for seed in range(max(options.seeds, options.random)):
        for method in options.methods:
            if seed >= (options.random if method == RANDOM else options.seeds):
                continue
            if (method, seed, settings) in done:
                continue
            line = {"method": method, "seed": seed, **run(method, seed, options)}
            with options.file.open("a") as file:
                print(json.dumps({**line, "settings": settings}), file=file)


WHAT_IS_RUN = ("file", "table", "methods", "seeds", "random")
"""Options that change which runs there are, and not a run."""


if __name__ == "__main__":
    main()
