"""The page of a run, read from nothing but its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metadist.report.charts import Curve, histogram, line_chart, number_text
from metadist.report.page import (
    HTML,
    code,
    details,
    escaped,
    items,
    page,
    pairs,
    picture,
    table,
    text,
    tile,
)
from metadist.run.files import (
    ARTIFACTS,
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    MAX_CONFIG_BYTES,
    RESULT,
    TENSORBOARD,
)
from metadist.run.names import width_name
from metadist.run.reading import History, Scalar, find_history, find_tree
from metadist.run.status import RunStatus, run_status
from metadist.run.storage import Folder

SPLITS = {"train": "training", "val": "validation", "test": "test", "evaluation": "evaluation"}
MAX_EVENTS = 300
MAX_CHARTS = 24
MAX_PAGE_IMAGES_BYTES = 1_200_000
"""So that with everything else a page can be mailed."""
UNITS = {
    "tasks/per_second": "tasks per second",
    "outer/lr": "outer learning rate",
    "outer/hypergradient_norm": "norm of the hypergradient",
    "workers/number": "workers alive",
    "workers/waiting_share": "share of time in which workers wait",
    "workers/staleness_mean": "mean staleness, in steps",
}
FILES = {
    CONFIG: "the options that the run was started with",
    RESULT: "how the run ended, with the metrics of its test",
    EVENTS: "one line for every event that matters",
    CHECKPOINTS: "the outer variable and all that a resumed run needs",
    TENSORBOARD: "events for TensorBoard",
    ARTIFACTS: "files of the problem, by outer step",
    "metrics.csv": "all scalars: step, name, value",
    "wandb.json": "the identity of the run with Weights & Biases",
    "mlflow.json": "the identity of the run with MLflow",
}
COUNTED = {
    "worker_lost": ("num_lost", "workers lost"),
    "server_recovered": ("num_lost", "losses of the parameter server"),
    "lease_reissued": ("leases", "leases handed out again"),
    "contribution_repeated": ("leases", "results that came twice and were added once"),
    "lease_slow": ("leases", "leases that took ten times the median"),
    "user_error": ("errors", "errors of the problem or sampler, tried again"),
    "task_dropped": ("tasks", "tasks dropped, whose hypergradient was not finite"),
    "validation_failed": (None, "validations without a score"),
    "checkpoint_skipped": (None, "damaged checkpoints skipped"),
    "logger_failed": (None, "loggers that failed"),
    "run_interrupted": (None, "interruptions"),
    "run_failed": (None, "failures"),
}
"""What to count of which events, and its name."""


def run_page(run: str | Path, stale_s: float = 300.0) -> str:
    """A run as one HTML page, from its folder alone, also while it is running or damaged.

    Raises:
        ValueError: There is no run in that folder.
    """
    folder = Folder(run)
    status = run_status(folder.uri, stale_s)
    try:
        history = find_history(folder / TENSORBOARD)
    except OSError as error:
        history = History({}, {}, {}, {}, [f"{TENSORBOARD} cannot be read: {error}"], False)
    result = find_tree(folder, RESULT)
    config = _config(folder)
    title = f"Run {folder.uri.rstrip('/').rpartition('/')[2]}"
    sections = [
        ("Results", _results(status, result)),
        ("Curves", curves_of(history.scalars)),
        ("Sample tasks", _pictures(history, "task/", "Pictures of the first training task.")),
        ("Adaptation", _pictures(history, "adaptation/", ADAPTATION)),
        ("Learned weights", _weights(history)),
        ("What happened", _happened(status)),
        ("Protocol", _protocol(result)),
        ("Settings", _settings(history, result)),
        ("Environment", _environment(status)),
        ("Files and how to repeat it", _files(folder, config, status)),
        ("Missing or damaged", _missing(status, history, result, config)),
    ]
    return page(title, (status.state, status.is_well), _intro(folder, status, result), sections)


ADAPTATION = (
    "Query examples of one validation task: the true class, and the predicted classes before and "
    "after adaptation (+ right, x wrong)."
)


def _intro(folder: Folder, status: RunStatus, result: Mapping[str, Any]) -> HTML:
    now = datetime.now(timezone.utc).isoformat(" ", "minutes")
    of = f" of {status.until_step}" if status.until_step else ""
    tiles = [tile("outer steps", f"{status.step}{of}")]
    tested = metrics_of(result)
    for name in ("query_accuracy", "query_loss"):
        if name in tested:
            mean, half = tested[name]
            tiles.append(tile(f"test {name.removeprefix('query_')}", interval_text(mean, half)))
    for metric in ("accuracy", "loss"):
        found = status.scalars.get(f"{metric}/val")
        if found is not None and not tested:
            width = status.scalars.get(width_name(f"{metric}/val"))
            shown = interval_text(found.value, width.value if width else None)
            tiles.append(tile(f"validation {metric}, step {found.step}", shown))
    seconds = result.get("seconds")
    if isinstance(seconds, (int, float)):
        tiles.append(tile("seconds", number_text(float(seconds))))
    where = f"{folder.uri}, as read at {now.removesuffix('+00:00')} UTC"
    error = next(
        (e.get("error") for e in reversed(status.events) if e["event"] == "run_failed"), ""
    )
    failed = text(f"Error: {error}") if error and status.state == "failed" else ""
    return HTML(
        f"<p class=soft>{escaped(where)}</p>{failed}<div class=tiles>{''.join(tiles)}</div>"
    )


def metrics_of(result: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """(mean, half width) of the metrics of the test in a result, as far as they are numbers."""
    tested = result.get("test")
    metrics = tested.get("metrics") if isinstance(tested, dict) else None
    found = {}
    for name, value in (metrics if isinstance(metrics, dict) else {}).items():
        if isinstance(value, dict) and isinstance(value.get("mean"), (int, float)):
            half = value.get("half_width")
            found[str(name)] = (
                float(value["mean"]),
                half if isinstance(half, (int, float)) else None,
            )
    return found


def interval_text(mean: float, half_width: float | None) -> str:
    """A mean with its interval."""
    return f"{mean:.4g}" + ("" if half_width is None else f" ± {half_width:.2g}")


def _results(status: RunStatus, result: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    for name, (mean, half) in metrics_of(result).items():
        rows.append(["test", _metric_name(name), f"{mean:.4g}", _half(half), _tested_step(result)])
    for tag, scalar in status.scalars.items():
        metric, _, split = tag.partition("/")
        if metric not in ("accuracy", "loss"):
            continue
        which, _, rest = split.partition("_")
        if which == "test" and result.get("test"):
            continue
        half_width = status.scalars.get(width_name(tag))
        name = f"{metric} {_suffix(rest)}".strip()
        half = None if half_width is None else half_width.value
        rows.append([which, name, f"{scalar.value:.4g}", _half(half), scalar.step])
    if not rows:
        return text("There are no metrics yet.")
    order = ("test", "val", "evaluation", "train")
    rows.sort(key=lambda row: (order.index(row[0]) if row[0] in order else 9, row[1]))
    named = [[SPLITS.get(row[0], row[0]), *row[1:]] for row in rows]
    note = text("Means over tasks; ± is the half width of the 95 % interval (Student's t).")
    shown = table(["tasks", "metric", "mean", "±", "at step"], named, numbers_from=2)
    return shown + note + (text(UNMOVED) if _is_unmoved(status, result) else "")


UNMOVED = (
    "Metrics before and after adaptation are equal: no inner variable moves. So it is with methods "
    "without an inner loop (ProtoNet, RidgeHead, NearestCentroid), whose head follows from the "
    "support set at once."
)


def _is_unmoved(status: RunStatus, result: Mapping[str, Any]) -> bool:
    """Whether all metrics that are there before and after adaptation are equal."""
    means: dict[str, float] = {tag: scalar.value for tag, scalar in status.scalars.items()}
    means |= {name: mean for name, (mean, _) in metrics_of(result).items()}
    pairs = [
        (means[f"{name}_before"], mean) for name, mean in means.items() if f"{name}_before" in means
    ]
    return bool(pairs) and all(before == after for before, after in pairs)


def _tested_step(result: Mapping[str, Any]) -> str:
    """The outer step that was tested, as the name of its checkpoint ends."""
    tested = result.get("test")
    name = str(tested.get("checkpoint", "")) if isinstance(tested, dict) else ""
    found = re.search(r"\d+$", name)
    return str(int(found[0])) if found else ""


def _half(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2g}"


def _metric_name(name: str) -> str:
    found = re.fullmatch(r"(query|support)_(\w+?)(_before)?", name)
    if found is None:
        return name
    words = [found[2], "on the support set" if found[1] == "support" else ""]
    return " ".join(filter(None, [*words, "before adaptation" if found[3] else ""]))


def _suffix(rest: str) -> str:
    return {"before": "before adaptation", "support": "on the support set"}.get(rest, rest)


def curves_of(scalars: Mapping[str, Sequence[Scalar]]) -> str:
    """Charts of all scalars: accuracies and losses first, what is asked less often is folded."""
    first: list[str] = []
    more: list[str] = []
    for metric in ("accuracy", "loss"):
        curves: dict[bool, list[Curve]] = {True: [], False: []}
        tags = [tag for tag in scalars if tag.startswith(f"{metric}/")]
        for tag in sorted(tags, key=_order):
            is_main = tag.count("_") == 0 or tag == f"{metric}/train_before"
            curves[is_main].append(_curve(tag, scalars[tag], scalars.get(width_name(tag))))
        first.append(line_chart(curves[True], "outer step", metric))
        more.append(line_chart(curves[False], "outer step", metric))
    for tag, column in sorted(scalars.items()):
        group = tag.partition("/")[0]
        if group in ("accuracy", "loss", "width"):
            continue
        points = [(float(scalar.step), scalar.value) for scalar in column]
        place = more if group in ("workers", "oracle", "tasks", "outer") else first
        if len(place) < MAX_CHARTS:
            place.append(line_chart([Curve(tag, points)], "outer step", UNITS.get(tag, tag)))
    shown = f"<div class=charts>{''.join(first)}</div>" if any(first) else ""
    if any(more):
        charts = f"<div class=charts>{''.join(more)}</div>"
        shown += details("Support sets, optimiser, speed and workers", charts)
    return shown


def _order(tag: str) -> tuple[int, str]:
    split = tag.partition("/")[2].partition("_")[0]
    return ([*SPLITS].index(split) if split in SPLITS else len(SPLITS)), tag


def _curve(tag: str, column: Sequence[Scalar], halves: Sequence[Scalar] | None) -> Curve:
    split, _, rest = tag.partition("/")[2].partition("_")
    name = f"{SPLITS.get(split, split)} {_suffix(rest)}".strip()
    points = [(float(scalar.step), scalar.value) for scalar in column]
    widths = {scalar.step: scalar.value for scalar in halves or ()}
    if any(scalar.step not in widths for scalar in column):
        return Curve(name, points)
    low = [scalar.value - widths[scalar.step] for scalar in column]
    high = [scalar.value + widths[scalar.step] for scalar in column]
    return Curve(name, points, low, high)


def _pictures(history: History, prefix: str, note: str) -> str:
    shown = []
    left = MAX_PAGE_IMAGES_BYTES
    for tag, (step, png) in sorted(history.images.items(), reverse=True):
        if tag.startswith(prefix) and len(png) <= left // 2:
            left -= len(png)
            at = f", step {step}" if step else ""
            shown.append(picture(f"{tag.removeprefix(prefix)}{at}", png))
    return f"{text(note)}<div class=pictures>{''.join(shown)}</div>" if shown else ""


def _weights(history: History) -> str:
    found = {
        tag.removeprefix("weights/"): (step, bars)
        for tag, (step, bars) in history.histograms.items()
        if tag.startswith("weights/")
    }
    if not found:
        return ""
    step = max(step for step, _ in found.values())
    groups = [(name, bars) for name, (_, bars) in sorted(found.items())]
    note = text(f"The learned weights of the training examples at step {step}.")
    return note + histogram(groups, "weight", "share of the examples")


def _happened(status: RunStatus) -> str:
    counts = []
    for event, (field, name) in COUNTED.items():
        found = [e for e in status.events if e["event"] == event]
        number = sum(1 if field is None else _size(e.get(field)) for e in found)
        if number:
            counts.append((name, f"{number:,}"))
    starts = sum(event["event"] == "run_started" for event in status.events)
    if starts > 1:
        counts.insert(0, ("starts of the run", str(starts)))
    first = table(["", "number"], counts) if counts else text("Nothing was lost or dropped.")
    newest = status.events[-MAX_EVENTS:]
    rows = [[e["time"][:19].replace("T", " "), e["step"], e["event"], _about(e)] for e in newest]
    left_out = len(status.events) - len(newest)
    note = text(f"{left_out} older ones are in {EVENTS}.") if left_out else ""
    listed = table(["time (UTC)", "step", "event", ""], rows, numbers_from=9)
    return first + (details(f"{len(rows)} events", listed + note) if rows else "")


def _size(value: Any) -> int:
    if isinstance(value, list):
        return len(value)
    return int(value) if isinstance(value, (int, float)) else 0


def _about(event: Mapping[str, Any]) -> str:
    of_process = ("time", "event", "step", "host", "boot", "pid", "started", "software")
    parts = [f"{name}={value}" for name, value in event.items() if name not in of_process]
    about = ", ".join(parts)
    return about if len(about) <= 300 else f"{about[:300]}..."


def _protocol(result: Mapping[str, Any]) -> str:
    tested = result.get("test")
    protocol = tested.get("protocol") if isinstance(tested, dict) else None
    if not isinstance(protocol, dict):
        return ""
    assert isinstance(tested, dict)
    return pairs({"checkpoint": tested.get("checkpoint", ""), **protocol})


def _settings(history: History, result: Mapping[str, Any]) -> str:
    settings = result.get("settings")
    if not isinstance(settings, dict):
        settings = {}
        for line in history.texts.get("settings/text_summary", "").splitlines()[2:]:
            name, _, value = line.strip().strip("|").partition(" | ")
            settings[name.strip()] = value.strip()
    return pairs(settings) if settings else ""


def _environment(status: RunStatus) -> str:
    starts = [event for event in status.events if event["event"] == "run_started"]
    if not starts:
        return ""
    last = starts[-1]
    software = last.get("software")
    names = ("executor", "policy", "device", "num_workers", "host")
    rows: list[tuple[str, Any]] = [(name, last[name]) for name in names if name in last]
    if isinstance(software, list):
        rows.append(("software", ", ".join(map(str, software))))
    return pairs(rows)


def _config(folder: Folder) -> str | None:
    try:
        return folder.read(CONFIG, MAX_CONFIG_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return None


def _files(folder: Folder, config: str | None, status: RunStatus) -> str:
    try:
        names = folder.names(links=False)
    except OSError:
        names = []
    held = dict(FILES)
    if status.artifacts:
        held[ARTIFACTS] += f"; {status.newest_artifacts}"
    rows = [(name, held[name]) for name in held if name in names]
    commands = [
        f"metadist status {folder.uri}",
        f"metadist evaluate {folder.uri}",
        f"metadist train --config {folder.uri.rstrip('/')}/{CONFIG} --run_dir runs/again",
        f"tensorboard --logdir {folder.uri}",
    ]
    shown = table(["file", "holds"], rows, numbers_from=9) if rows else ""
    shown += "<h3>Commands</h3>" + code("\n".join(commands))
    if config is not None:
        shown += text(
            "The same command with the config below repeats the run: with the same versions on the "
            "same type of machine to the last bit, where its policy is bsp."
        )
        shown += details(CONFIG, code(config))
    return shown


def _missing(
    status: RunStatus, history: History, result: Mapping[str, Any], config: str | None
) -> str:
    wrong = [*dict.fromkeys([*status.unreadable, *history.unreadable])]
    if status.damaged:
        what = "being written or damaged" if status.state == "running" else "damaged"
        wrong += [f"checkpoint {name} is {what}" for name in status.damaged]
    absent = {
        f"{CONFIG}: the options of the run": config is None,
        f"{EVENTS}: what happened, and the environment": not status.events,
        f"{TENSORBOARD}: curves and pictures": not history.scalars,
        f"{RESULT}: the test": status.state == "finished" and not result,
        "checkpoints: no good one": status.newest is None,
    }
    wrong += [f"missing: {name}" for name, is_absent in absent.items() if is_absent]
    if status.is_partial:
        wrong.append(f"{EVENTS} is long: only its newest events were read")
    if history.is_partial:
        wrong.append(f"{TENSORBOARD} is long: only its newest records were read")
    return items(wrong) if wrong else ""
