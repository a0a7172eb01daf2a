"""TF-IDF features of texts.

Shape letters: n texts, m largest number of terms of a text, D features (terms), C classes.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.hypergradient import lbfgs
from metadist.checks.values import require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch
from metadist.tasks.data.random import Random
from metadist.tasks.data.sources import NEWS_ARTICLES, FetchError, data_root, fetch
from metadist.tasks.fixed import OneTask, metrics_on
from metadist.tasks.text.regularisation import TextRegularisation
from metadist.trees import Params

NAMES = ("news_articles", "20newsgroups")
STRENGTHS = tuple(10 ** (k / 4) for k in range(-28, -3))
"""Four a decade, from 1e-7 to 0.1."""
NEEDS = "texts need scikit-learn: pip install 'metadist[text]'"


class TextFeatures(OneTask):
    """A sampler of one task: TF-IDF features of texts, for training and for validation.

    A row is as scikit-learn's `TfidfVectorizer` makes it, which sees training texts only. Texts of
    the same words are one text.

    Args:
        source: "news_articles" (3,824 articles of nine publishers, fetched where they are missing,
            see `fetch`; the publisher is the label, its name is taken out of the text),
            "20newsgroups" (by scikit-learn, from the internet), a folder with a folder of text
            files for each class, or (texts, labels).
        root: folder of the data, see `data_root`.
        num_train, num_val, num_test: texts >= 1. Those of 20 Newsgroups in the papers: 5657, 5657
            and 7532, the last from its test part.
        num_selection: further texts, >= 0, that neither x nor y is fitted to: to choose
            hyperparameters by, and where to end. x has more numbers than there are validation
            texts and overfits them.
        min_df: terms of fewer training texts are left out, >= 1.
        max_features: keep so many terms, the most frequent; None: all.
        max_terms: keep so many terms of a text, those of the largest values, since a text of m
            terms makes every row m long; None: all.
        seed: of the choice of texts, 0 <= seed < 2^64.

    Raises:
        ValueError: more texts asked for than there are, a class without training or validation
            text, an argument out of its range, no scikit-learn.
        FetchError: the data is not here and cannot be had.
    """

    def __init__(
        self,
        source: str | Path | tuple[Sequence[str], Sequence[Any]] = "news_articles",
        root: str | Path | None = None,
        num_train: int = 1800,
        num_val: int = 900,
        num_test: int = 900,
        num_selection: int = 0,
        min_df: int = 2,
        max_features: int | None = None,
        max_terms: int | None = 512,
        seed: int = 0,
    ) -> None:
        sizes = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        for field, value in {**sizes, "min_df": min_df}.items():
            require_integer(field, value, 1)
        require_integer("num_selection", num_selection, 0)
        for field, limit in (("max_features", max_features), ("max_terms", max_terms)):
            if limit is not None:
                require_integer(field, limit, 1)
        require_word("seed", seed)
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ValueError(NEEDS) from error
        vectorizer = TfidfVectorizer(min_df=min_df, max_features=max_features, dtype=np.float32)
        texts, labels, held_out = _read(source, root)
        order = Random(seed, "texts", 0).choose(len(texts), len(texts))
        chosen = _different(texts, order, vectorizer.build_analyzer())
        for_test = set(held_out or chosen[-num_test:])
        test = [i for i in chosen if i in for_test]
        rest = [i for i in chosen if i not in for_test]
        fitted = num_train + num_val
        for field, needed, there in (
            ("num_train + num_val + num_selection", fitted + num_selection, len(rest)),
            ("num_test", num_test, len(test)),
        ):
            if needed > there:
                raise ValueError(f"{field} must be <= {there}, the different texts, got {needed}")
        self.class_names, numbers = np.unique(np.array(labels), return_inverse=True)
        parts = (
            rest[:num_train],
            rest[num_train:fitted],
            rest[fitted : fitted + num_selection],
            test[:num_test],
        )
        for part, field in zip(parts[:2], sizes, strict=False):
            missing = set(range(len(self.class_names))) - set(numbers[part].tolist())
            if missing:
                raise ValueError(
                    f"{field} must hold a text of every class, got none of "
                    f"{', '.join(str(self.class_names[c]) for c in sorted(missing))} among "
                    f"{len(part)}: ask for more, or use another seed"
                )
        vectorizer.fit([texts[i] for i in parts[0]])
        self.terms: list[str] = vectorizer.get_feature_names_out().tolist()

        def batch(part: list[int]) -> Batch:
            return Batch.of(
                *_rows(vectorizer.transform([texts[i] for i in part]), max_terms),
                torch.from_numpy(numbers[part].astype(np.int64)),
            )

        train, val, selection, test = parts
        self.selection = batch(selection) if selection else None
        self.test = batch(test)
        super().__init__(batch(train), batch(val))

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.terms)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Accuracy and loss on the test texts, and on those for selection if there are any."""
        metrics = metrics_on(problem, outer, inner, self.test)
        if self.selection is not None:
            metrics |= metrics_on(problem, outer, inner, self.selection, "selection")
        return metrics

    def baselines(
        self, strengths: Sequence[float] = STRENGTHS, max_iter: int = 100
    ) -> dict[str, dict[str, float]]:
        """Metrics of the best single strength for all features, which a grid search finds.

        What to beat is "one strength": y fitted to the training texts, with the strength of the
        least `val_loss`, the loss on validation texts and those for selection together. In "one
        strength, all texts" y is fitted to all three: what they are worth as training texts.

        Args:
            strengths: to try, at least one, all > 0.
            max_iter: of L-BFGS, >= 1, for each of them; it starts from the next larger strength's
                solution.

        Returns:
            For both names `strength` and the metrics on the test texts, for the first also
            `val_loss` and those on the texts for selection.
        """
        require_integer("max_iter", max_iter, 1)
        if not strengths or not min(strengths) > 0:
            raise ValueError(f"strengths must be numbers > 0, at least one, got {strengths}")
        problem = TextRegularisation(self.num_features, self.num_classes, per_feature=False)
        outer = problem.init_outer(torch.Generator())
        held_out = [self.query] if self.selection is None else [self.query, self.selection]

        def mean_loss(y: Params, parts: list[Batch]) -> Tensor:
            sizes = [len(part.index) for part in parts]
            losses = [problem.outer_loss(outer, y, part) for part in parts]
            return torch.stack(losses) @ torch.tensor(sizes).to(losses[0]) / sum(sizes)

        def fitted(strength: float, parts: list[Batch], start: Params) -> Params:
            x = {"log_strengths": torch.tensor([math.log(strength)])}
            return lbfgs(lambda y: mean_loss(y, parts) + problem.penalty(x, y), start, max_iter)

        inner = problem.init_inner(outer, self.sample(0))
        found = []
        for strength in sorted(strengths, reverse=True):
            inner = fitted(strength, [self.support], inner)
            found.append((float(mean_loss(inner, held_out)), strength, inner))
        val_loss, strength, inner = min(found, key=lambda one: one[0])
        of_all = fitted(strength, [self.support, *held_out], inner)
        return {
            "one strength": {
                "strength": strength,
                "val_loss": val_loss,
                **self.solution_metrics(problem, outer, inner),
            },
            "one strength, all texts": {
                "strength": strength,
                **metrics_on(problem, outer, of_all, self.test),
            },
        }


