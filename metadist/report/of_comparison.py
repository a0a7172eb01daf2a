"""The page of a comparison, read from nothing but its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metadist.compare.plan import COMPARISON, Comparison, Outcome, read_reported
from metadist.compare.report import AXES, Row, band_of, headline_columns, row_cell, rows, used_axes
from metadist.report.charts import Curve, line_chart
from metadist.report.page import HTML, code, details, escaped, items, page, pairs, table, text
from metadist.run.files import MAX_CONFIG_BYTES
from metadist.run.storage import Folder


def comparison_page(run: str | Path) -> str:
    """A comparison as one HTML page, from its folder alone, also while it is running.

    Raises:
        ValueError: There is no comparison in that folder.
    """
    folder = Folder(run)
    try:
        kept = json.loads(folder.read(COMPARISON, MAX_CONFIG_BYTES))
        comparison = Comparison.of(kept["config"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"run_dir must hold a {COMPARISON} of `metadist compare`, got {str(run)!r}: {error}"
        ) from error
    found = read_reported(comparison, folder)
    lines = rows(comparison, found.outcomes)
    num_done = sum(row.num_runs for row in lines)
    errors = [error for row in lines for error in row.errors]
    state = "finished" if not errors else f"{len(errors)} missing or failed"
    sections = [
        ("Results", _results(comparison, lines)),
        ("Curves", _curves(comparison, found.outcomes)),
        ("All metrics", _all_metrics(lines)),
        ("Grids", _grids(comparison, found.searched, {run.name for run in found.chosen})),
        ("Missing or failed", items(errors) if errors else ""),
        ("Protocol", _protocol(comparison, kept.get("metadist", ""))),
        ("Files and how to repeat it", _files(folder, kept["config"])),
    ]
    title = f"Comparison {folder.uri.rstrip('/').rpartition('/')[2]}"
    intro = f"<p class=soft>{escaped(folder.uri)}: {num_done} runs</p>"
    return page(title, (state, not errors), intro, sections)


def _results(comparison: Comparison, lines: Sequence[Row]) -> HTML:
    columns = headline_columns(comparison)
    shown = []
    for row in lines:
        point = f" ({row.point})" if row.point else ""
        shown.append([row.entry + point, *(_cell(row, name) for name in columns)])
    note = text(
        "Means over seeds at the end of the budget; ± is the half width of the 95 % interval "
        "(Student's t), given from three seeds on."
    )
    return HTML(table(["method", *columns], shown) + note)


def _all_metrics(lines: Sequence[Row]) -> HTML:
    names = list(dict.fromkeys(name for row in lines for name in row.numbers))
    shown = [[name, *(_cell(row, name) for row in lines)] for name in names]
    return details(f"{len(names)} metrics", table(["", *(row.entry for row in lines)], shown))


def _cell(row: Row, column: str) -> str:
    return row_cell(row, column).replace("+-", "±")


def _curves(comparison: Comparison, outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """The metric that was asked for, against each axis; the others below."""
    names: dict[str, None] = {comparison.metric: None}
    for found in outcomes.values():
        for outcome in found:
            names |= {name: None for record in outcome.records for name in record.metrics}
    shown, rest = "", ""
    for name in names:
        charts = ""
        for label in used_axes(outcomes):
            curves = []
            for entry, found in outcomes.items():
                band = band_of(found, name, AXES[label])
                if band is not None:
                    places, low, mean, high = band
                    points = list(zip(places, mean, strict=True))
                    edges: tuple[Any, Any] = (low, high) if len(found) > 1 else ((), ())
                    curves.append(Curve(entry, points, *edges))
            charts += line_chart(curves, label, name)
        if not charts:
            continue
        if name == comparison.metric:
            shown = f"<div class=charts>{charts}</div>" + text(
                "Means over seeds, within bands from the lowest to the highest."
            )
        else:
            rest += details(name, f"<div class=charts>{charts}</div>")
    return shown + rest


def _grids(comparison: Comparison, searched: Sequence[Outcome], chosen: set[str]) -> str:
    lines = []
    for run, records, error in searched:
        value = f"{records[-1].metrics[comparison.metric]:.4g}" if records and not error else ""
        point = ", ".join(f"{option}={setting}" for option, setting in run.point.items())
        lines.append([run.entry, point, value or error, "yes" if run.name in chosen else ""])
    return table(["method", "point", comparison.metric, "chosen"], lines, 9) if lines else ""


def _protocol(comparison: Comparison, version: str) -> HTML:
    budget = {name: value for name, value in asdict(comparison.budget).items() if value}
    return pairs(
        {
            "budget of each run": ", ".join(f"{value:g} {name}" for name, value in budget.items()),
            "seeds": ", ".join(map(str, comparison.seeds)),
            "evaluations": comparison.evaluations,
            "metric": f"{comparison.metric}, {comparison.mode} is better",
            "metadist": version,
        }
    )


def _files(folder: Folder, config: object) -> str:
    where = folder.uri.rstrip("/")
    commands = code(f"metadist compare comparison.yaml --run_dir {where}\nmetadist report {where}")
    note = text(
        f"{COMPARISON} of the folder has the config, which is that of comparison.yaml; each run "
        "has a folder below runs/, of which `metadist report` makes a page too."
    )
    return commands + note + details("config", code(json.dumps(config, indent=1)))
