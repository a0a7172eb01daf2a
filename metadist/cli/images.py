"""Folders of images as the support and query sets of a trained run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from metadist.checks.paths import absent
from metadist.cli.trained import Trained
from metadist.problem import has_few_shot_classes
from metadist.sampler import Labelled as HasClasses
from metadist.sampler import ReadsImages, num_tasks_of
from metadist.task import Batch, Task
from metadist.tasks.data.images import look_into


@dataclass(frozen=True)
class Labelled:
    """Image files, and the names of the folders they are in; no names where there are none."""

    files: list[Path]
    labels: list[str]


@dataclass(frozen=True)
class Support:
    """What a run adapts to, and the names of the classes."""

    task: Task | Batch
    classes: list[str]
    reader: ReadsImages


def labelled(folder: Path, field: str) -> Labelled:
    """The images of a folder, or of the folders in it.

    Raises:
        ValueError: There are none, or it holds both.
    """
    if not folder.is_dir():
        raise ValueError(f"{field} must be a folder, got {folder}: {absent(folder, 'folder')}")
    found = look_into(folder)
    if found.images and found.folders:
        raise ValueError(f"{field} must hold images or folders of images, got both in {folder}")
    inside = {part.name: look_into(part).images for part in found.folders}
    files = found.images or list(chain(*inside.values()))
    if not files:
        raise ValueError(f"{field} must hold images, got none in {folder}")
    empty = [name for name, images in inside.items() if not images]
    if empty:
        raise ValueError(
            f"each folder of {field} must hold images, got none in {folder / empty[0]}: remove it"
        )
    labels = [name for name, images in inside.items() for _ in images]
    return Labelled(files, labels)


def support_of(trained: Trained, folder: str | None) -> Support:
    """The support set in `folder`, or the task of the run's own data.

    Raises:
        ValueError: The run does not classify images, or there is nothing to adapt to.
    """
    sampler = trained.sampler
    if not isinstance(sampler, ReadsImages):
        raise ValueError(
            "the run's sampler must read images (a method read_images) to adapt to files, got "
            f"{type(sampler).__name__}: use metadist.predict with tensors"
        )
    if folder is not None:
        if not has_few_shot_classes(trained.problem):
            raise ValueError(
                f"support must not be given for {type(trained.problem).__name__}, whose classes "
                f"are those of the run's data, got {folder}: leave it out"
            )
        images = labelled(Path(folder), "support")
        if not images.labels:
            raise ValueError(f"support must hold a folder for each class, got images in {folder}")
        classes = sorted(set(images.labels), key=images.labels.index)
        targets = torch.tensor([classes.index(label) for label in images.labels])
        inputs = sampler.read_images(images.files)
        _check_classes(trained, inputs, classes)
        return Support(Batch.of(inputs, targets), classes, sampler)
    if num_tasks_of(trained.sampler) is None or not isinstance(sampler, HasClasses):
        raise ValueError(
            "support must be a folder with a folder of images for each class, got none: only runs "
            "on one task have classes of their own"
        )
    return Support(sampler.sample(0), [str(i) for i in range(sampler.num_classes)], sampler)


def _check_classes(trained: Trained, inputs: Tensor, classes: list[str]) -> None:
    """Raise ValueError unless the model has one output for each class."""
    one_class = Batch.of(inputs[:2], torch.zeros(len(inputs[:2]), dtype=torch.int64))
    num_outputs = trained.predict(one_class).shape[1]
    if num_outputs not in (1, len(classes)):  # 1: as many outputs as the support set has classes
        raise ValueError(
            f"support must hold as many classes as the model has outputs, {num_outputs}, got "
            f"{len(classes)} folders ({', '.join(classes[:5])}): add or remove folders, or train "
            "with another n_way"
        )
