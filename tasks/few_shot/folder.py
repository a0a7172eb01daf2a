"""Few-shot tasks from a folder of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metadist.tasks.data.images import image_files, read_images, require_format, subfolders
from metadist.tasks.few_shot.class_splits import read_splits, require_split, select_classes
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler, require_episode

FIXED = ("train", "val", "test")
Files = dict[str, list[Path]]  # class name: its image files


class ImageFolder(EpisodeSampler):
    """A sampler of N-way K-shot tasks over `<root>/<alphabet>/<character>/*.png`.

    Also `<root>/<class>/*.png`; .jpg and .jpeg too. A class is called `alphabet/character`, or
    `class`. Hidden files and folders are left out. Which classes belong to which split:

    * `splits` given: a JSON file, `{"train": ["alphabet/character", ...], "val": ...}`.
    * Every folder in `root` is called train, val or test: those are the splits.
    * Otherwise by alphabet (by class where there are no alphabets), sorted by code point: the last
      20 % are test, the 16 % before them val, the rest train, each rounded and at least one.
    * `split="all"`: every class there is.

    Images are squeezed to `image_size` squared, and kept in memory as one byte a pixel and
    channel; they travel with a pickled sampler, because another machine may not have the files.

    Args:
        root: The folder.
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`.
        split: One of train, val, test, all, or a name in the splits file.
        splits: Path of a JSON file; see above.
        image_size: Pixels.
        channels: 1 (grey) or 3 (RGB).
        invert: 255 - x, for black ink on white.

    Raises:
        ValueError: bad sizes or splits, an empty folder, or an unreadable image; the path is named.
    """

    def __init__(
        self,
        root: str | Path,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        splits: str | Path | None = None,
        image_size: int = 28,
        channels: Literal[1, 3] = 1,
        invert: bool = False,
        seed: int = 0,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_format(image_size, channels)
        files = _files_of_split(Path(root).expanduser(), split, splits)
        classes = ClassImages.of(read_images(files, image_size, channels, invert))
        super().__init__(classes, n_way, k_shot, k_query, split, seed)


def _files_of_split(root: Path, split: str, splits: str | Path | None) -> Files:
    if not root.is_dir():
        raise ValueError(f"root must be a folder, got {root}: no such folder")
    folders = {folder.name: folder for folder in subfolders(root)}
    if not folders:
        raise ValueError(f"root must hold a folder of images for each class, got none in {root}")
    if splits is None and set(folders) <= set(FIXED):
        return _fixed(folders, split)
    groups = {name: _classes_of(folder) for name, folder in folders.items()}
    everything = {name: files for group in groups.values() for name, files in group.items()}
    if splits is not None:
        names = list(everything)
        known: dict[str | int, int] = {name: i for i, name in enumerate(names)}
        chosen = select_classes(read_splits(splits), split, known)
        return {names[i]: everything[names[i]] for i in chosen}
    require_split(split, [*FIXED, "all"])
    if split == "all":
        return everything
    wanted = divide(list(groups))[split]
    return {name: files for group in wanted for name, files in groups[group].items()}


def divide(groups: list[str]) -> dict[str, list[str]]:
    """The sorted groups (alphabets) of each split: 64 % train, 16 % val, 20 % test."""
    count = len(groups)
    if count < 3:
        raise ValueError(
            f"root must hold at least 3 alphabets (or classes) to be split, got {count} "
            f"({', '.join(groups)}): use split='all', a splits file, or folders train/, val/, test/"
        )
    num_test = max(1, (20 * count + 50) // 100)
    num_val = max(1, (16 * count + 50) // 100)
    ordered = sorted(groups)
    num_train = count - num_val - num_test
    return {
        "train": ordered[:num_train],
        "val": ordered[num_train : num_train + num_val],
        "test": ordered[num_train + num_val :],
    }


def _fixed(folders: dict[str, Path], split: str) -> Files:
    require_split(split, [*(name for name in FIXED if name in folders), "all"])
    owner: dict[str, str] = {}
    files: Files = {}
    for part, folder in folders.items():
        for top in subfolders(folder):
            for name, images in _classes_of(top).items():
                if name in owner:
                    raise ValueError(
                        f"splits must be disjoint, got class {name!r} in {owner[name]}/ and "
                        f"{part}/: move or rename one of them"
                    )
                owner[name] = part
                if split in (part, "all"):
                    files[name] = images
    if not files:
        raise ValueError(f"split {split!r} must hold classes, got none in {folders[split]}")
    return files


def _classes_of(folder: Path) -> Files:
    """The classes in a folder of the first level: itself, or the folders in it."""
    images, inner = image_files(folder), subfolders(folder)
    if images and inner:
        raise ValueError(
            f"a folder must hold images or folders of images, got both in {folder}: move one"
        )
    if images:
        return {folder.name: images}
    files = {f"{folder.name}/{sub.name}": image_files(sub) for sub in inner}
    empty = [name for name, found in files.items() if not found]
    if empty or not files:
        raise ValueError(
            f"a class must hold .png or .jpg images, got none in "
            f"{folder.parent / empty[0] if empty else folder}: add some or remove the folder"
        )
    return files
