"""`CSVLogger`: the scalars of a run as one CSV file in its folder."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from metadist.loggers.base import LoggedRun, Logger

HEAD = ["step", "name", "value"]


class CSVLogger(Logger):
    """All scalars in metrics.csv of the run folder, a row for each: step, name, value.

    table = pandas.read_csv("runs/mine/metrics.csv")
    table.pivot_table(index="step", columns="name", values="value")
    """

    files = ("metrics.csv",)

    def __init__(self) -> None:
        self._path = Path()
        self._stream: IO[str] | None = None
        self._last: int | None = None
        """The step that the run continues from."""
        self._names: set[str] = set()
        """What the file has of that step."""

    def open(self, run: LoggedRun) -> None:
        self._path = run.folder / self.files[0]
        self._last = run.step
        self._keep(lambda step: run.step is None or step <= run.step)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        assert self._stream is not None
        writer = csv.writer(self._stream, lineterminator="\n")
        for name, value in values.items():
            # A validation that was interrupted before its checkpoint is made again.
            if step != self._last or name not in self._names:
                writer.writerow([step, name, repr(float(value))])

    def rewind(self, step: int) -> None:
        self._keep(lambda found: found < step)

    def flush(self) -> None:
        assert self._stream is not None
        self._stream.flush()

    def close(self, failed: bool = False) -> None:
        if self._stream is not None:
            self._stream.close()

    def _keep(self, is_kept: Callable[[int], bool]) -> None:
        """Write the file anew with the rows of the steps that are kept, and continue it."""
        self.close()
        self._names = set()
        kept = io.StringIO()
        writer = csv.writer(kept, lineterminator="\n")
        writer.writerow(HEAD)
        if self._path.exists():
            with self._path.open(newline="") as stream:
                for row in csv.reader(stream):
                    # Neither the head nor half a row, which a killed process may have left.
                    if len(row) == len(HEAD) and row[0].isdecimal() and is_kept(int(row[0])):
                        writer.writerow(row)
                        if int(row[0]) == self._last:
                            self._names.add(row[1])
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(kept.getvalue())
        os.replace(part, self._path)
        self._stream = self._path.open("a", newline="", buffering=1)
