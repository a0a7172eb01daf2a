"""`RunLock`: at any time one process works on a run folder.

The file `lock.json` says who: host, process, since when, and the time of its last sign of life,
which it renews. A lock whose process is known to be gone is taken over at once; one of another
host, or from before this one was started again, when it gives no sign of life. On an object store,
where nothing is atomic, two that come in the same instant both find out before they write.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from metadist.run.files import LOCK
from metadist.run.processes import boot, is_alive, started
from metadist.run.storage import Folder

log = logging.getLogger("metadist.run.lock")

BEAT_S = 15.0
"""The seconds between signs of life."""
SILENT_S = 50.0
"""A process that gives no sign of life for so long is gone."""
OLD_S = 86400.0
"""A sign of life that is older needs no waiting for another: clocks differ, but not by a day."""
SETTLE_S = 0.2
"""How long after writing to an object store the lock is looked at again."""

_held: set[str] = set()
"""The tokens of the locks of this process."""


class RunLocked(ValueError):
    """Another process works on the run folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        host, pid: The process.
        machine: What tells apart machines, and containers on them, of the same name.
        started: When the process started, as the kernel has it: numbers of processes come again.
        token: The lock, of which one process may have had several.
        since, time: When it was locked, and the last sign of life (UTC).
    """

    host: str
    pid: int
    machine: str
    started: str
    token: str
    since: str
    time: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        pid, now = os.getpid(), _now()
        return cls(socket.gethostname(), pid, boot(), started(pid), uuid.uuid4().hex, now, now)

    @classmethod
    def of(cls, data: bytes) -> Holder:
        """The holder in the file; ValueError if it is damaged."""
        try:
            tree = json.loads(data)
            holder = cls(**{name: str(tree[name]) for name in cls.__annotations__})  # type: ignore[arg-type]
            datetime.fromisoformat(holder.time)
            return replace(holder, pid=int(holder.pid))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{LOCK} is damaged: {error!r}") from error

    def is_alive(self) -> bool | None:
        """Whether the process is there; None if that cannot be seen from here."""
        if (self.host, self.machine) != (socket.gethostname(), boot()):
            return None
        if self.pid == os.getpid() and self.started == started(self.pid):
            return self.token in _held
        return is_alive(self.pid, self.started)

    @property
    def age_s(self) -> float:
        """Seconds since the last sign of life; by two clocks, if it is of another host."""
        seen = datetime.fromisoformat(self.time)
        return (datetime.now(timezone.utc) - seen).total_seconds()


def holder_of(folder: Folder) -> Holder | None:
    """Who works on a run folder, or did when it was killed; None if nobody, or nobody can say."""
    data = _read(folder)
    with suppress(ValueError):
        return None if data is None else Holder.of(data)
    return None


class RunLock:
    """The lock of a run folder, for one process.

    Args:
        folder: The run folder.
        say: Shows a line to the user.
    """

    def __init__(self, folder: Folder, say: Callable[[str], None] = log.info) -> None:
        self._folder = folder
        self._say = say
        self._holder: Holder | None = None
        self._stop = threading.Event()
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Lock the folder.

        Raises:
            RunLocked: Another process is at work on it.
        """
        silent = self._await_silence()
        holder = Holder.here()
        if self._folder.local is not None:
            self._made = _missing(self._folder.local)
            self._folder.local.mkdir(parents=True, exist_ok=True)
        _held.add(holder.token)
        try:
            with _alone(self._folder):
                self._check_free(silent)
                self._write(holder)
            if self._folder.local is None:
                time.sleep(SETTLE_S)
            found = holder_of(self._folder)
            if found is None or found.token != holder.token:
                raise self._locked(found)
        except BaseException:
            _held.discard(holder.token)
            raise
        self._holder = holder
        self._stop.clear()
        threading.Thread(target=self._beat, name="metadist-lock", daemon=True).start()

    def check(self) -> None:
        """Raise RunLocked if another process has taken the lock over."""
        found = None
        with suppress(OSError):
            found = holder_of(self._folder)
        if self._holder and found and found.token != self._holder.token:
            raise self._locked(found)

    def release(self) -> None:
        """Unlock the folder, and remove it if it was made for the lock and is empty."""
        if self._holder is None:
            return
        self._stop.set()
        with suppress(OSError), _alone(self._folder):
            found = holder_of(self._folder)
            if found is not None and found.token == self._holder.token:
                self._folder.remove(LOCK)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()
        _held.discard(self._holder.token)
        self._holder = None

    def _check_free(self, silent: bytes | None) -> None:
        data = _read(self._folder)
        holder = holder_of(self._folder)
        is_alive = holder.is_alive() if holder else None
        if data is not None and (is_alive or (is_alive is None and data != silent)):
            raise self._locked(holder)
        if holder is not None:
            self._say(
                f"taking over from process {holder.pid} on {holder.host}, which is gone "
                f"(it worked on {self._folder.uri} since {holder.since})"
            )

    def _await_silence(self) -> bytes | None:
        """The lock of a process of which nothing is known, when it has been silent for long."""
        data = _read(self._folder)
        holder = holder_of(self._folder)
        if data is None or (holder and (holder.is_alive() is not None or holder.age_s > OLD_S)):
            return data
        who = f"process {holder.pid} on {holder.host}" if holder else "somebody"
        self._say(f"{self._folder.uri} is locked by {who}: waiting {SILENT_S:g} s for its death")
        deadline = time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_S / 4))
            now = _read(self._folder)
            if now is None:
                return None
            if now != data:
                raise self._locked(holder_of(self._folder))
        return data

    def _locked(self, holder: Holder | None) -> RunLocked:
        who = "another process works"
        if holder is not None:
            who = (
                f"process {holder.pid} on {holder.host} works since {holder.since} (last sign of "
                f"life {holder.time})"
            )
        return RunLocked(
            f"run_dir must be free, got {self._folder.uri!r}, on which {who}: wait for it, stop "
            f"it, or choose another folder. If it is surely gone, remove {self._folder.path(LOCK)}"
        )

    def _write(self, holder: Holder) -> None:
        self._folder.write(LOCK, (json.dumps(asdict(holder), indent=1) + "\n").encode())

    def _beat(self) -> None:
        holder, stop = self._holder, self._stop
        while holder is not None and not stop.wait(BEAT_S):
            with suppress(OSError):  # a disk that fails now may be there again next time
                found = holder_of(self._folder)
                if (found is None or found.token == holder.token) and not stop.is_set():
                    self._write(replace(holder, time=_now()))


@contextmanager
def _alone(folder: Folder) -> Iterator[None]:
    """Within the block no other process of this machine is in it."""
    if folder.local is None:
        yield
        return
    import fcntl

    number = os.open(folder.local, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks do not lock folders: then we look twice
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _read(folder: Folder) -> bytes | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        return folder.read(LOCK, at_most=1 << 16)
    return None


def _missing(folder: Path) -> list[Path]:
    """The folders on the path that are not there, the deepest first."""
    absent = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        absent.append(path)
    return absent


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
