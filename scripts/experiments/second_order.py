"""Does the second order of MAML pay off? Train MAML and FOMAML alike and compare them by task.

    .venv/bin/python scripts/experiments/second_order.py sinusoid   10-shot regression, some minutes
    .venv/bin/python scripts/experiments/second_order.py glyphs     20-way 1-shot, much longer

Both get the same initial weights, training tasks, rates and number of outer steps, and are tested
on the same tasks, so the interval of their difference is over pairs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD
from metadist.evaluation import evaluate_tasks
from metadist.intervals import mean_interval
from metadist.models import MLP, Conv4
from metadist.tasks import FewShotProblem, Glyphs, Sinusoid

SETTINGS: dict[str, dict[str, Any]] = {
    "glyphs": {
        "sampler": lambda split: Glyphs(n_way=20, k_shot=1, k_query=5, split=split),
        "problem": lambda: FewShotProblem(Conv4(n_way=20, width=32)),
        "algorithm": {"inner_steps": 5, "inner_lr": 0.1},
        "metric": "query_accuracy",
        "num_steps": 400,
        "trainer": {"meta_batch_size": 4, "outer_optimizer": OuterOptimizer(lr=2e-3)},
    },
    "sinusoid": {
        "sampler": lambda split: Sinusoid(k_shot=10, k_query=10, split=split),
        "problem": lambda: FewShotProblem(MLP(), loss="mse"),
        "algorithm": {"inner_steps": 1, "inner_lr": 0.01},
        "metric": "query_loss",
        "num_steps": 5000,
        "trainer": {"meta_batch_size": 16, "outer_optimizer": OuterOptimizer(lr=1e-3)},
    },
}


def main() -> None:
    """Train and test both; print means, and the mean of the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--num_steps", type=int, help="outer steps (default: those of the setting)")
    parser.add_argument("--num_tasks", type=int, default=600, help="test tasks (600)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    num_steps = options.num_steps or setting["num_steps"]
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    columns = {}
    for name, first_order in (("MAML", False), ("FOMAML", True)):
        torch.manual_seed(options.seed)
        algorithm = ITD(first_order=first_order, **setting["algorithm"])
        trainer = Trainer(
            setting["problem"](),
            setting["sampler"]("train"),
            algorithm,
            seed=options.seed,
            quiet=not sys.stderr.isatty(),
            **setting["trainer"],
        )
        result = trainer.fit(num_steps)
        metrics = evaluate_tasks(
            trainer.problem, setting["sampler"]("test"), algorithm, trainer.outer, options.num_tasks
        )
        columns[name] = metrics[setting["metric"]]
        console.print(
            f"{name}: {setting['metric']} {mean_interval(columns[name])} on {options.num_tasks} "
            f"test tasks after {num_steps} outer steps, {result.seconds:.0f} s"
        )
    pairs = zip(columns["MAML"], columns["FOMAML"], strict=True)
    console.print(f"MAML - FOMAML: {mean_interval([a - b for a, b in pairs])}, 95 % over pairs")


if __name__ == "__main__":
    main()
