"""The results of a comparison as tables and curves."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from metadist.compare.plan import Comparison, Outcome, Run
from metadist.compare.run import Record
from metadist.intervals import Interval, mean_interval

SPENT = r"steps|seconds|gradients|calls .*|.* per step"
"""The columns of what a run has spent; the others are metrics."""
NUM_POINTS = 200
"""The number of points of a curve."""
PRODUCTS = "products H v"
"""The axis that is drawn where a method uses such products."""
MIN_SEEDS = 3
"""The number of seeds from which on an interval says something."""
AXES: dict[str, Callable[[Record], float]] = {
    "seconds of training": lambda record: record.spent.seconds,
    "outer steps": lambda record: record.spent.step,
    "oracle calls, in gradients": lambda record: record.spent.gradients,
    PRODUCTS: lambda record: record.spent.calls.get("hvp", 0),
}


@dataclass
class Row:
    """A row of the tables: an entry, and the values of each column over its seeds."""

    entry: str
    point: str
    num_runs: int
    errors: list[str]
    numbers: dict[str, list[float]]

    def add(self, column: str, value: float) -> None:
        """Append the value of one more seed to a column."""
        self.numbers.setdefault(column, []).append(float(value))


def rows(comparison: Comparison, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    """A row for each entry, from its reported runs."""
    return [_row(comparison, entry, list(found)) for entry, found in outcomes.items()]


def _row(comparison: Comparison, entry: str, outcomes: list[Outcome]) -> Row:
    row = Row(entry=entry, point="", num_runs=0, errors=[], numbers={})
    for run, records, error in outcomes:
        if error is not None:
            row.errors.append(f"{run.name}: {error}")
            continue
        row.num_runs += 1
        last, best = records[-1], max(records, key=comparison.score)
        row.add("steps", last.spent.step)
        row.add("seconds", last.spent.seconds)
        row.add("gradients", last.spent.gradients)
        for name, count in sorted(last.spent.calls.items()):
            row.add(f"calls {name}", count)
        for name, value in last.traffic.items():
            row.add(f"{name} per step", value)
        for name, value in last.metrics.items():
            row.add(name, value)
        for name, value in best.metrics.items():
            row.add(f"{name} at best", value)
    if outcomes:
        point = outcomes[0].run.point
        row.point = ", ".join(f"{option}={value}" for option, value in point.items())
    return row


def to_csv(table: Sequence[Row]) -> str:
    """CSV: means over the seeds and half widths of their 95 % t-intervals."""
    columns = _columns(table)
    heads = ["entry", "point", "runs"]
    for column in columns:
        heads += [column, f"{column} +-"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "errors"])
    for row in table:
        cells: list[Any] = [row.entry, row.point, row.num_runs]
        for column in columns:
            cells += _mean(row.numbers.get(column, []))
        writer.writerow([*cells, "; ".join(row.errors)])
    return text.getvalue()


def headline_columns(comparison: Comparison) -> list[str]:
    """The columns that are seen first, the metric that was asked for before all others."""
    metric = comparison.metric
    return [metric, f"{metric} at best", "seconds", "gradients"]


def to_markdown(comparison: Comparison, table: Sequence[Row]) -> str:
    """Markdown: a table of five columns, then all metrics, the budget spent, and the errors."""
    spent: list[str] = []
    at_end: list[str] = []
    at_best: list[str] = []
    for name in _columns(table):
        if re.fullmatch(SPENT, name):
            spent.append(name)
        elif name.endswith(" at best"):
            at_best.append(name)
        else:
            at_end.append(name)
    lines = [
        f"Budget: {_budget(comparison)}; seeds {', '.join(map(str, comparison.seeds))}. Means +- "
        f"half widths of 95 % t-intervals over seeds (from {MIN_SEEDS} on), at the end of the "
        f"budget; `at best`: at the evaluation with {comparison.mode} {comparison.metric}.",
        "",
        *_grid(["entry"], headline_columns(comparison), table),
        "",
        "All metrics:",
        "",
        *_grid(["entry", "point", "runs"], at_end + at_best, table),
        "",
        *_grid(["entry"], spent, table),
    ]
    errors = [f"* {error}" for row in table for error in row.errors]
    if errors:
        lines += ["", "Failed:", "", *errors]
    return "\n".join(lines) + "\n"


def grid_to_csv(comparison: Comparison, tried: Sequence[Outcome], chosen: Iterable[Run]) -> str:
    """All points of all grids with the metric they were chosen by."""
    names = {run.name for run in chosen}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["entry", "point", "seed", comparison.metric, "chosen", "error"])
    for run, records, error in tried:
        value = records[-1].metrics[comparison.metric] if records and not error else ""
        point = json.dumps(run.point)
        writer.writerow(
            [run.entry, point, run.seed, value, "yes" if run.name in names else "", error or ""]
        )
    return text.getvalue()


def to_console(comparison: Comparison, table: Sequence[Row]) -> Table:
    """A short table for the terminal."""
    columns = headline_columns(comparison)
    shown = Table("entry", *columns)
    for row in table:
        point = f"\n{row.point}" if row.point else ""
        shown.add_row(row.entry + point, *(row_cell(row, name) for name in columns))
    return shown


def check_matplotlib() -> None:
    """Raise ValueError if curves cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "plots must be false without matplotlib, got true: pip install 'metadist[plots]', or "
            "pass --plots false"
        )


