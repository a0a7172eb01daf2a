"""`Logger`: what receives the numbers of a run, and how a failure of it is borne."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger is opened for.

    Args:
        folder: The run folder; of one that is not on this machine, the local side of it.
        uri: The run folder, as it was given.
        step: The outer step that the run continues from. Rows of later steps are left from an
            interruption and will come again. None: rows are added, and none comes again.
        settings: What a reader needs to know of the run, by name.
        is_branch: Whether it went back to an earlier checkpoint by will, and abandons what
            followed that.
    """

    folder: Path
    uri: str
    step: int | None
    settings: Mapping[str, str | int | float]
    is_branch: bool = False

    @property
    def name(self) -> str:
        """The last part of the folder."""
        return self.uri.rstrip("/").rpartition("/")[2]


class Logger(ABC):
    """Receives the numbers of a run; derive from it, and give it to `Trainer(loggers=[...])`.

    The trainer opens it before the first outer step and closes it at the end, in the process that
    drives the run, also on Ray. A failure within it does not stop the training: it is reported
    once, and at the next checkpoint the logger is opened again. Only a new run whose logger cannot
    be opened at all does not begin.
    """

    files: tuple[str, ...] = ()
    """Files in the run folder that it continues; a resumed run finds its own there."""
    folders: tuple[str, ...] = ()
    """Folders in the run folder that it writes to."""

    @abstractmethod
    def open(self, run: LoggedRun) -> None:
        """Begin, or continue after `run.step`: each row must be there once in the end."""

    @abstractmethod
    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of one outer step, by names such as "accuracy/val"; they may be NaN."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Add a text (Markdown)."""

    def log_image(self, step: int, name: str, image_CHW: Tensor) -> None:
        """Add a picture of 1 or 3 channels, with values in [0, 1]."""

    def log_histogram(self, step: int, name: str, values: Tensor) -> None:
        """Add a distribution."""

    @abstractmethod
    def rewind(self, step: int) -> None:
        """The rows of this outer step and of later ones come again: x was lost, and goes back."""

    def flush(self) -> None:
        """Have everything so far where it belongs; called with every checkpoint."""

    def close(self, failed: bool = False) -> None:
        """End; `failed` if the training ends with an error."""


class Bearing:
    """A logger whose failures are reported once, and do not stop a run.

    After a failure rows are missing until the next `flush`, where the logger is opened again.

    Args:
        logger: The logger.
        run: The run to open it for.
        report: Called with the first failure.
        bears_open: Whether the first opening may fail too.
    """

    def __init__(
        self,
        logger: Logger,
        run: LoggedRun,
        report: Callable[[Logger, Exception], None],
        bears_open: bool,
    ) -> None:
        self._logger = logger
        self._run = run
        self._report = report
        self._has_failed = False
        self._is_open = True
        self._has_opened = False
        if bears_open:
            self._open(run.step)
            return
        try:
            logger.open(run)
        except Exception as error:
            raise ValueError(
                f"loggers must be able to begin, got from {type(logger).__name__} "
                f"{type(error).__name__}: {error}"
            ) from error
        self._has_opened = True

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of the logger."""
        if not self._is_open:
            return
        try:
            getattr(self._logger, method)(*arguments)
        except Exception as error:  # noqa: BLE001  # it may raise whatever its service raises
            self._fail(error)

    def flush(self, step: int) -> None:
        """Flush it; after a failure it is opened again, to continue after `step`."""
        if not self._is_open:
            self._open(step)
        self.call("flush")

    def _open(self, step: int | None) -> None:
        self._is_open = True
        is_branch = self._run.is_branch and not self._has_opened
        self.call("open", replace(self._run, step=step, is_branch=is_branch))
        self._has_opened |= self._is_open

    def _fail(self, error: Exception) -> None:
        self._is_open = False
        with suppress(Exception):  # it writes what it has not written, perhaps in vain
            self._logger.close(failed=True)
        if not self._has_failed:
            self._has_failed = True
            self._report(self._logger, error)


def require_package(name: str, extra: str) -> None:
    """Raise ValueError unless a package is there that a logger needs."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"loggers must not have {extra} without the package {name}, which is not installed: "
            f"pip install 'metadist[{extra}]'"
        )
