"""Data sets in the style of torchvision: labels, names, decoding, splits and errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from metadist.tasks import FewShotDataset, check_sampler, read_splits
from tests.tasks.helpers import Endless, equal, refusal

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
SPLITS = {"train": ["ant", "bee", "cat"], "test": ["dog", 4, "fox"]}


def picture(label: int, number: int, side: int = 8) -> np.ndarray:
    pixels = np.random.default_rng(100 * label + number).integers(0, 256, (side, side, 3))
    return pixels.astype(np.uint8)


class Plain:
    """No list of labels, no names; pictures as PIL images."""

    def __init__(self, per_class: int = 4) -> None:
        self.labels_given = [label for _ in range(per_class) for label in range(6)]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.labels_given)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        self.reads += 1
        label = self.labels_given[position]
        return self.convert(picture(label, position)), label

    def convert(self, pixels: np.ndarray) -> Any:
        return Image.fromarray(pixels)


class Named(Plain):
    """As torchvision's own: `.targets` and `.classes`."""

    def __init__(self, per_class: int = 4) -> None:
        super().__init__(per_class)
        self.targets: Any = list(self.labels_given)
        self.classes = NAMES


class Floats(Named):
    def convert(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class Rounded(Floats):
    def convert(self, pixels: np.ndarray) -> Tensor:
        return super().convert(pixels).bfloat16()


class Arrays(Named):
    def convert(self, pixels: np.ndarray) -> np.ndarray:
        return pixels


class Bytes(Named):
    def convert(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels).permute(2, 0, 1)


def few(dataset: Any, splits: Any = SPLITS, **arguments: Any) -> FewShotDataset:
    return FewShotDataset(dataset, splits, **({"n_way": 3, "k_query": 3} | arguments))


@pytest.mark.parametrize("kind", [Floats, Arrays, Bytes])
def test_all_kinds_of_pictures_give_the_same_tasks(kind: type[Named]):
    expected, got = few(Named()), few(kind())
    assert got.class_names == ("ant", "bee", "cat")
    assert all(equal(expected.sample(i), got.sample(i)) for i in range(5))
    assert expected.sample(0).support.tensors[0].shape == (3, 3, 8, 8)


def test_pictures_in_bfloat16_are_read():
    exact, rounded = (few(kind()).sample(0).support.tensors[0] for kind in (Named, Rounded))
    torch.testing.assert_close(exact, rounded, rtol=0, atol=1 / 200)


def test_images_stay_with_their_class():
    sampler = few(Named(), split="test")
    assert sampler.class_names == ("dog", "eel", "fox")
    expected = {picture(3 + c, 6 * i + 3 + c).tobytes() for c in range(3) for i in range(4)}
    images = sampler.classes.images.transpose(0, 2, 3, 1)
    assert {np.ascontiguousarray(image).tobytes() for image in images} == expected
    eel = images[4:8]
    assert np.array_equal(eel[1], picture(4, 10))


@pytest.mark.parametrize(
    "targets",
    [torch.arange(24) % 6, np.arange(24) % 6, tuple(range(6)) * 4],
    ids=["tensor", "array", "tuple"],
)
def test_labels_come_from_targets_and_only_the_split_is_decoded(targets: Any):
    dataset = Named()
    dataset.targets = targets
    few(dataset)
    assert dataset.reads == 12


def test_labels_come_from_one_pass_where_none_are_stored():
    sampler = few(Plain(), {"train": [0, 1, 2]})
    assert sampler.class_names == ("0", "1", "2")
    assert equal(sampler.sample(2), few(Named()).sample(2))


def test_labels_come_from_samples_or_labels():
    dataset = Plain()
    dataset.samples = [(f"{i}.png", label) for i, label in enumerate(dataset.labels_given)]  # type: ignore[attr-defined]
    few(dataset, {"train": [0, 1, 2]})
    assert dataset.reads == 12
    dataset = Plain()
    dataset.labels = np.array(dataset.labels_given)  # type: ignore[attr-defined]
    few(dataset, {"train": [0, 1, 2]})
    assert dataset.reads == 12


def test_omniglot_of_torchvision_is_understood():
    dataset = Plain()
    dataset._flat_character_images = [("x.png", label) for label in dataset.labels_given]  # type: ignore[attr-defined]
    dataset._characters = [f"Latin/character0{i}" for i in range(6)]  # type: ignore[attr-defined]
    sampler = few(dataset, {"train": ["Latin/character05", "Latin/character01"]}, n_way=2)
    assert sampler.class_names == ("Latin/character05", "Latin/character01")


def test_size_channels_and_transform():
    sampler = few(Named(), image_size=5, channels=1, transform=double)
    images = sampler.sample(0).support.tensors[0]
    assert images.shape == (3, 1, 5, 5)
    assert torch.equal(
        images, 2 * few(Named(), image_size=5, channels=1).sample(0).support.tensors[0]
    )
    assert sampler.size_bytes == 12 * 25


def double(images: Tensor) -> Tensor:
    return 2 * images


def test_a_pickled_sampler_carries_the_pictures_and_not_the_data_set():
    sampler = few(Named(), transform=double)
    pickled = pickle.dumps(sampler)
    assert b"Named" not in pickled and len(pickled) < sampler.size_bytes + 1500
    assert equal(pickle.loads(pickled).sample(5), sampler.sample(5))


def test_splits_from_a_file(tmp_path: Path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(SPLITS))
    assert equal(few(Named(), path).sample(1), few(Named()).sample(1))
    check_sampler(few(Named(), str(path)), processes=False, other=few(Named(), path, split="test"))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("{", "must be JSON: Expecting property name"),
        ("[1]", "must map split names to lists of classes, got [1]"),
        ("{}", "must map split names to lists of classes, got {}"),
        ('{"train": []}', "split 'train' must be a non-empty list of class names or integer"),
        ('{"train": "ant"}', "split 'train' must be a non-empty list of class names or integer"),
        ('{"train": [1.5]}', "split 'train' must be a non-empty list of class names or integer"),
        ('{"train": [true]}', "split 'train' must be a non-empty list of class names or integer"),
    ],
)
def test_bad_split_files(tmp_path: Path, splits: str, message: str):
    path = tmp_path / "splits.json"
    path.write_text(splits)
    found = refusal(lambda: read_splits(path))
    assert found.startswith(f"splits file {path}")
    assert message in found


