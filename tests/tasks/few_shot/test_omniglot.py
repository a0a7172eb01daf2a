"""Omniglot: the fixed splits, the layouts on disk, downloading and its errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torchvision

from metadist.tasks import Omniglot, check_sampler
from metadist.tasks.few_shot.class_splits import Splits, packaged_splits
from tests.tasks.helpers import equal, refusal, write_tree

BACKGROUND = [f"Latin/character{i:02d}" for i in (1, 2, 3)]
EVALUATION = [f"Tengwar/character{i:02d}" for i in (1, 2, 3)]
SPLITS = {"train": [*BACKGROUND[:2], EVALUATION[0]], "test": [BACKGROUND[2], *EVALUATION[1:]]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of torchvision, with few characters."""
    base = tmp_path / "data" / "omniglot-py"
    write_tree(base / "images_background", BACKGROUND, mode="1")
    write_tree(base / "images_evaluation", EVALUATION, mode="1", seed=1)
    return tmp_path / "data"


@pytest.fixture
def splits(tmp_path: Path) -> str:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(SPLITS))
    return str(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)


def omniglot(root: Path, splits: str, **arguments: Any) -> Omniglot:
    options: dict[str, Any] = {"splits": splits, "n_way": 3, "k_query": 2}
    return Omniglot(root, **(options | arguments))


def names_in(splits: Splits) -> Iterator[str]:
    for names in splits.values():
        yield from map(str, names)


def test_the_list_of_characters_is_fixed_and_follows_its_rule():
    splits = packaged_splits("omniglot.json")
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 1100,
        "val": 100,
        "test": 423,
    }
    ordered = sorted(names_in(splits), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert set(splits["train"]) == set(ordered[:1100])
    assert set(splits["val"]) == set(ordered[1100:1200])
    assert set(splits["test"]) == set(ordered[1200:])


def test_the_list_of_alphabets_covers_the_same_characters():
    splits = packaged_splits("omniglot_alphabets.json")
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 792,
        "val": 172,
        "test": 659,
    }
    alphabets = {split: {str(n).split("/")[0] for n in names} for split, names in splits.items()}
    assert {split: len(names) for split, names in alphabets.items()} == {
        "train": 25,
        "val": 5,
        "test": 20,
    }
    assert len(set().union(*alphabets.values())) == 50
    assert set(names_in(splits)) == set(names_in(packaged_splits("omniglot.json")))


def test_all_layouts_give_the_same_tasks_white_on_black(root: Path, splits: str, tmp_path: Path):
    expected = omniglot(root, splits)
    assert expected.sample(0).support.tensors[0].shape == (3, 1, 28, 28)
    without_base = omniglot(root / "omniglot-py", splits)
    plain = tmp_path / "plain"
    for part in ("images_background", "images_evaluation"):
        shutil.copytree(root / "omniglot-py" / part, plain, dirs_exist_ok=True)
    for other in (without_base, omniglot(plain, splits)):
        assert all(equal(expected.sample(i), other.sample(i)) for i in range(3))


def test_ink_is_white(tmp_path: Path, splits: str):
    from PIL import Image

    for name in names_in(SPLITS):
        for i in range(3):
            image = Image.new("1", (105, 105), 1)
            for offset in range(30):
                image.putpixel((40 + i, 30 + offset), 0)
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    images = omniglot(tmp_path, splits).sample(0).query.tensors[0]
    assert images[:, 0, 0, 0].max() == 0 and images.max() > 0.2 and images.mean() < 0.1


def test_a_packaged_split_reads_its_own_characters_only(tmp_path: Path):
    names = [str(name) for name in packaged_splits("omniglot.json")["val"]]
    write_tree(tmp_path, names, num_images=2)
    sampler = Omniglot(tmp_path, split="val", n_way=20, k_query=1, rotations=True)
    assert sampler.class_names == tuple(names) and sampler.num_classes == 400
    check_sampler(sampler, num_tasks=3, processes=False)


def test_splits_share_no_drawing(root: Path, splits: str):
    train, test = (omniglot(root, splits, split=split) for split in ("train", "test"))
    check_sampler(train, processes=False, other=test)


def test_archives_that_lie_there_are_checked_and_unpacked(
    root: Path, splits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = omniglot(root, splits).sample(0)
    there = tmp_path / "zipped" / "omniglot-py"
    there.mkdir(parents=True)
    sums = {}
    for part in ("images_background", "images_evaluation"):
        shutil.make_archive(str(there / part), "zip", root / "omniglot-py", part)
        sums[part] = hashlib.md5((there / f"{part}.zip").read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded to .*omniglot-py: "):
        omniglot(tmp_path / "zipped", splits)  # not the md5 of the original
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", sums)
    assert equal(omniglot(tmp_path / "zipped", splits).sample(0), expected)


def test_without_network_it_says_what_to_do(tmp_path: Path):
    base = tmp_path / "omniglot-py"
    way_out = (
        f"Put images_background.zip and images_evaluation.zip (github.com/brendenlake/omniglot, "
        f"folder python), or their contents, into {base} and use download=True to unpack them; or "
        "name another root; or list the characters there are in a file and pass it as splits"
    )
    found = refusal(lambda: Omniglot(tmp_path), FileNotFoundError)
    assert found == (
        f"Omniglot cannot be downloaded to {base}: <urlopen error no network>. {way_out}"
    )
    found = refusal(lambda: Omniglot(tmp_path, download=False), FileNotFoundError)
    assert found == (
        f"Omniglot in {tmp_path} must hold every character of the split, got 1100 of 1100 missing, "
        f"such as Alphabet_of_the_Magi/character02. {way_out}"
    )


def test_what_is_missing_is_named(root: Path, splits: str):
    shutil.rmtree(root / "omniglot-py" / "images_background" / "Latin" / "character02")
    (root / "omniglot-py" / "images_background" / "Latin" / "character02").mkdir()
    with pytest.raises(FileNotFoundError, match="got 1 of 3 missing, such as Latin/character02"):
        omniglot(root, splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, test, got 'dev'"),
        (
            {"splits": "/letters"},
            "splits must be a JSON file or a mapping, got /letters: no such file",
        ),
        ({"k_shot": 0}, "k_shot must be an integer >= 1, got 0"),
        ({"image_size": -1}, "image_size must be an integer >= 1, got -1"),
    ],
)
def test_arguments_are_checked_first(
    tmp_path: Path, splits: str, arguments: dict[str, Any], message: str
):
    found = refusal(lambda: Omniglot(tmp_path / "nothing", **({"splits": splits} | arguments)))
    assert found == message


def test_unknown_characters_are_named(tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text('{"train": ["Latin/character99"]}')
    with pytest.raises(ValueError, match=r"^splits must name existing classes, got 'Latin/charac"):
        omniglot(tmp_path, str(path))
