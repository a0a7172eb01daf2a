"""`metadist tune`: hyperparameters of a training by Ray Tune."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from metadist.cli.contending import check_contender, contender, go_to, keep_config
from metadist.cli.parsing import Parser, read_yaml
from metadist.cli.training import parse_training, train_parser
from metadist.cluster.jobs.tune import plan
from metadist.cluster.jobs.tune import tune as search
from metadist.compare.run import Contender
from metadist.run.storage import Folder

CONFIG, BEST, TRIALS = "tune.json", "best.yaml", "trials.json"
OWN = ("space", "metric", "mode", "num_samples", "evaluate_every", "scheduler", "search")
"""Keys of a config that are no options of a training."""


def tune_parser() -> ArgumentParser:
    """Options of `metadist tune`."""
    parser = Parser(
        prog="metadist tune",
        allow_abbrev=False,
        description="Search for good hyperparameters with Ray Tune, and write the best as a config "
        "of `metadist train`. The same command again goes on where it was. See docs/compare.md.",
    )
    parser.add_argument("config", type=str, help="YAML file: space, options of train")
    parser.add_argument("--folder", type=str, required=True, help="for everything it writes")
    parser.add_argument("--num_workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--cpus_per_worker", type=float, default=1.0, help="reserved for a trial")
    parser.add_argument("--gpus_per_worker", type=float, default=0.0, help="reserved for a trial")
    parser.add_argument(
        "--address", type=str | None, help="of a running Ray cluster; else RAY_ADDRESS, or one here"
    )
    parser.add_argument("--verbose", type=int, default=1, help="how much Ray Tune tells, 0 to 3")
    return parser


def tune(config: Namespace) -> int:
    """Run `metadist tune`; exit code 1 if no trial has come to a result."""
    tree = read_yaml(config.config)
    options = {name: value for name, value in tree.items() if name not in OWN}
    own = {name: value for name, value in tree.items() if name in OWN}
    space = own.pop("space", None)
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"space must map options to what is tried of them, got {space!r}")
    if "evaluate_every" not in own:
        raise ValueError("evaluate_every must be given in outer steps, got none")
    for field in ("run_dir", "quiet", "checkpoint_every"):
        if field in options:
            raise ValueError(f"config must not have {field}: every trial has its own")
    check_contender("the config", options, {}, config.num_workers)
    _check_names(options, space)
    defaults = train_parser().get_defaults()
    own |= {name: options.get(name, defaults[name]) for name in ("num_steps", "seed")}
    plan(space, num_workers=config.num_workers, **own)
    folder = Folder(config.folder)
    keep_config(folder, tree, CONFIG)
    found = search(
        partial(_make, options, os.getcwd()),
        space,
        config.folder,
        **own,
        **{
            name: value
            for name, value in config.items()
            if name in inspect.signature(search).parameters and name != "folder"
        },
    )
    metric = own.get("metric", inspect.signature(search).parameters["metric"].default)
    table = Table("", *space, "step", metric, "error")
    for trial in found.trials:
        mark = "best" if trial == found.best else ""
        metrics = [trial.metrics.get(name, "") for name in ("step", metric)]
        row = [mark, *(trial.values.get(name, "") for name in space), *metrics, trial.error or ""]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
    told = json.dumps([trial._asdict() for trial in found.trials], indent=1, default=str)
    folder.write(TRIALS, f"{told}\n".encode())
    if found.best is None:
        return 1
    best = parse_training(options, found.best.values)
    folder.write(BEST, train_parser().dump(best, skip_unset=False).encode())
    print(f"best: {found.best.values}, {metric} {found.best.metrics[metric]:.4g}")
    print(f"metadist train --config {folder.uri.rstrip('/')}/{BEST} --run_dir runs/NAME")
    return 0


def _make(options: dict[str, Any], here: str, values: Mapping[str, Any], run_dir: str) -> Contender:
    go_to(here)
    return contender(options, values, run_dir)


def _check_names(options: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Raise ValueError for a name in the space that is no option, by a value it may have."""
    for name, spec in space.items():
        first = next(iter(spec.values())) if isinstance(spec, Mapping) and spec else None
        if isinstance(first, list) and first:
            try:
                parse_training(options, {name: first[0]})
            except ValueError as error:
                raise ValueError(f"space of {name}: {error}") from error