@pytest.mark.parametrize(
    ("splits", "arguments", "message"),
    [
        (
            {"train": ["ant", "gnu", 77]},
            {},
            "splits must name existing classes, got 'gnu', 77; the classes are 0, 1, 2, 3, 4, 5, "
            "'ant', 'bee', ... (12 in all)",
        ),
        (
            {"train": ["ant", "bee"], "val": ["cat", 0]},
            {},
            "splits must be disjoint, got class 0 in 'train' and 'val': list each class once",
        ),
        (
            {"train": ["ant", "ant", "bee"]},
            {},
            "splits must be disjoint, got class 'ant' in 'train' and 'train': list each class once",
        ),
        (
            None,
            {},
            "splits must be a JSON file or a mapping, got NoneType: pass the classes of each "
            'split, {"train": [...], "val": [...], "test": [...]}',
        ),
        (SPLITS, {"split": "val"}, "split must be one of train, test, got 'val'"),
        (SPLITS, {"channels": 4}, "channels must be 1 (grey) or 3 (RGB), got 4"),
        (SPLITS, {"rotations": "no"}, "rotations must be True or False, got 'no'"),
        (SPLITS, {"augment": 0}, "augment must be True or False, got 0"),
        (SPLITS, {"seed": 1.0}, "seed must be an integer >= 0, got 1.0"),
    ],
)
def test_errors(splits: Any, arguments: dict[str, Any], message: str):
    found = refusal(lambda: few(Named(), splits, **arguments))
    assert found == message


def test_wrong_pictures_are_named():
    class Normalised(Floats):
        def convert(self, pixels: np.ndarray) -> Tensor:
            return super().convert(pixels) - 0.5

    with pytest.raises(
        ValueError, match=r"^picture 0 of the data set must be uint8 or floating in"
    ):
        few(Normalised())

    class Words(Named):
        def convert(self, pixels: np.ndarray) -> str:
            return "a picture"

    with pytest.raises(
        ValueError, match=r"^picture 0 of the data set must be a PIL image, a tensor"
    ):
        few(Words())

    class Deep(Named):
        def convert(self, pixels: np.ndarray) -> np.ndarray:
            return np.zeros((4, 4, 7), dtype=np.uint8)

    assert refusal(lambda: few(Deep())) == (
        "picture 0 of the data set must be of 1, 3 or 4 channels, (height, width, channels), got a "
        "ndarray of shape (4, 4, 7)"
    )

    class Last(Named):
        def convert(self, pixels: np.ndarray) -> Tensor:
            return torch.zeros(8, 8, 3)

    found = refusal(lambda: few(Last()))
    assert "(channels, height, width), got a Tensor of shape (8, 8, 3)" in found

    class Whole(Named):
        def convert(self, pixels: np.ndarray) -> np.ndarray:
            return pixels.astype(np.int64)

    assert "got int64 from" in (found := refusal(lambda: few(Whole())))
    assert found.endswith("convert it, 0 .. 255, to uint8")

    class Growing(Named):
        def __getitem__(self, position: int) -> tuple[Any, Any]:
            label = self.labels_given[position]
            return picture(label, position, side=8 + position), label

    with pytest.raises(
        ValueError, match=r"^images must have one shape, got .*: give an image_size$"
    ):
        few(Growing())


