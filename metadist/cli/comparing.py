"""`metadist compare`: several methods on one problem, each on the same budget."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from metadist import __version__
from metadist.cli.names import NAMES
from metadist.cli.parsing import MAX_CONFIG_BYTES, Parser, read_yaml
from metadist.cli.training import build, parse_training
from metadist.cluster.parallel import in_parallel
from metadist.comparison import Comparison, Run, differences
from metadist.comparison_report import (
    Outcome,
    check_matplotlib,
    curves,
    grid_to_csv,
    rows,
    to_console,
    to_csv,
    to_markdown,
)
from metadist.comparison_run import (
    MAX_STEPS,
    Contender,
    is_finished,
    read_records,
    run_on_budget,
)
from metadist.evaluation import EvaluationResult
from metadist.figures import kept_figures
from metadist.storage import Folder, write_json

CONFIG = "comparison.json"
ERROR = "error.txt"


def compare_parser() -> ArgumentParser:
    """Options of `metadist compare`."""
    parser = Parser(
        prog="metadist compare",
        allow_abbrev=False,
        description="Train several methods on one problem, each on the same budget and several "
        "seeds; write tables and curves. The same command again continues what was interrupted "
        "or failed, and redoes nothing. Exit code 1: a run has failed; the others are in the "
        "tables. See docs/compare.md.",
    )
    parser.add_argument("config", type=str, help="YAML file: entries, budget, options of train")
    parser.add_argument("--folder", type=str, required=True, help="for everything it writes")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=0,
        help="runs at a time, each in a process of Ray; 0: one after another in this process",
    )
    parser.add_argument("--cpus_per_worker", type=float, default=1.0, help="reserved for a run")
    parser.add_argument("--gpus_per_worker", type=float, default=0.0, help="reserved for a run")
    parser.add_argument(
        "--address", type=str | None, help="of a running Ray cluster; else RAY_ADDRESS, or one here"
    )
    parser.add_argument("--plots", type=bool, default=True, help="draw curves (with matplotlib)")
    return parser


def compare(config: Namespace) -> int:
    """Run `metadist compare`; exit code 1 if a run has failed."""
    if config.num_workers < 0:
        raise ValueError(f"num_workers must be >= 0, got {config.num_workers}")
    if config.plots:
        check_matplotlib()
    tree = read_yaml(config.config)
    comparison = Comparison.of(tree)
    folder = Folder(config.folder)
    tried = {entry: comparison.runs(entry) for entry in comparison.entries}
    for run in (run for runs in tried.values() for run in runs):
        _check(comparison, run, config.num_workers)
    keep_config(folder, tree, CONFIG)

    def run_all(runs: Sequence[Run]) -> None:
        jobs = [Job(comparison, run, config.folder, os.getcwd()) for run in runs]
        for number, line in _run_all(jobs, config):
            print(f"{runs[number].name}: {line}", flush=True)

    run_all([run for runs in tried.values() for run in runs])
    outcomes = {entry: [_outcome(comparison, folder, run) for run in runs]
                for entry, runs in tried.items()}  # fmt: skip
    searched = [found for entry in outcomes for found in outcomes[entry] if found.run.point]
    chosen = []
    for entry in {outcome.run.entry: None for outcome in searched}:
        good = [(run, records) for run, records, error in outcomes[entry] if error is None]
        best = comparison.chosen(good)
        chosen += best
        run_all(best[1:])
        outcomes[entry] = [_outcome(comparison, folder, run) for run in best] or [
            outcome._replace(error=outcome.error or f"{comparison.figure} is not finite")
            for outcome in outcomes[entry]
        ]
    _report(comparison, folder, outcomes, config.plots)
    if searched:
        folder.write("grid.csv", grid_to_csv(comparison, searched, chosen).encode())
    return int(any(outcome.error for found in outcomes.values() for outcome in found))


class Job(NamedTuple):
    """A run, as it goes to another process; `here` is the folder that relative paths are of."""

    comparison: Comparison
    run: Run
    folder: str
    here: str


def _run_all(jobs: list[Job], config: Namespace) -> Iterator[tuple[int, str]]:
    """(position, what to tell) of each as it ends."""
    if not config.num_workers:
        yield from ((number, _execute(job)) for number, job in enumerate(jobs))
        return
    left = []  # what is done needs no process
    for number, job in enumerate(jobs):
        folder = Folder(job.folder) / job.run.name
        if is_finished(read_records(folder), job.comparison.budget):
            yield number, _execute(job)
        else:
            left.append(number)
    found = in_parallel(
        _execute,
        [jobs[number] for number in left],
        config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        address=config.address,
    )
    for position, line in found:
        if isinstance(line, Exception):
            job = jobs[left[position]]
            line = " ".join(str(line).split())
            (Folder(job.folder) / job.run.name).write(ERROR, line.encode())
            line = f"failed: {line}"
        yield left[position], line


def _execute(job: Job) -> str:
    """Run it, or go on with it; what to tell of how it ended."""
    go_to(job.here)
    comparison, run, _, _ = job
    folder = Folder(job.folder) / run.name
    try:
        records = run_on_budget(
            partial(_contender, comparison, run),
            folder,
            comparison.budget,
            comparison.evaluations,
            comparison.figure,
        )
    except Exception as error:  # noqa: BLE001  # one failed run does not stop the others
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        folder.write(ERROR, f"{told}\n\n{traceback.format_exc()}".encode())
        return f"failed: {told}"
    folder.remove(ERROR)
    spent, figures = records[-1].spent, records[-1].figures
    return (
        f"{spent.step} steps, {spent.seconds:.1f} s, {spent.gradients:.0f} gradients, "
        f"{comparison.figure} {figures[comparison.figure]:.4g}"
    )


def go_to(here: str) -> None:
    """Let relative paths and users' modules be found as where the command was given."""
    with suppress(FileNotFoundError):  # on another machine, where they must be absolute
        os.chdir(here)
    if here not in sys.path:
        sys.path.insert(0, here)


