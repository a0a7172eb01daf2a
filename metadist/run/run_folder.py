"""`RunFolder`: what a training keeps in its folder, and who may write there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metadist.loggers.base import Logger
from metadist.run.checkpoint import Checkpoint, CheckpointStore, name_of
from metadist.run.events import EventLog
from metadist.run.files import ARTIFACTS, CHECKPOINTS, CONFIG, EVENTS, LOCK, MAX_CONFIG_BYTES
from metadist.run.lock import RunLock
from metadist.run.rebuild import is_own
from metadist.run.storage import Folder, Mirror, is_part

log = logging.getLogger("metadist.trainer")

_ARTIFACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class RunFolder:
    """The folder of a run, as its trainer uses it.

    Args:
        run_dir: A path or URI.
        loggers: Their files belong to the run.
        config: The text of config.yaml, if there is one; None: it is written by `write_config`.
        keep_checkpoints, keep_every: See `CheckpointStore`.

    Raises:
        ValueError: It cannot be written to.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[Logger],
        config: str | None,
        keep_checkpoints: int,
        keep_every: int | None,
    ) -> None:
        self.folder = Folder(run_dir)
        self.store = CheckpointStore(
            (self.folder / CHECKPOINTS).uri, keep_checkpoints, keep_every=keep_every
        )
        self.folder.check_writable()
        self._mirror = Mirror(self.folder)
        self.path = self._mirror.path
        """The folder; if it is not on this machine, the local copy of its events."""
        for file in (EVENTS, *(file for logger in loggers for file in logger.files)):
            self._mirror.fetch(file)
        self._logs = {name for logger in loggers for name in (*logger.files, *logger.folders)}
        self.events = EventLog(self.path / EVENTS)
        self._config = config
        self._lock: RunLock | None = None

    @property
    def uri(self) -> str:
        """Where it is, as it was given."""
        return self.folder.uri

    def check_new(self) -> None:
        """Raise ValueError if a run would begin in a folder that holds something else.

        What a run has left that ended before its first checkpoint is nothing: it begins again.
        """
        names = {name for name in self.folder.names() if not is_part(name)}
        if names <= {LOCK}:
            return
        is_ours = names <= {CONFIG, EVENTS, CHECKPOINTS, LOCK, *self._logs}
        if is_ours and (names != {CONFIG} or self._has_own_config()) and self.store.is_bare():
            return
        raise ValueError(
            f"run_dir must be a new or empty folder, got {self.uri!r}, which holds "
            "files: choose another, or continue that run (metadist resume, --if_exists continue, "
            "Trainer.restore)"
        )

    def _has_own_config(self) -> bool:
        own = (self._config or "").encode()
        return (
            bool(own)
            and self.folder.size_bytes(CONFIG) == len(own)
            and self.folder.read(CONFIG, len(own)) == own
        )

    @contextmanager
    def locked(self, is_new: bool, say: Callable[[str], None]) -> Iterator[None]:
        """Within the block no other process may write to the folder.

        Args:
            is_new: Whether the run begins there.
            say: Shows a line to the user.
        """
        self._lock = RunLock(self.folder, say)
        self._lock.acquire()
        try:
            if is_new:
                self.check_new()  # another run may have begun and ended in the meantime
                if set(self.folder.names()) > {LOCK}:
                    say(f"beginning {self.uri} again, which holds no checkpoint")
            yield
        finally:
            self._lock.release()

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def write_config(self, make: Callable[[], str]) -> None:
        """Write config.yaml: the given text, or what `make` returns, unless a command wrote one."""
        if self._config is not None:
            self.folder.write(CONFIG, self._config.encode())
        elif CONFIG not in self.folder.names() or is_own(
            self.folder.read(CONFIG, MAX_CONFIG_BYTES).decode()
        ):
            self.folder.write(CONFIG, make().encode())

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and say so."""
        self._check_lock()
        name = self.store.save(checkpoint)
        self._report_abandoned(log.warning)
        self.events.write(
            "checkpoint_written",
            step=checkpoint.state.version,
            checkpoint=name,
            score=checkpoint.score,
        )
        self.upload()

    def abandon_newer(self, version: int, say: Callable[[str], None]) -> None:
        """Move away the checkpoints after the one that the run was told to go back to."""
        self.store.abandon(version)
        self._report_abandoned(say)

    def _report_abandoned(self, say: Callable[[str], None]) -> None:
        if moved := self.store.set_aside:
            say(f"moved away, of a branch that is abandoned: {', '.join(moved)}")
            self.events.write("branch_abandoned", checkpoints=[*moved])
            moved.clear()

    def write_artifacts(self, version: int, found: Any) -> None:
        """Write what a problem shows of this step; ValueError for what `artifacts` may not be."""
        if not isinstance(found, Mapping):
            raise ValueError(
                f"artifacts must return a dict of bytes by name, got {type(found).__name__}: "
                "return {} where there is nothing to show"
            )
        for name, data in found.items():
            if not (
                isinstance(name, str) and _ARTIFACT.fullmatch(name) and isinstance(data, bytes)
            ):
                raise ValueError(
                    "artifacts must be bytes by names of letters, digits and ._-, which begin with "
                    f"none of these signs, got {type(data).__name__} by the name {name!r}"
                )
        folder = self.folder / ARTIFACTS / name_of(version)
        for name, data in found.items():
            self._check_lock()
            folder.write(name, data)

    def upload(self) -> None:
        """Copy what has changed on the local side."""
        self._mirror.upload()
