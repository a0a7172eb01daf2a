"""Rows of tokens in files that are mapped into memory, with an index beside them.

Shape letters: n rows, L tokens of a row.

    index.json        what is there, and a sha256 of every file
    train.ids         the rows of all sources, one source after another, (n, L)
    train.mask        bool (n, L), where rows are padded
    train.labels      int32 (n, L), where the tokens to predict are others than the tokens
    validation.*, test.*
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import require_integer
from metadist.tasks.language.tokenizers import Tokenizer

INDEX, FORMAT = "index.json", 1
TRAIN, VALIDATION, TEST = "train", "validation", "test"
IGNORED = -100
"""The label of a token that no loss counts, as in torch and transformers."""


class Row(NamedTuple):
    """A row before it is written.

    Args:
        ids: int64, shape (L,).
        mask: bool, shape (L,); None: no padding.
        labels: int64, shape (L,); None: the tokens themselves.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None
    labels: NDArray[np.int64] | None = None


KINDS = {"ids": None, "mask": np.dtype(np.bool_), "labels": np.dtype(np.int32)}
TORCH = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32, "bool": torch.bool}


def packed(texts: Iterable[NDArray[np.int64]], length: int, end: int | None) -> Iterator[Row]:
    """Rows that hold one text after another, each with its end; what fills no row is left out."""
    left = np.zeros(0, dtype=np.int64)
    after = np.array([] if end is None else [end], dtype=np.int64)
    for ids in texts:
        left = np.concatenate([left, ids, after])
        whole = len(left) // length * length
        for row in left[:whole].reshape(-1, length):
            yield Row(row)
        left = left[whole:]


def padded(
    examples: Iterable[tuple[NDArray[np.int64], NDArray[np.int64] | None]], length: int, pad: int
) -> Iterator[Row]:
    """A row for each example (tokens, labels), cut at `length` tokens, or filled up to them."""
    for ids, labels in examples:
        mask = np.arange(length) < len(ids)
        filled = np.full(length, pad, dtype=np.int64)
        filled[mask] = ids[:length]
        if labels is not None:
            targets = np.full(length, IGNORED, dtype=np.int64)
            targets[mask] = labels[:length]
            yield Row(filled, mask, targets)
        else:
            yield Row(filled, mask)


