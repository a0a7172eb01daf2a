"""N-way K-shot episodes drawn from images in memory: the part that all image sources share.

Shape letters: N ways, K shots, Q queries a class, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import require_bool, require_integer, require_word
from metadist.task import Batch, Task
from metadist.tasks.data.images import read_images
from metadist.tasks.data.random import Random

JUDGED = ("val", "test")
"""The splits whose images stay as they are where training turns and warps them."""


def require_episode(n_way: int, k_shot: int, k_query: int, seed: int) -> None:
    """Raise ValueError for sizes that are wrong whatever the data; call it before reading any."""
    require_integer("n_way", n_way, 2)
    require_integer("k_shot", k_shot, 1)
    require_integer("k_query", k_query, 1)
    require_word("seed", seed)


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images in memory, class by class: those of class c are `images[starts[c]:starts[c + 1]]`.

    Args:
        images: uint8, (images, C, H, W).
        starts: int64, (classes + 1,).
        names: One a class, all different.
    """

    images: NDArray[np.uint8]
    starts: NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def of(cls, images_by_class: dict[str, Sequence[NDArray[np.uint8]]]) -> ClassImages:
        """The images of each class, one uint8 array (C, H, W) an image, all of one shape."""
        empty = [name for name, images in images_by_class.items() if not len(images)]
        if not images_by_class or empty:
            raise ValueError(f"every class must hold an image, got none in {empty or 'any'}")
        shapes: dict[tuple[int, ...], str] = {}
        everything: list[NDArray[np.uint8]] = []
        starts = [0]
        for name, images in images_by_class.items():
            shapes |= {image.shape: name for image in images}
            everything += images
            starts.append(len(everything))
        if len(shapes) > 1:
            found = " and ".join(f"{shape} in class {name!r}" for shape, name in shapes.items())
            raise ValueError(f"images must have one shape, got {found}: give an image_size")
        return cls(
            images=np.ascontiguousarray(np.stack(everything), dtype=np.uint8),
            starts=np.array(starts, dtype=np.int64),
            names=tuple(images_by_class),
        )

    @classmethod
    def from_labels(
        cls, images: NDArray[np.uint8], labels: NDArray[np.integer[Any]]
    ) -> ClassImages:
        """The images (images, C, H, W) with an integer label each; a class is called its label."""
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                "images must be uint8 of shape (images, C, H, W) with one label each, got "
                f"{images.dtype} {images.shape} and {len(labels)} labels"
            )
        order = np.argsort(labels, kind="stable")
        values, counts = np.unique(labels, return_counts=True)
        names = tuple(str(value) for value in values.tolist())
        return cls(images[order], np.cumsum([0, *counts], dtype=np.int64), names)


