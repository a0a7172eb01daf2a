"""Few-shot tasks from a folder of image files."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal

from torch import Tensor

from metadist.checks.paths import absent
from metadist.checks.values import normal_form, require_bool
from metadist.tasks.data.images import Found, format_of, look_into, read_images, require_format
from metadist.tasks.data.random import Random
from metadist.tasks.few_shot.class_splits import read_splits, require_split, select_classes
from metadist.tasks.few_shot.episodes import (
    JUDGED,
    ClassImages,
    EpisodeSampler,
    is_dark_on_light,
    require_episode,
    require_square,
)
from metadist.tasks.few_shot.glyphs import random_affine

log = logging.getLogger("metadist.tasks")

FIXED = ("train", "val", "test")
SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
}
UNCLEAR = ("eval", "evaluation", "holdout", "heldout")  # val to some, test to others
SHORT = {"tr", "va", "vl", "te", "ts"}  # splits, or languages
Files = dict[str, list[Path]]  # class name: its image files


class ImageFolder(EpisodeSampler):
    """A sampler of N-way K-shot tasks over `<root>/<alphabet>/<character>/*.png`.

    Also `<root>/<class>/*.png`, and every other kind of file that Pillow opens. A class is called
    `alphabet/character`, or `class`. Other files are left out, hidden ones too; `left_out`, the
    repr and a line in the log say how many. Which classes belong to which split:

    * `splits` given: a JSON file, `{"train": ["alphabet/character", ...], "val": ...}`.
    * The folders in `root` are called train, val and test, in one of the usual spellings (Train,
      training, meta_train, valid, validation, dev, testing, ...): those are the splits. One more
      folder beside them is refused.
    * Otherwise by alphabet (by class where there are no alphabets), sorted by code point: the last
      20 % are test, the 16 % before them val, the rest train, each rounded and at least one.
    * `split="all"`: every class there is.

    With `split_by="image"` all splits have all classes, and other images of each: those of the
    folders train, val and test, or 64, 16 and 20 % of the images of a class, in the order of the
    SHA-256 of their names. It then measures how well known classes are told apart from `k_shot`
    images of each, not how well new ones are.

    Images are kept in memory as one byte a pixel and channel; they travel with a pickled sampler,
    because another machine may not have the files.

    Args:
        root: The folder.
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`.
        split: One of train, val, test, all, or a name in the splits file.
        splits: Path of a JSON file; see above.
        image_size: Pixels; images are squeezed to this square. None: they have one size already.
        channels: 1 (grey) or 3 (RGB). None: as the files are, which must be all grey or all colour.
        invert: 255 - x, for black ink on white. Where it is not given and grey images are dark on
            light, a line in the log says so.
        rotations: Each class also turned by 90, 180 and 270 degrees, as three more classes; not in
            the splits val and test, which are judged as they are.
        augment: Each image, not those of val and test, through its own random affine map, as of
            `Glyphs`, with the border's pixels outside; images must be square.
        split_by: "class": a class is in one split. "image": it is in all, by its images.

    Raises:
        ValueError: bad sizes or splits, folders that may be splits or alphabets, images of several
            sizes or kinds, an empty folder, or an unreadable image; the path is named.
    """

    def __init__(
        self,
        root: str | Path,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        splits: str | Path | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        invert: bool = False,
        seed: int = 0,
        rotations: bool = False,
        augment: bool = False,
        split_by: Literal["class", "image"] = "class",
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(invert=invert, rotations=rotations, augment=augment)
        require_format(image_size, channels)
        if split_by not in ("class", "image"):
            raise ValueError(f"split_by must be 'class' or 'image', got {split_by!r}")
        if split_by == "image" and splits is not None:
            raise ValueError(
                f"splits must not be given with split_by='image', got {splits}: that file names "
                "classes; put images into folders train/, val/ and test/ instead"
            )
        self.split_by = split_by
        self.augment = augment
        self.root, self.splits = root, splits
        self.image_size, self.channels = image_size, channels
        root = Path(root).expanduser()
        tree = _Tree()
        if split_by == "image":
            files = tree.files_by_image(root, split)
        else:
            files = tree.files_of_split(root, split, splits)
        form = format_of(files, image_size, channels)
        animated: list[Path] = []
        images = read_images(files, form.image_size, form.channels, invert, animated)
        tree.others += Counter({"files' frames after the first": len(animated)})
        self.left_out: dict[str, int] = dict(sorted(tree.others.items()))
        """How many files are no images, by kind: ".txt", "hidden", ..."""
        self.invert = invert
        classes = ClassImages.of(images)
        if augment:
            require_square(classes)
        super().__init__(
            classes, n_way, k_shot, k_query, split, seed, rotations and split not in JUDGED
        )
        if not invert and is_dark_on_light(classes.images):
            _say(
                f"ImageFolder {root} has dark images on a light ground: few-shot models learn "
                "faster from light on dark, try invert=True (--sampler.invert true)"
            )
        if tree.others.keys() - {"hidden"}:
            _say(f"ImageFolder {root} leaves out {self._left_out()}")

    def finish(self, images: Tensor, draws: Random | None) -> Tensor:
        """The images, in training each through its own random affine map where `augment` is set."""
        if self.augment and self.split not in JUDGED and draws is not None:
            return random_affine(images, draws, "border")
        return images

    def __repr__(self) -> str:
        left_out = f"; left out {self._left_out()}" if self.left_out else ""
        return super().__repr__().removesuffix(")") + left_out + ")"

    def _left_out(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.left_out.items())


@cache
def _say(message: str) -> None:
    """Log a warning, once in a process: the splits of a folder have much in common."""
    log.warning(message)


class _Tree:
    """Reads folders, and counts in `others` the files that are no images."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()

    def look_into(self, folder: Path) -> Found:
        found = look_into(folder)
        self.others += found.others
        return found

    def folders_in(self, root: Path) -> dict[str, Path]:
        """The folders of the first level by name, at least one."""
        if not root.is_dir():
            raise ValueError(f"root must be a folder, got {root}: {absent(root, 'folder')}")
        top = self.look_into(root)
        if not top.folders:
            raise ValueError(
                f"root must hold a folder of images for each class, got none in {root}"
            )
        self.others += Counter({"images beside folders": len(top.images)})
        return {normal_form(folder.name): folder for folder in top.folders}

    def files_by_image(self, root: Path, split: str) -> Files:
        """The files of one split where every class is in all of them."""
        folders = self.folders_in(root)
        parts = understood(root, folders)
        require_split(split, [*(parts.values() or FIXED), "all"])
        if not parts:
            classes = _together(self._classes_of(folder) for folder in folders.values())
            return {name: part_of(images, split, name) for name, images in classes.items()}
        found: dict[str, Files] = {}
        for name, part in parts.items():
            inside = self.look_into(folders[name])
            self.others += Counter({"images beside folders": len(inside.images)})
            found[part] = _together(self._classes_of(folder) for folder in inside.folders)
        everywhere = set.intersection(*(set(files) for files in found.values()))
        for part, files in found.items():
            if lone := sorted(set(files) - everywhere):
                raise ValueError(
                    f"each class must be in every split with split_by='image', got {lone[0]!r} in "
                    f"{part} and not in all: add it there, or use split_by='class'"
                )
        if split != "all":
            return found[split]
        return {
            name: list(chain.from_iterable(files[name] for files in found.values()))
            for name in sorted(everywhere)
        }

    def files_of_split(self, root: Path, split: str, splits: str | Path | None) -> Files:
        folders = self.folders_in(root)
        if splits is None:
            parts = understood(root, folders)
            if parts:
                return self._fixed({parts[name]: folders[name] for name in folders}, split)
        groups = {name: self._classes_of(folder) for name, folder in folders.items()}
        if splits is None:
            require_split(split, [*FIXED, "all"])
            wanted = list(groups) if split == "all" else divide(list(groups))[split]
            return _together(groups[group] for group in wanted)
        everything = _together(groups.values())
        names = list(everything)
        known: dict[str | int, int] = {name: i for i, name in enumerate(names)}
        chosen = select_classes(read_splits(splits), split, known)
        return {names[i]: everything[names[i]] for i in chosen}

    def _fixed(self, parts: dict[str, Path], split: str) -> Files:
        require_split(split, [*(name for name in FIXED if name in parts), "all"])
        owner: dict[str, Path] = {}
        files: Files = {}
        for part, folder in parts.items():
            inside = self.look_into(folder)
            if inside.images and not inside.folders:
                raise ValueError(
                    f"a folder of a split must hold a folder for each class, got images in {folder}"
                )
            self.others += Counter({"images beside folders": len(inside.images)})
            for top in inside.folders:
                for name, images in self._classes_of(top).items():
                    if name in owner:
                        raise ValueError(
                            f"splits must be disjoint, got class {name!r} in {owner[name].name}/ "
                            f"and {folder.name}/: move or rename one of them, or pass "
                            "split_by='image' if training and test share classes"
                        )
                    owner[name] = folder
                    if split in (part, "all"):
                        files[name] = images
        if not files:
            where = parts.get(split, next(iter(parts.values())).parent)
            raise ValueError(f"split {split!r} must hold classes, got none in {where}")
        return files

    def _classes_of(self, folder: Path) -> Files:
        """The classes in a folder of the first level: itself, or the folders in it."""
        found = self.look_into(folder)
        if found.images:
            return {normal_form(folder.name): self._images_of(folder, found)}
        _require_no_splits(folder, found.folders)
        files: Files = {}
        for inner in found.folders:
            name = normal_form(f"{folder.name}/{inner.name}")
            files[name] = self._images_of(inner, self.look_into(inner))
        return files or {normal_form(folder.name): self._images_of(folder, found)}

    def _images_of(self, folder: Path, found: Found) -> list[Path]:
        if found.images and found.folders:
            raise ValueError(
                f"a folder must hold images or folders of images, got both in {folder}: move one"
            )
        if not found.images:
            raise ValueError(
                f"a class must hold images, got none in {folder}: add some or remove the folder"
            )
        return found.images


def _together(groups: Iterable[Files]) -> Files:
    together: Files = {}
    for group in groups:
        together |= group
    return together


def role_of(name: str) -> str | None:
    """The split that a folder of this name is, in one of the usual spellings; else None."""
    bare = re.sub(r"[\W\d_]+", "", normal_form(name).casefold())
    for split, spellings in SPELLINGS.items():
        if re.fullmatch(f"(meta)?({'|'.join(spellings)})(set|data|images|split|classes)?", bare):
            return split
    return None


def mentions_split(name: str) -> bool:
    """Whether one of the words of a name is that of a split."""
    known = {*UNCLEAR, *chain.from_iterable(SPELLINGS.values())}
    words = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", normal_form(name)))
    return role_of(name) is not None or any(word.casefold() in known for word in words)


def understood(root: Path, folders: dict[str, Path]) -> dict[str, str]:
    """The split of each folder in `root`; empty where they are alphabets or classes.

    Raises:
        ValueError: It is not clear what they are.
    """
    roles = {name: role_of(name) for name in folders}
    splits = {name: role for name, role in roles.items() if role is not None}
    if len(splits) == len(folders) == len(set(splits.values())):
        return splits
    suspects = []
    for name, folder in folders.items():
        # A class may be called anything, train or test_tube: it holds images and no folders.
        if mentions_split(name) and (len(splits) > 1 or not look_into(folder).images):
            suspects.append(name)
    if not suspects and not {name.casefold() for name in folders} <= SHORT:
        return {}
    said = ", ".join(f"{name} is {role or 'not understood'}" for name, role in roles.items())
    raise ValueError(
        f"the folders in {root} must be one for each of train, val and test, or alphabets "
        f"(classes) of which none is called so, got {said}: rename or move folders, or say which "
        "classes belong to which split in a splits file (splits=...)"
    )


def _require_no_splits(folder: Path, inner: list[Path]) -> None:
    """Raise ValueError if a class is split by its images, <class>/train and <class>/test."""
    roles = {role: path.name for path in inner if (role := role_of(path.name))}
    if len(roles) > 1:
        raise ValueError(
            f"classes must be split and not the images of a class, got {folder} with the folders "
            f"{', '.join(roles.values())}: put the images of a class into one folder, or turn the "
            "folders round (train/<class>) and pass split_by='image'"
        )


def part_of(files: list[Path], split: str, name: str) -> list[Path]:
    """The images of a class that are in one split; "all": all of them."""
    if split == "all":
        return files
    if len(files) < len(FIXED):
        raise ValueError(
            f"a class must hold at least 3 images to be split by image, got {len(files)} in "
            f"{name!r}: add some, or use split='all'"
        )
    # The order of names may be that of time, and files are added later.
    digests = {hashlib.sha256(normal_form(file.name).encode()).hexdigest(): file for file in files}
    return [digests[digest] for digest in divide(list(digests))[split]]


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
