"""A comparison of methods: its runs, their budget, and the choice of a point of a grid.

A comparison is a tree of options. Those beside the fields of `Comparison` are shared by all runs;
an entry changes some of them, and its `grid` tries several values of others.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from metadist.checks.values import plain, require_integer
from metadist.compare.run import Budget, Record, is_finished, read_records
from metadist.run.storage import Folder

GRID = "grid"
COMPARISON = "comparison.json"
"""The file of the folder that keeps the config."""
ERROR = "error.txt"
"""The file of a run that says why it has failed."""
OURS = {
    "run_dir": "every run has a folder of its own",
    "seed": "give `seeds`",
    "num_steps": "give `budget`",
    "checkpoint_every": "a checkpoint is written with every evaluation",
    "keep_checkpoints": "a checkpoint is written with every evaluation",
    "val_every": "give `evaluations`",
    "if_exists": "a comparison always resumes",
}
"""Options of a training that a comparison sets itself, and why."""


class Run(NamedTuple):
    """One training of a comparison.

    Args:
        entry: The name of the entry.
        seed: The seed of the training.
        options: The shared options with the changes of the entry.
        point: The values of this point of the grid by option; empty without a grid.
        number: The number of the point.
        seeded: Further options that are set to the seed.
    """

    entry: str
    seed: int
    options: dict[str, Any]
    point: dict[str, Any]
    number: int
    seeded: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """The options that come after `options`: the seed and the point."""
        return {**dict.fromkeys(("seed", *self.seeded), self.seed), **self.point}

    @property
    def name(self) -> str:
        """The folder of the run within that of the comparison."""
        point = f"/point-{self.number}" if self.point else ""
        return f"runs/{self.entry}{point}/seed-{self.seed}"


class Outcome(NamedTuple):
    """How a run ended: its evaluations, and the error if it did not reach its budget."""

    run: Run
    records: list[Record]
    error: str | None


@dataclass(frozen=True)
class Comparison:
    """Several methods x several seeds, each on the same budget.

    Args:
        entries: The options of each method by its name; `grid` among them holds lists of values by
            option ("algorithm.inner_lr"), all combinations of which are tried.
        budget: Exactly one of `seconds` of training, `steps`, and `calls` (see `Budget`).
        shared: The options that all entries share.
        seeds: The seeds of the runs. The points of a grid are tried with the first of them.
        seeded: Further options that are set to the seed of the run, for example "sampler.seed".
            Without it all seeds have the same data, and methods that draw nothing give the same
            result.
        evaluations: The number of evaluations, at equal parts of the budget; one more follows the
            first step.
        metric: The name of the metric that chooses the point of a grid and the best evaluation of
            a run; not one of test data.
        mode: Whether the "min" or the "max" of the metric is better.
    """

    entries: Mapping[str, Mapping[str, Any]]
    budget: Budget
    shared: Mapping[str, Any]
    seeds: Sequence[int] = (0,)
    seeded: Sequence[str] = ()
    evaluations: int = 20
    metric: str = "query_loss"
    mode: str = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.entries, Mapping) or not self.entries:
            raise ValueError(
                f"entries must map names of methods to their options, got {self.entries!r}"
            )
        for name, options in self.entries.items():
            _check_entry(name, options)
        _check_options("a comparison", self.shared)
        seeds = self.seeds
        if isinstance(seeds, (list, tuple)):
            seeds = type(seeds)(plain(seed) for seed in seeds)
        if (
            not isinstance(seeds, (list, tuple))
            or not seeds
            or not all(type(seed) is int and seed >= 0 for seed in seeds)
            or len(set(seeds)) < len(seeds)
        ):
            raise ValueError(f"seeds must be a list of different integers >= 0, got {seeds!r}")
        object.__setattr__(self, "seeds", seeds)
        if not isinstance(self.seeded, (list, tuple)) or not all(
            isinstance(name, str) for name in self.seeded
        ):
            raise ValueError(f"seeded must be a list of options, got {self.seeded!r}")
        require_integer("evaluations", self.evaluations, 1)
        object.__setattr__(self, "evaluations", int(self.evaluations))
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if not isinstance(self.metric, str) or self.metric.startswith("test"):
            raise ValueError(
                f"metric must not be one of test data, got {self.metric!r}: what chooses must be "
                "of validation data, for example query_loss"
            )

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Comparison:
        """The comparison that a config describes.

        Raises:
            ValueError: it describes none; options of trainings are not checked here.
        """
        names = {field.name for field in fields(cls)} - {"shared"}
        for name in ("entries", "budget"):
            if name not in tree:
                raise ValueError(f"a comparison must have {name}, got {', '.join(tree) or 'none'}")
        own: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        for name, value in tree.items():
            (own if name in names else shared)[name] = value
        own["budget"] = Budget.of(own["budget"])
        return cls(**own, shared=shared)

    def runs(self, entry: str) -> list[Run]:
        """The first runs of an entry: every point of its grid with the first seed, or all seeds."""
        options = dict(self.entries[entry])
        grid = options.pop(GRID, None)
        first = Run(
            entry=entry,
            seed=self.seeds[0],
            options=merge(self.shared, options),
            point={},
            number=0,
            seeded=tuple(self.seeded),
        )
        if not grid:
            return [first._replace(seed=seed) for seed in self.seeds]
        runs = []
        for number, values in enumerate(itertools.product(*grid.values())):
            point = dict(zip(grid, values, strict=True))
            runs.append(first._replace(point=point, number=number))
        return runs

    def chosen(self, tried: Sequence[Outcome]) -> list[Run]:
        """The runs of the best point of a grid, for all seeds; none if all failed or without grid.

        The best is by `metric` at the end of the budget.
        """
        best, highest = None, -math.inf
        for run, records, error in sorted(tried, key=lambda outcome: outcome.run.number):
            if run.point and error is None and self.score(records[-1]) > highest:
                best, highest = run, self.score(records[-1])
        return [] if best is None else [best._replace(seed=seed) for seed in self.seeds]

    def score(self, record: Record) -> float:
        """The score of an evaluation, the larger the better; -inf where `metric` is not finite."""
        value = record.metrics[self.metric]
        if not math.isfinite(value):
            return -math.inf
        return value if self.mode == "max" else -value


class Reported(NamedTuple):
    """What the folder of a comparison holds.

    Args:
        outcomes: The runs of each entry that are reported: all seeds, of a grid at its best point.
        searched: The runs of all points of all grids.
        chosen: The runs of the best points.
    """

    outcomes: dict[str, list[Outcome]]
    searched: list[Outcome]
    chosen: list[Run]


def read_reported(comparison: Comparison, folder: Folder) -> Reported:
    """The outcomes of a comparison so far, from its folder."""
    outcomes: dict[str, list[Outcome]] = {}
    searched: list[Outcome] = []
    chosen: list[Run] = []
    for entry in comparison.entries:
        found = read_outcomes(comparison, folder, comparison.runs(entry))
        outcomes[entry] = found
        if not found[0].run.point:
            continue
        searched += found
        best = comparison.chosen(found)
        chosen += best
        if best:
            outcomes[entry] = read_outcomes(comparison, folder, best)
        else:
            not_finite = f"{comparison.metric} is not finite"
            outcomes[entry] = [
                outcome._replace(error=outcome.error or not_finite) for outcome in found
            ]
    return Reported(outcomes, searched, chosen)


def read_outcomes(comparison: Comparison, folder: Folder, runs: Sequence[Run]) -> list[Outcome]:
    """How runs ended, or stand, from the folder of their comparison."""
    return [_outcome(comparison, folder / run.name, run) for run in runs]


def _outcome(comparison: Comparison, folder: Folder, run: Run) -> Outcome:
    records = read_records(folder)
    if is_finished(records, comparison.budget):
        return Outcome(run, records, None)
    try:
        error = folder.read(ERROR, at_most=1 << 24).decode().strip()
    except FileNotFoundError:
        error = "not run"
    return Outcome(run, records, error.partition("\n")[0])


def merge(shared: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`shared` with `changes`, mapping by mapping; another class comes with its own options."""
    merged = dict(shared)
    for name, value in changes.items():
        before = merged.get(name)
        if (
            isinstance(value, Mapping)
            and isinstance(before, Mapping)
            and value.get("class_path", before.get("class_path")) == before.get("class_path")
        ):
            merged[name] = merge(before, value)
        else:
            merged[name] = value
    return merged


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The options that differ from those that a comparison was started with.

    New entries, and new seeds after the old ones, are no difference: they change no run.
    """
    if before is None and isinstance(now, Mapping):
        before = {}  # a group of options that was left out
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for name in before if path == "entries" else {**before, **now}:
            place = f"{path}.{name}" if path else str(name)
            found += differences(before.get(name), now.get(name), place)
        return found
    if path == "seeds" and isinstance(now, list) and now[: len(before)] == before:
        return []
    return [] if before == now else [f"{path} was {before!r}, is {now!r}"]


def _check_entry(name: Any, options: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or set(name) <= {"."}:
        raise ValueError(
            "names of entries must be of letters, digits, '.', '+', '_' and '-', since they name "
            f"folders, got {name!r}"
        )
    if not isinstance(options, Mapping):
        raise ValueError(f"entry {name} must be a mapping of options, got {options!r}")
    grid = options.get(GRID, {})
    if not isinstance(grid, Mapping) or not all(
        isinstance(values, list) and values for values in grid.values()
    ):
        raise ValueError(
            f"grid of entry {name} must map options to lists of values, got {grid!r}: "
            "for example {algorithm.inner_lr: [0.01, 0.1]}"
        )
    _check_options(f"entry {name}", options)
    _check_options(f"grid of entry {name}", grid)


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for option, why in OURS.items():
        if option in options:
            raise ValueError(f"{where} must not have the option {option}: {why}")
