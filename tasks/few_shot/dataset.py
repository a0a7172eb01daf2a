"""Few-shot tasks from any labelled data set in the style of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import require_bool
from metadist.tasks.data.datasets import LabelledDataset, class_name, class_names, decode, labels_of
from metadist.tasks.data.images import require_format
from metadist.tasks.data.random import Random
from metadist.tasks.data.sets import map_style
from metadist.tasks.few_shot.class_splits import Splits, read_splits, select_classes
from metadist.tasks.few_shot.episodes import (
    JUDGED,
    ClassImages,
    EpisodeSampler,
    require_episode,
    require_square,
)
from metadist.tasks.few_shot.glyphs import random_affine


class FewShotDataset(EpisodeSampler):
    """A sampler of N-way K-shot tasks over a labelled data set, with classes split by a file.

    The pictures of the split are decoded once, here, and kept as one byte a pixel and channel:
    images * C * H * W bytes (`size_bytes`; 60,000 of 3x32x32 are 184 MB). They travel with a
    pickled sampler, because another machine may not have the files; the data set does not.

    Args:
        dataset: `dataset[i]` is (PIL image | tensor (C, H, W) | array (H, W, C), label), also with
            a path behind, or a mapping with "image" and "label". Numbers are uint8, or floating in
            [0, 1] and rounded to 1/255. Labels are integers or one-hot; they come from `.targets`,
            `.labels`, `.samples` or `._flat_character_images` where it has one of them;
            otherwise from one pass over it. Class names come from `.classes`, `._characters` or
            `.features`; a name of two classes gets the label behind it, "crane (134)". Of a
            DataLoader the data set is read.
        splits: A JSON file or a mapping, `{"train": [...], "val": [...], "test": [...]}`, with
            class names or integer labels; see `read_splits`.
        split: The one to draw from.
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`.
        image_size: Pixels; pictures are squeezed to this square. None: they have one size already.
        channels: 1 (grey) or 3 (RGB). None: as the first picture; colour beside grey is refused.
        transform: A pure function of float32 images (n, C, H, W) in [0, 1], applied to the support
            and the query images of every task (say, a normalisation). It must be picklable and
            draw no random numbers.
        rotations: Each class also turned by 90, 180 and 270 degrees, as three more classes; not in
            the splits val and test, which are judged as they are.
        augment: Each image, not those of val and test, through its own random affine map, as of
            `Glyphs`, with the border's pixels outside, before `transform`; images must be square.

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
        rotations: bool = False,
        augment: bool = False,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(rotations=rotations, augment=augment)
        require_format(image_size, channels)
        splits = read_splits(splits)
        dataset = map_style(dataset)
        labels = labels_of(dataset)
        present = sorted({int(label) for label in labels})
        names = class_names(dataset, labels)
        known: dict[str | int, int] = {label: label for label in present}
        known |= {names[label]: label for label in present if label in names}
        chosen = select_classes(splits, split, known)
        decoded: dict[int, list[NDArray[np.uint8]]] = {label: [] for label in chosen}
        positions = np.flatnonzero(np.isin(labels, chosen)).tolist()
        for label, image in decode(dataset, labels, positions, image_size, channels):
            decoded[label].append(image)
        classes = ClassImages.of({class_name(names, label): decoded[label] for label in chosen})
        if augment:
            require_square(classes)
        super().__init__(
            classes, n_way, k_shot, k_query, split, seed, rotations and split not in JUDGED
        )
        self.augment = augment
        self.transform = transform

    def finish(self, images: Tensor, draws: Random | None) -> Tensor:
        """The images through `transform`, in training after their own maps if `augment` is set."""
        if self.augment and self.split not in JUDGED and draws is not None:
            images = random_affine(images, draws, "border")
        return images if self.transform is None else self.transform(images)
