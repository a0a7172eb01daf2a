"""The signals that stop a run: held while a step is half done, and followed by a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 4
"""The number of further signals that are ignored while the first one is obeyed."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Within the block the signals that stop a run wait; they take effect at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are never handled here
        return
    held: list[tuple[Any, ...]] = []
    before = {
        number: signal.signal(number, lambda *arguments: held.append(arguments))
        for number in STOPPING
        if signal.getsignal(number) is not None  # set by other than Python, could not be restored
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late, _ in held:
        signal.raise_signal(late)


class OneStop:
    """Within the block the first signal that stops the run takes effect, and further ones do not.

    A second Ctrl-C, or a signal sent to each process of a group, must not interrupt the writing of
    the last checkpoint. A signal that would kill the process raises KeyboardInterrupt here, and
    kills it when the block is left; SIGUSR1, which schedulers send some time before they stop a
    job, does the same as SIGTERM.
    """

    def __enter__(self) -> OneStop:
        self._before: dict[int, Any] = {}
        self._kills: int | None = None
        self._is_stopping = False
        self._num_ignored = 0
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                handler = signal.getsignal(number)
                if callable(handler) or handler is signal.SIG_DFL:
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._kills is not None:
            signal.raise_signal(self._kills)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came whose exception somebody's code swallowed."""
        if self._is_stopping:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_stopping and self._num_ignored < PATIENCE:
            self._num_ignored += 1
            return
        handler = self._before[number]
        if not callable(handler):
            self._kills = signal.SIGTERM if number == signal.SIGUSR1 else number
            self._is_stopping = True
            raise KeyboardInterrupt(signal.Signals(number).name)
        try:
            handler(number, frame)
        except BaseException:
            self._is_stopping = True
            raise
