"""`metadist compare`: several methods on one problem, each on the same budget."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from metadist.cli.contending import check_contender, contender, go_to, keep_config
from metadist.cli.parsing import Parser, read_yaml
from metadist.cluster.jobs.parallel import in_parallel
from metadist.compare.plan import Comparison, Outcome, Run
from metadist.compare.report import (
    check_matplotlib,
    curves,
    grid_to_csv,
    rows,
    to_console,
    to_csv,
    to_markdown,
)
from metadist.compare.run import (
    MAX_STEPS,
    Contender,
    is_finished,
    read_records,
    run_on_budget,
)
from metadist.run.storage import Folder

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
        where = f"entry {run.entry}" + (f" at {run.point}" if run.point else "")
        check_contender(where, run.options, run.values, config.num_workers)
    keep_config(folder, tree, CONFIG)

    def run_all(runs: Sequence[Run]) -> None:
        jobs = [Job(comparison, run, config.folder, os.getcwd()) for run in runs]
        for number, line in _run_all(jobs, config):
            print(f"{runs[number].name}: {line}", flush=True)

    run_all([run for runs in tried.values() for run in runs])
    outcomes = {
        entry: [_outcome(comparison, folder, run) for run in runs] for entry, runs in tried.items()
    }
    searched = [found for entry in outcomes for found in outcomes[entry] if found.run.point]
    chosen = {entry: comparison.chosen(found) for entry, found in outcomes.items()}
    run_all([run for runs in chosen.values() for run in runs[1:]])
    for entry in {outcome.run.entry: None for outcome in searched}:
        outcomes[entry] = [_outcome(comparison, folder, run) for run in chosen[entry]] or [
            outcome._replace(error=outcome.error or f"{comparison.metric} is not finite")
            for outcome in outcomes[entry]
        ]
    _report(comparison, folder, outcomes, config.plots)
    if searched:
        best = [run for runs in chosen.values() for run in runs]
        folder.write("grid.csv", grid_to_csv(comparison, searched, best).encode())
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
            comparison.metric,
        )
    except Exception as error:  # noqa: BLE001  # one failed run does not stop the others
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        folder.write(ERROR, f"{told}\n\n{traceback.format_exc()}".encode())
        return f"failed: {told}"
    folder.remove(ERROR)
    spent, metrics = records[-1].spent, records[-1].metrics
    return (
        f"{spent.step} steps, {spent.seconds:.1f} s, {spent.gradients:.0f} gradients, "
        f"{comparison.metric} {metrics[comparison.metric]:.4g}"
    )


def _contender(comparison: Comparison, run: Run, run_dir: str) -> Contender:
    num_steps = comparison.budget.steps or MAX_STEPS
    return contender({**run.options, "num_steps": num_steps}, run.values, run_dir)


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
        for name in {name: None for record in every for name in record.metrics}:
            if any(len([r for r in run.records if name in r.metrics]) > 1
                   for found in outcomes.values() for run in found):  # fmt: skip
                folder.write(f"{name.replace('/', '_')}.png", curves(name, outcomes))
    print(f"tables, curves and results: {folder.uri}")