class Writer:
    """Writes a folder of token files; it is there whole or not at all.

    Args:
        folder: The folder.
        tokenizer: Of which the tokens are.
        length: L.
        recipe: What the tokens were made from, by which a later call knows them again; {}: nothing
            tells.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, length: int, recipe: dict[str, Any]
    ) -> None:
        require_integer("length", length, 2)
        self._folder = folder
        self._partly = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        self._vocabulary = tokenizer.vocabulary
        names = [name for name in ("uint8", "uint16") if tokenizer.vocabulary <= _room(name)]
        self._dtype = names[0] if names else "int32"
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "length": length,
            "dtype": self._dtype,
            "vocabulary": tokenizer.vocabulary,
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.digest},
            "recipe": recipe,
            "files": {},
            "sources": {},
        }

    def __enter__(self) -> Writer:
        self._partly.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partly, ignore_errors=True)

    def write(self, part: str, sources: Iterable[tuple[str, Iterable[Row]]]) -> None:
        """Write all rows of a part, source by source.

        Raises:
            ValueError: A source without a row, a token outside the vocabulary, an example of which
                no token is predicted.
        """
        files: dict[str, _File] = {}
        try:
            for name, rows in sources:
                count = 0
                for row in rows:
                    where = f"row {count} of source {name!r}" if part == TRAIN else f"row {count}"
                    self._check(row, f"{where} ({part})")
                    columns = {
                        kind: column for kind, column in row._asdict().items() if column is not None
                    }
                    if files and files.keys() != columns.keys():
                        raise ValueError(
                            f"all rows of {part} must have {', '.join(files)}, got "
                            f"{', '.join(columns)} in {where}"
                        )
                    for kind, column in columns.items():
                        if kind not in files:
                            files[kind] = _File(self._partly / f"{part}.{kind}")
                        files[kind].add(column.astype(KINDS[kind] or self._dtype))
                    count += 1
                if not count:
                    raise ValueError(
                        f"{f'source {name!r}' if part == TRAIN else part} must have at least "
                        f"{self._index['length']} tokens, a row of them, got fewer: give it more "
                        "text, lower length, or pass pack=False"
                    )
                if part == TRAIN:
                    self._index["sources"][name] = count
        finally:
            for kind, file in files.items():
                self._index["files"][f"{part}.{kind}"] = file.close()

    def _check(self, row: Row, where: str) -> None:
        low, high = int(row.ids.min()), int(row.ids.max())
        if low < 0 or high >= self._vocabulary:
            raise ValueError(
                f"tokens must be 0 .. {self._vocabulary - 1}, got {low} .. {high} in {where}: the "
                "vocabulary is larger than was said, or the ids are of another tokenizer"
            )
        if row.labels is not None:
            told = row.labels[row.labels != IGNORED]
            if len(told) and (told.min() < 0 or told.max() >= self._vocabulary):
                raise ValueError(
                    f"labels must be 0 .. {self._vocabulary - 1}, or {IGNORED} where none is "
                    f"predicted, got {told.min()} .. {told.max()} in {where}: they are tokens of "
                    "the vocabulary"
                )
        counted = row.ids if row.labels is None else row.labels
        is_told = counted[1:] != IGNORED
        if row.mask is not None:
            is_told = is_told & row.mask[1:]
        if not is_told.any():
            raise ValueError(
                f"every example must have a token to predict, got none after the first in {where} "
                f"(empty, or all labels {IGNORED}): leave it out"
            )

    def _finish(self) -> None:
        text = json.dumps(self._index, indent=1) + "\n"
        (self._partly / INDEX).write_text(text)
        if not self._folder.exists() or not any(self._folder.iterdir()):
            if self._folder.exists():
                self._folder.rmdir()
            self._partly.rename(self._folder)
            return
        there = read_index(self._folder)
        if {**there, "recipe": None} != {**self._index, "recipe": None}:
            raise ValueError(_other(self._folder, there))


def _other(folder: Path, there: dict[str, Any]) -> str:
    return (
        f"folder must be a new one, or hold these very tokens, got {str(folder)!r} with others "
        f"({there['tokenizer']['name']}, length {there['length']}, sources "
        f"{', '.join(there['sources'])}): name another folder, or delete it"
    )


def known(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds what this recipe makes.

    Raises:
        ValueError: It holds something else.
    """
    if not (folder / INDEX).exists():
        return False
    there = read_index(folder)
    if there["recipe"] and there["recipe"] != recipe:
        raise ValueError(_other(folder, there))
    return bool(there["recipe"])


def _room(dtype: str) -> int:
    return int(np.iinfo(dtype).max) + 1


class _File:
    """A file that is written row by row, with the sha256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0

    def add(self, values: NDArray[Any]) -> None:
        content = values.tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._size += len(content)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self._size, "sha256": self._sha256.hexdigest()}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of token files.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    try:
        found = json.loads((folder / INDEX).read_text())
        if not isinstance(found, dict) or found["format"] != FORMAT:
            raise ValueError("another format")
    except OSError as error:
        raise ValueError(
            f"folder must hold token files on host {socket.gethostname()}, got {str(folder)!r} "
            f"without a readable {INDEX}: make it with TokenSources.from_text, put it where every "
            "machine sees it (a shared file system), or copy it there under the same path"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{INDEX} must be as TokenSources wrote it, got {str(folder / INDEX)!r} on host "
            f"{socket.gethostname()} with {error}: write the folder again"
        ) from error
    return found


def check_files(folder: Path, index: dict[str, Any], whole: bool) -> None:
    """Raise ValueError for a file that is missing or damaged; `whole`: all bytes are looked at."""
    for name, expected in index["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "none"
            raise ValueError(_damaged(path, f"{expected['bytes']} bytes", got))
        if whole:
            hasher = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    hasher.update(piece)
            if (digest := hasher.hexdigest()) != expected["sha256"]:
                raise ValueError(_damaged(path, f"sha256 {expected['sha256']}", digest))


def _damaged(path: Path, expected: str, got: str) -> str:
    return (
        f"{path} on host {socket.gethostname()} must have {expected}, as {INDEX} says, got {got}: "
        "the file is damaged; copy or write the folder again"
    )


def mapped(folder: Path, index: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The columns of a part by kind, (n, L) each; a row is read from the disk when it is used."""
    columns = {}
    for kind, dtype in KINDS.items():
        if (name := f"{part}.{kind}") in index["files"]:
            stored = np.dtype(index["dtype"]) if dtype is None else dtype
            size = index["files"][name]["bytes"] // stored.itemsize
            flat = torch.from_file(
                str(folder / name), shared=False, size=size, dtype=TORCH[stored.name]
            )
            columns[kind] = flat.view(-1, index["length"])
    return columns
