"""The results of a comparison as tables and curves."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from metadist.compare.plan import Comparison, Outcome, Run
from metadist.compare.run import Record
from metadist.evaluation import Interval, mean_interval

NUM_POINTS = 200
"""The number of points of a curve."""
PRODUCTS = "products H v"
"""The axis that is drawn where a method uses such products."""
AXES: dict[str, Callable[[Record], float]] = {
    "seconds of training": lambda record: record.spent.seconds,
    "oracle calls, in gradients": lambda record: record.spent.gradients,
    PRODUCTS: lambda record: record.spent.calls.get("hvp", 0),
}


class Row(NamedTuple):
    """A row of the tables: an entry, and the values of each column over its seeds."""

    entry: str
    point: str
    num_runs: int
    errors: list[str]
    numbers: dict[str, list[float]]


def rows(comparison: Comparison, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    """A row for each entry, from its reported runs."""
    return [_row(comparison, entry, list(found)) for entry, found in outcomes.items()]


def _row(comparison: Comparison, entry: str, outcomes: list[Outcome]) -> Row:
    numbers: dict[str, list[float]] = {}
    finished = [outcome for outcome in outcomes if outcome.error is None]
    for outcome in finished:
        last = outcome.records[-1]
        best = max(outcome.records, key=comparison.score)
        found = {
            "steps": float(last.spent.step),
            "seconds": last.spent.seconds,
            "gradients": last.spent.gradients,
            **{f"calls {name}": float(count) for name, count in sorted(last.spent.calls.items())},
            **{f"{name} per step": value for name, value in last.traffic.items()},
            **last.metrics,
            **{f"{name} at best": value for name, value in best.metrics.items()},
        }
        for name, value in found.items():
            numbers.setdefault(name, []).append(value)
    point = outcomes[0].run.point if outcomes else {}
    return Row(
        entry,
        ", ".join(f"{option}={value}" for option, value in point.items()),
        len(finished),
        [f"{outcome.run.name}: {outcome.error}" for outcome in outcomes if outcome.error],
        numbers,
    )


def to_csv(table: Sequence[Row]) -> str:
    """CSV: means over the seeds and half widths of their 95 % t-intervals."""
    columns = _columns(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = [name for column in columns for name in (column, f"{column} +-")]
    writer.writerow(["entry", "point", "runs", *pairs, "errors"])
    for row in table:
        cells: list[Any] = [row.entry, row.point, row.num_runs]
        for column in columns:
            cells += _mean(row.numbers.get(column, []))
        writer.writerow([*cells, "; ".join(row.errors)])
    return text.getvalue()


def to_markdown(comparison: Comparison, table: Sequence[Row]) -> str:
    """Markdown: the metrics in one table, the budget spent in another, then the errors."""
    columns = _columns(table)
    spent = [name for name in columns if name in ("steps", "seconds", "gradients")]
    spent += [name for name in columns if name.startswith("calls ") or name.endswith(" per step")]
    metrics = [name for name in columns if name not in spent and not name.endswith(" at best")]
    metrics += [name for name in columns if name.endswith(" at best") and name not in spent]
    at = ", ".join(f"{name} {value}" for name, value in _given(comparison).items())
    lines = [
        f"Budget: {at}; seeds {', '.join(map(str, comparison.seeds))}. Means +- half widths of 95 "
        f"% t-intervals over seeds, at the end of the budget; `at best`: at the evaluation with "
        f"{comparison.mode} {comparison.metric}.",
        "",
        *_grid(["entry", "point", "runs"], metrics, table),
        "",
        *_grid(["entry"], spent, table),
    ]
    errors = [error for row in table for error in row.errors]
    if errors:
        lines += ["", "Failed:", "", *(f"* {error}" for error in errors)]
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
    metric = comparison.metric
    columns = ["steps", "seconds", "gradients", metric, f"{metric} at best"]
    shown = Table("entry", "point", "runs", *columns)
    for row in table:
        shown.add_row(
            row.entry, row.point, str(row.num_runs), *(_cell(row, name) for name in columns)
        )
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

    ends = [run.records[-1] for found in outcomes.values() for run in found if run.records]
    asked = any(AXES[PRODUCTS](end) for end in ends)
    axes = {label: position for label, position in AXES.items() if asked or label != PRODUCTS}
    picture = Figure(figsize=(15 if asked else 12, 4.5), layout="constrained")
    panels = picture.subplots(1, len(axes), sharey=True)
    later: list[float] = []
    for panel, (label, position) in zip(panels, axes.items(), strict=True):
        for number, (entry, found) in enumerate(outcomes.items()):
            lines = [_line(outcome.records, metric, position) for outcome in found]
            lines = [line for line in lines if line and line[-1][0] > 0]
            if not lines:
                continue
            places, low, mean, high = _band(lines)
            later += [value for line in lines for _, value in line[1:]]
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


def _line(
    records: Sequence[Record], metric: str, position: Callable[[Record], float]
) -> list[tuple[float, float]]:
    return [
        (position(record), record.metrics[metric])
        for record in records
        if math.isfinite(record.metrics.get(metric, math.nan))
    ]


def _band(
    lines: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(places, min, mean, max): over the stretch that all lines have, straight between points."""
    import numpy as np

    first = max(line[0][0] for line in lines)
    last = max(first, min(line[-1][0] for line in lines))
    places = np.linspace(first, last, NUM_POINTS)
    values = np.stack(
        [np.interp(places, [x for x, _ in line], [y for _, y in line]) for line in lines]
    )
    return (
        places.tolist(),
        values.min(0).tolist(),
        values.mean(0).tolist(),
        values.max(0).tolist(),
    )


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


def _cell(row: Row, column: str) -> str:
    mean, half = _mean(row.numbers.get(column, []))
    if mean == "":
        return ""
    return f"{mean:.4g}" + (f" +- {half:.2g}" if half else "")


def _grid(heads: Sequence[str], columns: Sequence[str], table: Sequence[Row]) -> list[str]:
    words_of = {"entry": lambda row: row.entry, "point": lambda row: row.point}
    lines = [[*heads, *columns], ["---"] * (len(heads) + len(columns))]
    for row in table:
        words = [words_of.get(head, lambda row: str(row.num_runs))(row) for head in heads]
        lines.append([*words, *(_cell(row, column) for column in columns)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _given(comparison: Comparison) -> dict[str, Any]:
    budget = vars(comparison.budget)
    return {name: value for name, value in budget.items() if value is not None}
