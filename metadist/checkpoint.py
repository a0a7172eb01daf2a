"""Checkpoints: a folder per outer step at any fsspec URI, never half of one.

    step-00000100/tensors.safetensors   outer variable, state of optimiser and algorithm
    step-00000100/state.json            everything else
    step-00000100/manifest.json         sizes and SHA-256 of the two and of itself, written last

A folder whose manifest is missing, or does not fit the files, is not a checkpoint. Nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from metadist.outer import OuterState
from metadist.trees import Params

FORMAT = 2
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on exactly where it was.

    Args:
        state: the outer variable, its optimiser, its version, which leases are in it, and what
            the algorithm keeps.
        info: JSON data to go with it: seed, settings that must not change, ...
        score: of validation, larger is better; None if there was none.
    """

    state: OuterState
    info: dict[str, Any] = field(default_factory=dict)
    score: float | None = None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        uri: the folder: a local path or any fsspec URI.
        keep_last: how many of the newest stay, >= 1.
        keep_best: whether the one with the highest score stays too.
    """

    def __init__(self, uri: str, keep_last: int = 3, keep_best: bool = True) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self.uri = uri
        self._fs, self._root = fsspec.core.url_to_fs(uri)
        self._keep_last = keep_last
        self._keep_best = keep_best
        self.skipped: dict[str, str] = {}
        """Damaged checkpoints that the last `load` passed over, and why."""

    def names(self) -> list[str]:
        """The checkpoint folders, oldest first, damaged ones included."""
        if not self._fs.isdir(self._root):
            return []
        found = (
            str(path).rstrip("/").rpartition("/")[2]
            for path in self._fs.ls(self._root, detail=False)
        )
        return sorted(name for name in found if re.fullmatch(r"step-\d{8,}", name))

    def best(self) -> str | None:
        """The name of the good checkpoint with the highest score; None if none has a score."""
        scores = {name: manifest["score"] for name, manifest in self._manifests().items()}
        scored = [(score, name) for name, score in scores.items() if score is not None]
        return max(scored)[1] if scored else None

    def save(self, checkpoint: Checkpoint) -> str:
        """The name of the checkpoint, which is complete when this returns.

        A good checkpoint of the same step is left as it is.
        """
        name = f"step-{checkpoint.state.version:08d}"
        if name in self.names():
            if self._damage(name) is None:
                return name
            self._remove(name)
        files = {TENSORS: _tensors(checkpoint), STATE: _json(_state(checkpoint))}
        self._fs.makedirs(self._path(name), exist_ok=True)
        for file, data in files.items():
            self._write(self._path(name, file), data)
        manifest = {
            "format": FORMAT,
            "score": checkpoint.score,
            "files": {
                file: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for file, data in files.items()
            },
        }
        self._write(self._path(name, MANIFEST), _json({**manifest, "sha256": _digest(manifest)}))
        self._prune(name)
        return name

    def load(self, name: str | None = None) -> tuple[str, Checkpoint]:
        """(its name, the checkpoint): `name`, "best", or None for the newest good one.

        Raises:
            CheckpointError: there is none; or the one asked for by name is damaged.
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

    def _load(self, name: str) -> Checkpoint:
        data = {file: self._read(name, file) for file in (MANIFEST, TENSORS, STATE)}
        manifest = self._check(name, data)
        state = json.loads(data[STATE])
        try:
            tensors = safetensors.torch.load(data[TENSORS])
            outer: Params = {key: tensors["outer." + key] for key in state["outer"]}
            optimizer = {key: tensors["optimizer." + key] for key in state["optimizer"]}
            recursion = {key: tensors["recursion." + key] for key in state["recursion"]}
            states = {int(key): tensors[f"states.{key}"] for key in state["states"]}
            return Checkpoint(
                OuterState(
                    outer,
                    optimizer,
                    int(state["version"]),
                    int(state["applied_below"]),
                    tuple(map(int, state["applied"])),
                    recursion,
                    states,
                ),
                state["info"],
                manifest["score"],
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self._path(name)} is of another format: {error!r}"
            ) from error

    def _check(self, name: str, data: dict[str, bytes]) -> dict[str, Any]:
        """The manifest, if `data` are the files it lists."""
        where = self._path(name)
        try:
            manifest = json.loads(data[MANIFEST])
            version, listed, digest = manifest["format"], manifest["files"], manifest["sha256"]
            expected = {
                file: (listed[file]["size_bytes"], listed[file]["sha256"]) for file in listed
            }
            manifest["score"] = None if manifest["score"] is None else float(manifest["score"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {where} is damaged: {MANIFEST}: {error!r}"
            ) from error
        if version != FORMAT:
            raise CheckpointError(
                f"checkpoint {where} must be of format {FORMAT}, got {version!r}: "
                "load it with the version of metadist that wrote it"
            )
        if digest != _digest(manifest):
            raise CheckpointError(
                f"checkpoint {where} is damaged: {MANIFEST} must have SHA-256 {digest}, got "
                f"{_digest(manifest)}"
            )
        for file in (TENSORS, STATE):
            found = (len(data[file]), hashlib.sha256(data[file]).hexdigest())
            if expected.get(file) != found:
                raise CheckpointError(
                    f"checkpoint {where} is damaged: {file} must have (bytes, SHA-256) "
                    f"{expected.get(file)}, got {found}"
                )
        return manifest

    def _damage(self, name: str) -> CheckpointError | None:
        try:
            self._load(name)
        except CheckpointError as error:
            return error
        return None

    def _manifests(self) -> dict[str, dict[str, Any]]:
        """Of the checkpoints that have one; their files are not read."""
        found = {}
        for name in self.names():
            try:
                manifest = json.loads(self._read(name, MANIFEST))
                if manifest["sha256"] != _digest(manifest):
                    continue
                score = manifest["score"]
                manifest["score"] = None if score is None or math.isnan(score) else float(score)
            except (CheckpointError, KeyError, TypeError, ValueError):
                continue
            found[name] = manifest
        return found

    def _prune(self, saved: str) -> None:
        whole = list(self._manifests())
        # The one just saved too, which is not the newest after going back to an earlier one: of
        # the others only the manifests were looked at.
        keep = {saved, *whole[-self._keep_last :]}
        if self._keep_best:
            keep.add(self.best() or "")
        for name in whole:
            if name not in keep:
                self._remove(name)

    def _remove(self, name: str) -> None:
        # The manifest first: an interrupted removal must not leave what looks like a checkpoint.
        if self._fs.exists(self._path(name, MANIFEST)):
            self._fs.rm(self._path(name, MANIFEST))
        self._fs.rm(self._path(name), recursive=True)

    def _read(self, name: str, file: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._path(name, file)))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self._path(name)} is damaged: {file} cannot be read: {error}"
            ) from error

    def _write(self, path: str, data: bytes) -> None:
        with self._fs.open(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            if "file" in self._fs.protocol:
                os.fsync(stream.fileno())

    def _path(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))


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


def _tensors(checkpoint: Checkpoint) -> bytes:
    state = checkpoint.state
    groups: dict[str, Mapping[Any, Tensor]] = {
        "outer": state.outer,
        "optimizer": state.optimizer,
        "recursion": state.recursion,
        "states": state.states,
    }
    # Views of one flat vector share memory, which the format refuses.
    return safetensors.torch.save(
        {
            f"{group}.{name}": leaf.contiguous().clone()
            for group, leaves in groups.items()
            for name, leaf in leaves.items()
        }
    )


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    return {
        "outer": list(state.outer),  # in order: safetensors keeps none
        "optimizer": list(state.optimizer),
        "recursion": list(state.recursion),
        "states": list(state.states),
        "version": state.version,
        "applied_below": state.applied_below,
        "applied": list(state.applied),
        "info": checkpoint.info,
    }


def _digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own field for it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