def curves(metric: str, outcomes: Mapping[str, Sequence[Outcome]]) -> bytes:
    """A PNG: a metric against each of `AXES`, means over seeds within bands from min to max."""
    from matplotlib.figure import Figure

    axes = {label: AXES[label] for label in used_axes(outcomes)}
    picture = Figure(figsize=(6 + 3 * len(axes), 4.5), layout="constrained")
    panels = picture.subplots(1, len(axes), sharey=True)
    later: list[float] = []
    for panel, (label, position) in zip(panels, axes.items(), strict=True):
        for number, (entry, found) in enumerate(outcomes.items()):
            lines = _lines(found, metric, position)
            later += [value for line in lines for _, value in line[1:]]
            if not lines:
                continue
            places, low, mean, high = _band(lines)
            panel.plot(places, mean, label=entry, color=f"C{number}")
            if len(lines) > 1:
                panel.fill_between(places, low, high, color=f"C{number}", alpha=0.2)
        panel.set_xlabel(label)
        panel.grid(color="0.92")
    panels[0].set_ylabel(metric)
    # The common first point is far away and would leave no room for the differences.
    bottom, top = min(later, default=0.0), max(later, default=0.0)
    if bottom > 0 and top / bottom > 20:
        panels[0].set_yscale("log")
        panels[0].set_ylim(bottom / 1.2, top * 1.2)
    elif top > bottom:
        margin = 0.05 * (top - bottom)
        panels[0].set_ylim(bottom - margin, top + margin)
    panels[0].legend()
    stream = io.BytesIO()
    picture.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()


def used_axes(outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """The names of `AXES` to draw: products only where a method uses them."""
    return [label for label in AXES if label != PRODUCTS or _uses_products(outcomes)]


def band_of(
    outcomes: Sequence[Outcome], metric: str, position: Callable[[Record], float]
) -> list[list[float]] | None:
    """[places, min, mean, max] of a metric over runs; None if no run has it."""
    lines = _lines(outcomes, metric, position)
    return [column.tolist() for column in _band(lines)] if lines else None


def _lines(
    outcomes: Sequence[Outcome], metric: str, position: Callable[[Record], float]
) -> list[list[tuple[float, float]]]:
    found = [_line(outcome.records, metric, position) for outcome in outcomes]
    return [line for line in found if line and line[-1][0] > 0]


def _uses_products(outcomes: Mapping[str, Sequence[Outcome]]) -> bool:
    for found in outcomes.values():
        if any(run.records and AXES[PRODUCTS](run.records[-1]) for run in found):
            return True
    return False


def _line(
    records: Sequence[Record], metric: str, position: Callable[[Record], float]
) -> list[tuple[float, float]]:
    """The points (position, value) of a run where the value is finite."""
    line = []
    for record in records:
        value = record.metrics.get(metric, math.nan)
        if math.isfinite(value):
            line.append((position(record), value))
    return line


def _band(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[Any, Any, Any, Any]:
    """(places, min, mean, max): over the stretch that all lines have, straight between points."""
    import numpy as np

    first = max(line[0][0] for line in lines)
    last = max(first, min(line[-1][0] for line in lines))
    places = np.linspace(first, last, NUM_POINTS)
    values = []
    for line in lines:
        x, y = np.array(line).T
        values.append(np.interp(places, x, y))
    return places, np.min(values, 0), np.mean(values, 0), np.max(values, 0)


def _columns(table: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in table for name in row.numbers))


def _mean(values: list[float]) -> list[float | str]:
    """[mean, half width], each "" where it does not exist."""
    if not values:
        return ["", ""]
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return [math.fsum(values) / len(values), ""]
    interval: Interval = mean_interval(values)
    return [interval.mean, interval.half_width]


def row_cell(row: Row, column: str) -> str:
    """A mean with its interval, as text; empty where there is none."""
    mean, half = _mean(row.numbers.get(column, []))
    if mean == "":
        return ""
    has_interval = half and len(row.numbers[column]) >= MIN_SEEDS
    return f"{mean:.4g}" + (f" +- {half:.2g}" if has_interval else "")


def _grid(heads: Sequence[str], columns: Sequence[str], table: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table with these fields and columns of each row."""
    lines = [[*heads, *columns], ["---"] * (len(heads) + len(columns))]
    for row in table:
        words = {"entry": row.entry, "point": row.point, "runs": str(row.num_runs)}
        cells = [row_cell(row, column) for column in columns]
        lines.append([*(words[head] for head in heads), *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _budget(comparison: Comparison) -> str:
    budget = asdict(comparison.budget).items()
    return ", ".join(f"{name} {value}" for name, value in budget if value is not None)
