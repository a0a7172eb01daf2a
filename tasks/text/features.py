"""TF-IDF features of texts.

Shape letters: n texts, m largest number of terms of a text, D features (terms), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch
from metadist.tasks.data.random import Random
from metadist.tasks.fixed import OneTask, metrics_on
from metadist.tasks.text.corpora import Source, read_corpus
from metadist.trees import Params

NEEDS = "texts need scikit-learn: pip install 'metadist[text]'"


class TextFeatures(OneTask):
    """A sampler of one task: TF-IDF features of texts, for training and for validation.

    A row is as scikit-learn's `TfidfVectorizer` makes it, fitted to the training texts only. Texts
    with the same words count as one.

    Args:
        source: "news_articles" (3,824 articles of nine publishers, fetched where they are missing,
            see `fetch`; the publisher is the label, its name is taken out of the text),
            "20newsgroups" (by scikit-learn, from the internet), a folder with a folder of text
            files for each class, or (texts, labels).
        root: The folder of the data, see `data_root`.
        num_train, num_val, num_test: Texts >= 1. Those of 20 Newsgroups in the papers: 5657, 5657
            and 7532, the last from its test part.
        num_selection: Further texts, >= 0, to which neither x nor y is fitted: they choose
            hyperparameters and the end of training. x has more entries than there are
            validation texts and overfits them.
        min_df: Terms of fewer training texts are left out, >= 1.
        max_features: The number of terms to keep, the most frequent ones; None: all.
        max_terms: The number of terms of a text to keep, those with the largest values; None: all.
            A text of m terms makes every row m long.
        seed: The seed of the choice of texts, 0 <= seed < 2^64.

    Raises:
        ValueError: more texts asked for than there are, a class without training or validation
            text, an argument out of its range, no scikit-learn.
        FetchError: the data is missing and cannot be fetched.
    """

    def __init__(
        self,
        source: Source = "news_articles",
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
        corpus = read_corpus(source, root)
        order = Random(seed, "texts", 0).choose(len(corpus.texts), len(corpus.texts))
        chosen = _different(corpus.texts, order, vectorizer.build_analyzer())
        for_test = set(corpus.test or chosen[-num_test:])
        test = [i for i in chosen if i in for_test]
        rest = [i for i in chosen if i not in for_test]
        fitted = num_train + num_val
        for field, needed, there in (
            ("num_train + num_val + num_selection", fitted + num_selection, len(rest)),
            ("num_test", num_test, len(test)),
        ):
            if needed > there:
                raise ValueError(f"{field} must be <= {there}, the different texts, got {needed}")
        self.class_names, numbers = np.unique(np.array(corpus.labels), return_inverse=True)
        train, val, test = rest[:num_train], rest[num_train:fitted], test[:num_test]
        selection = rest[fitted : fitted + num_selection]
        self._require_classes(numbers[train], "num_train")
        self._require_classes(numbers[val], "num_val")
        vectorizer.fit([corpus.texts[i] for i in train])
        self.terms: list[str] = vectorizer.get_feature_names_out().tolist()

        def batch(part: list[int]) -> Batch:
            matrix = vectorizer.transform([corpus.texts[i] for i in part])
            labels = torch.from_numpy(numbers[part].astype(np.int64))
            columns, values = _rows(matrix, max_terms)
            return Batch.named(columns=columns, values=values, targets=labels)

        super().__init__(batch(train), batch(val))
        self.selection = batch(selection) if selection else None
        self.test = batch(test)

    def _require_classes(self, numbers: NDArray[np.int64], field: str) -> None:
        missing = sorted(set(range(self.num_classes)) - set(numbers.tolist()))
        if missing:
            raise ValueError(
                f"{field} must hold a text of every class, got none of "
                f"{', '.join(str(self.class_names[number]) for number in missing)} among "
                f"{len(numbers)}: ask for more, or use another seed"
            )

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
    """The positions in `order` of texts that have words, and other words than those before."""
    seen: set[tuple[str, ...]] = {()}
    kept = []
    for i in order:
        content = tuple(words(texts[i]))
        if content not in seen:
            seen.add(content)
            kept.append(i)
    return kept
