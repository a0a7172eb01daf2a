"""`run_status`: a running or finished run at a glance, read from nothing but its folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from metadist.run.checkpoint import CheckpointStore
from metadist.run.files import ARTIFACTS, CHECKPOINTS, CONFIG, RESULT, TENSORBOARD
from metadist.run.names import width_name
from metadist.run.processes import is_gone
from metadist.run.reading import MAX_STEP, Scalar, find_events, find_json, find_scalars
from metadist.run.storage import Folder, is_part
from metadist.run.text import shown

State = Literal["waiting", "running", "stale", "killed", "finished", "interrupted", "failed"]

BEGUN = (CONFIG, CHECKPOINTS, TENSORBOARD)
"""What is in the folder of a run that waits for workers."""
NUM_EVENTS = 6
"""The number of events shown, the newest ones."""
NUM_NAMED = 8
"""The number of workers, and of files of artifacts, shown one by one."""


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, as read from its folder; print it with rich.

    Args:
        run: The folder.
        state: "waiting" is a run that has not begun to train; "killed" one whose process is gone,
            which can be seen on its own machine; "stale" one that has not ended and has written
            nothing for long: its process was killed, its machine is gone, or one outer step takes
            longer than that.
        age_s: Seconds since it last wrote something.
        step: Outer steps taken.
        until_step: The step it ends at; None if the folder does not say.
        left_s: The expected seconds until then, while it is running.
        scalars: The newest value of each TensorBoard tag.
        events: All events, oldest first, see `EventLog`.
        checkpoints: The names of the checkpoints, oldest first, damaged ones included.
        newest: The newest good checkpoint.
        best: The good one with the best validation.
        damaged: Checkpoints newer than `newest`, which are damaged or being written.
        result: What the command line wrote at the end of a finished run.
        unreadable: What is wrong with the files that this was read from; what they would add is
            missing.
        is_partial: Whether the file of events is so long that only the newest were read.
        artifacts: The folders of artifacts, oldest first.
        artifact_files: The files in the newest of them.
    """

    run: str
    state: State
    age_s: float
    step: int
    until_step: int | None
    left_s: float | None
    scalars: Mapping[str, Scalar]
    events: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[str]
    newest: str | None
    best: str | None
    damaged: Sequence[str]
    result: Mapping[str, Any]
    unreadable: Sequence[str] = ()
    is_partial: bool = False
    artifacts: Sequence[str] = ()
    artifact_files: Sequence[str] = ()

    @property
    def is_well(self) -> bool:
        """Whether it is running or about to, or ended as planned."""
        return self.state in ("waiting", "running", "finished")

    @property
    def is_damaged(self) -> bool:
        """Whether files are damaged; those of a run that goes on may be half written instead."""
        return bool(self.unreadable or (self.damaged and self.state == "finished"))

    @property
    def newest_artifacts(self) -> str:
        """The newest folder of artifacts and its files, as text; there is one."""
        more = len(self.artifacts) - 1
        older = f" ({more} older)" if more else ""
        files = _first(self.artifact_files, ", ")
        return f"{ARTIFACTS}/{self.artifacts[-1]}{older}: {files}"

    def __rich__(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        # A path or an error without spaces is folded, and nothing is cut off.
        table.add_column(overflow="fold")
        for name, text in self._rows():
            table.add_row(name, shown(text))
        return table

    def _rows(self) -> Iterator[tuple[str, str]]:
        last = f"last wrote {_duration(self.age_s)} ago"
        yield "run", self.run
        yield "state", self.state if self.state == "waiting" else f"{self.state}, {last}"
        for number, text in enumerate(self.unreadable):
            yield ("damaged" if number == 0 else ""), text
        if error := self._last("run_failed").get("error"):
            yield "error", _short(str(error), 500)
        of = f" of {self.until_step}" if self.until_step else ""
        left = "" if self.left_s is None else f", about {_duration(self.left_s)} left"
        yield "step", f"{self.step}{of}{left}"
        about = self._last("run_started")
        if about.get("executor"):
            names = [about["executor"], about.get("policy"), about.get("device")]
            yield "executor", ", ".join(str(name) for name in names if name)
        if self.result:
            tasks, dropped = self.result.get("num_tasks"), self.result.get("num_dropped")
            took = _duration(float(self.result.get("seconds") or 0))
            yield "result", f"{tasks} tasks in {took}, {dropped} dropped"
        yield from self._metrics()
        yield from self._kept()
        counts = Counter(
            {
                label: sum(_size(event, field) for event in self.events if event["event"] == name)
                for name, field, label in (
                    ("worker_lost", "num_lost", "workers lost"),
                    ("server_recovered", "num_lost", "servers lost"),
                    ("lease_reissued", "leases", "leases re-issued"),
                    ("contribution_repeated", "leases", "results repeated"),
                    ("lease_slow", "leases", "leases very slow"),
                    ("user_error", "errors", "errors of your code tried again"),
                    ("task_dropped", "tasks", "tasks dropped"),
                )
            }
        )
        if losses := [f"{number} {label}" for label, number in counts.items() if number]:
            yield "losses", ", ".join(losses) + (", not counting older events" * self.is_partial)
        if broken := self._last("logger_failed"):
            text = f"{broken.get('logger')} failed at step {broken['step']}: {broken.get('error')}"
            yield "logs", _short(text, 300)
        shown = self.events[-NUM_EVENTS:]
        days = {event["time"][:10] for event in shown}
        for number, event in enumerate(shown):
            day = f"{event['time'][:10]} " if len(days) > 1 else ""
            yield ("events" if number == 0 else ""), day + _event(event)

    def _metrics(self) -> Iterator[tuple[str, str]]:
        if speed := self.scalars.get("tasks/per_second"):
            waiting = self.scalars.get("workers/waiting_share")
            share = f", workers waited {waiting.value:.1%} of the time" if waiting else ""
            yield "speed", f"{speed.value:.3g} tasks/s{share}, at step {speed.step}"
        if workers := self.scalars.get("workers/number"):
            speeds = {
                tag.rpartition("/")[2]: scalar.value
                for tag, scalar in self.scalars.items()
                if tag.startswith("workers/tasks_per_second/") and scalar.step == workers.step
            }
            shown = [f"{name} {value:.3g}" for name, value in sorted(speeds.items(), key=_by_name)]
            tasks = f" (tasks/s: {_first(shown, ', ')})" if shown else ""
            yield "workers", f"{workers.value:.0f}{tasks}"
        if isinstance(held := self._last("states_held").get("workers"), list):
            yield "states", f"of tasks, on {_first([_short(str(text)) for text in held], '; ')}"
        for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
            if text := self._losses(split):
                yield name, text

    def _losses(self, split: str) -> str:
        """The newest loss and accuracy of a split."""
        parts = []
        at = None
        for metric in ("loss", "accuracy"):
            found = self.scalars.get(f"{metric}/{split}")
            if found is None:
                continue
            at = found.step
            width = self.scalars.get(width_name(f"{metric}/{split}"))
            before = self.scalars.get(f"{metric}/{split}_before")
            parts.append(
                f"{metric} {found.value:.4g}"
                + (f" +- {width.value:.2g}" if width else "")
                + (f" (before {before.value:.4g})" if before else "")
            )
        return f"{', '.join(parts)}, at step {at}" if parts else ""

    def _kept(self) -> Iterator[tuple[str, str]]:
        scores = {
            event.get("checkpoint"): event.get("score")
            for event in self.events
            if event["event"] == "checkpoint_written"
        }

        def named(name: str | None) -> str:
            score = scores.get(name)
            return f"{name}" + ("" if score is None else f" (score {score:.4g})")

        if self.newest is None:
            yield "checkpoints", "no good one yet"
        elif self.newest == self.best:
            yield "checkpoints", f"newest good and best: {named(self.newest)}"
        else:
            yield "checkpoints", f"newest good: {named(self.newest)}"
            if self.best:
                yield "", f"best: {named(self.best)}"
        if self.damaged:
            what = "being written or damaged" if self.state == "running" else "damaged"
            yield "", f"{what}: {', '.join(self.damaged)}"
        if self.artifacts:
            yield "artifacts", self.newest_artifacts

    def _last(self, name: str) -> Mapping[str, Any]:
        """The last event of that name since the run was last started; empty if none."""
        for event in reversed(self.events):
            if event["event"] == name:
                return event
            if event["event"] == "run_started":
                break
        return {}


def run_status(run: str | Path, stale_s: float = 300.0, now: float | None = None) -> RunStatus:
    """The status of a run from its folder, which is only read, also while the run writes to it.

    Cost: the newest good checkpoint is read and verified.

    Args:
        run: Its folder, a local path or any fsspec URI.
        stale_s: Seconds without a sign of life after which a run that has not ended is "stale".
        now: Seconds since 1970; None: by the clock.

    Raises:
        ValueError: There is no run in that folder.
    """
    if not stale_s > 0:
        raise ValueError(f"stale_s must be > 0, got {stale_s}")
    folder = Folder(run)
    store = CheckpointStore((folder / CHECKPOINTS).uri)
    try:
        names, there = store.names(), folder.names()
        scalars, unreadable = find_scalars(folder / TENSORBOARD)
    except NotADirectoryError:
        names, there, scalars, unreadable = [], [], {}, []
    events, wrong, is_partial = find_events(folder)
    unreadable += wrong
    if not (events or scalars or names or unreadable or set(there) & set(BEGUN)):
        if runs := _runs_in(folder, there):
            raise ValueError(
                f"run_dir must be the folder of a run, got {str(run)!r}: it holds runs: "
                f"{', '.join(runs[:5])}{', ...' * (len(runs) > 5)}; give one"
            )
        raise ValueError(
            f"run_dir must be the folder of a run that has begun to train, got {str(run)!r}: give "
            "the run_dir of `metadist train`. That of a job appears when the job starts: "
            "`metadist status --address` asks Ray"
        )
    newest, damaged = _newest(store)
    result, wrong = find_json(folder, RESULT)
    unreadable += wrong
    starts = [event for event in events if event["event"] == "run_started"]
    state = _state([event["event"] for event in events], bool(result))
    written = [_seconds(event) for event in events[-1:]]
    written += [scalar.time for scalar in scalars.values()]
    age_s = max(0.0, (time.time() if now is None else now) - max(written, default=0.0))
    if not (written or names or unreadable):
        state = "waiting"
    elif state == "running" and starts and is_gone(starts[-1]):
        state = "killed"
    elif state == "running" and age_s > stale_s:
        state = "stale"
    steps = [scalar.step for scalar in scalars.values()] + [event["step"] for event in events[-1:]]
    steps += [int(newest.rpartition("-")[2])] if newest else []
    step = max(steps, default=0)
    until = starts[-1].get("until_step") if starts else result.get("num_steps")
    left_s = None
    if state == "running" and starts and until:
        taken, took_s = step - starts[-1]["step"], max(written) - _seconds(starts[-1])
        left_s = (until - step) * took_s / taken if taken > 0 else None
    artifacts, files = _artifacts(folder, there)
    return RunStatus(
        run=str(run),
        state=state,
        age_s=age_s,
        step=step,
        until_step=until,
        left_s=left_s,
        scalars=scalars,
        events=events,
        checkpoints=names,
        newest=newest,
        best=store.best(),
        damaged=damaged,
        result=result if state == "finished" else {},
        unreadable=unreadable,
        is_partial=is_partial,
        artifacts=artifacts,
        artifact_files=files,
    )


def _artifacts(folder: Folder, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the folders of artifacts, the files in the newest); of a run whose folder has `names`."""
    if ARTIFACTS not in names:
        return [], []
    with suppress(OSError):
        if steps := (folder / ARTIFACTS).names():
            files = (folder / ARTIFACTS / steps[-1]).names()
            return steps, [name for name in files if not is_part(name)]
    return [], []


def _runs_in(folder: Folder, names: Sequence[str]) -> list[str]:
    """The first few of `names` that are folders of runs."""
    found = []
    for name in names[:100]:
        with suppress(OSError):
            if set((folder / name).names()) & set(BEGUN):
                found.append(name)
    return found[:6]


def _state(names: Sequence[str], has_result: bool) -> State:
    """The state of a run with events of these names; "running" if it has not ended."""
    for name in reversed(names):
        if name == "run_finished":
            return "finished"
        if name == "run_interrupted":
            return "interrupted"
        if name == "run_failed":
            return "failed"
        if name == "run_started":
            return "running"
    return "finished" if has_result else "running"


def _newest(store: CheckpointStore) -> tuple[str | None, list[str]]:
    """(the newest checkpoint that fits its manifest, newer ones that do not)."""
    skipped: list[str] = []
    newest = None
    for name in reversed(store.names()):
        if store.is_whole(name):
            newest = name
            break
        skipped.append(name)
    # A running one may have removed some while they were read.
    there = set(store.names())
    return newest, [name for name in skipped if name in there]


def _seconds(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _size(event: Mapping[str, Any], field: str) -> int:
    """The number of things an event reports: a count, or the length of a list."""
    value = event.get(field, 0)
    if isinstance(value, list):
        return len(value)
    return int(value) if isinstance(value, (int, float)) and abs(value) <= MAX_STEP else 0


def _by_name(item: tuple[str, float]) -> tuple[int, str]:
    return len(item[0]), item[0]  # worker-10 after worker-9


def _event(event: Mapping[str, Any]) -> str:
    """A line for an event."""
    if event["event"] == "run_started":
        names: Sequence[str] = ("until_step", "executor", "num_workers")
    else:
        names = [name for name in event if name not in ("time", "event", "step", "checkpoint")]
    about = [f"{name}={_short(_plain(event[name]), 30)}" for name in names if name in event]
    # A checkpoint is named after its step, which is shown anyway.
    return " ".join([event["time"][11:19], f"step {event['step']}", event["event"], *about])


def _first(texts: Sequence[str], mark: str) -> str:
    """The first of these texts, and how many more there are."""
    more = len(texts) - NUM_NAMED
    return mark.join(texts[:NUM_NAMED]) + (f"{mark}and {more} more" if more > 0 else "")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