def _contender(comparison: Comparison, run: Run, run_dir: str) -> Contender:
    num_steps = comparison.budget.steps or MAX_STEPS
    return contender({**run.options, "seed": run.seed, "num_steps": num_steps}, run.point, run_dir)


def contender(options: Mapping[str, Any], values: Mapping[str, Any], run_dir: str) -> Contender:
    """The training with these options, and these values of some of them, and its figures."""
    ours = {"quiet": True, "run_dir": run_dir, "checkpoint_every": MAX_STEPS}
    # A report of losses costs forward passes.
    parsed = parse_training({"log_every": 1000, **options, **ours}, values)
    trainer, samplers = build(parsed)
    if parsed.keep_state:
        return Contender(trainer, partial(kept_figures, trainer))

    def judged(split: str, num_tasks: int, prefix: str = "") -> dict[str, float]:
        if split not in samplers:
            return {}
        result: EvaluationResult = trainer.test(samplers[split], num_tasks)
        return {prefix + name: interval.mean for name, interval in result.metrics.items()}

    return Contender(
        trainer,
        partial(judged, "val", parsed.val_tasks),
        partial(judged, "test", parsed.test_tasks, "test_"),
    )


def _check(comparison: Comparison, run: Run, num_workers: int) -> None:
    """Raise ValueError for a run that could not be started."""
    where = f"entry {run.entry}" + (f" at {run.point}" if run.point else "")
    check_contender(where, run.options, run.point, num_workers)


def check_contender(
    where: str, options: Mapping[str, Any], values: Mapping[str, Any], num_workers: int
) -> None:
    """Raise ValueError for a training that could not be judged, or not in a process of Ray."""
    try:
        parsed = parse_training({**options, "run_dir": "x"}, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if num_workers and parsed.executor.class_path != NAMES["local"]:
        raise ValueError(
            f"{where}: executor must be local with num_workers={num_workers}, got "
            f"{parsed.executor.class_path}: every run is in a process of Ray already"
        )
    judges = parsed.val_sampler or parsed.val_split
    if parsed.keep_state and (judges or parsed.test_sampler or parsed.test_split):
        raise ValueError(
            f"{where}: val and test samplers must not be given with keep_state: the figures are "
            "those of the kept solution"
        )
    if not parsed.keep_state and not judges:
        raise ValueError(
            f"{where}: val_split or val_sampler must be given, got neither: new tasks at every "
            "step are judged on those (for a single problem set keep_state)"
        )


def keep_config(folder: Folder, tree: dict[str, Any], name: str) -> None:
    """Write the config; raise ValueError if the folder is of another comparison."""
    now = json.loads(json.dumps(tree))
    try:
        before = json.loads(folder.read(name, MAX_CONFIG_BYTES))["config"]
    except FileNotFoundError:
        if folder.names():
            raise ValueError(
                f"folder must be new, empty, or hold {name}, got {folder.uri!r}, which holds "
                "other files"
            ) from None
        folder.check_writable()
    else:
        if found := differences(before, now):
            raise ValueError(
                f"folder {folder.uri!r} is of another config: {'; '.join(found)}. Choose another "
                "folder (entries and seeds may be added)"
            )
    write_json(f"{folder.uri.rstrip('/')}/{name}", {"metadist": __version__, "config": now})


def _outcome(comparison: Comparison, folder: Folder, run: Run) -> Outcome:
    place = folder / run.name
    records = read_records(place)
    if is_finished(records, comparison.budget):
        return Outcome(run, records, None)
    try:
        told = place.read(ERROR, at_most=1 << 24).decode().strip()
    except FileNotFoundError:
        told = "not run"
    return Outcome(run, records, told.partition("\n")[0])


def _report(
    comparison: Comparison, folder: Folder, outcomes: dict[str, list[Outcome]], plots: bool
) -> None:
    table = rows(comparison, outcomes)
    folder.write("table.md", to_markdown(comparison, table).encode())
    folder.write("table.csv", to_csv(table).encode())
    lines = [
        json.dumps({"entry": run.entry, "seed": run.seed, "point": run.point, **record.to_json()})
        + "\n"
        for found in outcomes.values()
        for run, records, _ in found
        for record in records
    ]
    folder.write("results.jsonl", "".join(lines).encode())
    Console().print(to_console(comparison, table))
    for row in table:
        for error in row.errors:
            print(f"failed: {error}")
    if plots:
        every = [record for found in outcomes.values() for run in found for record in run.records]
        # A test on new tasks is made once, at the end: no curve.
        for name in {name: None for record in every for name in record.figures}:
            if any(len([r for r in run.records if name in r.figures]) > 1
                   for found in outcomes.values() for run in found):  # fmt: skip
                folder.write(f"{name.replace('/', '_')}.png", curves(name, outcomes))
    print(f"tables, curves and results: {folder.uri}")
