"""Labelled data sets: opened by name, and decoded to labels and pixels.

Shape letters: n images, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import normal_form
from metadist.tasks.data.images import is_grey, picture, pixels
from metadist.tasks.data.sets import map_style
from metadist.tasks.data.sources import MNIST_5K, ROOT_VARIABLE, FetchError, data_root, fetch


class LabelledDataset(Protocol):
    """A map-style data set: `dataset[i]` is (picture, label), see `item`."""

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

    Raises:
        ValueError: there is no such name.
        FetchError: the files are missing.
    """
    if not isinstance(dataset, str):
        return map_style(dataset), None
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
    folder = data_root(root)
    try:
        return kind(folder, train=True), kind(folder, train=False)
    except (RuntimeError, FileNotFoundError) as error:
        # So torchvision says that files are missing, and to set an argument that is not ours.
        raise FetchError(
            f"root must hold the files of dataset {dataset!r}, got {folder} ({error}): run "
            f"{dataset}({str(folder)!r}, download=True) where there is internet, or set root or "
            f"{ROOT_VARIABLE} to a folder that has them"
        ) from error


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


IMAGE_KEYS = ("image", "img", "picture")
LABEL_KEYS = ("label", "labels", "target", "targets", "class", "y")
EXPECTED = 'a data set must give (picture, label) or {"image": picture, "label": label}'


def require_dataset(dataset: Any) -> None:
    """Raise ValueError unless `dataset` can be read like a map-style data set."""
    kind = type(dataset).__name__
    if isinstance(dataset, np.ndarray | Tensor):
        raise ValueError(
            f"dataset must be a data set, got a {kind} of shape {tuple(dataset.shape)} without "
            "labels: EpisodeSampler(ClassImages.from_labels(images, labels)) takes arrays"
        )
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset must be one data set, got a {kind} of {', '.join(map(str, dataset))}: pass "
            "one of them"
        )
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if missing:
        raise ValueError(
            f"dataset must have the methods __len__ and __getitem__, got a {kind} without "
            f"{', '.join(missing)}: collect its items in a list first"
        )
    if not len(dataset):
        raise ValueError(f"dataset must hold pictures, got an empty {kind}: check how it was made")


def labels_of(dataset: LabelledDataset) -> NDArray[np.int64]:
    """The label of every picture; from one pass over the data set where it has no list of them."""
    require_dataset(dataset)
    stored = _stored_labels(dataset)
    if stored is not None:
        return stored
    labels, widths = [], set()
    for position in range(len(dataset)):
        label = item(dataset, position)[1]
        labels.append(_label(label, position))
        widths.add(_width(label))
    if len(widths) > 1:
        raise ValueError(
            "labels must all be integers, or one-hot vectors of one length, got "
            f"{' and '.join(_width_in_words(width) for width in sorted(widths))}"
        )
    return np.array(labels, dtype=np.int64)


def item(dataset: LabelledDataset, position: int) -> tuple[Any, Any]:
    """(picture, label) of what is at a position of a data set.

    Raises:
        ValueError: It is something else, and it would be a guess which part is which.
    """
    value = dataset[position]
    pair: tuple[Any, Any] | None = None
    if isinstance(value, Mapping):
        pictures = [key for key in IMAGE_KEYS if key in value]
        labels = [key for key in LABEL_KEYS if key in value]
        if len(pictures) == len(labels) == 1:
            pair = value[pictures[0]], value[labels[0]]
    elif isinstance(value, tuple | list) and len(value) > 1:
        # What comes after must not look like a label or a picture: paths, notes.
        is_plain = all(isinstance(part, str | Path | None) for part in value[2:])
        pair = (value[0], value[1]) if is_plain else None
    if pair is None or isinstance(pair[0], int | np.integer):
        raise ValueError(
            f"{EXPECTED}, got {shown(value)} at position {position}: wrap the data set in a class "
            "whose __getitem__ does"
        )
    return pair


