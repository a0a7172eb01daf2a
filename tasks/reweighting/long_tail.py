"""Images of unequally frequent classes, for class weights and loss weighting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metadist.checks.values import check, require_integer, require_word
from metadist.problem import Problem
from metadist.tasks.data.datasets import LabelledDataset, open_dataset
from metadist.tasks.data.random import Random
from metadist.tasks.fixed import metrics_on
from metadist.tasks.image_sets import Drawing, ImageProblemData, Images, Scaling, require_classes
from metadist.trees import Params


class LongTail(ImageProblemData):
    """A sampler of one task: training images of unequal classes, balanced validation images.

    Class c of N has round(num_largest * imbalance^(-c / (N - 1))) training images, so that the
    first has `imbalance` times as many as the last.

    Args:
        dataset, root: The data set and the folder of the data, see `open_dataset`.
        imbalance: >= 1.
        num_largest: Training images of class 0.
        val_per_class: Validation images of each class >= 1.
        num_test: Test images, from the test part of the data set, where it has one.
        seed: The seed of the choice of images, 0 <= seed < 2^64.
        mean, std: Inputs are (pixels / 255 - mean) / std.

    Raises:
        ValueError: more images asked for than there are, a class left without a training image,
            pictures that cannot be read, an argument out of its range.
        FetchError: the data set is missing and cannot be fetched.

    Source: Cui et al., Class-balanced loss (2019), section 5.1, as used by Meta-Weight-Net.
    """

    def __init__(
        self,
        dataset: str | LabelledDataset = "fashion_mnist",
        root: str | Path | None = None,
        imbalance: float = 100.0,
        num_largest: int = 2000,
        val_per_class: int = 50,
        num_test: int = 10000,
        seed: int = 0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        check("imbalance", imbalance, ge=1)
        require_integer("num_largest", num_largest, 1)
        require_integer("val_per_class", val_per_class, 1)
        require_integer("num_test", num_test, 1)
        require_word("seed", seed)
        scaling = Scaling(mean, std)
        if isinstance(dataset, str):  # an object would travel with a pickled sampler
            self.dataset = dataset
        self.root, self.seed, self.mean, self.std = root, seed, mean, std
        self.imbalance, self.num_largest = imbalance, num_largest
        self.val_per_class, self.num_test = val_per_class, num_test
        whole, held_out = open_dataset(dataset, root)
        drawing = Drawing(whole)
        order = np.array(Random(seed, "images", 0).choose(len(whole), len(whole)))
        num_classes = len(drawing.classes)
        left = [iter(order[drawing.numbers[order] == c].tolist()) for c in range(num_classes)]
        tail = imbalance ** -(np.arange(num_classes) / (num_classes - 1))
        counts = np.rint(num_largest * tail).astype(int)
        train = _by_class(drawing, left, counts, "images of class {} in num_largest")
        val = _by_class(drawing, left, np.full(num_classes, val_per_class), "val_per_class of {}")
        require_classes(train, drawing.classes, "num_largest with this imbalance")
        rest = iter(order.tolist())
        if held_out is not None:
            drawing = drawing.of(held_out)
            rest = iter(Random(seed, "images", 1).choose(len(held_out), len(held_out)))
        test = drawing.take(rest, num_test, "num_test")
        super().__init__(train, val, test, scaling)
        self.counts = tuple(counts.tolist())

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Test accuracy and loss, and the accuracy on the class with the fewest training images."""
        rarest = self.test.labels == len(self.counts) - 1
        metrics = super().solution_metrics(problem, outer, inner)
        if rarest.any():
            images = Images(self.test.pixels[rarest], self.test.labels[rarest])
            on_it = metrics_on(problem, outer, inner, self.scaling.batch(images))
            metrics["test_accuracy_rarest_class"] = on_it["test_accuracy"]
        return metrics


def _by_class(
    drawing: Drawing, left: list[Iterator[int]], counts: NDArray[np.int64], field: str
) -> Images:
    """`counts` images of each class, in the order of the classes."""
    parts = [
        drawing.take(positions, int(count), field.format(drawing.classes[c]))
        for c, (positions, count) in enumerate(zip(left, counts, strict=True))
        if count
    ]
    return Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
