"""Pictures to arrays: decoding, resizing and reading folders of image files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # more than 8 bits; convert() would clip them


def require_format(image_size: int | None, channels: int | None) -> None:
    """Raise ValueError unless `image_size` and `channels` are usable."""
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise ValueError(f"image_size must be an integer >= 1, got {image_size!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")


def picture(value: object) -> Image.Image:
    """A PIL image of what a data set holds.

    A PIL image; an array (H, W) or (H, W, C); a tensor (H, W) or (C, H, W). Numbers are uint8, or
    floating in [0, 1].
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise ValueError(f"must be a PIL image, a tensor or an array, got {type(value).__name__}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"must be of 1, 3 or 4 channels, got shape {tuple(value.shape)}")
    return Image.fromarray(_bytes(array))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    inside = np.issubdtype(array.dtype, np.floating) and bool(np.all((array >= 0) & (array <= 1)))
    if not inside:
        raise ValueError(
            f"must be uint8 or floating in [0, 1], got {array.dtype} from {array.min()} to "
            f"{array.max()}: normalise with the transform of the sampler, not of the data set"
        )
    return np.rint(array * 255).astype(np.uint8)


def pixels(
    image: Image.Image, image_size: int | None, channels: int, invert: bool = False
) -> NDArray[np.uint8]:
    """The image as uint8 (channels, H, W), squeezed to `image_size` squared if one is given.

    Transparent pixels become white, so that ink on a transparent ground stays visible. Images are
    resized with a Lanczos filter; the aspect ratio is not kept.
    """
    if image.mode in _DEEP:
        raise ValueError(f"must have 8 bits a channel, got mode {image.mode}: convert it first")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.uint8)
    array = array[None] if channels == 1 else array.transpose(2, 0, 1)
    return 255 - array if invert else array


def read_images(
    files: dict[str, list[Path]], image_size: int | None, channels: int, invert: bool
) -> dict[str, Sequence[NDArray[np.uint8]]]:
    """The pixels of the files of each class.

    Raises:
        ValueError: a file that cannot be read as an image; its path is named.
    """

    def read(path: Path) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                return pixels(image, image_size, channels, invert)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read image {path}: {error}") from error

    with ThreadPoolExecutor(max_workers=4) as pool:
        return {name: list(pool.map(read, paths)) for name, paths in files.items()}


def image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name; hidden ones are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted by name; hidden ones are left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
