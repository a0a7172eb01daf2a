"""The letters of many scripts that come with the package, as arrays.

Shape letters: n images, c classes, H height, W width.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class GlyphImages(NamedTuple):
    """White letters on black, sorted by letter and font family.

    Args:
        images: uint8, (n, 1, H, W), H = W = 28.
        labels: The number of the letter of each image, int64, (n,).
        families: The number of the font family of each image, int64, (n,).
        scripts, splits, codepoints: Of each letter, (c,).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    families: NDArray[np.int64]
    scripts: list[str]
    splits: list[str]
    codepoints: list[int]


@cache
def load_glyphs() -> GlyphImages:
    """All of them, read once in a process."""
    file = resources.files("metadist.tasks") / "data" / "glyphs.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        labels, families = data["label"].astype(np.int64), data["family"].astype(np.int64)
        order = np.lexsort((families, labels))
        return GlyphImages(
            images=data["images"][order][:, None],
            labels=labels[order],
            families=families[order],
            scripts=data["script"].tolist(),
            splits=data["split"].tolist(),
            codepoints=data["codepoint"].tolist(),
        )