class EpisodeSampler:
    """A sampler of N-way K-shot tasks over images in memory.

    `sample(index)` gives a task whose support tensors are images float32 (N*K, C, H, W) in [0, 1]
    and labels int64 (N*K,), and whose query tensors are the same with N*Q. Classes are drawn
    without replacement and numbered 0 .. N-1 in random order; images of a class are drawn without
    replacement, so support and query are disjoint. Both sets are class-major: K (Q) images of
    class 0, then of class 1, and so on.

    Give it arrays (`EpisodeSampler(ClassImages.from_labels(images, labels), ...)`), or use one of
    its subclasses, which read a data set. The images (`size_bytes`) travel with a pickled sampler.

    Args:
        classes: The images of one split.
        n_way: Classes of a task, N >= 2.
        k_shot: Support images a class, K >= 1.
        k_query: Query images a class, Q >= 1.
        split: Name of the split; a part of the random seed.
        seed: 0 <= seed < 2^64; another seed, another stream of tasks.
        rotations: Every class also turned by 90, 180 and 270 degrees, as three more classes.

    Raises:
        ValueError: a size is not positive, or larger than the classes or images there are.

    Source: Vinyals et al., Matching networks (2016), section 4; the rotated classes are those of
    Santoro et al. (2016).
    """

    invert = False
    """Whether files are read as 255 - x."""

    def __init__(
        self,
        classes: ClassImages,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        seed: int = 0,
        rotations: bool = False,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(rotations=rotations)
        if rotations:
            require_square(classes, "rotations")
        self.n_way = int(n_way)
        self.k_shot = int(k_shot)
        self.k_query = int(k_query)
        self.split = split
        self.seed = int(seed)
        self.rotations = rotations
        self.classes = classes
        self._turns = 4 if rotations else 1
        self._require_classes()
        self._require_images()

    @property
    def num_classes(self) -> int:
        """How many classes tasks are drawn from."""
        return self._turns * len(self.classes.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes tasks are drawn from, without their rotations."""
        return self.classes.names

    @property
    def size_bytes(self) -> int:
        """Memory of the images: one byte a pixel and channel."""
        return self.classes.images.nbytes

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_way={self.n_way}, k_shot={self.k_shot}, "
            f"k_query={self.k_query}, split={self.split!r}, seed={self.seed}; "
            f"{self.num_classes} classes, {len(self.classes.images)} images)"
        )

    def sample(self, index: int) -> Task:
        """The task number `index`, 0 <= index < 2^64."""
        draws, chosen = self._drawn(index)
        rows_NM = np.array([self.draw_rows(c // self._turns, draws) for c in chosen])
        turns_N = np.array(chosen) % self._turns
        support = self._batch(rows_NM[:, : self.k_shot], turns_N, draws)
        query = self._batch(rows_NM[:, self.k_shot :], turns_N, draws)
        return Task(support, query, int(index))

    @property
    def table_bytes(self) -> int:
        """Memory of `tables`; 0: what becomes of the images of a task is computed on the CPU."""
        return self._turns * self.size_bytes if self._is_plain else 0

    def tables(self) -> tuple[Tensor, Tensor]:
        """The images uint8 (rows, C, H, W), after each turn, and pixels of float32 by their byte.

        A look-up, since a GPU may divide by 255 as it multiplies by its reciprocal.
        """
        images = self.classes.images
        if self._turns > 1:
            turned = [np.rot90(images, turns, axes=(-2, -1)) for turns in range(self._turns)]
            images = np.concatenate(turned)
        return torch.from_numpy(images), torch.arange(256.0).div_(255)

    def rows(self, index: int) -> Tensor:
        """The rows of the images of a task in `tables`, (N, K + Q)."""
        draws, chosen = self._drawn(index)
        rows_NM = np.array([self.draw_rows(c // self._turns, draws) for c in chosen])
        turns_N = np.array(chosen) % self._turns
        return torch.from_numpy(rows_NM + len(self.classes.images) * turns_N[:, None])

    def cut(self, tables: tuple[Tensor, ...], rows: Tensor, index: int) -> Task:
        """The task of these rows, where the tables are."""
        images, pixels = tables
        classes = torch.arange(self.n_way, device=rows.device)[:, None]

        def batch(rows_NM: Tensor) -> Batch:
            chosen = images.index_select(0, rows_NM.flatten())
            labels = classes.expand(rows_NM.shape).flatten()
            return Batch.of(pixels[chosen.int()], labels)

        return Task(batch(rows[:, : self.k_shot]), batch(rows[:, self.k_shot :]), int(index))

    @property
    def _is_plain(self) -> bool:
        """Whether the images of a task are those in memory, as `tables` has them."""
        ours = EpisodeSampler
        if type(self).sample is not ours.sample or type(self)._batch is not ours._batch:
            return False
        shape = self.classes.images.shape[1:]
        probe = torch.linspace(0.1, 0.9, math.prod(shape)).reshape(1, *shape)
        finished = self.finish(probe.clone(), Random(self.seed, self.split, 0))
        return torch.equal(finished, probe)

    def classes_of(self, index: int) -> list[str]:
        """The names of the classes 0 .. N-1 of a task, with the angle of those that are turned."""
        names = []
        for number in self._drawn(index)[1]:
            turns = number % self._turns
            turned = f" turned by {90 * turns}" if turns else ""
            names.append(self.class_names[number // self._turns] + turned)
        return names

    def _drawn(self, index: int) -> tuple[Random, list[int]]:
        """The random numbers of a task after those of its classes, and these."""
        draws = Random(self.seed, self.split, index)
        return draws, draws.choose(self.num_classes, self.n_way)

    def draw_rows(self, class_: int, draws: Random) -> list[int]:
        """The rows of the images drawn from a class: K of support, then Q of query."""
        start, stop = self.classes.starts[class_ : class_ + 2].tolist()
        chosen = draws.choose(stop - start, self.k_shot + self.k_query)
        return [start + position for position in chosen]

    def finish(self, images: Tensor, draws: Random | None) -> Tensor:
        """The images of one set as a task holds them, given them in [0, 1].

        Without `draws` the images are to be predicted, and nothing may be drawn for them.
        """
        return images

    def read_images(self, files: Sequence[Path]) -> Tensor:
        """Image files as this sampler has its own: in size, channels, inversion and `finish`.

        Raises:
            ValueError: A file cannot be read, or is of another size that is not resized to.
        """
        channels, height, width = self.classes.images.shape[1:]
        size = height if height == width else None
        images = read_images({"": list(files)}, size, channels, self.invert)[""]
        for file, image in zip(files, images, strict=True):
            if image.shape != (channels, height, width):
                raise ValueError(
                    f"images must be {width}x{height} as those of the run, which are no squares to "
                    f"squeeze them to, got {file} of {image.shape[2]}x{image.shape[1]}: resize it"
                )
        return self.finish(torch.from_numpy(np.stack(images)).to(torch.float32).div_(255), None)

    def _batch(self, rows_NM: NDArray[Any], turns_N: NDArray[Any], draws: Random) -> Batch:
        images_NMCHW = self.classes.images[rows_NM]
        for turns in range(1, self._turns):
            turned = turns_N == turns
            images_NMCHW[turned] = np.rot90(images_NMCHW[turned], turns, axes=(-2, -1))
        pixels = torch.from_numpy(images_NMCHW).flatten(0, 1)
        images = self.finish(pixels.to(torch.float32).div_(255), draws)
        return Batch.of(images, torch.arange(self.n_way).repeat_interleave(rows_NM.shape[1]))

    def _require_classes(self) -> None:
        if self.n_way > self.num_classes:
            raise ValueError(
                f"n_way must be <= the {self.num_classes} classes of split {self.split!r}, "
                f"got {self.n_way}: lower n_way or give the split more classes"
            )

    def _require_images(self) -> None:
        sizes = np.diff(self.classes.starts)
        needed = self.k_shot + self.k_query
        if needed > sizes.min():
            raise ValueError(
                f"k_shot + k_query must be <= the images of every class of split {self.split!r}, "
                f"got {self.k_shot} + {self.k_query} = {needed} but class "
                f"{self.classes.names[sizes.argmin()]!r} holds {sizes.min()} "
                f"({int((sizes < needed).sum())} of {len(sizes)} classes hold too few): lower "
                "k_query or k_shot, or leave those classes out of the splits"
            )


def require_square(classes: ClassImages, field: str = "augment") -> None:
    """Raise ValueError unless images are square, as `field`, which maps or turns them, has them."""
    height, width = classes.images.shape[2:]
    if height != width:
        raise ValueError(
            f"{field} needs square images, got {width}x{height}: give an image_size, or leave "
            f"{field} out"
        )


def is_dark_on_light(images: NDArray[np.uint8]) -> bool:
    """Whether grey images are ink on paper: borders are light, and what is on them darker."""
    if images.shape[1] != 1:
        return False
    border = np.concatenate(
        [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], axis=-1
    )
    return bool(np.median(border) > 200 and np.mean(images < 100) > np.mean(border < 100))
