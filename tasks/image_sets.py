"""Labelled images in memory, drawn once from a data set, for the image samplers of one task.

Shape letters: n images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import check, require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.data.datasets import LabelledDataset, decode, labels_of, open_dataset
from metadist.tasks.data.images import read_images
from metadist.tasks.data.random import Random
from metadist.tasks.fixed import metrics_on
from metadist.trees import Params


class Images(NamedTuple):
    """Images and their labels.

    Args:
        pixels: uint8, (n, C, H, W).
        labels: int64, (n,), numbered 0 .. N-1.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Drawing:
    """Draws images from a data set, none of them twice; equal images count as one.

    `classes` holds the label of each class; an image gets the number of its class, 0 .. N-1.
    """

    def __init__(self, dataset: LabelledDataset) -> None:
        self._dataset = dataset
        self._labels = labels_of(dataset)
        self._seen: set[bytes] = set()
        self.classes = np.unique(self._labels)
        if len(self.classes) < 2:
            raise ValueError(f"a data set must have two classes, got {self.classes.tolist()}")

    def of(self, dataset: LabelledDataset) -> Drawing:
        """A drawing from another part of the data, which must have the same classes."""
        part = Drawing(dataset)
        if not np.array_equal(part.classes, self.classes):
            raise ValueError(
                f"both parts of a data set must have the same classes, got "
                f"{self.classes.tolist()} for training and {part.classes.tolist()} for the test"
            )
        part._seen = self._seen
        return part

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The number of the class of every picture."""
        return np.searchsorted(self.classes, self._labels)

    def take(self, positions: Iterable[int], count: int, field: str) -> Images:
        """The first `count` images at `positions` that are new; ValueError if there are fewer.

        `positions` may be an iterator: the positions that are not needed stay in it.
        """
        pixels, labels = [], []
        found = decode(self._dataset, self._labels, positions)
        for label, image in found if count else ():
            content = image.tobytes()
            if content in self._seen:
                continue
            self._seen.add(content)
            pixels.append(image)
            labels.append(label)
            if len(pixels) == count:
                break
        if len(pixels) < count:
            raise ValueError(
                f"{field} must be <= {len(pixels)}, the different images that are left in the "
                f"data set, got {count}"
            )
        if len({image.shape for image in pixels}) > 1:
            raise ValueError(
                "images must have one shape, got "
                f"{sorted({image.shape for image in pixels})}: resize them in the data set"
            )
        return Images(np.stack(pixels), np.searchsorted(self.classes, labels))


@dataclass(frozen=True)
class Scaling:
    """Pixels in 0 .. 255 to numbers: (pixels / 255 - mean) / std."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check("std", self.std, gt=0)
        check("mean", self.mean)

    def batch(self, images: Images) -> Batch:
        """Inputs float32 (n, C, H, W) and labels (n,)."""
        inputs = torch.from_numpy(images.pixels).float().div_(255).sub_(self.mean).div_(self.std)
        return Batch.of(inputs, torch.from_numpy(images.labels))


