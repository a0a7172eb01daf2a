"""Checkpoints: a folder per outer step, `step-NNNNNNNN`, at any fsspec URI, never half of one.

checkpoint_files.py says which files are in it. A folder whose manifest is missing, or does not fit
the files, is not a checkpoint. Nothing is ever unpickled, no file is read that is longer than the
manifest says, and no name in a checkpoint is used as a path.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch

from metadist.checks.values import check
from metadist.outer import OuterState, differences
from metadist.run.checkpoint_files import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    READABLE,
    STATE,
    Malformed,
    Manifest,
    as_json,
    digest_of,
    restored,
    sha256,
    state_file,
    step_of_part,
    tensor_files,
)
from metadist.run.storage import Folder
from metadist.trees import Params


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to continue exactly where it was.

    Args:
        state: The outer variable, its optimiser, its version, which leases are in it, and what
            the algorithm keeps.
        info: JSON data to go with it: seed, settings that must not change, ...
        score: The score of validation, larger is better; None if there was none.
    """

    state: OuterState
    info: dict[str, Any] = field(default_factory=dict)
    score: float | None = None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        uri: The folder: a local path or any fsspec URI.
        keep_last: How many of the newest stay, >= 1.
        keep_best: Whether the one with the highest score stays too.
        keep_every: The checkpoints whose step is a multiple of it stay for good; None: none.
    """

    def __init__(
        self,
        uri: str,
        keep_last: int = 3,
        keep_best: bool = True,
        keep_every: int | None = None,
    ) -> None:
        check("keep_last", keep_last, is_integer=True, ge=1)
        check("keep_every", keep_every, is_integer=True, ge=1, none="")
        self.uri = uri
        self.folder = Folder(uri)
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._keep_every = keep_every
        self.skipped: dict[str, str] = {}
        """Damaged checkpoints that the last `load` passed over, and why."""
        self.set_aside: list[str] = []
        """Checkpoints of abandoned branches that this object moved away, as "folder/name"."""

    def names(self) -> list[str]:
        """The checkpoint folders, oldest first, damaged ones included.

        Raises:
            OSError: The folder cannot be listed.
        """
        names = self.folder.names(links=False)
        return sorted((n for n in names if re.fullmatch(r"step-\d{8,}", n, re.ASCII)), key=_step)

    def best(self) -> str | None:
        """The name of the good checkpoint with the highest score; None if none has a score."""
        return _best(self._manifests())

    def save(self, checkpoint: Checkpoint) -> str:
        """The name of the checkpoint, which is complete when this returns.

        A good checkpoint of the same state is left as it is, but for a score that it lacks; one
        of another state at the same step is moved away, see `set_aside`. Older ones are removed
        only after this one was read back.

        Raises:
            OSError: The storage failed; what was there before is there still.
            CheckpointError: What was read back is not what was written.
        """
        name = name_of(checkpoint.state.version)
        found = self._if_good(name)
        if found is not None:
            if not differences(found.state, checkpoint.state):
                if found.score is None and checkpoint.score is not None:
                    self._score(name, checkpoint.score)
                return name
            self._move_aside([name])
        # First, so that at no time it stands beside files that it does not belong to.
        self.folder.remove(f"{name}/{MANIFEST}")
        rest = state_file(checkpoint.state, checkpoint.info)
        listed = {}
        try:
            for file, data in itertools.chain(tensor_files(checkpoint.state), [(STATE, rest)]):
                self.folder.write(f"{name}/{file}", data)
                listed[file] = {"size_bytes": len(data), "sha256": sha256(data)}
            manifest = {"format": FORMAT, "score": checkpoint.score, "files": listed}
            self._write_manifest(name, manifest)
        except BaseException:
            # Half a checkpoint is useless, and the disk may be full.
            with suppress(OSError):
                self._remove(name)
            raise
        del data
        self._prune(name)
        return name

    def load(self, name: str | None = None) -> tuple[str, Checkpoint]:
        """(its name, the checkpoint): `name`, "best", or None for the newest good one.

        Raises:
            CheckpointError: There is none; or the one asked for by name is damaged.
        """
        self.skipped = {}
        if name == "best":
            name = self.best()
            if name is None:
                raise CheckpointError(
                    "checkpoint must be one of "
                    f"{self.names() or 'none'} in {self.uri}, got 'best': none was validated"
                )
        if name is not None:
            if name not in self.names():
                raise CheckpointError(
                    f"checkpoint must be one of {self.names() or 'none'} in {self.uri}, "
                    f"got {name!r}"
                )
            return name, self._load(name)
        for candidate in reversed(self.names()):
            try:
                return candidate, self._load(candidate)
            except CheckpointError as error:
                self.skipped[candidate] = str(error)
        damaged = "".join(f"\n  {reason}" for reason in self.skipped.values())
        raise CheckpointError(f"no good checkpoint in {self.uri}{damaged or ': it holds none'}")

    def is_whole(self, name: str) -> bool:
        """Whether the files of a checkpoint fit its manifest; reads them in blocks."""
        try:
            files = self._manifest(name).files
            return all(
                self.folder.size_bytes(f"{name}/{file}") == size
                and self.folder.sha256(f"{name}/{file}") == digest
                for file, (size, digest) in files.items()
            )
        except (OSError, ValueError):
            return False

    def _load(self, name: str) -> Checkpoint:
        manifest = self._manifest(name)
        rest = self._file(name, STATE, manifest)
        try:
            state = json.loads(rest)
            if name != name_of(state["version"]):
                raise ValueError(f"it holds step {state['version']}")
            if not isinstance(state["info"], dict):
                raise TypeError(f"info is {state['info']!r}")
            parts: list[Params] = []
            kept: Params = {}
            for file in manifest.files:
                if file in manifest.state_files:
                    kept |= self._mapped(name, file, manifest)
                elif file != STATE:
                    data = self._file(name, file, manifest)
                    parts.append(safetensors.torch.load(data))
                    if (step := step_of_part(data)) not in (None, str(state["version"])):
                        raise ValueError(f"{file} is of step {step}")
            return Checkpoint(restored(state, parts, kept), state["info"], manifest.score)
        except Malformed as error:
            raise CheckpointError(
                f"checkpoint {self.folder.path(name)} is of another format: {error!r}"
            ) from error

    def _manifest(self, name: str) -> Manifest:
        where = self.folder.path(name)
        data = self._read(name, MANIFEST, MAX_MANIFEST_BYTES)
        try:
            tree = json.loads(data)
            version, digest, found = tree["format"], tree["sha256"], digest_of(tree)
            is_known = version in READABLE
            manifest = Manifest.of(tree) if is_known and digest == found else None
        except Malformed as error:
            raise CheckpointError(
                f"checkpoint {where} is damaged: {MANIFEST}: {error!r}"
            ) from error
        if not is_known:
            raise CheckpointError(
                f"checkpoint {where} must be of format {FORMAT}, got {version!r}: "
                "load it with the version of metadist that wrote it"
            )
        if manifest is None:
            raise CheckpointError(
                f"checkpoint {where} is damaged: {MANIFEST} must have SHA-256 {digest}, got {found}"
            )
        return manifest

    def _file(self, name: str, file: str, manifest: Manifest) -> bytes:
        """A file of a checkpoint, if it is what the manifest says."""
        expected = manifest.files[file]
        data = self._read(name, file, expected[0])
        found = (len(data), sha256(data))
        if found != expected:
            raise self._damaged(name, file, expected, found)
        return data

    def _mapped(self, name: str, file: str, manifest: Manifest) -> Params:
        """The tensors of a file, if it is what the manifest says: mapped into memory, not read."""
        if self.folder.local is None:
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(self._file(name, file, manifest))
                copy.flush()
                return safetensors.torch.load_file(copy.name)
        expected, where = manifest.files[file], f"{name}/{file}"
        try:
            found = (self.folder.size_bytes(where), self.folder.sha256(where))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder.path(name)} is damaged: {file} cannot be read: {error}"
            ) from error
        if found != expected:
            raise self._damaged(name, file, expected, found)
        return safetensors.torch.load_file(self.folder.local / where)

    def _damaged(
        self, name: str, file: str, expected: tuple[int, str], found: tuple[int, str]
    ) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.folder.path(name)} is damaged: {file} must have (bytes, "
            f"SHA-256) {expected}, got {found}"
        )

    def _if_good(self, name: str) -> Checkpoint | None:
        """A checkpoint, if it is whole; raises OSError if the storage fails to say."""
        try:
            return self._load(name)
        except CheckpointError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            return None

    def _score(self, name: str, score: float | None) -> None:
        """Write the score into a manifest, which is replaced at once."""
        manifest = json.loads(self._read(name, MANIFEST, MAX_MANIFEST_BYTES))
        del manifest["sha256"]
        self._write_manifest(name, {**manifest, "score": score})

    def _write_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        signed = as_json({**manifest, "sha256": digest_of(manifest)})
        self.folder.write(f"{name}/{MANIFEST}", signed)

    def is_bare(self) -> bool:
        """Whether no checkpoint was ever complete here; half of a first one does not count."""
        return not any(MANIFEST in (self.folder / name).names() for name in self.folder.names())

    def newer(self, step: int) -> list[str]:
        """The checkpoints of later steps whose manifest is good, oldest first."""
        manifests = self._manifests()
        return [name for name, manifest in manifests.items() if manifest and _step(name) > step]

    def abandon(self, step: int) -> None:
        """Move the checkpoints of later steps to a folder of their own, see `set_aside`."""
        self._move_aside(self.newer(step))

    def remove_newer(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for name in reversed(self.newer(step)):
            self._remove(name)

    def _move_aside(self, names: Sequence[str]) -> None:
        if not names:
            return
        taken = [re.fullmatch(r"abandoned-(\d+)", name, re.ASCII) for name in self.folder.names()]
        number = 1 + max((int(found[1]) for found in taken if found), default=0)
        for name in reversed(names):  # the newest first: what stays is one branch at any time
            target = f"abandoned-{number}/{name}"
            self.folder.move(name, target, last=MANIFEST)
            self.set_aside.append(target)

    def _manifests(self) -> dict[str, Manifest | None]:
        """The good manifests by checkpoint, and None for checkpoints without any.

        Their other files are not looked at.
        """
        found: dict[str, Manifest | None] = {}
        for name in self.names():
            try:
                found[name] = self._manifest(name)
            except CheckpointError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    found[name] = None
        return found

    def _prune(self, saved: str) -> None:
        manifests = self._manifests()
        whole = [name for name, manifest in manifests.items() if manifest]
        # The one just saved too, which is not the newest after going back to an earlier one: of
        # the others only the manifests were looked at.
        keep = {saved, *whole[-self._keep_last :]}
        oldest = min(map(_step, keep))
        if self._keep_best:
            keep.add(_best(manifests) or saved)
        if self._keep_every is not None:
            keep |= {n for n in whole if _step(n) and _step(n) % self._keep_every == 0}
        doomed = [
            name
            for name, manifest in manifests.items()
            # Without a manifest: what an interrupted removal has left.
            if name not in keep and (manifest or _step(name) < oldest)
        ]
        if not doomed:
            return
        manifest = self._manifest(saved)
        for file in manifest.files:  # one at a time, for the sake of memory
            self._file(saved, file, manifest)
        for name in doomed:
            self._remove(name)

    def _remove(self, name: str) -> None:
        # The manifest first: an interrupted removal must not leave what looks like a checkpoint.
        self.folder.remove(f"{name}/{MANIFEST}")
        self.folder.remove(name)

    def _read(self, name: str, file: str, at_most: int) -> bytes:
        try:
            return self.folder.read(f"{name}/{file}", at_most)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder.path(name)} is damaged: {file} cannot be read: {error}"
            ) from error


def check_same_model(found: Params, expected: Params, where: str) -> None:
    """Raise CheckpointError unless the two have the same names, shapes and dtypes."""
    for name in [*expected, *found]:
        here = _signature(expected.get(name))
        there = _signature(found.get(name))
        if here != there:
            raise CheckpointError(
                f"checkpoint {where} is of another model: {name!r} must be {here} as in the "
                f"problem, got {there}; give the problem and algorithm it was trained with"
            )


def _signature(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    return f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}"


def _best(manifests: Mapping[str, Manifest | None]) -> str | None:
    scores = {name: manifest.score for name, manifest in manifests.items() if manifest}
    scored = [
        (score, _step(name), name)
        for name, score in scores.items()
        if score is not None and not math.isnan(score)
    ]
    return max(scored)[2] if scored else None


def name_of(step: int) -> str:
    """The name of the checkpoint of that step."""
    return f"step-{step:08d}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
