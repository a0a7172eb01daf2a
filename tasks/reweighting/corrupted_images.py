"""Images some of whose training labels are wrong, for hyper-cleaning and loss weighting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import check
from metadist.problem import Problem
from metadist.task import Batch, to_device
from metadist.tasks.data.datasets import LabelledDataset
from metadist.tasks.data.random import Random
from metadist.tasks.image_sets import ImageProblemData, Images, Scaling, draw_parts, require_classes
from metadist.trees import Params


@runtime_checkable
class FindsWrongLabels(Protocol):
    """A problem that says which training examples it holds for wrongly labelled."""

    def suspected(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """Whether each example of `batch` is held for wrong: bool, shape (examples,)."""
        ...


class CorruptedImages(ImageProblemData):
    """A sampler of one task: training images with corrupted labels, clean validation images.

    The labels of round(corruption * num_train) training images are drawn anew, once, by `seed`.
    With redraw="any" the true class may be drawn again: half the labels of ten
    classes redrawn are 45 % wrong. `wrong` says which labels are.

    Args:
        dataset: The data set, see `open_dataset`: "mnist", "fashion_mnist", "mnist_5k", "digits",
            an import path, or a data set.
        root: The folder of the data, see `data_root`.
        num_train, num_val, num_test: Images >= 1, all of them different. Test images are from the
            test part of the data set, where it has one.
        num_selection: Further clean images, >= 0, to which neither x nor y is fitted: they choose
            hyperparameters and the end of training. x has one entry for each training image
            and overfits the validation images.
        corruption: Share of training labels that are redrawn, in [0, 1].
        redraw: "any" class, or another class than the true one.
        seed: The seed of the choice of images and labels, 0 <= seed < 2^64.
        mean, std: Inputs are (pixels / 255 - mean) / std.

    Raises:
        ValueError: more images asked for than there are, a class without training or validation
            image, pictures that cannot be read (NaN), an argument out of its range.
        FetchError: the data set is missing and cannot be fetched.

    Source: the protocol of Franceschi et al. (2017) and its successors, see `HyperCleaning`; images
    for selection: Liu et al., BOME (2022).
    """

    def __init__(
        self,
        dataset: str | LabelledDataset = "mnist",
        root: str | Path | None = None,
        num_train: int = 5000,
        num_val: int = 5000,
        num_test: int = 10000,
        num_selection: int = 0,
        corruption: float = 0.5,
        redraw: Literal["any", "other"] = "any",
        seed: int = 0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        check("corruption", corruption, ge=0, le=1)
        if redraw not in ("any", "other"):
            raise ValueError(f"redraw must be 'any' or 'other', got {redraw!r}")
        scaling = Scaling(mean, std)
        if isinstance(dataset, str):  # an object would travel with a pickled sampler
            self.dataset = dataset
        self.root, self.seed, self.mean, self.std = root, seed, mean, std
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        self.num_selection, self.corruption, self.redraw = num_selection, corruption, redraw
        parts = draw_parts(
            dataset,
            root,
            seed,
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            num_selection=num_selection,
        )
        clean, classes = parts.train, parts.classes
        train = Images(clean.pixels, _redrawn(clean.labels, len(classes), corruption, redraw, seed))
        require_classes(train, classes, "num_train after the labels are redrawn")
        super().__init__(train, parts.val, parts.test, scaling, parts.selection)
        self.clean_labels = clean.labels

    @property
    def wrong(self) -> Tensor:
        """Whether the label of each training image is wrong; bool, (num_train,)."""
        return torch.from_numpy(self.train.labels != self.clean_labels)

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Test accuracy and loss; of problems that suspect examples also what they found.

        With images for selection `selection_accuracy` and `selection_loss` too. `precision` is the
        share of wrong labels among the examples that the problem suspects (0 if there is none),
        `recall` the share of wrong labels that it suspects.
        """
        metrics = super().solution_metrics(problem, outer, inner)
        if isinstance(problem, FindsWrongLabels):
            like = next(iter(inner.values()))
            batch = to_device(self.sample(0), like.device, like.dtype).support
            with torch.no_grad():
                metrics |= self.found(problem.suspected(outer, inner, batch))
        return metrics

    def found(self, suspected: Tensor) -> dict[str, float]:
        """Precision and recall of the examples `suspected` (bool, (num_train,)) to be wrong."""
        wrong = self.wrong
        hits = int((suspected.cpu() & wrong).sum())
        return {
            "precision": hits / max(1, int(suspected.sum())),
            "recall": hits / max(1, int(wrong.sum())),
        }


def _redrawn(
    labels: NDArray[np.int64], num_classes: int, corruption: float, redraw: str, seed: int
) -> NDArray[np.int64]:
    """`labels` with a share of them drawn anew."""
    draws = Random(seed, "corruption", 0)
    chosen = draws.choose(len(labels), round(corruption * len(labels)))
    words = draws.words(len(chosen))
    labels = labels.copy()
    if redraw == "any":
        labels[chosen] = words % np.uint64(num_classes)
    else:
        shift = 1 + (words % np.uint64(num_classes - 1)).astype(np.int64)
        labels[chosen] = (labels[chosen] + shift) % num_classes
    return labels