def test_wrong_labels_are_named():
    class Shifted(Named):
        def __getitem__(self, position: int) -> tuple[Any, Any]:
            image, label = super().__getitem__(position)
            return image, (label + 1) % 6

    found = refusal(lambda: few(Shifted()))
    assert found == (
        "labels must agree, got 1 from dataset[0] and 0 from its list of labels: drop the "
        "target_transform"
    )

    class Words(Plain):
        def __getitem__(self, position: int) -> tuple[Any, Any]:
            return super().__getitem__(position)[0], "ant"

    with pytest.raises(
        ValueError, match=r"^labels must be integers, got 'ant' at position 0: number"
    ):
        few(Words())


def item_as(convert: Any) -> Named:
    """`Named` with other items: `convert(picture, label, position)`; labels from one pass."""

    class Other(Plain):
        classes = NAMES

        def __getitem__(self, position: int) -> Any:
            return convert(*super().__getitem__(position), position)

    return Other()  # type: ignore[return-value]


@pytest.mark.parametrize(
    "convert",
    [
        lambda image, label, i: {"img": image, "label": label, "id": i},
        lambda image, label, i: {"picture": image, "target": torch.tensor(label)},
        lambda image, label, i: (image, label, f"{i}.png", None),
        lambda image, label, i: [image, np.array([label])],
        lambda image, label, i: (image, F.one_hot(torch.tensor(label), 6)),
        lambda image, label, i: (image, np.eye(6)[label]),
        lambda image, label, i: (image, [int(k == label) for k in range(6)]),
    ],
)
def test_items_whose_meaning_is_sure_are_taken(convert: Any):
    got = few(item_as(convert))
    assert got.class_names == ("ant", "bee", "cat")
    assert equal(got.sample(1), few(Named()).sample(1))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            lambda image, label, i: {"img": image, "fine": label, "coarse": label // 2},
            '"label": label}, got {img: Image, fine: 0, coarse: 0} at position 0: wrap',
        ),
        (
            lambda image, label, i: {"image": image, "label": label, "target": label},
            "got {image: Image, label: 0, target: 0} at position 0",
        ),
        (lambda image, label, i: (image, label, i), "got (Image, 0, 0) at position 0"),
        (lambda image, label, i: (label, image), "got (0, Image) at position 0"),
        (lambda image, label, i: (np.asarray(image),), "got (ndarray of shape (8, 8, 3)) at"),
        (lambda image, label, i: np.asarray(image), "got ndarray of shape (8, 8, 3) at position 0"),
        (
            lambda image, label, i: (image, np.ones(4)),
            "labels must be integers or one-hot vectors, got a ndarray of shape (4,) with 4 entr",
        ),
        (
            lambda image, label, i: (image, label if i < 9 else np.eye(6)[label]),
            "labels must all be integers, or one-hot vectors of one length, got integers and vect",
        ),
        (lambda image, label, i: (image, np.eye(6)), "labels must be integers, got ndarray of sha"),
    ],
)
def test_items_that_leave_a_guess_are_shown_and_refused(convert: Any, message: str):
    found = refusal(lambda: few(item_as(convert)))
    assert message in found and len(found) < 300


def numbered_from(first: int, names: Any) -> Plain:
    dataset = Plain()
    dataset.labels_given = [label + first for label in dataset.labels_given]
    dataset.classes = names  # type: ignore[attr-defined]
    return dataset


