"""Folders of images: layouts, splits, decoding and errors."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from metadist.tasks import FewShotDataset, ImageFolder, check_sampler
from metadist.tasks.data.datasets import ArrayDataset
from metadist.tasks.few_shot.folder import divide
from tests.tasks.helpers import equal, refusal, write_image, write_tree

ALPHABETS = [f"{alphabet}/letter{i}" for alphabet in "DACB" for i in range(2)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", ALPHABETS)


def folder(root: Path, **arguments) -> ImageFolder:
    return ImageFolder(root, **({"n_way": 2, "k_query": 2} | arguments))


def test_alphabets_are_split_in_sorted_order(tree: Path):
    names = {split: folder(tree, split=split).class_names for split in ("train", "val", "test")}
    assert names == {
        "train": ("A/letter0", "A/letter1", "B/letter0", "B/letter1"),
        "val": ("C/letter0", "C/letter1"),
        "test": ("D/letter0", "D/letter1"),
    }
    assert len(folder(tree, split="all", n_way=8).class_names) == 8
    check_sampler(folder(tree), processes=False, other=folder(tree, split="test"))


@given(st.integers(3, 200))
def test_every_split_gets_its_share(count: int):
    names = [f"{i:03d}" for i in range(count)][::-1]
    parts = divide(names)
    assert parts["train"] + parts["val"] + parts["test"] == sorted(names)
    assert min(map(len, parts.values())) >= 1
    assert abs(len(parts["val"]) - 0.16 * count) <= 0.52
    assert abs(len(parts["test"]) - 0.20 * count) <= 0.5


def test_classes_are_split_where_there_are_no_alphabets(tmp_path: Path):
    write_tree(tmp_path, list("cabdefghij"))
    assert folder(tmp_path).class_names == tuple("abcdef")
    assert folder(tmp_path, split="val").class_names == tuple("gh")
    assert folder(tmp_path, split="test").class_names == tuple("ij")


@pytest.mark.parametrize("depth", ["{}", "alphabet/{}"])
def test_folders_called_train_val_test_are_the_splits(tmp_path: Path, depth: str):
    for number, part in enumerate(("train", "val")):
        names = [depth.format(f"c{number}{i}") for i in range(3)]
        write_tree(tmp_path / part, names)
    assert folder(tmp_path, split="val").class_names == tuple(
        depth.format(f"c1{i}") for i in range(3)
    )
    assert len(folder(tmp_path, split="all").class_names) == 6
    with pytest.raises(ValueError, match=r"^split must be one of train, val, all, got 'test'$"):
        folder(tmp_path, split="test")


def test_a_class_in_two_split_folders_is_refused(tmp_path: Path):
    write_tree(tmp_path / "train", ["a", "b"])
    write_tree(tmp_path / "test", ["b", "c"])
    found = refusal(lambda: folder(tmp_path))
    assert found == (
        "splits must be disjoint, got class 'b' in test/ and train/: move or rename one of them, "
        "or pass split_by='image' if training and test share classes"
    )


def test_an_empty_split_folder_is_named(tmp_path: Path):
    write_tree(tmp_path / "train", ["a", "b"])
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"^split 'val' must hold classes, got none in .*/val$"):
        folder(tmp_path, split="val")


def test_a_splits_file_rules(tree: Path, tmp_path: Path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"mine": ["D/letter1", "A/letter0"], "rest": ["B/letter0"]}))
    assert folder(tree, split="mine", splits=path).class_names == ("D/letter1", "A/letter0")
    path.write_text(json.dumps({"train": ["D/letter1", "Z/letter0"]}))
    with pytest.raises(ValueError, match=r"^splits must name existing classes, got 'Z/letter0'; "):
        folder(tree, splits=path)


def test_pixels_size_channels_and_inversion(tmp_path: Path):
    for name in "abc":
        ink = np.full((10, 10), 255, dtype=np.uint8)
        ink[:, :5] = 0
        for i in range(3):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(ink).save(path)
    grey = folder(tmp_path, split="all", image_size=10).sample(0).support.tensors[0]
    assert grey.shape == (2, 1, 10, 10)
    assert torch.equal(grey[0, 0, 0], torch.tensor([0.0] * 5 + [1.0] * 5))
    inverted = (
        folder(tmp_path, split="all", image_size=10, invert=True).sample(0).support.tensors[0]
    )
    assert torch.equal(inverted, 1 - grey)
    colour = folder(tmp_path, split="all", image_size=20, channels=3).sample(0).support.tensors[0]
    assert colour.shape == (2, 3, 20, 20)


def test_jpegs_capitals_transparency_and_hidden_files(tmp_path: Path):
    for c, name in enumerate("abc"):
        write_image(tmp_path / name / "0.JPG", 10 * c, mode="RGB")
        write_image(tmp_path / name / "1.jpeg", 10 * c + 1, mode="RGB")
        image = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
        image.putpixel((0, 0), (0, 0, 0, 255))
        image.save(tmp_path / name / "2.png")
        (tmp_path / name / "._2.png").write_bytes(b"resource fork")
        (tmp_path / name / "notes.txt").write_text("kept out")
    (tmp_path / ".cache").mkdir()
    sampler = folder(tmp_path, split="all", image_size=12)
    transparent = sampler.classes.images[2, 0]
    assert transparent[0, 0] == 0 and (transparent.ravel()[1:] == 255).all()
    assert len(sampler.classes.images) == 9


@pytest.mark.parametrize("content", [b"not an image", b""], ids=["text", "empty"])
def test_an_unreadable_image_is_named(tree: Path, content: bytes):
    path = tree / "A" / "letter1" / "broken.png"
    path.write_bytes(content)
    found = refusal(lambda: folder(tree))
    assert found.startswith(f"cannot read image {path}: ")


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_photos_are_turned_upright(tmp_path: Path, suffix: str):
    scene = np.zeros((16, 32), dtype=np.uint8)
    scene[:8, :8] = 255  # the upper left corner as the camera saw it
    noted = Image.Exif()
    noted[0x0112] = 6  # the upper left corner is the upper right one of the scene
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.fromarray(scene).save(tmp_path / name / f"lying.{suffix}", exif=noted)
        Image.fromarray(np.rot90(scene, -1)).save(tmp_path / name / f"upright.{suffix}")
    images = folder(tmp_path, k_query=1, split="all").classes.images  # both are of one size
    assert images.shape == (6, 1, 32, 16)
    assert np.abs(images[0].astype(int) - images[1]).max() < 40  # the losses of a JPEG
    assert images[0, 0, :8, 8:].min() > 200 and images[0, 0, :, :8].max() < 50


def by_image(root: Path, split: str, **arguments) -> ImageFolder:
    return folder(root, split=split, split_by="image", k_query=1, **arguments)


def test_images_of_a_class_are_split_whatever_their_order(tmp_path: Path):
    write_tree(tmp_path, ["a", "b"], num_images=20)
    parts = {split: by_image(tmp_path, split).classes for split in ("train", "val", "test")}
    assert {split: part.names for split, part in parts.items()} == dict.fromkeys(parts, ("a", "b"))
    assert {split: part.starts.tolist() for split, part in parts.items()} == {
        "train": [0, 13, 26],
        "val": [0, 3, 6],
        "test": [0, 4, 8],
    }
    drawn = [image.tobytes() for part in parts.values() for image in part.images]
    every = by_image(tmp_path, "all").classes.images
    assert sorted(drawn) == sorted(image.tobytes() for image in every)
    assert len(set(drawn)) == 40
    assert parts["train"].images.tolist() != every[:26].tolist()  # not the first ones
    before = {image.tobytes() for image in parts["test"].images}
    (tmp_path / "a" / "0000_20.png").unlink()
    after = {image.tobytes() for image in by_image(tmp_path, "test").classes.images}
    assert len(before & after) >= 6  # few images move


def test_folders_of_splits_with_the_same_classes_are_split_by_image(tmp_path: Path):
    for number, part in enumerate(("Training", "valid", "test")):
        write_tree(tmp_path / part, ["a", "b"], seed=number)
    train, test = by_image(tmp_path, "train"), by_image(tmp_path, "test")
    assert train.class_names == test.class_names == ("a", "b")
    assert len(by_image(tmp_path, "all").classes.images) == 18
    assert not np.array_equal(train.classes.images, test.classes.images)
    write_tree(tmp_path / "test", ["c"], seed=3)
    assert refusal(lambda: by_image(tmp_path, "train")) == (
        "each class must be in every split with split_by='image', got 'c' in test and not in all: "
        "add it there, or use split_by='class'"
    )


def test_what_cannot_be_split_by_image_is_refused(tmp_path: Path):
    write_tree(tmp_path, ["a", "b"], num_images=2)
    assert refusal(lambda: by_image(tmp_path, "train")) == (
        "a class must hold at least 3 images to be split by image, got 2 in 'a': add some, or use "
        "split='all'"
    )
    found = refusal(lambda: by_image(tmp_path, "train", splits="splits.json"))
    assert found.startswith("splits must not be given with split_by='image', got splits.json: ")
    found = refusal(lambda: folder(tmp_path, split_by="file"))
    assert found == "split_by must be 'class' or 'image', got 'file'"
    assert refusal(lambda: by_image(tmp_path, "dev")) == (
        "split must be one of train, val, test, all, got 'dev'"
    )


def test_a_truncated_image_is_named(tree: Path):
    path = tree / "A" / "letter0" / "0003_01.png"
    path = next((tree / "A" / "letter0").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    found = refusal(lambda: folder(tree))
    assert found.startswith(f"cannot read image {path}: ")


def test_deep_images_are_refused(tree: Path):
    path = tree / "A" / "letter0" / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    with pytest.raises(ValueError, match=r"deep\.png: must have 8 bits a channel, got mode I;16"):
        folder(tree)


def test_folders_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^root must be a folder, got .*/none: no such folder$"):
        folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^root must hold a folder of images for each class, got"):
        folder(tmp_path)
    write_tree(tmp_path, ["a", "b"])
    found = refusal(lambda: folder(tmp_path))
    assert found == (
        "root must hold at least 3 alphabets (or classes) to be split, got 2 (a, b): use "
        "split='all', a splits file, or folders train/, val/, test/"
    )
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"^a class must hold images, got none in .*/c: "):
        folder(tmp_path)
    (tmp_path / "c" / "d").mkdir()
    with pytest.raises(ValueError, match=r"got none in .*/c/d: add some or remove the folder$"):
        folder(tmp_path)
    shutil.rmtree(tmp_path / "c")
    write_image(tmp_path / "a" / "deeper" / "0.png", 0)
    with pytest.raises(
        ValueError, match=r"^a folder must hold images or folders of images, got bo"
    ):
        folder(tmp_path, split="all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, val, test, all, got 'dev'"),
        ({"image_size": 0}, "image_size must be an integer >= 1, got 0"),
        ({"channels": 2}, "channels must be 1 (grey) or 3 (RGB), got 2"),
        ({"n_way": 0}, "n_way must be an integer >= 2, got 0"),
        (
            {"splits": "/no.json"},
            "splits must be a JSON file or a mapping, got /no.json: no such file",
        ),
    ],
)
def test_arguments_are_checked(tree: Path, arguments: dict[str, Any], message: str):
    found = refusal(lambda: folder(tree, **arguments))
    assert found == message


def test_a_pickled_sampler_needs_no_files(tree: Path):
    sampler = folder(tree)
    expected = sampler.sample(3)
    pickled = pickle.dumps(sampler)
    shutil.rmtree(tree)
    assert equal(pickle.loads(pickled).sample(3), expected)


def test_it_is_built_from_the_command_line(tree: Path):
    parser = ArgumentParser()
    parser.add_class_arguments(ImageFolder, "sampler")
    given = parser.parse_args(
        [
            f"--sampler.root={tree}",
            "--sampler.n_way=2",
            "--sampler.k_query=2",
            "--sampler.channels=3",
        ]
    )
    sampler = parser.instantiate(given).sampler
    assert sampler.sample(0).support.tensors[0].shape == (2, 3, 12, 12)


def drawn_from(root: Path, split: str) -> set[str]:
    """The beginnings of the names of the classes of a split, those `write_tree` got."""
    return {
        name.rpartition("/")[2].partition("-")[0] for name in folder(root, split=split).class_names
    }


@pytest.mark.parametrize(
    "parts",
    [
        ("TRAIN", "Dev", "TEST"),
        ("meta-training", "meta-validation", "meta-testing"),
        ("trainset", "val_set", "TestSet"),
        ("train2017", "valid", "test_images"),
        ("TrainData", "ValData", "TestData"),
    ],
)
@pytest.mark.parametrize("depth", ["{}-{}", "alphabet/{}-{}"])
def test_the_usual_spellings_of_splits_are_understood(tmp_path: Path, parts, depth: str):
    for number, part in enumerate(parts):
        names = [depth.format(part, i) for i in range(3)]
        write_tree(tmp_path / part, [name.replace("meta-", "meta") for name in names], seed=number)
    (tmp_path / "__MACOSX").mkdir()
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        assert drawn_from(tmp_path, split) == {part.replace("meta-", "meta").partition("-")[0]}
    assert len(folder(tmp_path, split="all").class_names) == 9


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("train", "val", "test", "unlabeled"), "train is train, unlabeled is not understood"),
        (("train", "valid", "validation"), "valid is val, validation is val"),
        (("train", "eval", "test"), "eval is not understood, test is test, train is train"),
        (("train_clean", "train_noisy", "other"), "other is not understood, train_clean is not un"),
        (("base", "val", "novel"), "base is not understood, novel is not understood, val is val"),
        (("tr", "va", "te"), "te is not understood, tr is not understood, va is not understood"),
        (("Latin", "Greek", "Testing", "Tamil"), "Testing is test"),
    ],
)
@pytest.mark.parametrize("split", ["train", "all"])
def test_folders_that_may_be_splits_or_not_are_refused(tmp_path: Path, parts, said: str, split):
    for part in parts:
        write_tree(tmp_path / part, ["a", "b"])
    found = refusal(lambda: folder(tmp_path, split=split))
    assert said in found and found.endswith("belong to which split in a splits file (splits=...)")
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": [f"{parts[0]}/a", f"{parts[1]}/b"]}))
    assert len(folder(tmp_path, splits=path).class_names) == 2


def test_a_class_may_be_called_train(tmp_path: Path):
    write_tree(tmp_path, ["bus", "train", "test_tube", "tank"])
    assert folder(tmp_path).class_names == ("bus", "tank")
    assert folder(tmp_path, split="all", n_way=4).class_names[3] == "train"


def test_splits_within_classes_are_refused(tmp_path: Path):
    write_tree(tmp_path, [f"{c}/{part}" for c in "abc" for part in ("Train", "test")])
    assert "got " + str(tmp_path / "a") + " with the folders Train, test: put" in refusal(
        lambda: folder(tmp_path)
    )


def test_images_without_classes_and_deeper_folders_are_refused(tmp_path: Path):
    for part in ("train", "test"):
        write_image(tmp_path / "flat" / part / "0.png", 0)
    found = refusal(lambda: folder(tmp_path / "flat"))
    assert found.startswith("a folder of a split must hold a folder for each class, got images in ")
    write_tree(tmp_path / "deep", [f"{a}/{c}" for a in "abc" for c in "xy"])
    write_image(tmp_path / "deep" / "a" / "x" / "more" / "0.png", 0)
    found = refusal(lambda: folder(tmp_path / "deep"))
    assert found.startswith("a folder must hold images or folders of images, got both in ")


SUFFIXES = ("gif", "tiff", "JPEG", "ppm", "ico", "tga")


def test_every_kind_of_image_counts_whatever_its_suffix(tmp_path: Path):
    for c in range(3):
        for i, suffix in enumerate(SUFFIXES):
            write_image(tmp_path / f"c{c}" / f"{i}.{suffix}", 10 * c + i, side=16, mode="RGB")
        write_image(tmp_path / "x.png", 99 + c, side=16, mode="RGB")
        (tmp_path / "x.png").rename(tmp_path / f"c{c}" / "picture.dat")
    sampler = folder(tmp_path, split="all")
    assert sampler.classes.images.shape == (21, 3, 16, 16)
    assert sampler.left_out == {} and "left out" not in repr(sampler)


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog):
    write_tree(tmp_path, list("abc"))
    for name in ("a/notes.txt", "b/notes.TXT", "c/Thumbs.db", "c/.DS_Store", "LICENSE", "b/x.csv"):
        (tmp_path / name).write_text("no image")
    frames = [Image.new("L", (12, 12), 40 * i) for i in range(3)]
    frames[0].save(tmp_path / "a" / "move.gif", save_all=True, append_images=frames[1:])
    samplers = [folder(tmp_path, split="all") for _ in range(2)]
    said = "1 .csv, 2 .txt, 1 files without a suffix, 1 files' frames after the first, 2 hidden"
    assert repr(samplers[0]).endswith(f"10 images; left out {said})")
    assert caplog.messages == [f"ImageFolder {tmp_path} leaves out {said}"]


def test_pictures_that_pillow_cannot_open_are_refused(tmp_path: Path):
    write_tree(tmp_path, list("abc"))
    (tmp_path / "b" / "photo.HEIC").write_bytes(b"ftypheic")
    found = refusal(lambda: folder(tmp_path))
    assert found.startswith("images must be of a kind that Pillow opens, got ")
    assert found.endswith("photo.HEIC: convert it to .png, or move it out of the folder")


def test_size_and_channels_are_those_of_the_files(tmp_path: Path):
    write_tree(tmp_path, list("abc"), mode="RGB")
    assert folder(tmp_path, split="all").classes.images.shape == (9, 3, 12, 12)
    write_image(tmp_path / "b" / "other.png", 1, side=20, mode="RGB")
    found = refusal(lambda: folder(tmp_path, split="all"))
    assert found.startswith("image_size must be given for images of several sizes, got 12x12 (9 fi")
    assert f"20x20 (1 files, such as {tmp_path / 'b' / 'other.png'}): pass image_size=N" in found
    assert folder(tmp_path, split="all", image_size=9).classes.images.shape == (10, 3, 9, 9)
    write_image(tmp_path / "b" / "other.png", 1, mode="L")
    found = refusal(lambda: folder(tmp_path, split="all"))
    assert found.startswith("channels must be given for images of several kinds, got colour (9 fi")
    assert found.endswith("other.png): pass channels=1 (grey) or 3 (RGB)")
    assert folder(tmp_path, split="all", channels=1).classes.images.shape == (10, 1, 12, 12)


@pytest.mark.parametrize(
    ("mode", "channels"), [("P", 3), ("L", 1), ("LA", 1), ("1", 1), ("RGBA", 3)]
)
def test_grey_and_colour_are_told_apart(tmp_path: Path, mode: str, channels: int):
    write_tree(tmp_path, list("abc"), mode=mode)
    assert folder(tmp_path, split="all").classes.images.shape[1] == channels


def test_a_grey_palette_is_grey(tmp_path: Path):
    write_tree(tmp_path, list("abc"))
    path = next((tmp_path / "a").iterdir())
    with Image.open(path) as image:
        image.load()
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(path)
    assert folder(tmp_path, split="all").classes.images.shape == (9, 1, 12, 12)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_names_are_the_same_in_any_unicode_form(tmp_path: Path):
    for form in (COMPOSED, DECOMPOSED):
        write_tree(tmp_path / form.encode().hex(), ["cafz", form, "caf0", "cafg"])
    roots = [tmp_path / form.encode().hex() for form in (COMPOSED, DECOMPOSED)]
    one, two = (folder(root, split="all").class_names for root in roots)
    assert one == two == ("caf0", "cafg", "cafz", COMPOSED)
    path = tmp_path / "splits.json"
    path.write_text("\ufeff" + json.dumps({"train": [DECOMPOSED, "cafz"]}), encoding="utf-8")
    for root in roots:
        assert folder(root, splits=path).class_names == (COMPOSED, "cafz")
    write_tree(tmp_path / "both", [COMPOSED, DECOMPOSED])
    assert "got 'caf" in refusal(lambda: folder(tmp_path / "both"))


def drawn(root: Path, invert: bool = False, count: int = 8) -> Path:
    """Three splits of three classes of grey images: a blot at the class's place on a ground."""
    for split in ("train", "val", "test"):
        for number in range(3):
            (root / split / f"{split}{number}").mkdir(parents=True)
            for image in range(count):
                pixels = np.full((12, 12), 5, np.uint8)
                pixels[2 : 5 + number, 3 + image % 3 : 9] = 250
                pixels = 255 - pixels if invert else pixels
                path = root / split / f"{split}{number}" / f"{image}.png"
                Image.fromarray(pixels).save(path)
    return root


