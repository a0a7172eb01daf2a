"""Token files: what is in them, that they are shipped by path, and what is refused."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.task import stays_on_host, to_device
from metadist.tasks import TokenSources
from metadist.tasks.language.problem import fields_of, labels_of
from tests.tasks.helpers import equal, refusal
from tests.tasks.language.helpers import rows, token_sources, write_texts


def test_texts_are_packed_into_rows_of_each_source_in_order(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    task = data.sample(0)
    fields = fields_of(task.support)
    texts = write_texts(tmp_path)
    for number, (name, count) in enumerate(data.sources.items()):
        mine = fields["ids"][fields["source"] == number]
        content = texts[name].read_bytes() + b"\0"
        assert len(mine) == count == len(content) // 16
        assert bytes(mine.flatten().tolist()) == content[: count * 16]
    assert set(fields) == {"ids", "source"}  # no mask, where there is no padding
    assert fields["ids"].dtype == torch.uint8
    assert set(fields_of(task.query)) == {"ids"}


def test_a_pickle_holds_the_path_and_a_draw_reads_its_rows(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    payload = pickle.dumps(data)
    assert len(payload) < 300
    again = pickle.loads(payload)
    assert equal(again.sample(0), data.sample(0))
    task = data.sample(0)
    assert all(stays_on_host(t) for t in task.query.tensors)
    moved = to_device(task, "meta")
    # The rows stay where they are, and those that are taken go to the device of their positions.
    assert fields_of(moved.support)["ids"].device.type == "cpu"
    assert moved.support.index.device.type == "meta"


def test_examples_are_padded_and_cut_where_texts_are_not_packed(tmp_path: Path) -> None:
    texts = {"a": ["abc", "defghijklmnop"], "b": ["xy"]}
    data = TokenSources.from_texts(
        {name: iter(some) for name, some in texts.items()},
        validation=(text for text in ["hello"]),
        length=8,
        folder=tmp_path / "tokens",
        pack=False,
    )
    fields = fields_of(data.sample(0).support)
    assert data.sources == {"a": 2, "b": 1}
    assert bytes(fields["ids"][0].tolist()) == b"abc\0\0\0\0\0"
    assert fields["mask"][0].tolist() == [True] * 4 + [False] * 4
    assert bytes(fields["ids"][1].tolist()) == b"defghijk"
    assert labels_of(fields)[2].tolist() == [120, 121, 0, -100, -100, -100, -100, -100]


def test_rows_of_ids_keep_labels_and_large_vocabularies(tmp_path: Path) -> None:
    ids = rows(0, 3, vocabulary=70_000)
    data = TokenSources.from_ids(
        {"a": ids, "b": [[1, 2, 3]]},
        validation=ids,
        vocabulary=70_000,
        length=8,
        folder=tmp_path / "tokens",
        labels={"a": ids, "b": [[-100, 2, 3]], "validation": ids},
    )
    fields = fields_of(data.sample(0).support)
    assert fields["ids"].dtype == torch.int32 and torch.equal(fields["ids"][:3].long(), ids)
    assert fields["mask"][0].all() and fields["mask"][3].sum() == 3
    assert labels_of(fields)[3].tolist() == [-100, 2, 3] + [-100] * 5
    assert data.vocabulary == 70_000


def test_a_dataset_gives_its_sources(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"text": ["abcdefgh", "ijklmnop", "qrstuvwx"], "source": ["one", "two", "one"]}
    )
    data = TokenSources.from_dataset(table, table, length=8, folder=tmp_path / "tokens")
    assert data.sources == {"one": 2, "two": 1}
    assert bytes(fields_of(data.sample(0).support)["ids"][0].tolist()) == b"abcdefgh"
    assert "must have the columns text, kind" in refusal(
        lambda: TokenSources.from_dataset(table, table, source="kind", folder=tmp_path / "t")
    )


def test_a_folder_is_known_again_and_another_one_is_not_written_over(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    written = (tmp_path / "tokens" / "train.ids").stat().st_mtime_ns
    assert equal(token_sources(tmp_path).sample(0), data.sample(0))
    assert (tmp_path / "tokens" / "train.ids").stat().st_mtime_ns == written
    texts = write_texts(tmp_path)
    texts["bad"].write_text("something else " * 40)
    sources = {"good": texts["good"], "bad": texts["bad"]}
    message = refusal(
        lambda: TokenSources.from_text(
            sources, texts["validation"], length=16, folder=tmp_path / "tokens"
        )
    )
    assert "folder must be a new one, or hold these very tokens" in message
    with pytest.raises(ValueError, match="must be a new one"):
        TokenSources.from_texts({"a": ["x" * 99]}, ["y" * 99], "bytes", 16, tmp_path / "tokens")
    assert [path.name for path in tmp_path.glob("*part*")] == []


def test_tasks_are_shares_of_the_rows(tmp_path: Path) -> None:
    data = token_sources(tmp_path, num_tasks=2)
    first, second, again = data.sample(0), data.sample(1), data.sample(2)
    whole = token_sources(tmp_path).sample(0).support
    assert len(first.support.index) + len(second.support.index) == len(whole.index)
    assert torch.equal(fields_of(first.support)["ids"], fields_of(whole)["ids"][::2])
    assert torch.equal(fields_of(again.support)["ids"], fields_of(first.support)["ids"])
    assert all(
        fields_of(task.support)["source"].unique().tolist() == [0, 1] for task in (first, second)
    )


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(path: Path, **fields: Any) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **fields}))


def test_a_missing_or_damaged_folder_is_refused_with_host_and_path(tmp_path: Path) -> None:
    import socket

    data = token_sources(tmp_path)
    folder = tmp_path / "tokens"
    payload = pickle.dumps(data)
    _flip(folder / "validation.ids")
    message = refusal(lambda: pickle.loads(payload))
    assert "validation.ids" in message and "sha256" in message and socket.gethostname() in message
    assert TokenSources(folder, check=False).sources == data.sources
    (folder / "train.ids").write_bytes((folder / "train.ids").read_bytes()[:-1])
    assert "the file is damaged" in refusal(lambda: TokenSources(folder, check=False))
    _edit(folder / "index.json", format=0)
    assert "another format" in refusal(lambda: TokenSources(folder))
    folder.rename(tmp_path / "moved")
    message = refusal(lambda: pickle.loads(payload))
    assert str(folder) in message and f"on host {socket.gethostname()}" in message


def test_what_cannot_be_trained_on_is_refused_while_it_is_written(tmp_path: Path) -> None:
    def of(**options: Any) -> str:
        given = {"sources": {"a": rows(0, 2), "b": rows(1, 2)}, "validation": rows(2, 2)}
        given |= {"vocabulary": 32, "length": 8, "folder": tmp_path / "tokens"}
        return refusal(lambda: TokenSources.from_ids(**{**given, **options}))

    assert "source 'b' must have at least" in of(sources={"a": rows(0, 2), "b": []})
    assert "tokens must be 0 .. 9" in of(vocabulary=10)
    blank = torch.full((2, 8), -100)
    labels = {"a": rows(0, 2), "b": blank, "validation": rows(2, 2)}
    assert "row 0 of source 'b' (train) (empty, or all labels -100)" in of(labels=labels)
    assert "labels must have those of 'validation'" in of(labels={"a": rows(0, 2), "b": rows(1, 2)})
    assert "at most 4 tokens" in of(length=4)
    assert "num_tasks must be <= the rows of the smallest source (2)" in of(num_tasks=3)
    texts = write_texts(tmp_path)
    missing = {"good": tmp_path / "none.txt"}
    assert "good must be a text file" in refusal(
        lambda: TokenSources.from_text(missing, texts["test"], folder=tmp_path / "other")
    )
    short = {"good": texts["good"], "bad": texts["bad"]}
    assert "source 'good' must have at least 4096 tokens" in refusal(
        lambda: TokenSources.from_text(short, texts["test"], length=4096, folder=tmp_path / "other")
    )
    assert not (tmp_path / "other").exists()


def test_ids_and_labels_that_would_be_read_as_others_are_refused(tmp_path: Path) -> None:
    ids, other = rows(0, 2), rows(1, 2)

    def of(a: Any = ids, of_a: Any = ids, **options: Any) -> str:
        given = {"sources": {"a": a, "b": other}, "validation": other}
        given |= {"labels": {"a": of_a, "b": other, "validation": other}}
        given |= {"vocabulary": 32, "length": 8, "folder": tmp_path / "tokens"}
        return refusal(lambda: TokenSources.from_ids(**{**given, **options}))

    assert "ids of 'a' must be integers, got float32" in of(ids.float())
    assert "labels of 'a' must be integers, got float64" in of(of_a=ids.double())
    for wrong in (32, -1):
        assert f"or -100 where none is predicted, got {wrong} .. {wrong}" in of(
            of_a=torch.full((2, 8), wrong)
        )
    assert "one for each of the 8 tokens of row 0, got 3" in of(of_a=ids[:, :3])
    assert "ids of 'a' must be an array (n, L) or a list of rows, got generator" in of(
        row for row in ids
    )
    assert "a first row with 0 axes" in of(ids[0])
    assert "sources must be a dict with at least one source" in of(sources={})
    assert not (tmp_path / "tokens").exists()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    found = []
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(mark + b"a text of words " * 9)
        sources = TokenSources.from_text({"a": path}, path, "bytes", 8, tmp_path / name)
        found.append(sources.sample(0).support.tensors[0])
    assert torch.equal(*found)


def test_texts_that_are_paths_or_no_utf_8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9 au lait ".encode("latin-1") * 9)
    folder = tmp_path / "tokens"
    texts: Any
    for texts in (path, str(path), b"text"):
        for sources, validation in (({"a": texts}, ["x" * 99]), ({"a": ["x" * 99]}, texts)):
            message = refusal(
                partial(TokenSources.from_texts, sources, validation, "bytes", 8, folder)
            )
            assert "must be a list or generator of texts" in message and "from_text" in message
    message = refusal(lambda: TokenSources.from_text({"a": path}, path, "bytes", 8, folder))
    assert f"{str(path)!r} must be text in UTF-8, got the byte 0xe9" in message


def test_a_tokenizer_of_a_folder_is_used_and_needs_a_padding_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    name = str(tmp_path / "tokenizer")
    texts = {"a": ["the cat the"], "b": ["cat dog cat"]}
    data = TokenSources.from_texts(texts, ["the cat the"], name, 4, tmp_path / "tokens")
    assert fields_of(data.sample(0).support)["ids"].tolist() == [[1, 2, 1, 3], [2, 0, 2, 3]]
    assert data.vocabulary == 4 and data.tokenizer == name
    message = refusal(
        lambda: TokenSources.from_texts(texts, ["the"], name, 4, tmp_path / "other", pack=False)
    )
    assert "pad must be a token with pack=False" in message and "pad=3" in message
    message = refusal(
        lambda: TokenSources.from_texts(
            texts, ["the"], "no/such", 4, tmp_path / "other", local_files_only=True
        )
    )
    assert "tokenizer must be a folder, or in the cache" in message and "hf download" in message
