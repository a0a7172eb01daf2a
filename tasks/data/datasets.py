"""Labelled data sets: opened by name, and decoded to labels and pixels.

Shape letters: n images, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metadist.tasks.data.images import picture, pixels
from metadist.tasks.data.sources import MNIST_5K, data_root, fetch


class LabelledDataset(Protocol):
    """A map-style data set: `dataset[i]` is (picture, integer label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Arrays as a data set: pixels uint8 (n, H, W), an integer label each."""

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, position: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[position], int(self.targets[position])


def open_dataset(
    dataset: str | LabelledDataset, root: str | Path | None
) -> tuple[LabelledDataset, LabelledDataset | None]:
    """(the training part, the test part or None where there is only one part).

    Args:
        dataset: "mnist", "fashion_mnist" or "mnist_5k", fetched where they are missing (see
            `fetch`); "digits" (scikit-learn); the import path of a class that is called with
            (root, train=...), as torchvision's are; or a data set as for `FewShotDataset`.
        root: The folder of the data, see `data_root`.
    """
    if not isinstance(dataset, str):
        return dataset, None
    if dataset == "digits":
        return _digits(), None
    if dataset == "mnist_5k":
        return _mnist_5k(fetch(dataset, root) / MNIST_5K), None
    if dataset in _TORCHVISION:
        root, dataset = fetch(dataset, root), _TORCHVISION[dataset]
    module, _, name = dataset.rpartition(".")
    if not module:
        raise ValueError(
            f"dataset must be one of {', '.join(map(repr, NAMES))}, an import path such as "
            f"'torchvision.datasets.KMNIST', or a data set, got {dataset!r}"
        )
    try:
        kind: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"dataset must be an import path, got {dataset!r}: {error}") from error
    return kind(data_root(root), train=True), kind(data_root(root), train=False)


_TORCHVISION = {
    "mnist": "torchvision.datasets.MNIST",
    "fashion_mnist": "torchvision.datasets.FashionMNIST",
}
NAMES = (*_TORCHVISION, "mnist_5k", "digits")


def _digits() -> ArrayDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "dataset must not be 'digits' without scikit-learn: pip install 'metadist[text]'"
        ) from error
    data = load_digits()
    return ArrayDataset(np.rint(data.images * (255 / 16)).astype(np.uint8), data.target)


def _mnist_5k(file: Path) -> ArrayDataset:
    with gzip.open(file) as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int64)  # the label is last
    return ArrayDataset(table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1])


def labels_of(dataset: LabelledDataset) -> NDArray[np.int64]:
    """The label of every picture; from one pass over the data set where it has no list of them."""
    stored = _stored_labels(dataset)
    if stored is not None:
        return stored
    return np.array([_label(dataset[i][1], i) for i in range(len(dataset))], dtype=np.int64)


def _stored_labels(dataset: LabelledDataset) -> NDArray[np.int64] | None:
    """The labels a data set keeps beside its pictures, or None."""
    for attribute in ("targets", "labels", "samples", "_flat_character_images"):
        stored: Any = getattr(dataset, attribute, ())
        if stored is None or len(stored) != len(dataset):
            continue
        if attribute in ("samples", "_flat_character_images"):
            stored = [pair[1] for pair in stored]
        labels: NDArray[Any] = np.asarray(stored)
        if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
            return labels.astype(np.int64)
    return None


def _label(label: Any, position: int) -> int:
    scalar = label.item() if isinstance(label, Tensor | np.generic | np.ndarray) else label
    if isinstance(scalar, bool) or not isinstance(scalar, int):
        raise ValueError(f"labels must be integers, got {label!r} at position {position}")
    return scalar


def class_names(dataset: LabelledDataset) -> Sequence[str]:
    names: Any = getattr(dataset, "classes", None) or getattr(dataset, "_characters", ())
    return tuple(str(name) for name in names)


def class_name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def decode(
    dataset: LabelledDataset,
    labels: NDArray[np.int64],
    positions: Iterable[int],
    image_size: int | None = None,
    channels: int | None = None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(label, pixels (C, H, W)) of the pictures at `positions`, one after another."""
    for position in positions:
        value, label = dataset[position]
        if _label(label, position) != labels[position]:
            raise ValueError(
                f"labels must agree, got {label!r} from dataset[{position}] and "
                f"{labels[position]} from its list of labels: drop the target_transform"
            )
        try:
            image = picture(value)
            if channels is None:
                channels = 1 if image.mode in ("1", "L") else 3
            yield int(labels[position]), pixels(image, image_size, channels)
        except ValueError as error:
            raise ValueError(f"picture {position} of the data set {error}") from error
