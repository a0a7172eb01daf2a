"""Folders at any fsspec URI: whole files go in, whole files come out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from metadist.run.uris import check_no_secret, tidy

log = logging.getLogger("metadist.run.storage")


class Folder:
    """A folder; a file in it is named by its path relative to the folder.

    Listings are never taken from a cache: another process may have written.

    Args:
        uri: a local path or any URI that fsspec knows.

    Raises:
        ValueError: Fsspec does not know the URI or lacks a package for it, or it holds a secret.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        check_no_secret(self.uri)
        try:
            self.fs, root = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"a folder must be a local path or a URI that fsspec can open, got {self.uri!r}: "
                f"{error}"
            ) from error
        self.root = tidy(root) if root.strip("/") else ""
        self.local = (
            Path(root) if isinstance(self.fs, fsspec.get_filesystem_class("file")) else None
        )
        """Its path if it is a folder of this machine."""

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def path(self, name: str) -> str:
        """The path of a file, as the file system has it."""
        return f"{self.root}/{name}"

    def names(self, links: bool = True) -> list[str]:
        """The names in the folder, with or without links; empty if it is not there.

        Raises:
            OSError: It cannot be listed.
        """
        try:
            with _os_errors(f"{self.root} cannot be listed"):
                self.fs.invalidate_cache()
                found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        shown = [item for item in found if links or not item.get("islink")]
        paths = [str(item["name"]).rstrip("/") for item in shown]
        # The listing of a file is itself.
        return sorted(path.rpartition("/")[2] for path in paths if path != self.root)

    def size_bytes(self, name: str) -> int:
        """The size of a plain file.

        Raises:
            FileNotFoundError: It is not there.
            OSError: It cannot be looked at.
            ValueError: It is a link, a pipe or a folder.
        """
        with _os_errors(f"{self.path(name)} cannot be looked at"):
            self.fs.invalidate_cache()
            info = self.fs.info(self.path(name))
        if info["type"] != "file" or info.get("islink"):
            raise ValueError(f"{self.path(name)} must be a plain file")
        return int(info["size"] or 0)

    def read(self, name: str, at_most: int) -> bytes:
        """The content of a plain file of no more than `at_most` bytes.

        Raises:
            FileNotFoundError: It is not there.
            OSError: It cannot be read.
            ValueError: It is longer, or no plain file.
        """
        size = self.size_bytes(name)
        if size > at_most:
            raise ValueError(f"{self.path(name)} must have at most {at_most} bytes, got {size}")
        with _os_errors(f"{self.path(name)} cannot be read"):
            return bytes(self.fs.cat_file(self.path(name)))

    def tail(self, name: str, at_most: int) -> tuple[bytes, int]:
        """(the last bytes of a plain file, the number of those before them); raises as `read`."""
        before = max(0, self.size_bytes(name) - at_most)
        with _os_errors(f"{self.path(name)} cannot be read"):
            return bytes(
                self.fs.cat_file(self.path(name), start=before, end=before + at_most)
            ), before

    def sha256(self, name: str) -> str:
        """The SHA-256 of a plain file, which is read in blocks."""
        with _os_errors(f"{self.path(name)} cannot be read"), self.fs.open(self.path(name)) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Make the file `data`; where this fails, it is what it was.

        This holds on disks, which have the data when this returns, and on object stores. A file
        system that does neither may keep a part of it.
        """
        path = self.path(name)
        with _os_errors(f"{path} cannot be written"):
            if self.local is not None:
                _write_local(self.local / name, data)
                return
            try:
                self.fs.pipe_file(path, data)
            except FileNotFoundError:  # not an object store: folders are made before files
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; no error if it is not there."""
        with suppress(FileNotFoundError), _os_errors(f"{self.path(name)} cannot be removed"):
            self.fs.invalidate_cache()
            self.fs.rm(self.path(name), recursive=True)

    def move(self, source: str, target: str, last: str) -> None:
        """Move a folder of files to a place that does not exist.

        Where this takes several steps, the file `last` is written last and removed first.
        """
        if self.local is not None:
            with _os_errors(f"{self.path(source)} cannot be moved"):
                _make_local((self.local / target).parent)
                os.rename(self.local / source, self.local / target)
                _sync_local((self.local / source).parent)
            return
        names = sorted((self / source).names(), key=lambda name: (name == last, name))
        for name in names:
            data = self.read(f"{source}/{name}", self.size_bytes(f"{source}/{name}"))
            self.write(f"{target}/{name}", data)
        self.remove(f"{source}/{last}")
        self.remove(source)

    def check_writable(self) -> None:
        """Raise ValueError unless files can be made here; leaves none."""
        try:
            if self.local is not None:
                _try_local(self.local)
                return
            # fsspec would make a bucket of that name.
            bucket = self.root.partition("/")[0]
            if not self.fs.root_marker and not self.fs.exists(bucket):
                raise FileNotFoundError(f"{bucket!r} is not there or cannot be looked at")
            name = f".metadist-{uuid.uuid4().hex}"
            self.write(name, b"")
            self.remove(name)
        except OSError as error:
            raise ValueError(
                f"run_dir must be a folder that can be written to, got {self.uri!r}: "
                f"{error.strerror or error}; choose another"
            ) from error


class Mirror:
    """The local side of a `Folder`, for files that grow.

    A local folder is its own; of another one it is a temporary folder, whose files are copied to
    it by `upload`.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._sent: dict[str, tuple[int, int]] = {}
        if folder.local is not None:
            self.path = folder.local
            return
        self.path = Path(tempfile.mkdtemp(prefix="metadist-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def fetch(self, name: str) -> None:
        """Have the file as it is in the folder, to append to it."""
        if self._folder.local is None:
            with suppress(FileNotFoundError):
                (self.path / name).write_bytes(self._folder.read(name, at_most=1 << 30))

    def upload(self) -> None:
        """Copy what has changed. A failure is logged, and made good by the next call."""
        if self._folder.local is not None:
            return
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            try:
                stat = path.stat()
                if not path.is_file() or self._sent.get(name) == (stat.st_size, stat.st_mtime_ns):
                    continue
                self._folder.write(name, path.read_bytes())
            except Exception:  # a failed upload must not stop training
                log.exception("cannot copy %s to %s", name, self._folder.uri)
                return
            self._sent[name] = (stat.st_size, stat.st_mtime_ns)


@contextmanager
def _os_errors(what: str) -> Iterator[None]:
    """File systems have exceptions of their own: within the block they become an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{what}: {error!r}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON to a path or URI so that the file is either the old one or the whole new one."""
    check_no_secret(str(path))
    parent, slash, name = str(path).rpartition("/")
    Folder(parent or slash or ".").write(name, (json.dumps(value, indent=1) + "\n").encode())


def _write_local(path: Path, data: bytes) -> None:
    _make_local(path.parent)
    # A name of its own, as several processes may fetch the same data at once.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    _sync_local(path.parent)


def is_part(name: str) -> bool:
    """Whether a file of that name is half of one, left by a process that was killed."""
    return name.startswith(".") and name.endswith(".part")


def _make_local(folder: Path) -> None:
    if not os.path.isdir(folder):
        _make_local(folder.parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
        _sync_local(folder.parent)


def _sync_local(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _try_local(folder: Path) -> None:
    existing = folder
    # Not Path.exists, which raises where a folder above may not be entered.
    while not os.path.exists(existing):
        existing = existing.parent
    with tempfile.TemporaryFile(dir=existing):
        pass