@pytest.mark.parametrize(
    ("first", "names"),
    [
        (1, NAMES),
        (0, np.array(NAMES)),
        (1, {name: label for label, name in enumerate(NAMES, 1)}),
        (7, dict(enumerate(NAMES, 7))),
    ],
)
def test_names_find_their_labels(first: int, names: Any):
    dataset = numbered_from(first, names)
    sampler = few(dataset, {"train": ["dog", "ant"]}, n_way=2)
    assert sampler.class_names == ("dog", "ant")
    images = sampler.classes.images.transpose(0, 2, 3, 1)
    assert np.array_equal(images[0], picture(first + 3, 3))


def test_names_that_may_belong_to_several_labels_are_refused():
    found = refusal(lambda: few(numbered_from(3, NAMES), {"train": ["ant", "bee"]}, n_way=2))
    assert found.startswith("labels must be 0 .. 5, the positions of the 6 names of classes of the")
    assert "or 1 .. 6 each, got 3 .. 8: correct its list of names" in found


def test_two_classes_of_one_name_stay_two():
    dataset = Named()
    dataset.classes = ["crane", "bee", "crane", "dog", "eel", "fox"]
    found = refusal(lambda: few(dataset, {"train": ["crane", "bee"]}, n_way=2))
    assert "got 'crane'; the classes are" in found
    sampler = few(dataset, {"train": [0, 2, "bee"]})
    assert sampler.class_names == ("crane (0)", "crane (2)", "bee")
    assert len(sampler.classes.images) == 12


def test_features_of_hub_data_sets_name_the_classes():
    dataset = item_as(lambda image, label, i: {"image": image, "label": label})
    dataset.features = {"image": None, "label": SimpleNamespace(names=NAMES)}  # type: ignore[attr-defined]
    assert few(dataset).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("stored", "value"),
    [
        ("samples", [{"path": "x", "label": 0}] * 24),
        ("samples", [("x", 0, "train")] * 24),
        ("targets", np.eye(6)[[0] * 24]),
        ("targets", [[0]] * 23 + [[0, 1]]),
        ("labels", dict.fromkeys(range(24), 0)),
        ("labels", lambda: [0] * 24),
    ],
)
def test_stored_labels_of_another_form_are_passed_over(stored: str, value: Any):
    dataset = Plain()
    setattr(dataset, stored, value)
    assert equal(few(dataset, {"train": [0, 1, 2]}).sample(2), few(Named()).sample(2))


def test_the_data_set_behind_a_loader_is_read():
    loader: Any = DataLoader(Named(), batch_size=5, shuffle=True)  # type: ignore[arg-type]
    assert equal(few(loader).sample(2), few(Named()).sample(2))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Endless(), "by position (__len__ and __getitem__), got the iterable Endless: tasks are"),
        (DataLoader(Endless()), "got the iterable Endless: tasks are drawn in any order"),
        (np.zeros((24, 8, 8)), "got a ndarray of shape (24, 8, 8) without labels: EpisodeSampler("),
        ({"train": Named(), "test": Named()}, "got a dict of train, test: pass one of them"),
        ([], "dataset must hold pictures, got an empty list"),
        (iter([]), "got a list_iterator without __len__, __getitem__: collect its items in a list"),
    ],
)
def test_what_is_no_data_set_is_named(dataset: Any, message: str):
    assert message in refusal(lambda: few(dataset))


def test_colour_behind_grey_is_refused():
    class Mixed(Named):
        def convert(self, pixels: np.ndarray) -> Any:
            return Image.fromarray(pixels).convert("L" if self.reads == 1 else "RGB")

    assert refusal(lambda: few(Mixed())).startswith("picture 1 of the data set must be grey as tho")
    assert few(Mixed(), channels=1).classes.images.shape == (12, 1, 8, 8)


def test_names_compare_equal_in_any_unicode_form(tmp_path: Path):
    dataset = Named()
    dataset.classes = ["e\u0301", *NAMES[1:]]
    path = tmp_path / "splits.json"
    path.write_text("\ufeff" + json.dumps({"train": ["\u00e9", "bee"]}), encoding="utf-8")
    assert few(dataset, path, n_way=2).class_names == ("\u00e9", "bee")


def test_numpy_integers_are_labels_and_sizes():
    splits = {"train": list(np.arange(3))}
    sampler = few(Named(), splits, n_way=np.int64(3), image_size=np.int32(5), seed=np.uint8(2))
    assert equal(sampler.sample(1), few(Named(), image_size=5, seed=2).sample(1))
