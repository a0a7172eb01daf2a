"""Letters of many scripts in many fonts: a few-shot set that comes with the package.

Shape letters: F families of a class, K shots, Q queries a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from metadist.checks.values import require_bool
from metadist.tasks.data.glyphs import load_glyphs
from metadist.tasks.data.random import Random
from metadist.tasks.few_shot.class_splits import require_split
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler, require_episode

SPLITS = ("train", "val", "test")
ROTATION_DEGREES = 15.0
SHEAR = 0.2
SCALE = (0.85, 1.2)
SHIFT_PIXELS = 2.0


class Glyphs(EpisodeSampler):
    """A sampler of N-way K-shot tasks of white letters on black, (1, 28, 28).

    A class is a letter, its images are renderings of it in several styles of many font families.
    Splits are by script: train Latin, Greek, Cyrillic, Arabic; val Hebrew, Telugu; test Devanagari,
    Bengali, Thai.

    With `disjoint_families` the query images of a class come from other font families than its
    support images. Up to k_shot families, in random order, go to the support set, as many as leave
    k_query images for the query set; one shot from each in turn. A family that would not leave
    k_shot - 1 + k_query images is used for queries only. Classes with too few renderings for
    that (without it: for k_shot + k_query) are not drawn; `num_classes` of `num_classes_of_split`
    remain. A smaller `k_query` lets more in.

    With `augment` every image goes through its own random affine map: rotation within 15 degrees,
    shear within 0.2, scale 0.85 to 1.2 along each axis, shift within 2 pixels, bilinear. The
    same seed gives the same bytes on one kind of processor for any number of threads; on another
    kind pixels may differ by rounding (about 1e-6). Without `augment` there is no such limit.

    The images are read once in a process. A pickled sampler holds its arguments only.

    Args:
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`.
        split: One of train, val and test.
        augment: Draw an affine map for each image.
        disjoint_families: No font family in both sets of a class.

    Raises:
        ValueError: bad sizes, or fewer than n_way classes have renderings enough.

    Source: this package; `tasks/data/FONTS.md` lists the fonts. Upright type is easy (a nearest
    neighbour in pixels: .76 at 5-way 1-shot); augmented it is as hard as Omniglot (.43).
    """

    def __init__(
        self,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        seed: int = 0,
        augment: bool = True,
        disjoint_families: bool = True,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(augment=augment, disjoint_families=disjoint_families)
        require_split(split, SPLITS)
        self.augment = augment
        self.disjoint_families = disjoint_families
        glyphs = _load()
        of_split = [c for c, found in enumerate(glyphs.splits) if found == split]
        self.num_classes_of_split = len(of_split)
        self.scripts = tuple(sorted({glyphs.scripts[c] for c in of_split}))
        self._offered = [c for c in of_split if self._suffices(glyphs, c, k_shot, k_query)]
        if len(self._offered) < n_way:
            raise ValueError(
                f"n_way must be <= the classes of split {split!r} with renderings enough for "
                f"k_shot + k_query = {k_shot} + {k_query} (disjoint_families="
                f"{disjoint_families}), got {n_way} and {len(self._offered)} of {len(of_split)} "
                "classes: lower k_query, k_shot or n_way"
            )
        self._runs = glyphs.runs
        super().__init__(glyphs.classes, n_way, k_shot, k_query, split, seed)

    def __reduce__(self) -> tuple[Any, ...]:
        sizes = (self.n_way, self.k_shot, self.k_query, self.split, self.seed)
        return type(self), (*sizes, self.augment, self.disjoint_families)

    def __repr__(self) -> str:
        return (
            f"Glyphs(n_way={self.n_way}, k_shot={self.k_shot}, k_query={self.k_query}, "
            f"split={self.split!r}, seed={self.seed}, augment={self.augment}, "
            f"disjoint_families={self.disjoint_families}; {self.num_classes} of "
            f"{self.num_classes_of_split} classes have renderings enough)"
        )

    @property
    def num_classes(self) -> int:
        """How many classes tasks are drawn from."""
        return len(self._offered)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes tasks are drawn from, as `script U+codepoint`."""
        return tuple(self.classes.names[c] for c in self._offered)

    def draw_rows(self, class_: int, draws: Random) -> list[int]:
        """The rows of the images drawn from a class: K of support, then Q of query."""
        class_ = self._offered[class_]
        if not self.disjoint_families:
            return super().draw_rows(class_, draws)
        runs_F = self._runs[class_]
        for_support = self._draw_families(runs_F, draws)
        support = self._draw_shots([runs_F[family] for family in for_support], draws)
        rest: list[int] = []
        for family, run in enumerate(runs_F):
            if family not in for_support:
                rest.extend(range(*run))
        return support + [rest[i] for i in draws.choose(len(rest), self.k_query)]

    def finish(self, images: Tensor, draws: Random | None) -> Tensor:
        """The images, each through its own random affine map."""
        return random_affine(images, draws) if self.augment and draws else images

    def _draw_families(self, runs_F: list[tuple[int, int]], draws: Random) -> set[int]:
        """Up to K families whose images leave Q for the query set."""
        room = runs_F[-1][1] - runs_F[0][0] - self.k_query
        # A larger family could leave less room than there are shots missing.
        largest = room - self.k_shot + 1
        taken: set[int] = set()
        for family in draws.choose(len(runs_F), len(runs_F)):
            size = runs_F[family][1] - runs_F[family][0]
            if size <= min(room, largest):
                taken.add(family)
                room -= size
            if len(taken) == self.k_shot:
                break
        return taken

    def _draw_shots(self, runs: list[tuple[int, int]], draws: Random) -> list[int]:
        """K rows, one from each family in turn."""
        orders = [draws.choose(stop - start, stop - start) for start, stop in runs]
        rows = []
        for turn in range(max(len(order) for order in orders)):
            for (start, _), order in zip(runs, orders, strict=True):
                if turn < len(order):
                    rows.append(start + order[turn])
        return rows[: self.k_shot]

    def _suffices(self, glyphs: _Glyphs, class_: int, k_shot: int, k_query: int) -> bool:
        sizes = [stop - start for start, stop in glyphs.runs[class_]]
        total = sum(sizes)
        if not self.disjoint_families:
            return total >= k_shot + k_query
        largest = total - k_query - k_shot + 1
        return sum(size for size in sizes if size <= largest) >= k_shot

    def _require_classes(self) -> None:
        """Checked earlier, with a more specific message."""

    def _require_images(self) -> None:
        """Checked earlier: classes that are too small are not offered."""


@dataclass(frozen=True, eq=False)
class _Glyphs:
    """The packaged data: images sorted by class and family, and facts about each class."""

    classes: ClassImages
    runs: list[list[tuple[int, int]]]  # per class and family: first row, row after the last
    scripts: list[str]
    splits: list[str]


@cache
def _load() -> _Glyphs:
    glyphs = load_glyphs()
    labels, families = glyphs.labels, glyphs.families
    changes = np.flatnonzero(np.diff(labels) | np.diff(families)) + 1
    edges = [0, *changes.tolist(), len(labels)]
    runs: list[list[tuple[int, int]]] = [[] for _ in glyphs.scripts]
    for start, stop in pairwise(edges):
        runs[labels[start]].append((start, stop))
    letters = zip(glyphs.scripts, glyphs.codepoints, strict=True)
    names = tuple(f"{script} U+{codepoint:04X}" for script, codepoint in letters)
    starts = np.searchsorted(labels, np.arange(len(names) + 1)).astype(np.int64)
    return _Glyphs(
        classes=ClassImages(glyphs.images, starts, names),
        runs=runs,
        scripts=glyphs.scripts,
        splits=glyphs.splits,
    )


def random_affine(
    images: Tensor, draws: Random, padding: Literal["zeros", "border"] = "zeros"
) -> Tensor:
    """Square images (n, C, H, H), each through its own random affine map about its centre.

    The map is shift(rotation(shear(scale(.)))), with bounds given by the constants above; pixels
    are bilinear, and outside zero or those of the border. Every step is elementwise or per image,
    so that the number of threads cannot change a bit.
    """
    count, side = len(images), images.shape[-1]
    angle = np.deg2rad(draws.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, count))
    shear = draws.uniform(-SHEAR, SHEAR, count)
    scale_x, scale_y = draws.uniform(*SCALE, count), draws.uniform(*SCALE, count)
    pixel = 2 / side  # grid_sample measures from -1 to 1
    shift_x = pixel * draws.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, count)
    shift_y = pixel * draws.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, count)
    # Output pixel p comes from inverse(scale) inverse(shear) inverse(rotation) (p - shift).
    cos, sin = np.cos(angle), np.sin(angle)
    xx, xy = (cos + shear * sin) / scale_x, (sin - shear * cos) / scale_x
    yx, yy = -sin / scale_y, cos / scale_y
    offset_x, offset_y = -xx * shift_x - xy * shift_y, -yx * shift_x - yy * shift_y

    def column(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32))[:, None, None]

    line = (torch.arange(side, dtype=torch.float32) + 0.5) * pixel - 1
    x, y = line[None, None, :], line[None, :, None]
    grid = torch.empty(count, side, side, 2)
    torch.add(column(xx) * x, column(xy) * y + column(offset_x), out=grid[..., 0])
    torch.add(column(yx) * x, column(yy) * y + column(offset_y), out=grid[..., 1])
    return grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
