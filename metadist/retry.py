"""When work of user code is tried again, and when it is slow: rules that all executors share."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from metadist.memory import DeviceMemoryError

log = logging.getLogger("metadist.retry")

T = TypeVar("T")

MAX_BACKOFF_S = 10.0
"""The longest pause before work is tried again."""

SLOW_FACTOR = 10.0
"""Work that takes this many times the median is reported as slow; it may hang."""
MIN_SLOW_S = 30.0
"""No work is reported as slow before it has taken so long."""
FIRST_SLOW_S = 300.0
"""The same while no work has ended yet."""
LOOK_S = 1.0
"""The seconds between two looks of a `Watchdog`."""

_PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def type_name(error: object) -> str:
    """The name of its type, with the module."""
    return f"{type(error).__module__}.{type(error).__qualname__}"


def is_worth_a_try(error: object, before: Sequence[str], max_user_errors: int) -> bool:
    """Whether the work in which user code raised `error` is tried again.

    An error of a type that this work has raised before would come for ever; but time alone may mend
    a disk or a network that is away, however often it was. A GPU has as much memory as before.

    Args:
        error: What it raised now.
        before: The names of the types that it raised before in a row.
        max_user_errors: The largest number of further tries.
    """
    may_pass = isinstance(error, OSError) and not isinstance(error, (*_PERMANENT, PermissionError))
    is_known = type_name(error) in before or isinstance(error, DeviceMemoryError)
    return len(before) < max_user_errors and (may_pass or not is_known)


def pause_after(num_before: int, backoff_s: float, max_backoff_s: float) -> float:
    """The pause before another try; it doubles with each."""
    return min(max_backoff_s, backoff_s * 2.0**num_before)


def in_short(error: object) -> str:
    """The type and the text of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


class Pace:
    """How long a piece of work usually takes."""

    def __init__(self) -> None:
        self._took_s: deque[float] = deque(maxlen=100)

    def add(self, seconds: float) -> None:
        """Note that work has taken so long."""
        self._took_s.append(seconds)

    def clear(self) -> None:
        """Forget all: other work comes."""
        self._took_s.clear()

    @property
    def slow_s(self) -> float:
        """How long work takes that is slow."""
        median_s = self.median_s
        return FIRST_SLOW_S if median_s is None else max(MIN_SLOW_S, SLOW_FACTOR * median_s)

    @property
    def median_s(self) -> float | None:
        """How long work usually takes; None while none has ended."""
        took_s = tuple(self._took_s)
        return statistics.median(took_s) if took_s else None

    def report(
        self, notify: Callable[..., None], work: str, worker: str, seconds: float, way_out: str
    ) -> None:
        """Warn of slow work, in the log and with the event `lease_slow`."""
        median_s = self.median_s
        usual = "" if median_s is None else f", the median is {median_s:.3g} s"
        log.warning(
            "%s takes %.0f s on %s%s: it may hang; %s", work, seconds, worker, usual, way_out
        )
        notify("lease_slow", leases=[work], worker=worker, seconds=seconds, median_s=median_s)


class Watchdog:
    """Within the block a thread warns of work of this process that takes very long.

    Args:
        notify: See `Executor.notify`; called by the thread.
    """

    def __init__(self, notify: Callable[..., None]) -> None:
        self._notify = notify
        self._pace = Pace()
        self._work: tuple[float, str] | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._look, name="metadist-watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    @contextmanager
    def watch(self, work: str) -> Iterator[None]:
        """Within the block this process is at that work; what it takes is usual if it succeeds."""
        began = time.monotonic()
        self._work = began, work
        try:
            yield
            self._pace.add(time.monotonic() - began)
        finally:
            self._work = None

    def _look(self) -> None:
        reported = None
        while not self._stop.wait(LOOK_S):
            current = self._work
            if current is None or current is reported:
                continue
            began, work = current
            seconds = time.monotonic() - began
            if seconds >= self._pace.slow_s:
                reported = current
                way_out = "you may stop the run and continue it (metadist resume)"
                self._pace.report(self._notify, work, "local", seconds, way_out)


class Retries:
    """Tries work again in this process after errors of user code that may pass.

    Args:
        max_user_errors: The largest number of further tries of the same work.
        backoff_s: The pause before another one; it doubles with each.
    """

    def __init__(self, max_user_errors: int = 3, backoff_s: float = 0.5) -> None:
        self._max_user_errors = max_user_errors
        self._backoff_s = backoff_s
        self._retried: list[str] = []

    def run(
        self, watchdog: Watchdog, work: str, function: Callable[..., T], *arguments: object
    ) -> T:
        """What `function` returns for the arguments; `work` is its name for messages."""
        before: list[str] = []
        while True:
            try:
                with watchdog.watch(work):
                    return function(*arguments)
            except Exception as error:
                if not is_worth_a_try(error, before, self._max_user_errors):
                    raise
                log.warning("%s raised and is tried again", work, exc_info=True)
                self._retried.append(f"{work}: {in_short(error)}")
                after_s = pause_after(len(before), self._backoff_s, MAX_BACKOFF_S)
                before.append(type_name(error))
            time.sleep(after_s)

    def take(self) -> tuple[str, ...]:
        """The errors after which something was tried again, since the last call of this."""
        retried, self._retried = tuple(self._retried), []
        return retried
