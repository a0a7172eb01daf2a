"""The files of a checkpoint: what is in each, as bytes.

    tensors.safetensors     outer variable, state of optimiser and algorithm
    tensors-1.safetensors   if a server of several shards wrote it: the same of its second shard,
                            and so on
    states-1.safetensors    if the kept states of tasks are large: that of one task; otherwise they
                            are in the first file
    state.json              everything else
    manifest.json           sizes and SHA-256 of these and of itself, written last

A leaf that lies in several shards has a flat piece in the file of each; all others have their name
and shape. It is loaded whole, whatever number of shards resumes from it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from metadist.outer import OuterState, shard_bounds
from metadist.trees import Params, num_elements

FORMAT = 3
READABLE = (2, FORMAT)
"""Format 2 is that of one shard."""
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
STATES = "states.safetensors"
LARGE_STATES_BYTES = 64 << 20
"""Kept states that have so many bytes together get a file each, so that no process that saves or
loads them has to hold them all in memory."""
MAX_MANIFEST_BYTES = 1 << 16

Malformed = (
    *(SafetensorError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""The exceptions that forged data raises; a RecursionError is a RuntimeError."""


class Manifest(NamedTuple):
    """The parts of a manifest that matter: (bytes, SHA-256) of each file, and the score."""

    files: dict[str, tuple[int, str]]
    score: float | None

    @property
    def state_files(self) -> list[str]:
        """The files of large kept states."""
        after = list(self.files).index(STATE) + 1
        return list(self.files)[after:]

    @classmethod
    def of(cls, tree: Any) -> Manifest:
        """The manifest in this JSON; raises one of `Malformed` if it is none."""
        listed, score = tree["files"], tree["score"]
        parts = itertools.takewhile(listed.__contains__, map(_part_name, itertools.count(1)))
        numbered = (_part_name(number, STATES) for number in itertools.count(1))
        names = [TENSORS, *parts, STATE, *itertools.takewhile(listed.__contains__, numbered)]
        return cls(
            {
                file: (operator.index(listed[file]["size_bytes"]), str(listed[file]["sha256"]))
                for file in names
            },
            None if score is None else float(score),
        )


def _part_name(number: int, first: str = TENSORS) -> str:
    stem, dot, suffix = first.partition(".")
    return f"{stem}-{number}{dot}{suffix}" if number else first


def tensor_files(state: OuterState) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of tensors, made one at a time for the sake of memory."""
    is_large = sum(leaf.nbytes for leaf in state.states.values()) >= LARGE_STATES_BYTES
    # One shard may hold what is not of one floating dtype, or no vectors.
    bounds = [(0, num_elements(state.outer))]
    if state.num_shards > 1:
        bounds = shard_bounds(bounds[0][1], state.num_shards)
    for number, (start, stop) in enumerate(bounds):
        tensors = {f"outer.{name}": leaf for name, leaf in _cut(state.outer, start, stop).items()}
        for group, leaves in (("optimizer", state.optimizer), ("recursion", state.recursion)):
            for name, leaf in leaves.items():
                if len(bounds) == 1 or (number == 0 and not leaf.ndim):
                    tensors[f"{group}.{name}"] = leaf
                elif leaf.ndim:
                    tensors[f"{group}.{name}"] = leaf[start:stop]
        if number == 0 and not is_large:
            tensors |= {f"states.{index}": leaf for index, leaf in state.states.items()}
        contiguous = {name: leaf.contiguous() for name, leaf in tensors.items()}
        # Of a state in one file nothing could be of another step.
        about = {"version": str(state.version)} if len(bounds) > 1 else None
        yield _part_name(number), safetensors.torch.save(contiguous, about)
    for number, (index, leaf) in enumerate(state.states.items() if is_large else (), start=1):
        data = safetensors.torch.save({f"states.{index}": leaf.contiguous()})
        yield _part_name(number, STATES), data


def step_of_part(data: bytes) -> str | None:
    """The step that the file of a shard says it is of; None if it says none."""
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return about.get("version")


def _cut(tree: Params, start: int, stop: int) -> Params:
    """The part of the concatenated leaves between the two: whole leaves and flat pieces."""
    found, offset = {}, 0
    for name, leaf in tree.items():
        first, last = max(0, start - offset), min(leaf.numel(), stop - offset)
        if (first, last) == (0, leaf.numel()):
            found[name] = leaf
        elif first < last:
            found[name] = leaf.reshape(-1)[first:last]
        offset += leaf.numel()
    return found


def _whole(parts: list[Params], key: str, shape: Sequence[int] = (-1,)) -> Tensor:
    """The leaf of which the parts have pieces, which are taken from them."""
    pieces = [part.pop(key) for part in parts if key in part]
    if not pieces:
        raise KeyError(key)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.reshape(-1) for piece in pieces]).reshape(shape)


def restored(tree: Any, parts: list[Params], kept: Params) -> OuterState:
    """The state of a checkpoint; raises one of `Malformed` if this is none.

    Args:
        tree: The content of `STATE`.
        parts: The tensors of each shard, which are taken out of it.
        kept: Those of large kept states.
    """
    if min([tree["applied_below"], *tree["applied"]]) < 0:
        raise ValueError("a lease has a negative number")
    shapes = tree["outer"]
    if isinstance(shapes, list):  # format 2, in which no leaf is in pieces
        shapes = dict.fromkeys(shapes, (-1,))
    return OuterState(
        outer={key: _whole(parts, f"outer.{key}", shape) for key, shape in shapes.items()},
        optimizer={key: _whole(parts, f"optimizer.{key}") for key in tree["optimizer"]},
        recursion={key: _whole(parts, f"recursion.{key}") for key in tree["recursion"]},
        states={int(key): _whole([*parts, kept], f"states.{key}") for key in tree["states"]},
        version=int(tree["version"]),
        applied_below=int(tree["applied_below"]),
        applied=tuple(map(int, tree["applied"])),
        num_shards=len(parts),
    )


def state_file(state: OuterState, info: dict[str, Any]) -> bytes:
    """The content of `STATE`."""
    return as_json(
        {
            # In order: safetensors keeps none.
            "outer": {name: list(leaf.shape) for name, leaf in state.outer.items()},
            "optimizer": list(state.optimizer),
            "recursion": list(state.recursion),
            "states": list(state.states),
            "version": state.version,
            "applied_below": state.applied_below,
            "applied": list(state.applied),
            "info": info,
        }
    )


def sha256(data: bytes) -> str:
    """The SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own field for it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()
