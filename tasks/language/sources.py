"""`TokenSources`: texts of several sources as rows of tokens, and a text to validate on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import require_integer
from metadist.problem import Problem
from metadist.task import Batch, Task, stay_on_host
from metadist.tasks.fixed import metrics_on
from metadist.tasks.language.token_files import (
    IGNORED,
    TEST,
    TRAIN,
    VALIDATION,
    Row,
    Writer,
    check_files,
    known,
    mapped,
    packed,
    padded,
    read_index,
)
from metadist.tasks.language.tokenizers import Tokenizer, open_tokenizer
from metadist.trees import Params

Ids = Any
"""Rows of token ids: an array (n, L), or a sequence of sequences of at most L."""

PIECE = 1 << 20
"""Characters of a file that are tokenized at once, and the next line end."""


class TokenSources:
    """A sampler of language-model tasks: rows of tokens of several sources, and of a target text.

    The support set holds the rows of all sources, the query set those of the validation text. The
    tokens stay in files that are mapped into memory: a mini-batch reads its own rows, a pickle
    holds the path alone.

        data = TokenSources.from_text({"news": "news.txt", "web": "web.txt"},
                                      validation="target.txt", tokenizer="gpt2", length=1024,
                                      folder="tokens")

    Examples have the fields `ids` (n, L), `source` (n,) in the support set, and where they are
    padded `mask` (n, L), where other tokens than the next ones are predicted `labels` (n, L).

    With one task, a `meta_batch_size` of K trains K inner models that draw mini-batches of their
    own; with `num_tasks` = K each of K inner models has its own share of the rows.

    Args:
        folder: The folder that a `from_...` wrote; every machine must see it under this path.
        num_tasks: Into how many tasks the rows are dealt, >= 1.
        check: Whether all bytes are compared with their sha256 when the folder is opened, at the
            speed of the disk; False: the sizes of the files are.

    Raises:
        ValueError: No such folder on this host, a file that is missing or damaged, fewer rows of a
            source than tasks.
    """

    def __init__(self, folder: str | Path, num_tasks: int = 1, check: bool = True) -> None:
        require_integer("num_tasks", num_tasks, 1)
        self.folder, self.num_tasks, self.check = str(Path(folder).absolute()), num_tasks, check
        index = read_index(Path(self.folder))
        check_files(Path(self.folder), index, check)
        self.sources: dict[str, int] = index["sources"]
        """The rows of each source by name."""
        self.length: int = index["length"]
        """L, the tokens of a row."""
        self.vocabulary: int = index["vocabulary"]
        """The size of the tokenizer's vocabulary."""
        self.tokenizer: str = index["tokenizer"]["name"]
        if min(self.sources.values()) < num_tasks:
            raise ValueError(
                f"num_tasks must be <= the rows of the smallest source "
                f"({min(self.sources.values())}), got {num_tasks}"
            )
        train = mapped(Path(self.folder), index, TRAIN)
        counts = torch.tensor(list(self.sources.values()))
        source = torch.arange(len(counts)).repeat_interleave(counts)
        self._train = _batch({**train, "source": source})
        self._validation = _batch(mapped(Path(self.folder), index, VALIDATION))
        test = mapped(Path(self.folder), index, TEST)
        self.test = _batch(test) if test else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.num_tasks, self.check)

    @property
    def repeats(self) -> bool:
        """An outer step may have each task several times, with other draws."""
        return True

    def sample(self, index: int) -> Task:
        """The task at `index`, modulo their number."""
        part = index % self.num_tasks
        support = self._train
        if self.num_tasks > 1:
            # Every K-th row: each task has as much of each source, give or take a row.
            support = _batch(
                {
                    name: tensor[part :: self.num_tasks]
                    for name, tensor in zip(support.names, support.tensors, strict=True)
                }
            )
        return Task(support, self._validation, index)

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Loss, token accuracy and perplexity on the test text, if there is one."""
        if self.test is None:
            return {}
        found = metrics_on(problem, outer, inner, self.test)
        return {**found, "test_perplexity": float(np.exp(found["test_loss"]))}

    def __repr__(self) -> str:
        sources = ", ".join(f"{name}: {count}" for name, count in self.sources.items())
        return f"TokenSources({self.folder!r}, {self.length} tokens a row, rows {{{sources}}})"

    @classmethod
    def from_text(
        cls,
        sources: Mapping[str, str | Path],
        validation: str | Path,
        tokenizer: str = "bytes",
        length: int = 1024,
        folder: str | Path = "tokens",
        *,
        test: str | Path | None = None,
        num_tasks: int = 1,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> TokenSources:
        """The rows of text files, written to `folder` unless they are there already.

        Texts are packed: one after another, cut into rows of `length`; what fills no row is left
        out.

        Args:
            sources: A text file, or a folder with a .txt file for each text, by name of the source.
            validation: The text, or folder of texts, that the outer loss is taken on.
            tokenizer: "bytes" (UTF-8, 256 tokens, no dependency), or a name or path of Hugging
                Face.
            length: Tokens of a row, >= 2.
            folder: Where the token files go; created.
            test: A text for `solution_metrics`.
            num_tasks: See `TokenSources`.
            revision: That of the tokenizer, a tag or commit.
            local_files_only: Whether to look in the cache only.

        Raises:
            ValueError: A missing file, one that is not UTF-8, an empty source, a folder with other
                tokens.
        """
        _require_sources(sources)
        texts = {name: _files(name, path) for name, path in sources.items()}
        held_out = {VALIDATION: _files("validation", validation)}
        if test is not None:
            held_out[TEST] = _files("test", test)
        found = open_tokenizer(tokenizer, revision, local_files_only)
        recipe = {
            "tokenizer": found.digest,
            "length": length,
            "texts": {
                name: [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
                for name, files in {**texts, **{f"({k})": v for k, v in held_out.items()}}.items()
            },
        }
        if not known(Path(folder), recipe):
            with Writer(Path(folder).absolute(), found, length, recipe) as writer:
                writer.write(
                    TRAIN, ((n, _packed_files(f, found, length)) for n, f in texts.items())
                )
                for part, files in held_out.items():
                    writer.write(part, [(part, _packed_files(files, found, length))])
        return cls(folder, num_tasks)

    @classmethod
    def from_texts(
        cls,
        sources: Mapping[str, Iterable[str]],
        validation: Iterable[str],
        tokenizer: str = "bytes",
        length: int = 1024,
        folder: str | Path = "tokens",
        *,
        test: Iterable[str] | None = None,
        pack: bool = True,
        pad: int | None = None,
        num_tasks: int = 1,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> TokenSources:
        """The rows of texts that lists or generators give; each is gone through once.

        Args:
            sources: The texts of each source by its name.
            validation: The texts that the outer loss is taken on.
            tokenizer: See `from_text`.
            length: Tokens of a row, >= 2.
            folder: Where the token files go.
            test: Texts for `solution_metrics`.
            pack: True: texts follow one another in the rows, each with the tokenizer's end of text.
                False: each text is an example of its own, cut at `length` and padded up to it.
            pad: The padding token; None: that of the tokenizer.
            num_tasks: See `TokenSources`.
            revision: That of the tokenizer.
            local_files_only: Whether to look in the cache only.

        Raises:
            ValueError: As for `from_text`; pack=False without a padding token.
        """
        _require_sources(sources)
        for name, given in {**sources, f"({VALIDATION})": validation, f"({TEST})": test}.items():
            if isinstance(given, str | bytes | os.PathLike):
                raise ValueError(
                    f"texts of {name} must be a list or generator of texts, got {given!r:.60}: its "
                    "letters are no texts; put it in a list, or files into TokenSources.from_text"
                )
        found = open_tokenizer(tokenizer, revision, local_files_only)
        fill = found.pad if pad is None else pad
        if not pack and fill is None:
            raise ValueError(
                f"pad must be a token with pack=False, got None, and {tokenizer!r} has no padding "
                "token: name one that a mask may cover, such as its end of text "
                f"(pad={found.end}), or pack the texts"
            )

        def rows(texts: Iterable[str]) -> Iterator[Row]:
            ids = (found.encode(text) for text in texts)
            if pack:
                return packed(ids, length, found.end)
            assert fill is not None
            after = [] if found.end is None else [found.end]
            return padded(((np.append(i, after).astype(np.int64), None) for i in ids), length, fill)

        with Writer(Path(folder).absolute(), found, length, {}) as writer:
            writer.write(TRAIN, ((name, rows(texts)) for name, texts in sources.items()))
            writer.write(VALIDATION, [(VALIDATION, rows(validation))])
            if test is not None:
                writer.write(TEST, [(TEST, rows(test))])
        return cls(folder, num_tasks)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        validation: Any,
        tokenizer: str = "bytes",
        length: int = 1024,
        folder: str | Path = "tokens",
        *,
        test: Any = None,
        text: str = "text",
        source: str = "source",
        **options: Any,
    ) -> TokenSources:
        """The rows of a `datasets.Dataset`, whose column `source` names the source of each text.

        Args:
            dataset: With the columns `text` and `source`.
            validation: A data set with the column `text`.
            tokenizer: See `from_text`.
            length: Tokens of a row, >= 2.
            folder: Where the token files go.
            test: Another one, for `solution_metrics`.
            text: The name of the column of texts.
            source: The name of the column of sources.
            **options: Those of `from_texts`.

        Raises:
            ValueError: A missing column; otherwise as for `from_texts`.
        """
        for field, found, columns in (
            ("dataset", dataset, (text, source)),
            ("validation", validation, (text,)),
            *([("test", test, (text,))] if test is not None else []),
        ):
            missing = sorted(set(columns) - set(found.column_names))
            if missing:
                raise ValueError(
                    f"{field} must have the columns {', '.join(columns)}, got "
                    f"{', '.join(found.column_names)}: rename them, or pass text= and source="
                )
        names = [str(name) for name in dataset[source]]

        def texts_of(wanted: str) -> Iterator[str]:
            for number, name in enumerate(names):
                if name == wanted:
                    yield dataset[number][text]

        return cls.from_texts(
            {name: texts_of(name) for name in dict.fromkeys(names)},
            (row[text] for row in validation),
            tokenizer,
            length,
            folder,
            test=None if test is None else (row[text] for row in test),
            **options,
        )

    @classmethod
    def from_ids(
        cls,
        sources: Mapping[str, Ids],
        validation: Ids,
        vocabulary: int,
        length: int,
        folder: str | Path = "tokens",
        *,
        labels: Mapping[str, Ids] | None = None,
        test: Ids | None = None,
        pad: int = 0,
        num_tasks: int = 1,
    ) -> TokenSources:
        """Rows of tokens that the caller has.

        Args:
            sources: The rows of each source by its name: an array (n, L), or sequences of at most L
                tokens, which are padded.
            validation: The rows that the outer loss is taken on.
            vocabulary: Tokens are 0 .. vocabulary-1.
            length: L.
            folder: Where the token files go.
            labels: The tokens to predict, like `sources`, by the same names and also "validation"
                and "test"; -100: none. They are shifted by the loss. None: the tokens.
            test: Rows for `solution_metrics`.
            pad: The token that padding is written as.
            num_tasks: See `TokenSources`.

        Raises:
            ValueError: A row longer than L, tokens that are no integers or outside the vocabulary,
                such labels, or labels of another shape, an example without a token to predict, an
                empty source.
        """
        require_integer("vocabulary", vocabulary, 1)
        _require_sources(sources)
        held_out = {VALIDATION: validation, **({} if test is None else {TEST: test})}
        for kind, trees in (("ids", {**sources, **held_out}), ("labels", labels or {})):
            for name, given in trees.items():
                _require_rows(f"{kind} of {name!r}", given)
        tokenizer = Tokenizer(
            name="ids",
            digest=hashlib.sha256(f"ids of {vocabulary}".encode()).hexdigest(),
            vocabulary=vocabulary,
            end=None,
            pad=pad,
            encode=_refuse_text,
        )

        def rows(name: str, given: Ids) -> Iterator[Row]:
            of_rows = None if labels is None else labels.get(name)
            if labels is not None and of_rows is None:
                raise ValueError(f"labels must have those of {name!r}, got none: add them")
            if of_rows is not None and len(of_rows) != len(given):
                raise ValueError(
                    f"labels of {name!r} must have a row for each of {len(given)}, got "
                    f"{len(of_rows)}"
                )
            is_full = all(len(row) == length for row in given)

            def examples() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
                for i, row in enumerate(given):
                    ids, targets = _row(f"ids of {name!r}", row, length), None
                    if of_rows is not None:
                        targets = _row(f"labels of {name!r}", of_rows[i], length)
                        if len(targets) != len(ids):
                            raise ValueError(
                                f"labels of {name!r} must have one for each of the {len(ids)} "
                                f"tokens of row {i}, got {len(targets)}: add {IGNORED} where none "
                                "is predicted"
                            )
                    yield ids, targets

            for row in padded(examples(), length, pad):
                yield row._replace(mask=None) if is_full else row

        with Writer(Path(folder).absolute(), tokenizer, length, {}) as writer:
            is_padded = any(len(row) != length for given in sources.values() for row in given)
            writer.write(
                TRAIN, ((n, _with_mask(rows(n, g), is_padded)) for n, g in sources.items())
            )
            writer.write(VALIDATION, [(VALIDATION, rows(VALIDATION, validation))])
            if test is not None:
                writer.write(TEST, [(TEST, rows(TEST, test))])
        return cls(folder, num_tasks)


def _batch(columns: Mapping[str, Tensor]) -> Batch:
    batch = Batch.named(**columns)
    for name, tensor in columns.items():
        if name != "source":
            stay_on_host(tensor)
    return batch


def _with_mask(rows: Iterable[Row], is_padded: bool) -> Iterator[Row]:
    """Rows all of which have a mask if one source of them does."""
    for row in rows:
        if is_padded and row.mask is None:
            row = row._replace(mask=np.ones(len(row.ids), dtype=np.bool_))
        yield row


def _require_sources(sources: object) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise ValueError(
            "sources must be a dict with at least one source by its name, got "
            f"{repr(sources) if sources == {} else type(sources).__name__}: "
            "pass {'news': ..., 'web': ...}"
        )


def _require_rows(what: str, given: Any) -> None:
    is_list = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    if not is_list or isinstance(given, str | bytes | Mapping):
        raise ValueError(
            f"{what} must be an array (n, L) or a list of rows, got {type(given).__name__}: they "
            "are gone through twice; put them in a list"
        )
    if len(given) and np.ndim(given[0]) != 1:
        raise ValueError(
            f"{what} must be rows of tokens, (n, L), got a first row with {np.ndim(given[0])} "
            "axes: pass a list of rows"
        )


def _row(what: str, row: Sequence[int], length: int) -> NDArray[np.int64]:
    array = np.asarray(row)
    if array.ndim != 1 or len(array) > length:
        raise ValueError(
            f"{what} must be rows of at most {length} tokens, got shape {array.shape}: cut them"
        )
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{what} must be integers, got {array.dtype}: round them yourself, or pass token ids"
        )
    return array.astype(np.int64)


def _refuse_text(text: str) -> NDArray[np.int64]:
    raise AssertionError("rows of ids have no text")


def _files(name: str, path: str | Path) -> list[Path]:
    """The text files of a source."""
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"{name} must be a text file, or a folder with .txt files, got {str(path)!r}"
        )
    return files


def _pieces(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        try:
            while piece := lines.read(PIECE):
                yield piece + lines.readline()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{str(file)!r} must be text in UTF-8, got the byte "
                f"0x{error.object[error.start]:02x} ({error.reason}): convert the file"
            ) from error


def _packed_files(files: Sequence[Path], tokenizer: Tokenizer, length: int) -> Iterator[Row]:
    def texts() -> Iterator[NDArray[np.int64]]:
        after = [] if tokenizer.end is None else [tokenizer.end]
        for file in files:
            yield from map(tokenizer.encode, _pieces(file))
            yield np.array(after, dtype=np.int64)

    return packed(texts(), length, None)
