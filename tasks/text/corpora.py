"""Texts and their labels: the news articles, 20 Newsgroups, a folder, or what the caller has.

A new corpus is a function that returns a `Corpus`, and its entry in `CORPORA`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from metadist.tasks.data.sources import NEWS_ARTICLES, FetchError, data_root, fetch

Source = str | Path | tuple[Sequence[str], Sequence[Any]]
"""The name of a corpus, a folder, or (texts, labels)."""


class Corpus(NamedTuple):
    """Texts, the label of each, and the positions of those of the test part, if there is one."""

    texts: list[str]
    labels: list[Any]
    test: list[int]


def read_corpus(source: Source, root: str | Path | None) -> Corpus:
    """The texts of `source`, see `TextFeatures`."""
    if isinstance(source, tuple):
        texts, labels = source
        if len(texts) != len(labels):
            raise ValueError(
                f"source must hold a label for each text, got {len(texts)} texts and "
                f"{len(labels)} labels"
            )
        return Corpus(list(texts), list(labels), [])
    if source in CORPORA:
        return CORPORA[str(source)](root)
    if not Path(source).is_dir():
        raise ValueError(
            f"source must be one of {', '.join(map(repr, CORPORA))}, a folder, or (texts, labels), "
            f"got {source!r}"
        )
    from sklearn.datasets import load_files  # late, because it is an extra

    files = load_files(source, encoding="utf-8", decode_error="replace")
    return Corpus(files.data, [files.target_names[number] for number in files.target], [])


def newsgroups(root: str | Path | None) -> Corpus:
    """20 Newsgroups with its own test part, which scikit-learn fetches from the internet."""
    from sklearn.datasets import fetch_20newsgroups  # late, because it is an extra

    folder = data_root(root)
    try:
        train, test = (
            fetch_20newsgroups(data_home=folder, subset=subset) for subset in ("train", "test")
        )
    except OSError as error:
        raise FetchError(
            f"data set '20newsgroups' must be fetched by scikit-learn, got {error}: run "
            f"sklearn.datasets.fetch_20newsgroups(data_home={str(folder)!r}) where there is "
            "internet, and copy the folder"
        ) from error
    corpus = Corpus([], [], list(range(len(train.data), len(train.data) + len(test.data))))
    for part in (train, test):
        corpus.texts.extend(part.data)
        corpus.labels.extend(part.target_names[number] for number in part.target)
    return corpus


PUBLISHERS = {
    "www.aljazeera.com": ("al jazeera", "aljazeera"),
    "tass.com": ("itar-tass", "tass"),
    "abcnews.go.com": ("abc news", "abcnews", "abc"),
    "www.rte.ie": ("rté", "rte"),
    "www.huffingtonpost.com": ("the huffington post", "huffington post", "huffpost"),
    "www.dw.com": ("deutsche welle", "dw"),
    "europe.chinadaily.com.cn": ("china daily", "chinadaily", "xinhua"),
    "www.bbc.co.uk": ("bbc",),
    "www.cnn.com": ("cnn",),
}
"""Names of the publishers of the news articles. A text that held the name of its own would give
its label away."""


def news_articles(root: str | Path | None) -> Corpus:
    """News articles by publisher, without the names of the publishers."""
    file = fetch("news_articles", root) / NEWS_ARTICLES
    names = map(re.escape, chain(*PUBLISHERS.values()))
    publisher = re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)
    corpus = Corpus([], [], [])
    with file.open(encoding="utf-8", newline="") as lines:
        for article in csv.DictReader(lines):
            corpus.texts.append(publisher.sub(" ", f"{article['title']}\n{article['text']}"))
            corpus.labels.append(urlparse(article["article_source_link"]).netloc)
    return corpus


CORPORA: dict[str, Callable[[str | Path | None], Corpus]] = {
    "news_articles": news_articles,
    "20newsgroups": newsgroups,
}
