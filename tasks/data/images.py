"""Pictures to arrays: decoding, resizing and reading folders of image files."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from metadist.checks.values import normal_form, require_integer

FOREIGN = (".heic", ".heif", ".avif", ".jxl", ".svg", ".svgz", ".dng", ".cr2", ".nef", ".arw")
"""Suffixes of pictures that no or not every Pillow opens."""
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")
"""What file systems and archives leave behind; as good as hidden."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # more than 8 bits; convert() would clip them


def require_format(image_size: int | None, channels: int | None) -> None:
    """Raise ValueError unless `image_size` and `channels` are usable."""
    if image_size is not None:
        require_integer("image_size", image_size, 1)
    if isinstance(channels, bool) or channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")


def picture(value: object) -> Image.Image:
    """A PIL image of what a data set holds.

    A PIL image; an array (H, W) or (H, W, C); a tensor (H, W) or (C, H, W). Numbers are uint8, or
    floating in [0, 1].
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        array = (value.float() if value.is_floating_point() else value).numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise ValueError(f"must be a PIL image, a tensor or an array, got {type(value).__name__}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        order = (
            "(channels, height, width)"
            if isinstance(value, Tensor)
            else "(height, width, channels)"
        )
        raise ValueError(
            f"must be of 1, 3 or 4 channels, {order}, got a {type(value).__name__} of shape "
            f"{tuple(value.shape)}"
        )
    return Image.fromarray(_bytes(array))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    is_floating = np.issubdtype(array.dtype, np.floating)
    if not is_floating or not bool(np.all((array >= 0) & (array <= 1))):
        way_out = "normalise with the transform of the sampler, not of the data set"
        raise ValueError(
            f"must be uint8 or floating in [0, 1], got {array.dtype} from {array.min()} to "
            f"{array.max()}: {way_out if is_floating else 'convert it, 0 .. 255, to uint8'}"
        )
    return np.rint(array * 255).astype(np.uint8)


def pixels(
    image: Image.Image, image_size: int | None, channels: int, invert: bool = False
) -> NDArray[np.uint8]:
    """The image as uint8 (channels, H, W), squeezed to `image_size` squared if one is given.

    Photos are turned upright as their EXIF orientation says. Transparent pixels become white, so
    that ink on a transparent ground stays visible. Images are resized with a Lanczos filter; the
    aspect ratio is not kept.
    """
    _require_8_bits(image)
    image = upright(image)
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


class Found(NamedTuple):
    """What a folder holds.

    Args:
        images: The image files, sorted by name.
        folders: The folders, sorted by name.
        others: How many other files there are, by kind: ".txt", "hidden", ...
    """

    images: list[Path]
    folders: list[Path]
    others: Counter[str]


def look_into(folder: Path) -> Found:
    """What is directly in a folder.

    Every file that Pillow opens is an image, whatever its suffix. Names are compared and sorted in
    one Unicode form (NFC), so that the order is the same on every file system.

    Raises:
        ValueError: A picture of a kind that this Pillow does not open, or two folders with one
            name in two Unicode forms; the path is named.
    """
    images: list[Path] = []
    folders: list[Path] = []
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir(), key=lambda path: (normal_form(path.name), path.name)):
        if path.name.startswith(".") or path.name in JUNK:
            others["hidden"] += 1
        elif path.is_dir():
            if folders and normal_form(folders[-1].name) == normal_form(path.name):
                raise ValueError(
                    f"folders must have different names, got {path.name!r} in two Unicode forms "
                    f"in {folder}: rename one of them"
                )
            folders.append(path)
        elif path.suffix.lower() in suffixes() or _is_image(path):
            images.append(path)
        elif path.suffix.lower() in FOREIGN:
            raise ValueError(
                f"images must be of a kind that Pillow opens, got {path}: convert it to .png, "
                "or move it out of the folder"
            )
        else:
            others[path.suffix.lower() or "files without a suffix"] += 1
    return Found(images, folders, others)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the kinds of files that Pillow opens."""
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    )


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except UNREADABLE:
        return False


class Format(NamedTuple):
    """The size in pixels (None: as the files are) and the channels that images are read with."""

    image_size: int | None
    channels: int


def format_of(files: dict[str, list[Path]], image_size: int | None, channels: int | None) -> Format:
    """The format to read files with; what is not given is read from them.

    Raises:
        ValueError: The files differ in what is not given, or one cannot be read.
    """
    if image_size is not None and channels is not None:
        return Format(image_size, channels)
    paths = list(chain(*files.values()))
    with ThreadPoolExecutor(max_workers=4) as pool:
        surveyed = list(pool.map(_survey, paths))
    if image_size is None:
        _require_one(
            "image_size",
            "sizes",
            paths,
            [f"{width}x{height}" for (width, height), _ in surveyed],
            "pass image_size=N, which squeezes each to N x N",
        )
    if channels is None:
        kinds = ["grey" if is_grey else "colour" for _, is_grey in surveyed]
        _require_one("channels", "kinds", paths, kinds, "pass channels=1 (grey) or 3 (RGB)")
        channels = 1 if kinds[0] == "grey" else 3
    return Format(image_size, channels)


def _survey(path: Path) -> tuple[tuple[int, int], bool]:
    """(width and height, whether it is grey) of an image file."""
    with _opened(path) as image:
        _require_8_bits(image)
        return upright(image).size, is_grey(image)


def _require_one(field: str, what: str, paths: list[Path], values: list[str], way_out: str) -> None:
    examples = {value: path for path, value in zip(paths[::-1], values[::-1], strict=True)}
    if len(examples) < 2:
        return
    found = Counter(values)
    shown = [
        f"{value} ({count} files, such as {examples[value]})"
        for value, count in found.most_common(3)
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ValueError(
        f"{field} must be given for images of several {what}, got {', '.join(shown)}{more}: "
        f"{way_out}"
    )


def _require_8_bits(image: Image.Image) -> None:
    if image.mode in _DEEP:
        raise ValueError(f"must have 8 bits a channel, got mode {image.mode}: convert it first")


def upright(image: Image.Image) -> Image.Image:
    """The image as it was seen: cameras that are held sidewise only note that (EXIF)."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, struct.error):
        return image  # damaged notes beside the picture
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colour: by its mode, or where that is a palette by its colours."""
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB"))
        return bool((colours == colours[..., :1]).all())
    return image.mode in ("1", "L", "LA", "La")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file; whatever is wrong with it is a ValueError that names the path."""
    try:
        # Not by its path: Pillow maps files it opens itself, and scrambles lying TIFF photos then.
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except (*UNREADABLE, struct.error) as error:
        raise ValueError(f"cannot read image {path}: {error}: remove or replace it") from error


def read_images(
    files: dict[str, list[Path]],
    image_size: int | None,
    channels: int,
    invert: bool,
    animated: list[Path] | None = None,
) -> dict[str, Sequence[NDArray[np.uint8]]]:
    """The pixels of the files of each class, of the first frame where there are several.

    `animated` receives the files of which that is not all.

    Raises:
        ValueError: a file that cannot be read as an image; its path is named.
    """

    def read(path: Path) -> NDArray[np.uint8]:
        with _opened(path) as image:
            # The further pictures of an MPO are previews and gain maps of the first.
            if animated is not None and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                animated.append(path)
                image.seek(0)
            return pixels(image, image_size, channels, invert)

    with ThreadPoolExecutor(max_workers=4) as pool:
        return {name: list(pool.map(read, paths)) for name, paths in files.items()}
