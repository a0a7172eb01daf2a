"""The shared episode logic: numbers, shapes, labels, chances and errors."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.sampler import TaskSampler
from metadist.tasks import ClassImages, EpisodeSampler, Random
from tests.tasks.helpers import equal, refusal, striped

WORDS_0 = [3729391207109357223, 14868129626659792616]
WORDS_7 = [2395421135051096332, 15175731306697583254]
CHOSEN = [223, 708, 580, 233, 111]
UNIFORM = [0.20217070243981505, 0.8060029221010319]
FIRST_PIXELS = [122, 74, 96, 144, 85, 69]

quick = settings(deadline=None, max_examples=60)


def first_two_pixels(images: torch.Tensor) -> list[tuple[int, int]]:
    """(class, image) of each image of `striped`."""
    whole = (images[:, 0, 0, :2] * 255).round().int()
    return [(int(a), int(b)) for a, b in whole.tolist()]


def test_random_words_are_these_on_every_platform():
    assert Random(0, "train", 0).words(2).tolist() == WORDS_0
    assert Random(7, "test", 123).words(2).tolist() == WORDS_7
    assert Random(0, "train", 0).choose(1000, 5) == CHOSEN
    assert Random(0, "train", 0).uniform(0.0, 1.0, 2).tolist() == UNIFORM


def test_a_task_is_this_on_every_platform():
    images = (np.arange(40 * 4 * 4) % 251).astype(np.uint8).reshape(40, 1, 4, 4)
    classes = ClassImages.from_labels(images, np.repeat(np.arange(8), 5))
    task = EpisodeSampler(classes, n_way=3, k_shot=1, k_query=2).sample(0)
    assert (task.query.tensors[0][:, 0, 0, 0] * 255).round().int().tolist() == FIRST_PIXELS


def test_numbers_of_different_tasks_are_different():
    words = [
        Random(seed, split, index).words(4)
        for seed in (0, 1, 2**64 - 1)
        for split in ("train", "val")
        for index in (0, 1, 2**64 - 1)
    ]
    assert len({int(word) for four in words for word in four}) == 4 * len(words)


@quick
@given(st.integers(1, 10**6), st.data())
def test_choose_gives_different_positions(size: int, data: st.DataObject):
    count = data.draw(st.integers(0, min(size, 50)))
    chosen = Random(data.draw(st.integers(0, 2**64 - 1)), "train", 0).choose(size, count)
    assert len(set(chosen)) == len(chosen) == count
    assert all(0 <= position < size for position in chosen)


def test_choose_is_uniform_over_ordered_pairs():
    draws = Random(0, "train", 0)
    counts = Counter(tuple(draws.choose(4, 2)) for _ in range(12_000))
    assert len(counts) == 12
    assert max(abs(count - 1000) for count in counts.values()) < 5 * 1000**0.5


def test_uniform_stays_within_its_bounds():
    values = Random(3, "val", 9).uniform(-2.0, 5.0, 20_000)
    assert values.min() >= -2 and values.max() < 5
    assert abs(values.mean() - 1.5) < 0.08


@quick
@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**64 - 1))
def test_shapes_labels_and_disjoint_sets(n_way: int, k_shot: int, k_query: int, index: int):
    sampler = EpisodeSampler(striped(6, 8, channels=3), n_way, k_shot, k_query)
    task = sampler.sample(index)
    assert task.id == index
    for batch, count in ((task.support, k_shot), (task.query, k_query)):
        images, labels = batch.tensors
        assert images.shape == (n_way * count, 3, 4, 4) and images.dtype == torch.float32
        assert labels.tolist() == [label for label in range(n_way) for _ in range(count)]
        assert labels.dtype == torch.int64
        assert batch.index.tolist() == list(range(n_way * count))
        classes = [class_ for class_, _ in first_two_pixels(images)]
        assert len({(c, y) for c, y in zip(classes, labels.tolist(), strict=True)}) == n_way
    support = first_two_pixels(task.support.tensors[0])
    query = first_two_pixels(task.query.tensors[0])
    assert len(set(support + query)) == n_way * (k_shot + k_query)
    assert [c for c, _ in support[::k_shot]] == [c for c, _ in query[::k_query]]


def test_pixels_are_those_of_the_source_divided_by_255():
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 5), dtype=np.uint8)
    sampler = EpisodeSampler(ClassImages.from_labels(images, np.repeat(np.arange(2), 6)), 2, 2, 4)
    task = sampler.sample(0)
    got = torch.cat([task.support.tensors[0], task.query.tensors[0]])
    expected = torch.from_numpy(images).float() / 255
    assert {row.numpy().tobytes() for row in got} == {row.numpy().tobytes() for row in expected}


def test_every_class_and_image_is_drawn_about_as_often():
    sampler = EpisodeSampler(striped(20, 6), n_way=5, k_shot=1, k_query=2)
    classes: Counter[int] = Counter()
    shots: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for index in range(800):
        support = first_two_pixels(sampler.sample(index).support.tensors[0])
        classes.update(c for c, _ in support)
        shots.update(i for _, i in support)
        first[support[0][0]] += 1
    assert sorted(classes) == list(range(20)) and sorted(shots) == list(range(6))
    assert all(abs(count - 200) < 5 * 200**0.5 for count in classes.values())
    assert all(abs(count - 4000 / 6) < 5 * (4000 / 6) ** 0.5 for count in shots.values())
    assert all(abs(count - 40) < 5 * 40**0.5 for count in first.values())


def test_tasks_depend_on_index_seed_and_split_only():
    classes = striped(20, 8)
    one, two = (EpisodeSampler(classes, k_query=3, seed=4) for _ in range(2))
    assert equal(one.sample(7), two.sample(7))
    forwards = [one.sample(index) for index in range(5)]
    backwards = [two.sample(index) for index in reversed(range(5))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    pixels = {one.sample(i).query.tensors[0].numpy().tobytes() for i in range(200)}
    assert len(pixels) == 200
    others = (
        EpisodeSampler(classes, k_query=3, seed=5),
        EpisodeSampler(classes, k_query=3, seed=4, split="val"),
    )
    assert not any(equal(one.sample(7), other.sample(7)) for other in others)


def test_tasks_share_no_memory_with_the_source_or_one_another():
    sampler = EpisodeSampler(striped(5, 4), n_way=2, k_query=2)
    task = sampler.sample(0)
    before = task.query.tensors[0].clone()
    for tensor in (*task.support.tensors, task.support.index):
        tensor.fill_(9)
    assert torch.equal(task.query.tensors[0], before)
    assert not (sampler.sample(0).support.tensors[1] == 9).any()
    assert (sampler.classes.images < 6).all()


def test_a_read_only_cache_is_enough():
    """As Ray hands one to workers on the same machine."""
    sampler = EpisodeSampler(striped(5, 4), n_way=2, k_query=2, rotations=True)
    expected = sampler.sample(3)
    sampler.classes.images.flags.writeable = False
    assert equal(sampler.sample(3), expected)


def test_rotations_are_classes_of_their_own():
    images = np.random.default_rng(0).integers(0, 256, (2 * 3, 1, 4, 4), dtype=np.uint8)
    classes = ClassImages.from_labels(images, np.repeat(np.arange(2), 3))
    sampler = EpisodeSampler(classes, n_way=8, k_shot=1, k_query=2, rotations=True)
    assert sampler.num_classes == 8
    task = sampler.sample(0)
    got = {
        image[0].numpy().tobytes()
        for image in torch.cat([task.support.tensors[0], task.query.tensors[0]])
    }
    turned = [np.rot90(image[0], turns) for image in images for turns in range(4)]
    assert got == {(torch.from_numpy(t.copy()).float() / 255).numpy().tobytes() for t in turned}
    by_class = task.query.tensors[0].reshape(8, 2, 16).sort(dim=-1).values
    assert by_class.shape == (8, 2, 16)


def test_from_labels_sorts_images_by_class():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    classes = ClassImages.from_labels(images, np.array([7, 3, 7, 3, 3]))
    assert classes.names == ("3", "7") and classes.starts.tolist() == [0, 3, 5]
    assert classes.images.ravel().tolist() == [1, 3, 4, 0, 2]


def test_pickled_samplers_draw_the_same_tasks():
    sampler = EpisodeSampler(striped(9, 4, channels=3), k_query=3, seed=2)
    copy = pickle.loads(pickle.dumps(sampler))
    assert equal(sampler.sample(11), copy.sample(11))
    assert sampler.size_bytes == 9 * 4 * 3 * 16


def test_it_is_a_task_sampler_and_says_what_it_holds():
    sampler = EpisodeSampler(striped(9, 4), k_query=3)
    assert isinstance(sampler, TaskSampler)
    assert repr(sampler) == (
        "EpisodeSampler(n_way=5, k_shot=1, k_query=3, split='train', seed=0; 9 classes, 36 images)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_way": 1}, "n_way must be an integer >= 2, got 1"),
        ({"k_shot": 0}, "k_shot must be an integer >= 1, got 0"),
        ({"k_query": -3}, "k_query must be an integer >= 1, got -3"),
        ({"k_query": 2.0}, "k_query must be an integer >= 1, got 2.0"),
        ({"k_shot": True}, "k_shot must be an integer >= 1, got True"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 2**64}, f"seed must be an integer < 2**64, got {2**64}"),
        (
            {"n_way": 10},
            "n_way must be <= the 9 classes of split 'train', got 10: lower n_way or give the "
            "split more classes",
        ),
        (
            {"k_shot": 2},
            "k_shot + k_query must be <= the images of every class of split 'train', got 2 + 3 = "
            "5 but class '0' holds 4 (9 of 9 classes hold too few): lower k_query or k_shot, or "
            "leave those classes out of the splits",
        ),
    ],
)
def test_errors_name_field_rule_value_and_way_out(arguments: dict[str, Any], message: str):
    found = refusal(lambda: EpisodeSampler(striped(9, 4), **({"k_query": 3} | arguments)))
    assert found == message


@pytest.mark.parametrize("index", [-1, 2**64, 1.5])
def test_an_index_out_of_range_is_refused(index: int):
    with pytest.raises(ValueError, match=r"^index must be an integer (>= 0|< 2\*\*64), got "):
        EpisodeSampler(striped(9, 4), k_query=3).sample(index)


def test_errors_of_class_images():
    grey = np.zeros((1, 2, 2), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"^every class must hold an image, got none in \['b'\]$"):
        ClassImages.of({"a": [grey], "b": []})
    with pytest.raises(ValueError, match=r"^every class must hold an image, got none in any$"):
        ClassImages.of({})
    found = refusal(
        lambda: ClassImages.of({"a": [grey], "b": [np.zeros((3, 2, 2), dtype=np.uint8)]})
    )
    assert found == (
        "images must have one shape, got (1, 2, 2) in class 'a' and (3, 2, 2) in class 'b': give "
        "an image_size"
    )
    found = refusal(
        lambda: ClassImages.from_labels(cast(Any, np.zeros((2, 2, 2))), np.zeros(2, dtype=int))
    )
    assert found == (
        "images must be uint8 of shape (images, C, H, W) with one label each, got float64 "
        "(2, 2, 2) and 2 labels"
    )
