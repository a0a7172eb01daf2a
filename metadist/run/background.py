"""`Background`: one job at a time beside the training, whose error is raised where it was given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs one job at a time in a thread, which the end of the process waits for."""

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin with a job; waits for the one before it, and raises its error instead."""
        self.wait()
        pool = ThreadPoolExecutor(1, "metadist-save")
        self._running = pool.submit(job)
        pool.shutdown(wait=False)

    def check(self) -> None:
        """Raise the error of a job that has failed; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the job; raises its error, once."""
        if self._running is not None:
            error = self._running.exception()  # an interrupt here leaves the job to be waited for
            self._running = None
            if error is not None:
                raise error

    def join(self) -> None:
        """Wait for the end of the job, whatever comes of it."""
        if self._running is not None:
            wait([self._running])
