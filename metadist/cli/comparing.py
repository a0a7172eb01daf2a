"""The work of `metadist compare`."""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import NamedTuple, TypeVar

from jsonargparse import Namespace
from rich.console import Console

from metadist.cli.contenders import check_contender, contender, go_to, keep_config
from metadist.cli.parsing import errors_of, read_yaml
from metadist.cluster import Workers
from metadist.cluster.jobs.parallel import in_parallel
from metadist.compare.plan import (
    COMPARISON,
    ERROR,
    Comparison,
    Outcome,
    Run,
    read_outcomes,
    read_reported,
)
from metadist.compare.report import (
    check_matplotlib,
    curves,
    grid_to_csv,
    rows,
    to_console,
    to_csv,
    to_markdown,
)
from metadist.compare.run import MAX_STEPS, Contender, is_finished, read_records, run_on_budget
from metadist.run.storage import Folder
from metadist.run.text import printable

OWN = [field.name for field in fields(Comparison) if field.name != "shared"]
"""Keys of a config that are no options of a training."""

Item = TypeVar("Item")


def compare(config: Namespace) -> int:
    """The exit code: 1 if a run has failed."""
    if config.workers is not None:
        config.workers = Workers(**vars(config.workers))
    if config.plots:
        check_matplotlib()
    tree = read_yaml(config.config)
    with errors_of(config.config):
        comparison = Comparison.of(tree)
        tried = {entry: comparison.runs(entry) for entry in comparison.entries}
        for run in flat(tried):
            where = f"entry {run.entry}" + (f" at {run.point}" if run.point else "")
            with errors_of(where):
                check_contender(run.options, run.values, config.workers, OWN)
    folder = Folder(config.run_dir)
    keep_config(folder, tree, COMPARISON)

    _run_all(comparison, flat(tried), config)
    # Each point of a grid is tried with the first seed, and the best of them with all seeds.
    tried_outcomes = {
        entry: read_outcomes(comparison, folder, runs) for entry, runs in tried.items()
    }
    chosen = [comparison.chosen(found)[1:] for found in tried_outcomes.values()]
    _run_all(comparison, [run for runs in chosen for run in runs], config)
    found = read_reported(comparison, folder)
    outcomes = found.outcomes
    _report(comparison, folder, outcomes, config.plots)
    if found.searched:
        grid = grid_to_csv(comparison, found.searched, found.chosen)
        folder.write("grid.csv", grid.encode())
    return int(any(outcome.error for outcome in flat(outcomes)))


def flat(by_entry: Mapping[str, Sequence[Item]]) -> list[Item]:
    """What all entries have."""
    return [item for items in by_entry.values() for item in items]


class Job(NamedTuple):
    """A run, as it travels to another process; relative paths start from `cwd`."""

    comparison: Comparison
    run: Run
    run_dir: str
    cwd: str


def _run_all(comparison: Comparison, runs: Sequence[Run], config: Namespace) -> None:
    """Run them, or continue them, and print how each ended."""
    jobs = [Job(comparison, run, config.run_dir, os.getcwd()) for run in runs]
    for number, line in _results(jobs, config):
        print(f"{runs[number].name}: {line}", flush=True)


def _results(jobs: Sequence[Job], config: Namespace) -> Iterator[tuple[int, str]]:
    """(position, how it ended) of each job as it ends."""
    left = []
    for number, job in enumerate(jobs):
        records = read_records(Folder(job.run_dir) / job.run.name)
        # What is finished needs no process.
        if config.workers is None or is_finished(records, job.comparison.budget):
            yield number, _execute(job)
        else:
            left.append(number)
    if not left:
        return
    results = in_parallel(
        _execute,
        [jobs[number] for number in left],
        config.workers,
        address=config.address,
    )
    for position, result in results:
        number = left[position]
        if isinstance(result, Exception):
            error = " ".join(str(result).split())
            job = jobs[number]
            (Folder(job.run_dir) / job.run.name).write(ERROR, error.encode())
            result = f"failed: {error}"
        yield number, result


def _execute(job: Job) -> str:
    """Run a job, or continue it; how it ended, in a line."""
    go_to(job.cwd)
    comparison, run = job.comparison, job.run
    folder = Folder(job.run_dir) / run.name
    try:
        records = run_on_budget(
            partial(_contender, comparison, run),
            folder,
            comparison.budget,
            comparison.evaluations,
            comparison.metric,
        )
    except Exception as error:  # noqa: BLE001  # one failed run does not stop the others
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        folder.write(ERROR, f"{line}\n\n{traceback.format_exc()}".encode())
        return f"failed: {line}"
    folder.remove(ERROR)
    spent, metrics = records[-1].spent, records[-1].metrics
    return (
        f"{spent.step} steps, {spent.seconds:.1f} s, {spent.gradients:.0f} gradients, "
        f"{comparison.metric} {metrics[comparison.metric]:.4g}"
    )


def _contender(comparison: Comparison, run: Run, run_dir: str) -> Contender:
    num_steps = comparison.budget.steps or MAX_STEPS
    return contender({**run.options, "num_steps": num_steps}, run.values, run_dir)


def _report(
    comparison: Comparison, folder: Folder, outcomes: dict[str, list[Outcome]], plots: bool
) -> None:
    table = rows(comparison, outcomes)
    folder.write("table.md", to_markdown(comparison, table).encode())
    folder.write("table.csv", to_csv(table).encode())
    lines = []
    for outcome in flat(outcomes):
        run = outcome.run
        for record in outcome.records:
            line = {"entry": run.entry, "seed": run.seed, "point": run.point, **record.to_json()}
            lines.append(json.dumps(line) + "\n")
    folder.write("results.jsonl", "".join(lines).encode())
    Console().print(to_console(comparison, table))
    for row in table:
        for error in row.errors:
            print(f"failed: {printable(error)}")
    if plots:
        for name in _curves(flat(outcomes)):
            folder.write(f"{name.replace('/', '_')}.png", curves(name, outcomes))
    print(f"tables, curves and results: {folder.uri}")


def _curves(outcomes: Sequence[Outcome]) -> list[str]:
    """The metrics that some run has twice: a test on new tasks is made once, and has no curve."""
    repeated: dict[str, None] = {}
    for outcome in outcomes:
        counts = Counter(name for record in outcome.records for name in record.metrics)
        repeated |= {name: None for name, count in counts.items() if count > 1}
    return list(repeated)
