"""What `metadist compare` and `metadist tune` share: trainings made from options, and judged."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from jsonargparse import Namespace

from metadist import __version__
from metadist.checks.losses import learns_start
from metadist.cli.names import class_path
from metadist.cli.train import build, parse_training, parser
from metadist.cli.workload import instantiate
from metadist.cluster import Workers
from metadist.compare.metrics import kept_metrics
from metadist.compare.plan import differences
from metadist.compare.run import MAX_STEPS, Contender
from metadist.evaluation import EvaluationResult
from metadist.run.files import MAX_CONFIG_BYTES
from metadist.run.storage import Folder, write_json
from metadist.sampler import num_tasks_of
from metadist.workload import trains_start

LOCAL = class_path("executors", "local")


def contender(options: Mapping[str, Any], values: Mapping[str, Any], run_dir: str) -> Contender:
    """The training with these options, and these values of some of them, and its metrics."""
    ours = {"quiet": True, "run_dir": run_dir, "checkpoint_every": MAX_STEPS}
    # Every report of losses costs forward passes.
    parsed = parse_training({"log_every": 1000, **options, **ours}, values)
    trainer, samplers = build(parsed)
    _require_judges(parsed, trainer.workload.keep_state)
    if trainer.workload.keep_state:
        return Contender(trainer, partial(kept_metrics, trainer))

    def means(split: str, num_tasks: int, prefix: str = "") -> dict[str, float]:
        if split not in samplers:
            return {}
        result: EvaluationResult = trainer.test(samplers[split], num_tasks)
        found = {prefix + name: interval.mean for name, interval in result.metrics.items()}
        if result.dropped:
            undefined = {prefix + name: math.nan for name in result.dropped}
            found = {**undefined, **found, f"{prefix}num_dropped": float(result.num_dropped)}
        return found

    return Contender(
        trainer,
        partial(means, "val", parsed.val_tasks),
        partial(means, "test", parsed.test_tasks, "test_"),
    )


def check_contender(
    options: Mapping[str, Any],
    values: Mapping[str, Any],
    workers: Workers | None,
    other_keys: Sequence[str] = (),
) -> None:
    """Raise ValueError for a training that could not be judged, or not in a process of Ray."""
    parsed = parse_training({**options, "run_dir": "x"}, values, other_keys)
    if workers is not None and parsed.executor.class_path != LOCAL:
        raise ValueError(
            f"executor must be local with num_workers={workers.num_workers}, got "
            f"{parsed.executor.class_path}: every run is in a process of Ray already"
        )
    keep_state = parsed.keep_state
    if keep_state is None:
        # What fails does so in its own run; and the data may be on other machines only.
        with suppress(Exception):
            keep_state = _keeps_state(parsed)
    if keep_state is not None:
        _require_judges(parsed, keep_state)


_asked: dict[str, tuple[bool, bool]] = {}
"""Whether tasks are a fixed set, and whether their start is learned, by sampler and problem."""


def _keeps_state(parsed: Namespace) -> bool:
    """What `tasks_of_steps` will say."""
    key = f"{parsed.sampler} {parsed.problem} {parsed.seed}"
    algorithm = instantiate(parsed, parser(), "algorithm").algorithm
    if key not in _asked:
        made = instantiate(parsed, parser(), "sampler", "problem")
        is_learned = learns_start(made.problem, made.sampler, parsed.seed)
        _asked[key] = num_tasks_of(made.sampler) is not None, is_learned
    is_fixed, is_learned = _asked[key]
    return is_fixed and not trains_start(algorithm, is_learned)


def _require_judges(parsed: Namespace, keep_state: bool) -> None:
    judges = parsed.val_sampler or parsed.val_split
    if keep_state and (judges or parsed.test_sampler or parsed.test_split):
        raise ValueError(
            "val and test samplers must not be given with keep_state: the metrics are "
            "those of the kept solution"
        )
    if not keep_state and not judges:
        raise ValueError(
            "val_split or val_sampler must be given, got neither: tasks without kept states are "
            "judged on those (for a single problem set keep_state)"
        )


def keep_config(folder: Folder, tree: dict[str, Any], name: str) -> None:
    """Write the config; raise ValueError if the folder has another one."""
    now = json.loads(json.dumps(tree))
    try:
        before = json.loads(folder.read(name, MAX_CONFIG_BYTES))["config"]
    except FileNotFoundError:
        if folder.names():
            raise ValueError(
                f"run_dir must be new, empty, or hold {name}, got {folder.uri!r}, which holds "
                "other files"
            ) from None
        folder.check_writable()
    else:
        if found := differences(before, now):
            raise ValueError(
                f"run_dir {folder.uri!r} is of another config: {'; '.join(found)}. Choose another "
                "folder"
            )
    write_json(f"{folder.uri.rstrip('/')}/{name}", {"metadist": __version__, "config": now})


def go_to(cwd: str) -> None:
    """Let relative paths and users' modules be found as in the folder of the command."""
    with suppress(FileNotFoundError):  # on another machine, where they must be absolute
        os.chdir(cwd)
    if cwd not in sys.path:
        sys.path.insert(0, cwd)
