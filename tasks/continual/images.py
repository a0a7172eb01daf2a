"""Streams of permuted images, of the classes of a data set in turn, and of alphabets in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.checks.values import require_integer
from metadist.tasks.continual.memory import MemoryKind
from metadist.tasks.continual.stream import ImageStream, Stage, require_stream
from metadist.tasks.data.datasets import LabelledDataset, decode, labels_of, open_dataset
from metadist.tasks.data.glyphs import load_glyphs
from metadist.tasks.data.random import Random


class PermutedImages(ImageStream):
    """The same classes again and again, each time with the pixels in another order.

    Every stage has training images of its own, and its own random order of the pixels. It is judged
    on the same test images, in its order.

        stream = PermutedImages("mnist", num_tasks=20)
        network = ContextualNetwork(num_tasks=20)
        Trainer(ContinualLearning(network), stream, ITD(inner_steps=1, inner_lr=0.1))

    Args:
        dataset, root: The data set and the folder of the data, see `open_dataset`.
        num_tasks: Stages, >= 1.
        per_task: Training images of a stage, a multiple of `batch`.
        batch, memory, semantic, replay, updates, kind: See `ImageStream`.
        num_test: Test images, from the test part of the data set, where it has one.
        seed: The seed of all choices, 0 <= seed < 2^64.

    Raises:
        ValueError: More images asked for than there are, pictures that cannot be read, an argument
            out of its range.
        FetchError: The data set is missing and cannot be fetched.
    """

    def __init__(
        self,
        dataset: str | LabelledDataset = "mnist",
        root: str | Path | None = None,
        num_tasks: int = 20,
        per_task: int = 1000,
        batch: int = 10,
        memory: int = 50,
        semantic: int = 10,
        replay: int = 64,
        updates: int = 2,
        kind: MemoryKind = "ring",
        num_test: int = 2000,
        seed: int = 0,
    ) -> None:
        require_integer("num_tasks", num_tasks, 1)
        require_integer("per_task", per_task, 1)
        require_integer("num_test", num_test, 1)
        require_stream(batch, memory, semantic, replay, updates, kind, seed)
        source = _Source(dataset, root)
        everything = np.arange(len(source.labels))
        needed = num_tasks * per_task
        rows = _chosen(everything, needed, "num_tasks * per_task", Random(seed, "images", 0))
        train = source.take(rows)
        if source.held_out is None:
            left = np.setdiff1d(everything, rows)
        else:
            left = np.arange(len(source.held_out.labels))
        of_test = _chosen(left, num_test, "num_test", Random(seed, "images", 1))
        test = (source.held_out or source).take(of_test)
        classes = np.unique(source.labels)
        size = train[0][0].size
        stages = [
            Stage(
                pixels=train[0][first : first + per_task],
                labels=np.searchsorted(classes, train[1][first : first + per_task]),
                test_pixels=test[0],
                test_labels=np.searchsorted(classes, test[1]),
                order=np.array(Random(seed, "pixels", first).choose(size, size)),
            )
            for first in range(0, needed, per_task)
        ]
        self._described = f"{dataset!r}, num_tasks={num_tasks}, per_task={per_task}"
        super().__init__(stages, batch, memory, semantic, replay, updates, kind, seed)


class SplitImages(ImageStream):
    """The classes of a data set in turn: some of them at a stage, numbered from 0 at each.

    Args:
        dataset, root: The data set and the folder of the data, see `open_dataset`.
        classes_per_task: Classes of a stage, >= 2; classes that are left over are not used.
        per_task: Training images of a stage, as many of each class; a multiple of `batch`.
        batch, memory, semantic, replay, updates, kind: See `ImageStream`.
        num_test: Test images of a stage, as many of each class.
        seed: The seed of all choices, 0 <= seed < 2^64.

    Raises:
        ValueError, FetchError: As for `PermutedImages`.
    """

    def __init__(
        self,
        dataset: str | LabelledDataset = "mnist",
        root: str | Path | None = None,
        classes_per_task: int = 2,
        per_task: int = 1000,
        batch: int = 10,
        memory: int = 50,
        semantic: int = 10,
        replay: int = 64,
        updates: int = 2,
        kind: MemoryKind = "ring",
        num_test: int = 400,
        seed: int = 0,
    ) -> None:
        _require_split(classes_per_task, per_task, num_test)
        require_stream(batch, memory, semantic, replay, updates, kind, seed)
        source = _Source(dataset, root)
        classes = np.unique(source.labels)
        num_stages = len(classes) // classes_per_task
        if not num_stages:
            raise ValueError(
                f"classes_per_task must be <= the {len(classes)} classes of the data set, got "
                f"{classes_per_task}"
            )
        stages = []
        for stage in range(num_stages):
            draws = Random(seed, "split", stage)
            of_stage = classes[stage * classes_per_task :][:classes_per_task].tolist()
            here = [np.flatnonzero(source.labels == label) for label in of_stage]
            there = here
            if source.held_out is not None:
                there = [np.flatnonzero(source.held_out.labels == label) for label in of_stage]
            train, test = _rows(here, there, per_task, num_test, draws)
            pixels, labels = source.take(train)
            test_pixels, test_labels = (source.held_out or source).take(test)
            numbers = np.searchsorted(of_stage, labels), np.searchsorted(of_stage, test_labels)
            stages.append(Stage(pixels, numbers[0], test_pixels, numbers[1]))
        self._described = f"{dataset!r}, classes_per_task={classes_per_task}, per_task={per_task}"
        super().__init__(stages, batch, memory, semantic, replay, updates, kind, seed)


SCRIPTS = ("Latin", "Greek", "Cyrillic", "Arabic", "Hebrew", "Devanagari", "Thai")
"""The alphabets with many renderings of a letter."""


class SplitGlyphs(ImageStream):
    """Alphabets in turn: letters of one script at a stage, numbered from 0 at each.

    The images are those of `Glyphs`, upright; a letter is tested on other renderings of it.

    Args:
        scripts: The scripts in their order, of those in `Glyphs`.
        classes_per_task: Letters of a stage, >= 2, drawn from those with renderings enough.
        per_task: Training images of a stage, as many of each letter; a multiple of `batch`.
        batch, memory, semantic, replay, updates, kind: See `ImageStream`.
        num_test: Test images of a stage, as many of each letter.
        seed: The seed of all choices, 0 <= seed < 2^64.

    Raises:
        ValueError: A script that there is not or that has too few letters, an argument out of its
            range.
    """

    def __init__(
        self,
        scripts: Sequence[str] = SCRIPTS,
        classes_per_task: int = 20,
        per_task: int = 500,
        batch: int = 10,
        memory: int = 50,
        semantic: int = 10,
        replay: int = 64,
        updates: int = 2,
        kind: MemoryKind = "ring",
        num_test: int = 200,
        seed: int = 0,
    ) -> None:
        _require_split(classes_per_task, per_task, num_test)
        require_stream(batch, memory, semantic, replay, updates, kind, seed)
        glyphs = load_glyphs()
        known = list(dict.fromkeys(glyphs.scripts))
        if not scripts or not set(scripts) <= set(known):
            raise ValueError(f"scripts must be some of {', '.join(known)}, got {tuple(scripts)}")
        counts = np.bincount(glyphs.labels, minlength=len(glyphs.scripts))
        needed = (per_task + num_test) // classes_per_task
        stages = []
        for stage, script in enumerate(scripts):
            draws = Random(seed, "split", stage)
            letters = np.flatnonzero((np.array(glyphs.scripts) == script) & (counts >= needed))
            if len(letters) < classes_per_task:
                raise ValueError(
                    f"classes_per_task must be <= the letters of {script} with {needed} "
                    f"renderings, got {classes_per_task} and {len(letters)} of these: lower it, "
                    "per_task or num_test"
                )
            chosen = np.sort(letters[draws.choose(len(letters), classes_per_task)])
            rows = [np.flatnonzero(glyphs.labels == letter) for letter in chosen]
            train, test = _rows(rows, rows, per_task, num_test, draws)
            stages.append(
                Stage(
                    pixels=glyphs.images[train],
                    labels=np.searchsorted(chosen, glyphs.labels[train]),
                    test_pixels=glyphs.images[test],
                    test_labels=np.searchsorted(chosen, glyphs.labels[test]),
                )
            )
        self._described = (
            f"{tuple(scripts)}, classes_per_task={classes_per_task}, per_task={per_task}"
        )
        super().__init__(stages, batch, memory, semantic, replay, updates, kind, seed)


class _Source:
    """A part of a data set, and the part that is held out of it for tests, if any."""

    def __init__(self, dataset: str | LabelledDataset, root: str | Path | None) -> None:
        whole, held_out = open_dataset(dataset, root)
        self._dataset = whole
        self.labels = labels_of(whole)
        self.held_out = None if held_out is None else _Source(held_out, None)

    def take(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """(pixels, labels) of the images at `positions`."""
        found = [image for _, image in decode(self._dataset, self.labels, positions.tolist())]
        shapes = {image.shape for image in found}
        if len(shapes) > 1:
            raise ValueError(
                f"images must have one shape, got {sorted(shapes)}: resize them in the data set"
            )
        return np.stack(found), self.labels[positions]


def _require_split(classes_per_task: Any, per_task: Any, num_test: Any) -> None:
    require_integer("classes_per_task", classes_per_task, 2)
    require_integer("per_task", per_task, 1)
    require_integer("num_test", num_test, 1)
    for name, value in (("per_task", per_task), ("num_test", num_test)):
        if value % classes_per_task:
            raise ValueError(
                f"{name} must be a multiple of classes_per_task ({classes_per_task}), as many "
                f"images of each, got {value}"
            )


def _chosen(
    positions: NDArray[np.int64], count: int, field: str, draws: Random
) -> NDArray[np.int64]:
    """`count` of the positions in random order."""
    if count > len(positions):
        raise ValueError(
            f"{field} must be <= {len(positions)}, the images that are left, got {count}"
        )
    return positions[draws.choose(len(positions), count)]


def _rows(
    train: Sequence[NDArray[np.int64]],
    test: Sequence[NDArray[np.int64]],
    per_task: int,
    num_test: int,
    draws: Random,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images to train and to test on, of the positions of each class; training mixed."""
    of_train, of_test = [], []
    for here, there in zip(train, test, strict=True):
        chosen = _chosen(here, per_task // len(train), "per_task of a class", draws)
        left = np.setdiff1d(there, chosen) if there is here else there
        of_train.append(chosen)
        of_test.append(_chosen(left, num_test // len(test), "num_test of a class", draws))
    rows = np.concatenate(of_train)
    return rows[draws.choose(len(rows), len(rows))], np.concatenate(of_test)