def test_training_is_turned_and_warped_and_val_and_test_are_not(tmp_path: Path):
    root = drawn(tmp_path / "plain")
    plain = {split: folder(root, split=split) for split in ("train", "val", "test")}
    turned = {
        split: folder(root, split=split, rotations=True, augment=True)
        for split in ("train", "val", "test")
    }
    assert [turned[split].num_classes for split in turned] == [12, 3, 3]
    for split in ("val", "test"):
        assert equal(turned[split].sample(0), plain[split].sample(0))
    warped = folder(root, augment=True)
    assert not equal(warped.sample(0), plain["train"].sample(0))
    assert equal(warped.sample(0), pickle.loads(pickle.dumps(warped)).sample(0))
    labels = [task.query.tensors[1] for task in (warped.sample(0), plain["train"].sample(0))]
    assert torch.equal(labels[0], labels[1])
    names = [name for index in range(8) for name in turned["train"].classes_of(index)]
    assert any(name.endswith(" turned by 90") for name in names)
    assert torch.equal(
        warped.read_images([root / "val" / "val0" / "0.png"]),
        plain["val"].read_images([root / "val" / "val0" / "0.png"]),
    )
    check_sampler(turned["train"], processes=False)


def test_a_data_set_is_turned_and_warped_too():
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8)).astype(np.uint8)
    data = ArrayDataset(images, np.arange(30) % 6)
    splits = {"train": [0, 1, 2], "test": [3, 4, 5]}
    options: dict[str, Any] = {"n_way": 3, "k_query": 2}
    train = FewShotDataset(data, splits, rotations=True, augment=True, **options)
    assert train.num_classes == 12
    test = FewShotDataset(data, splits, "test", rotations=True, augment=True, **options)
    assert equal(test.sample(0), FewShotDataset(data, splits, "test", **options).sample(0))
    assert not equal(train.sample(0), FewShotDataset(data, splits, **options).sample(0))
    oblong = ArrayDataset(images[:, :6], np.arange(30) % 6)
    message = refusal(lambda: FewShotDataset(oblong, splits, augment=True, **options))
    assert "augment needs square images, got 8x6" in message
    message = refusal(lambda: FewShotDataset(oblong, splits, rotations=True, **options))
    assert "rotations needs square images, got 8x6" in message


def test_ink_on_white_is_found_and_said(tmp_path: Path, caplog):
    dark = drawn(tmp_path / "dark", invert=True)
    folder(dark)
    assert "dark images on a light ground" in caplog.text and "--sampler.invert true" in caplog.text
    caplog.clear()
    folder(dark, invert=True)
    folder(drawn(tmp_path / "light"))
    folder(dark, channels=3)
    assert "ground" not in caplog.text
