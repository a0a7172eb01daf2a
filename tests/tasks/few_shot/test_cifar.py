"""CIFAR-FS and FC100: the fixed splits, the files on disk, integrity and safety."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torchvision

from metadist.tasks import CIFARFS, FC100, check_sampler
from metadist.tasks.few_shot import cifar as module
from metadist.tasks.few_shot.class_splits import packaged_splits
from tests.tasks.helpers import equal, refusal

NAMES = sorted(str(name) for names in packaged_splits("cifar_fs.json").values() for name in names)
SUPER_CLASSES = {  # one class of each
    "train": "trout rose cup pear clock couch road sea snake oak_tree bus tank",
    "val": "tiger camel crab mouse",
    "test": "whale bee fox girl",
}


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings, and the old names of NumPy's modules."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_text(self: Any, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def dump(path: Path, content: dict[str, Any]) -> None:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    written = stream.getvalue()
    assert b"numpy._core.multiarray" in written or path.name == "meta"
    path.write_bytes(written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """CIFAR-100 with 3 + 1 images a class, in the format of the original."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, per_class in (("train", 3), ("test", 1)):
        labels = [label for _ in range(per_class) for label in range(100)]
        images = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        images[:, 0] = labels
        dump(folder / name, {"data": images, "fine_labels": labels, "coarse_labels": labels})
    dump(folder / "meta", {"fine_label_names": NAMES, "coarse_label_names": []})
    return tmp_path / "data"


@pytest.fixture
def original(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, taken for the original files."""
    for name in module.MD5:
        content = (root / "cifar-100-python" / name).read_bytes()
        monkeypatch.setitem(module.MD5, name, hashlib.md5(content).hexdigest())
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)


@pytest.mark.parametrize(
    ("file_name", "sizes"), [("cifar_fs.json", (64, 16, 20)), ("fc100.json", (60, 20, 20))]
)
def test_the_splits_partition_the_classes(file_name: str, sizes: tuple[int, ...]):
    splits = packaged_splits(file_name)
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes
    assert sorted(str(name) for names in splits.values() for name in names) == NAMES
    assert len(set(NAMES)) == 100


def test_fc100_is_split_by_super_class():
    splits = packaged_splits("fc100.json")
    for split, members in SUPER_CLASSES.items():
        assert set(members.split()) <= set(splits[split])
        assert len(splits[split]) == 5 * len(members.split())


def test_checksums_are_those_torchvision_knows():
    files = [*torchvision.datasets.CIFAR100.train_list, *torchvision.datasets.CIFAR100.test_list]
    meta = torchvision.datasets.CIFAR100.meta
    assert dict(map(tuple, files)) | {meta["filename"]: meta["md5"]} == module.MD5
    assert torchvision.datasets.CIFAR100.filename == module.ARCHIVE


@pytest.mark.parametrize("source", [CIFARFS, FC100])
def test_images_carry_the_classes_of_the_split(original: Path, source: type[CIFARFS]):
    sampler = source(original, n_way=16, k_shot=1, k_query=3, split="val")
    assert sampler.classes.images.shape == (4 * sampler.num_classes, 3, 32, 32)
    for name, images in zip(
        sampler.class_names, np.split(sampler.classes.images, sampler.num_classes), strict=True
    ):
        assert (images[:, 0, 0, 0] == NAMES.index(name)).all()
    assert sampler.sample(0).support.tensors[0].shape == (16, 3, 32, 32)
    train = source(original, k_query=3)
    check_sampler(train, num_tasks=4, processes=False, other=sampler)
    other_layout = source(original / "cifar-100-python", k_query=3)
    assert equal(train.sample(1), other_layout.sample(1))


def test_files_with_another_checksum_are_refused_unless_told(root: Path):
    path = root / "cifar-100-python" / "train"
    got = hashlib.md5(path.read_bytes()).hexdigest()
    found = refusal(lambda: CIFARFS(root, k_query=3))
    assert found == (
        f"{path} must be the original file of CIFAR-100, md5 16019d7e3df5f24257cddd939b257f8d, got "
        f"md5 {got}: remove it to download it again, or pass verify=False to read another packing "
        "of it"
    )
    CIFARFS(root, k_query=3, verify=False).sample(0)


def test_newer_pickles_are_read_too(root: Path):
    expected = CIFARFS(root, k_query=3, verify=False).sample(0)
    for name in ("train", "test", "meta"):
        path = root / "cifar-100-python" / name
        content = pickle.loads(
            path.read_bytes().replace(b"numpy.core.", b"numpy._core."), encoding="latin1"
        )
        path.write_bytes(pickle.dumps(content, protocol=4))
    assert equal(CIFARFS(root, k_query=3, verify=False).sample(0), expected)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_a_file_that_would_run_code_does_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = root / "cifar-100-python" / "meta"
    path.write_bytes(pickle.dumps(Harmful()))
    found = refusal(lambda: CIFARFS(root, k_query=3, verify=False))
    assert found == (f"cannot read {path}: it asks for posix.mkdir, which a data file must not")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"data": 3})])
def test_a_damaged_file_is_named(root: Path, content: bytes):
    path = root / "cifar-100-python" / "test"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cifar-100-python"):
        CIFARFS(root, k_query=3, verify=False)


def test_missing_classes_are_named(root: Path):
    names = ["unknown" if name == "whale" else name for name in NAMES]
    dump(root / "cifar-100-python" / "meta", {"fine_label_names": names})
    found = refusal(lambda: CIFARFS(root, k_query=3, split="test", verify=False))
    assert found == "CIFAR-100 must hold the classes of the split, got no ['whale']"


def test_an_archive_that_lies_there_is_checked_and_unpacked(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = CIFARFS(original, k_query=3).sample(0)
    there = tmp_path / "archived"
    there.mkdir()
    archive = there / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(original / "cifar-100-python", "cifar-100-python")
    with pytest.raises(FileNotFoundError, match="the download failed: "):
        CIFARFS(there, k_query=3)  # not the md5 of the original
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", md5)
    assert equal(CIFARFS(there, k_query=3).sample(0), expected)


@pytest.mark.parametrize(
    ("download", "reason"),
    [
        (True, "the download failed: <urlopen error no network>"),
        (False, "{root} does not hold them and download is off"),
    ],
)
def test_without_network_it_says_what_to_do(tmp_path: Path, download: bool, reason: str):
    found = refusal(lambda: FC100(tmp_path, download=download), FileNotFoundError)
    assert found == (
        f"CIFAR-100 needs the files train, test, meta in {tmp_path / 'cifar-100-python'}, but "
        f"{reason.format(root=tmp_path)}. Put them there, or put cifar-100-python.tar.gz (python "
        f"version, www.cs.toronto.edu/~kriz) into {tmp_path} and use download=True to unpack it, "
        "or name another root"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "all"}, "split must be one of train, val, test, got 'all'"),
        ({"n_way": -5}, "n_way must be an integer >= 2, got -5"),
    ],
)
def test_arguments_are_checked_first(tmp_path: Path, arguments: dict[str, Any], message: str):
    found = refusal(lambda: CIFARFS(tmp_path / "nothing", **arguments))
    assert found == message
