"""`Shelf`: snapshots of kept states on the driver's disk."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from metadist.cluster.actors.buffers import Array, read_only


class Shelf:
    """The states of tasks at some versions of x, in files of a temporary folder.

    They are mapped into memory and not read: the driver reads those that somebody looks at, and
    the kernel takes the pages back when it needs them. Writing to such a tensor changes no file.
    A tensor outlives its file.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="metadist-states-")
        self._by_version: dict[int, dict[int, Tensor]] = {}

    def __contains__(self, version: int) -> bool:
        return version in self._by_version

    def lay(self, version: int, states: Mapping[int, Tensor]) -> None:
        """Hold these tensors as the states at that version, all of them."""
        self._by_version[version] = dict(states)

    def mapped(self, version: int, index: int, array: Array) -> Tensor:
        """A tensor of the same values in a file."""
        folder = Path(self._folder.name) / str(version)
        folder.mkdir(exist_ok=True)
        path = folder / f"{index}.npy"
        path.unlink(missing_ok=True)  # a tensor may still be on the file of another branch
        np.save(path, array, allow_pickle=False)
        return read_only(np.load(path, mmap_mode="c", allow_pickle=False))

    def at(self, version: int) -> dict[int, Tensor]:
        """The states at that version."""
        return self._by_version[version]

    def keep_only(self, versions: Collection[int]) -> None:
        """Remove all others."""
        for version in [version for version in self._by_version if version not in versions]:
            del self._by_version[version]
            folder = Path(self._folder.name) / str(version)
            for path in folder.glob("*.npy"):
                path.unlink()

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()
