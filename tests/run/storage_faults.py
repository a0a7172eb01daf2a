"""An S3 server on this machine, and file systems that fail at one chosen operation."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from metadist.run import storage

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(the address of an S3 server, its process)."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class ForeignError(Exception):
    """No OSError, as the errors of many clients of object stores."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "read or write error": lambda: OSError(errno.EIO, "Input/output error"),
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "time-out": lambda: TimeoutError("timed out"),
    "error of a client": lambda: ForeignError("connection pool is closed"),
}


class Faults:
    """Counts the operations of a folder's storage and lets number `at` fail.

    Args:
        at: from 0.
        error: what is raised.
        dies: whether nothing works after it.
        half: what the failing operation has done: half of it, or nothing.
        lies: half of the data are written at that operation, and no error is raised.
    """

    def __init__(
        self, at: int, error: str, *, dies: bool = False, half: bool = False, lies: bool = False
    ) -> None:
        self.at, self.dies, self.half, self.lies = at, dies, half, lies
        self.error = ERRORS[error]
        self.count = 0
        self.struck = False

    def strikes(self) -> bool:
        """Whether the operation that begins now is to fail."""
        number, self.count = self.count, self.count + 1
        if number == self.at or (self.dies and number > self.at):
            self.struck = True
            return True
        return False

    def write(self, data: bytes, write: Callable[[bytes], Any]) -> Any:
        """Write, perhaps not all of it."""
        if not self.strikes():
            return write(data)
        if self.lies:
            return write(data[: len(data) // 2])
        if self.half and self.count == self.at + 1:
            write(data[: len(data) // 2])
        raise self.error()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call, or fail."""
        if self.strikes() and not self.lies:
            raise self.error()
        return function(*arguments, **options)

    @contextmanager
    def on(self, folder: storage.Folder) -> Iterator[Faults]:
        """Within the block they are those of `folder`."""
        fs = folder.fs
        with pytest.MonkeyPatch.context() as patch:
            folder.fs = FaultyFileSystem(fs, self)
            patch.setattr(storage, "os", FaultyOs(self))
            patch.setattr(storage, "open", self.open, raising=False)
            try:
                yield self
            finally:
                folder.fs = fs

    def open(self, path: Any, mode: str) -> Any:
        """As the built-in."""
        return FaultyStream(self.call(open, path, mode), self)


class FaultyOs:
    """The module `os` where a disk is concerned."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name not in ("mkdir", "open", "fsync", "replace", "unlink"):
            return value
        return lambda *arguments: self._faults.call(value, *arguments)


class FaultyStream:
    """A file that is written to."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self._stream = stream
        self._faults = faults

    def __enter__(self) -> FaultyStream:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> Any:
        return self._faults.write(data, self._stream.write)


class FaultyFileSystem:
    """A file system of fsspec."""

    def __init__(self, fs: Any, faults: Faults) -> None:
        self._fs = fs
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if name not in ("ls", "info", "cat_file", "makedirs", "rm"):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            faults = self._faults
            if name == "rm" and faults.half and faults.count == faults.at:
                found = self._fs.find(arguments[0])
                if len(found) > 1:
                    self._fs.rm(min(found))
            return faults.call(value, *arguments, **options)

        return call

    def pipe_file(self, path: str, data: bytes) -> Any:
        return self._faults.write(data, lambda part: self._fs.pipe_file(path, part))