class ImageProblemData:
    """A sampler of one task: images for training (support) and for validation (query).

    `sample(index)` is the same task at every index, whose tensors are images float32
    (n, C, H, W) and labels int64 (n,).

    Images travel with a pickled sampler as one byte a pixel.
    """

    num_tasks = 1

    def __init__(
        self,
        train: Images,
        val: Images,
        test: Images,
        scaling: Scaling,
        selection: Images | None = None,
    ) -> None:
        self.train = train
        self.val = val
        self.test = test
        self.selection = selection
        self.scaling = scaling
        self._sets: tuple[Batch, Batch] | None = None

    def sample(self, index: int) -> Task:
        """The task; its id is `index`."""
        if self._sets is None:
            self._sets = (self.scaling.batch(self.train), self.scaling.batch(self.val))
        return Task(*self._sets, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sets": None}

    def read_images(self, files: Sequence[Path]) -> Tensor:
        """Image files as this sampler has its own: in size, channels and scale."""
        channels, height, width = self.train.pixels.shape[1:]
        size = height if height == width else None
        pixels = np.stack(read_images({"": list(files)}, size, channels, invert=False)[""])
        return self.scaling.batch(Images(pixels, np.zeros(len(pixels), np.int64))).tensors[0]

    @property
    def num_classes(self) -> int:
        """How many classes the training images have."""
        return int(self.train.labels.max()) + 1

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """Accuracy and loss of `inner` on the test images, and on those for selection if any."""
        metrics = metrics_on(problem, outer, inner, self.scaling.batch(self.test))
        if self.selection is not None:
            examples = self.scaling.batch(self.selection)
            metrics |= metrics_on(problem, outer, inner, examples, "selection")
        return metrics


class ImageData(ImageProblemData):
    """A sampler of one task: images for training and others for validation, labelled as they are.

    Args:
        dataset, root: The data set and the folder of the data, see `open_dataset`.
        num_train, num_val, num_test: Images >= 1, all of them different. Test images are from the
            test part of the data set, where it has one.
        seed: The seed of the choice of images, 0 <= seed < 2^64.
        mean, std: Inputs are (pixels / 255 - mean) / std.

    Raises:
        ValueError: more images asked for than there are, a class without training or validation
            image, pictures that cannot be read, an argument out of its range.
        FetchError: the data set is missing and cannot be fetched.
    """

    def __init__(
        self,
        dataset: str | LabelledDataset = "fashion_mnist",
        root: str | Path | None = None,
        num_train: int = 25000,
        num_val: int = 25000,
        num_test: int = 10000,
        seed: int = 0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        scaling = Scaling(mean, std)
        if isinstance(dataset, str):  # an object would travel with a pickled sampler
            self.dataset = dataset
        self.root, self.seed, self.mean, self.std = root, seed, mean, std
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        parts = draw_parts(
            dataset, root, seed, num_train=num_train, num_val=num_val, num_test=num_test
        )
        super().__init__(parts.train, parts.val, parts.test, scaling)


class Parts(NamedTuple):
    """Different images of a data set, and its classes in the order of their numbers."""

    train: Images
    val: Images
    selection: Images | None
    test: Images
    classes: NDArray[np.int64]


def draw_parts(
    dataset: str | LabelledDataset,
    root: str | Path | None,
    seed: int,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    num_selection: int = 0,
) -> Parts:
    """Images for each purpose; those of the test are from the test part, where there is one.

    Raises:
        ValueError, FetchError: See `ImageData`.
    """
    for field, value in (("train", num_train), ("val", num_val), ("test", num_test)):
        require_integer(f"num_{field}", value, 1)
    require_integer("num_selection", num_selection, 0)
    require_word("seed", seed)
    whole, held_out = open_dataset(dataset, root)
    drawing = Drawing(whole)
    order = iter(Random(seed, "images", 0).choose(len(whole), len(whole)))
    train = drawing.take(order, num_train, "num_train")
    val = drawing.take(order, num_val, "num_val (beside num_train)")
    selection = None
    if num_selection:
        field = "num_selection (beside num_train and num_val)"
        selection = drawing.take(order, num_selection, field)
    if held_out is not None:
        drawing = drawing.of(held_out)
        order = iter(Random(seed, "images", 1).choose(len(held_out), len(held_out)))
    test = drawing.take(order, num_test, "num_test")
    require_classes(train, drawing.classes, "num_train")
    require_classes(val, drawing.classes, "num_val")
    return Parts(train=train, val=val, selection=selection, test=test, classes=drawing.classes)


def require_classes(images: Images, classes: NDArray[np.int64], field: str) -> None:
    """Raise ValueError unless every class has an image."""
    missing = sorted(set(range(len(classes))) - set(images.labels.tolist()))
    if missing:
        raise ValueError(
            f"{field} must hold an image of every class, got none of class "
            f"{', '.join(str(classes[number]) for number in missing)} among {len(images.labels)} "
            "images: draw more, or use another seed"
        )