def shown(value: Any) -> str:
    """A value in a message: its form, and itself only where it is short."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}: {shown(part)}" for key, part in list(value.items())[:8])
        return f"{{{inside}}}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(shown, value[:8])) + (", ..." if len(value) > 8 else "")
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    plain = isinstance(value, str | bool | int | float | np.generic | None)
    return f"{value!r:.60}" if plain else type(value).__name__


def _stored_labels(dataset: LabelledDataset) -> NDArray[np.int64] | None:
    """The labels a data set keeps beside its pictures, or None.

    They are a short cut: what has another form than expected is passed over.
    """
    for attribute in ("targets", "labels", "samples", "_flat_character_images"):
        stored: Any = getattr(dataset, attribute, None)
        if not hasattr(stored, "__len__") or len(stored) != len(dataset):
            continue
        if attribute in ("samples", "_flat_character_images"):
            if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in stored):
                continue
            stored = [pair[1] for pair in stored]
        try:
            labels: NDArray[Any] = np.asarray(stored)
        except (TypeError, ValueError, RuntimeError):  # of unequal lengths, or on a GPU
            continue
        if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
            return labels.astype(np.int64)
    return None


def _label(label: Any, position: int) -> int:
    """The label as an integer: of a one-hot vector, the place of its one."""
    width = _width(label)
    if width > 1:
        vector: NDArray[Any] = np.asarray(label)
        ones = np.flatnonzero(vector)
        if len(ones) != 1 or vector[ones[0]] != 1:
            raise ValueError(
                f"labels must be integers or one-hot vectors, got a {shown(label)} with "
                f"{len(ones)} entries that are not 0 at position {position}: choose one class for "
                "each picture"
            )
        return int(ones[0])
    scalar = label.item() if width == 1 else label
    if isinstance(scalar, bool) or not isinstance(scalar, int):
        raise ValueError(
            f"labels must be integers, got {shown(label)} at position {position}: number the "
            "classes in the data set"
        )
    return scalar


def _width(label: Any) -> int:
    """0 for no array, 1 for an array of one number, else the length of a vector."""
    if isinstance(label, list | tuple):
        label = np.asarray(label)
    if not isinstance(label, Tensor | np.generic | np.ndarray):
        return 0
    return int(np.prod(label.shape)) if len(label.shape) <= 1 else 0


def _width_in_words(width: int) -> str:
    return f"vectors of {width}" if width > 1 else "integers"


def class_names(dataset: LabelledDataset, labels: NDArray[np.int64]) -> dict[int, str]:
    """The name of each label that has one, all different.

    Raises:
        ValueError: The data set names classes, and it is not clear which name is whose.
    """
    named = _stored_names(dataset)
    present = sorted(set(labels.tolist()))
    if not isinstance(named, dict) and named:
        size = len(named)
        if present == list(range(1, size + 1)):  # numbered from 1
            named = dict(enumerate(named, start=1))
        elif present[0] >= 0 and present[-1] < size:
            named = dict(enumerate(named))
        else:
            raise ValueError(
                f"labels must be 0 .. {size - 1}, the positions of the {size} names of classes of "
                f"the data set, or 1 .. {size} each, got {present[0]} .. {present[-1]}: correct "
                "its list of names (`classes`), or remove that and use the labels as names"
            )
    names = {label: normal_form(str(name)) for label, name in dict(named).items()}
    often = Counter(names.values())
    return {
        label: name if often[name] == 1 else f"{name} ({label})" for label, name in names.items()
    }


def _stored_names(dataset: LabelledDataset) -> Sequence[Any] | dict[int, Any]:
    """The names of classes that a data set keeps, by position or by label."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):  # as hub data sets have
        keys = [key for key in LABEL_KEYS if key in features]
        return list(getattr(features[keys[0]], "names", None) or ()) if len(keys) == 1 else ()
    for attribute in ("classes", "_characters"):
        stored: Any = getattr(dataset, attribute, None)
        if isinstance(stored, Mapping):
            pairs = list(stored.items())
            if all(isinstance(value, int | np.integer) for _, value in pairs):  # name: label
                pairs = [(value, key) for key, value in pairs]
            if all(isinstance(key, int | np.integer) for key, _ in pairs):
                return {int(key): value for key, value in pairs}
        elif hasattr(stored, "__len__") and len(stored) and not isinstance(stored, str):
            return list(stored)
    return ()


def class_name(names: Mapping[int, str], label: int) -> str:
    """The name of a label, which is the label itself where it has none."""
    return names.get(label, str(label))


def decode(
    dataset: LabelledDataset,
    labels: NDArray[np.int64],
    positions: Iterable[int],
    image_size: int | None = None,
    channels: int | None = None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(label, pixels (C, H, W)) of the pictures at `positions`, one after another."""
    is_guess = False
    for position in positions:
        value, label = item(dataset, position)
        if _label(label, position) != labels[position]:
            raise ValueError(
                f"labels must agree, got {shown(label)} from dataset[{position}] and "
                f"{labels[position]} from its list of labels: drop the target_transform"
            )
        try:
            image = picture(value)
            if channels is None:
                channels, is_guess = (1 if image.mode in ("1", "L") else 3), True
            array = pixels(image, image_size, channels)
            if is_guess and channels == 1 and not is_grey(image):
                raise ValueError(
                    "must be grey as those before it, got colour: convert all to one kind "
                    "(FewShotDataset: pass channels=1 or 3)"
                )
            yield int(labels[position]), array
        except ValueError as error:
            raise ValueError(f"picture {position} of the data set {error}") from error
