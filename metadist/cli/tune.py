"""`metadist tune`: hyperparameters of a training by Ray Tune."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from metadist.cli.parsing import Parser, errors_of, read_yaml
from metadist.cli.runs import search_parser

if TYPE_CHECKING:
    from metadist.cluster.jobs.tune import Tuned
    from metadist.compare.run import Contender

CONFIG, BEST, TRIALS = "tune.json", "best.yaml", "trials.json"
OWN = ("space", "metric", "mode", "num_samples", "evaluate_every", "scheduler", "search")
"""Keys of a config that are no options of a training."""


def parser() -> Parser:
    """Options of `metadist tune`."""
    from metadist.cluster import Workers
    from metadist.cluster.actors.options import JOB_UNUSED

    parser = search_parser(
        "tune",
        "Search for good hyperparameters with Ray Tune, and write the best as a config "
        "of `metadist train`. The same command again continues the search. See docs/compare.md.",
        "a space, options of `metadist train`",
    )
    parser.add_class_arguments(Workers, "workers", skip=set(JOB_UNUSED))
    parser.add_argument("--verbose", type=int, default=1, help="How much Ray Tune logs, 0 to 3.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist tune`; exit code 1 if no trial has reported a result."""
    from metadist.cli import train
    from metadist.cli.contenders import check_contender, keep_config
    from metadist.cluster import Workers
    from metadist.cluster.jobs.tune import plan, tune
    from metadist.run.storage import Folder

    tree = read_yaml(config.config)
    options = {name: value for name, value in tree.items() if name not in OWN}
    own = {name: value for name, value in tree.items() if name in OWN}
    space = own.pop("space", None)
    with errors_of(config.config):
        if not isinstance(space, Mapping) or not space:
            raise ValueError(f"space must map options to what is tried of them, got {space!r}")
        if "evaluate_every" not in own:
            raise ValueError("evaluate_every must be given in outer steps, got none")
        for field in ("run_dir", "quiet", "checkpoint_every"):
            if field in options:
                raise ValueError(f"config must not have {field}: every trial has its own")
        workers = Workers(**vars(config.workers))
        check_contender(options, {}, workers, OWN)
        _check_names(options, space)
        defaults = train.parser().get_defaults()
        own |= {name: options.get(name, defaults[name]) for name in ("num_steps", "seed")}
        plan(space, workers=workers, **own)
    folder = Folder(config.run_dir)
    keep_config(folder, tree, CONFIG)
    own.setdefault("metric", "query_loss")
    tuned = tune(
        partial(_make, options, os.getcwd()),
        space,
        config.run_dir,
        workers=workers,
        address=config.address,
        verbose=config.verbose,
        **own,
    )
    _print_trials(tuned, list(space), own["metric"])
    trials = [trial._asdict() for trial in tuned.trials]
    folder.write(TRIALS, f"{json.dumps(trials, indent=1, default=str)}\n".encode())
    if tuned.best is None:
        return 1
    best = train.parse_training(options, tuned.best.values)
    folder.write(BEST, train.parser().dump(best, skip_unset=False).encode())
    print(f"best: {tuned.best.values}, {own['metric']} {tuned.best.metrics[own['metric']]:.4g}")
    print(f"metadist train --config {folder.uri.rstrip('/')}/{BEST} --run_dir runs/NAME")
    return 0


def _print_trials(tuned: Tuned, space: list[str], metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from metadist.run.text import shown

    table = Table("", *space, "step", metric, "error")
    for trial in tuned.trials:
        cells: list[Any] = ["best" if trial == tuned.best else ""]
        cells += [trial.values.get(name, "") for name in space]
        cells += [trial.metrics.get(name, "") for name in ("step", metric)]
        cells += [trial.error or ""]
        table.add_row(
            *(shown(f"{cell:.4g}" if isinstance(cell, float) else cell) for cell in cells)
        )
    Console().print(table)


def _make(options: dict[str, Any], cwd: str, values: Mapping[str, Any], run_dir: str) -> Contender:
    from metadist.cli.contenders import contender, go_to

    go_to(cwd)
    return contender(options, values, run_dir)


def _check_names(options: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Raise ValueError for a name in the space that is no option, by a value it may have."""
    from metadist.cli.train import parse_training

    for name, spec in space.items():
        first = next(iter(spec.values())) if isinstance(spec, Mapping) and spec else None
        if isinstance(first, list) and first:
            with errors_of(f"space of {name}"):
                parse_training(options, {name: first[0]})
