"""Few-shot tasks from any labelled data set in the style of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metadist.tasks.class_splits import Splits, read_splits, select_classes
from metadist.tasks.episodes import ClassImages, Draws, EpisodeSampler, require_episode
from metadist.tasks.images import picture, pixels, require_format


class LabelledDataset(Protocol):
    """A map-style data set: `dataset[i]` is (picture, integer label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


class FewShotDataset(EpisodeSampler):
    """A sampler of N-way K-shot tasks over a labelled data set, with classes split by a file.

    The pictures of the split are decoded once, here, and kept as one byte a pixel and channel:
    images * C * H * W bytes (`size_bytes`; 60,000 of 3x32x32 are 184 MB). They travel with a
    pickled sampler, because another machine may not have the files; the data set does not.

    Args:
        dataset: `dataset[i]` is (PIL image | tensor (C, H, W) | array (H, W, C), label). Numbers
            are uint8, or floating in [0, 1] and rounded to 1/255. Labels come from `.targets`,
            `.labels`, `.samples` or `._flat_character_images` where it has one of them;
            otherwise from one pass over it. Class names come from `.classes` or `._characters`.
        splits: a JSON file or a mapping, `{"train": [...], "val": [...], "test": [...]}`, with
            class names or integer labels; see `read_splits`.
        split: the one to draw from.
        n_way, k_shot, k_query, seed: as for `EpisodeSampler`.
        image_size: pixels; pictures are squeezed to this square. None: they have one size already.
        channels: 1 (grey) or 3 (RGB). None: as the first picture.
        transform: a pure function of float32 images (n, C, H, W) in [0, 1], applied to the support
            and the query images of every task (say, a normalisation). It must be picklable and
            draw no random numbers.

    Raises:
        ValueError: bad sizes or splits, or a picture that cannot be used; its position is named.
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        splits: str | Path | Splits,
        split: str = "train",
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        seed: int = 0,
        image_size: int | None = None,
        channels: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_format(image_size, channels)
        splits = read_splits(splits)
        labels = labels_of(dataset)
        present = sorted({int(label) for label in labels})
        names = _class_names(dataset)
        known: dict[str | int, int] = {label: label for label in present}
        known |= {names[label]: label for label in present if 0 <= label < len(names)}
        chosen = select_classes(splits, split, known)
        decoded: dict[int, list[NDArray[np.uint8]]] = {label: [] for label in chosen}
        positions = np.flatnonzero(np.isin(labels, chosen)).tolist()
        for label, image in decode(dataset, labels, positions, image_size, channels):
            decoded[label].append(image)
        classes = ClassImages.of({_name(names, label): decoded[label] for label in chosen})
        super().__init__(classes, n_way, k_shot, k_query, split, seed)
        self.transform = transform

    def finish(self, images: Tensor, draws: Draws) -> Tensor:
        """The images through `transform`."""
        return images if self.transform is None else self.transform(images)


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


def _class_names(dataset: LabelledDataset) -> Sequence[str]:
    names: Any = getattr(dataset, "classes", None) or getattr(dataset, "_characters", ())
    return tuple(str(name) for name in names)


def _name(names: Sequence[str], label: int) -> str:
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