def _rows(matrix: Any, max_terms: int | None) -> tuple[Tensor, Tensor]:
    """(columns int32 (n, m), values float32 (n, m)) of a SciPy matrix by compressed rows."""
    longest = int(np.diff(matrix.indptr).max())
    width = max(1, longest if max_terms is None else min(longest, max_terms))
    columns = np.zeros((matrix.shape[0], width), dtype=np.int32)
    values = np.zeros((matrix.shape[0], width), dtype=np.float32)
    for i in range(matrix.shape[0]):
        part = slice(matrix.indptr[i], matrix.indptr[i + 1])
        data: NDArray[np.float32] = matrix.data[part]
        largest = np.sort(np.argsort(-data, kind="stable")[:width])
        columns[i, : len(largest)] = matrix.indices[part][largest]
        values[i, : len(largest)] = data[largest]
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return torch.from_numpy(columns), torch.from_numpy(values / np.where(norms > 0, norms, 1))


def _different(texts: Sequence[str], order: Sequence[int], words: Any) -> list[int]:
    """The positions in `order` without those of a text that came before, or has no words."""
    seen: set[tuple[str, ...]] = {()}
    kept = []
    for i in order:
        content = tuple(words(texts[i]))
        if content not in seen:
            seen.add(content)
            kept.append(i)
    return kept


Corpus = tuple[list[str], list[Any], list[int]]
"""Texts, their labels, and the positions of those that are for the test (empty: no such part)."""


def _read(source: str | Path | tuple[Sequence[str], Sequence[Any]], root: Any) -> Corpus:
    if isinstance(source, tuple):
        texts, labels = source
        if len(texts) != len(labels):
            raise ValueError(
                f"source must hold a label for each text, got {len(texts)} texts and "
                f"{len(labels)} labels"
            )
        return list(texts), list(labels), []
    if source == "news_articles":
        return _news_articles(fetch("news_articles", root) / NEWS_ARTICLES)
    from sklearn.datasets import fetch_20newsgroups, load_files

    if source == "20newsgroups":
        folder = data_root(root)
        try:
            parts = [fetch_20newsgroups(data_home=folder, subset=s) for s in ("train", "test")]
        except OSError as error:
            raise FetchError(
                f"data set '20newsgroups' must be fetched by scikit-learn, got {error}: run "
                f"sklearn.datasets.fetch_20newsgroups(data_home={str(folder)!r}) where there is "
                "internet, and copy the folder"
            ) from error
        labels = [part.target_names[number] for part in parts for number in part.target]
        num_train, num_test = (len(part.data) for part in parts)
        held_out = list(range(num_train, num_train + num_test))
        return parts[0].data + parts[1].data, labels, held_out
    if not Path(source).is_dir():
        raise ValueError(
            f"source must be one of {', '.join(map(repr, NAMES))}, a folder, or (texts, labels), "
            f"got {source!r}"
        )
    files = load_files(source, encoding="utf-8", decode_error="replace")
    return files.data, [files.target_names[c] for c in files.target], []


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


def _news_articles(file: Path) -> Corpus:
    with file.open(encoding="utf-8", newline="") as lines:
        articles = list(csv.DictReader(lines))
    names = [name for own in PUBLISHERS.values() for name in own]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b", re.IGNORECASE)
    texts = [pattern.sub(" ", f"{article['title']}\n{article['text']}") for article in articles]
    return texts, [urlparse(article["article_source_link"]).netloc for article in articles], []
