"""CIFAR-FS and FC100: two few-shot splits of CIFAR-100."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.checks.values import require_bool
from metadist.tasks.data.unpickle import read_arrays
from metadist.tasks.few_shot.class_splits import packaged_splits, require_split
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler, require_episode

FOLDER = "cifar-100-python"
MD5 = {  # of the original files
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
ARCHIVE = "cifar-100-python.tar.gz"


class _Cifar100Split(EpisodeSampler):
    """Images (3, 32, 32) of the classes that a packaged file lists, 600 a class."""

    splits_file: str

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(download=download, verify=verify)
        self.root, self.download, self.verify = root, download, verify
        splits = packaged_splits(self.splits_file)
        require_split(split, list(splits))
        folder = _folder(Path(root).expanduser(), download)
        images, labels, names = _read(folder, verify)
        classes = _select(images, labels, names, [str(name) for name in splits[split]])
        super().__init__(classes, n_way, k_shot, k_query, split, seed)


class CIFARFS(_Cifar100Split):
    """A sampler of N-way K-shot tasks over CIFAR-FS: 64 / 16 / 20 classes of CIFAR-100.

    The files train, test and meta of CIFAR-100 (python version) are read from
    `<root>/cifar-100-python` or from `root`. Where there are none and `download` is set,
    torchvision's archive is fetched into `root` and its md5 checked; an archive that lies there
    already is used. Training images take 118 MB of memory and travel with a pickled sampler.

    The files are pickles. They are read with an unpickler that knows arrays and nothing else, so
    that a tampered file cannot run code, and their md5 must be that of the original.

    Args:
        root: The folder; see above.
        download: Fetch what is missing.
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`.
        split: One of train, val and test.
        verify: Check the md5 of the files; False admits a copy that was packed anew.

    Raises:
        ValueError: bad sizes, or a file that is not the original one.
        FileNotFoundError: files are missing; says which, and what to do.

    Source: Bertinetto et al., Meta-learning with differentiable closed-form solvers (2019).
    """

    splits_file = "cifar_fs.json"


class FC100(_Cifar100Split):
    """A sampler of N-way K-shot tasks over FC100: 60 / 20 / 20 classes of CIFAR-100.

    Split by super-class, so that the splits are further apart than those of CIFAR-FS: in the order
    of CIFAR-100, test is super-classes 0, 7, 12, 14, val 8, 11, 13, 16, and train the other 12.

    Files, arguments and errors are those of `CIFARFS`.

    Source: Oreshkin et al., TADAM (2018), supplement.
    """

    splits_file = "fc100.json"


def _folder(root: Path, download: bool) -> Path:
    def found() -> Path | None:
        places = (root / FOLDER, root)
        for place in places:
            if all((place / name).is_file() for name in MD5):
                return place
        return None

    folder, cause = found(), None
    reason = f"{root} does not hold them and download is off"
    if folder is None and download:
        try:
            _download(root)
        except (OSError, RuntimeError) as error:
            cause, reason = error, f"the download failed: {error}"
        else:
            folder, reason = found(), f"the archive did not give them in {root}"
    if folder is None:
        raise FileNotFoundError(
            f"CIFAR-100 needs the files {', '.join(MD5)} in {root / FOLDER}, but {reason}. Put "
            f"them there, or put {ARCHIVE} (python version, www.cs.toronto.edu/~kriz) "
            f"into {root} and use download=True to unpack it, or name another root"
        ) from cause
    return folder


def _download(root: Path) -> None:
    from torchvision.datasets import CIFAR100  # here, because it takes a second
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(CIFAR100.url, str(root), filename=ARCHIVE, md5=CIFAR100.tgz_md5)


def _read(
    folder: Path, verify: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    content = {name: _load(folder / name, MD5[name] if verify else None) for name in MD5}
    try:
        parts = [content[name] for name in ("train", "test")]
        data = np.concatenate([np.asarray(part["data"], dtype=np.uint8) for part in parts])
        labels = np.concatenate([np.asarray(part["fine_labels"], dtype=np.int64) for part in parts])
        return data.reshape(-1, 3, 32, 32), labels, tuple(content["meta"]["fine_label_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} must hold CIFAR-100 (python version): {error!r}") from error


def _load(path: Path, md5: str | None) -> dict[str, Any]:
    content = path.read_bytes()
    if md5 is not None:
        got = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if got != md5:
            raise ValueError(
                f"{path} must be the original file of CIFAR-100, md5 {md5}, got md5 {got}: remove "
                "it to download it again, or pass verify=False to read another packing of it"
            )
    try:
        loaded: dict[str, Any] = read_arrays(content)
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return loaded


def _select(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: tuple[str, ...],
    wanted: list[str],
) -> ClassImages:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"CIFAR-100 must hold the classes of the split, got no {missing}")
    rows = [np.flatnonzero(labels == names.index(name)) for name in wanted]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return ClassImages(images[np.concatenate(rows)], starts, tuple(wanted))
