"""Small data on disk and in memory, and comparisons of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from metadist.problem import Problem
from metadist.task import Task
from metadist.tasks import ClassImages
from metadist.trees import Params, add, scale
from tests.problems import assert_close, oracle_of


class Endless(IterableDataset[Any]):
    """A data set without positions."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def striped(num_classes: int, num_images: int, channels: int = 1, side: int = 4) -> ClassImages:
    """Images whose first pixel is the class, and whose second pixel is the image."""
    images = np.zeros((num_classes, num_images, channels, side, side), dtype=np.uint8)
    images[..., 0, 0] = np.arange(num_classes)[:, None, None]
    images[..., 0, 1] = np.arange(num_images)[None, :, None]
    labels = np.repeat(np.arange(num_classes), num_images)
    return ClassImages.from_labels(images.reshape(-1, channels, side, side), labels)


def write_image(path: Path, seed: int, side: int = 12, mode: str = "L") -> None:
    """A random picture, another for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_tree(
    root: Path,
    classes: list[str],
    num_images: int = 3,
    mode: str = "L",
    seed: int = 0,
    side: int = 12,
) -> Path:
    """A folder of pictures for each class, named as Omniglot names them."""
    for c, name in enumerate(classes):
        for i in range(num_images):
            file = root / name / f"{c:04d}_{i + 1:02d}.png"
            write_image(file, 10**6 * seed + 1000 * c + i, side, mode)
    return root


def equal(one: Task, two: Task) -> bool:
    """The same bytes in the same places."""
    pairs = [(one.support, two.support), (one.query, two.query)]
    return bool(one.id == two.id) and all(
        torch.equal(a, b)
        for x, y in pairs
        for a, b in zip((*x.tensors, x.index), (*y.tensors, y.index), strict=True)
    )


def refusal(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """The message of the error that the call raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def assert_shards_add_up(
    problem: Problem, task: Task, outer: Params, inner: Params, v: Params, first: int
) -> None:
    """The products on the first examples and on the others, weighted, are those on all of them."""
    num_examples = len(task.support.index)

    def second_order(positions: torch.Tensor) -> tuple[Params, Params]:
        shard = task._replace(support=task.support.take(positions))
        oracle, context, _ = oracle_of(problem, outer, shard)
        return oracle.second_order(context, inner, v, oracle.draw_inner())

    whole = second_order(torch.arange(num_examples))
    parts = [
        [scale(tree, len(positions) / num_examples) for tree in second_order(positions)]
        for positions in (torch.arange(first), torch.arange(first, num_examples))
    ]
    for tree, one, two in zip(whole, *parts, strict=True):
        assert_close(add(one, two), tree)
