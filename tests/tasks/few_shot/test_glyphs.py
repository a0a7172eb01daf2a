"""The packaged letters: splits, families, augmentation and errors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from scipy.ndimage import affine_transform

from metadist.tasks import Glyphs, Random, check_sampler
from metadist.tasks.few_shot import glyphs as module
from tests.tasks.helpers import equal, refusal


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def families_of(sampler: Glyphs, class_: int, rows: list[int]) -> list[int]:
    runs = sampler._runs[sampler._offered[class_]]
    return [next(f for f, (start, stop) in enumerate(runs) if start <= r < stop) for r in rows]


def test_splits_are_by_script():
    samplers = {split: Glyphs(split=split, k_query=5) for split in module.SPLITS}
    scripts = [set(sampler.scripts) for sampler in samplers.values()]
    assert all(scripts) and len(set().union(*scripts)) == sum(map(len, scripts))
    assert {"Latin", "Greek"} <= scripts[0]
    names = [set(sampler.class_names) for sampler in samplers.values()]
    assert len(set().union(*names)) == sum(map(len, names))
    assert all(name.split(" U+")[0] in samplers["test"].scripts for name in names[2])


@pytest.mark.parametrize("split", module.SPLITS)
@pytest.mark.parametrize(("k_shot", "k_query"), [(1, 15), (5, 15), (3, 5)])
def test_support_and_query_come_from_different_families(split: str, k_shot: int, k_query: int):
    sampler = Glyphs(split=split, k_shot=k_shot, k_query=k_query, n_way=2)
    for class_ in range(sampler.num_classes):
        start, stop = sampler.classes.starts[sampler._offered[class_] :][:2]
        for index in range(4):
            rows = sampler.draw_rows(class_, Random(0, split, index))
            assert len(set(rows)) == len(rows) == k_shot + k_query
            assert start <= min(rows) and max(rows) < stop
            families = families_of(sampler, class_, rows)
            assert not set(families[:k_shot]) & set(families[k_shot:])


def test_shots_come_from_different_families_where_there_are_enough():
    sampler = Glyphs(k_shot=5, k_query=15)
    rich = [
        c
        for c, offered in enumerate(sampler._offered)
        if sampler.classes.starts[offered + 1] - sampler.classes.starts[offered] > 100
    ]
    for class_ in rich[:20]:
        rows = sampler.draw_rows(class_, Random(0, "train", class_))
        assert len(set(families_of(sampler, class_, rows[:5]))) == 5


def test_every_class_and_nearly_every_image_is_drawn():
    sampler = Glyphs(split="val", augment=False, k_query=5)
    images = {}
    for index in range(400):
        task = sampler.sample(index)
        for image in (*task.support.tensors[0], *task.query.tensors[0]):
            images[image.numpy().tobytes()] = image
    offered = np.concatenate(
        [sampler.classes.images[slice(*sampler.classes.starts[c:][:2])] for c in sampler._offered]
    )
    expected = {(torch.from_numpy(image) / 255).numpy().tobytes() for image in offered}
    assert set(images) <= expected
    assert len(images) > 0.95 * len(expected)


def test_without_disjoint_families_more_classes_are_offered():
    assert (
        Glyphs(split="test", disjoint_families=False).num_classes
        >= Glyphs(split="test").num_classes
    )
    task = Glyphs(disjoint_families=False, augment=False).sample(0)
    assert task.query.tensors[0].shape == (75, 1, 28, 28)


def test_tasks_are_valid_and_the_splits_are_apart():
    for arguments in ({}, {"augment": False}, {"n_way": 20, "k_shot": 5}):
        report = check_sampler(Glyphs(**arguments), processes=False, other=Glyphs(split="test"))
        assert report.n_way == arguments.get("n_way", 5) and report.constant_shapes
        assert report.distinct_tasks == report.num_tasks and report.pickle_bytes < 200


def test_images_stay_in_the_unit_interval():
    images = torch.cat([Glyphs().sample(i).query.tensors[0] for i in range(10)])
    assert images.min() >= 0 and images.max() <= 1 + 1e-6 and images.dtype == torch.float32


def test_augmentation_is_the_affine_map_it_says():
    """Against scipy's, built from the matrices and inverted by a solver."""
    rng = np.random.default_rng(0)
    images = rng.random((6, 1, 28, 28), dtype=np.float32)
    got = module.random_affine(torch.from_numpy(images), Random(1, "train", 2))
    draws = Random(1, "train", 2)
    angle = np.deg2rad(draws.uniform(-15, 15, 6))
    shear = draws.uniform(-0.2, 0.2, 6)
    scale_x, scale_y = draws.uniform(0.85, 1.2, 6), draws.uniform(0.85, 1.2, 6)
    shift_x, shift_y = draws.uniform(-2, 2, 6), draws.uniform(-2, 2, 6)
    for i in range(6):
        cos, sin = np.cos(angle[i]), np.sin(angle[i])
        rotation = np.array([[cos, -sin], [sin, cos]])
        matrix = rotation @ [[1, shear[i]], [0, 1]] @ np.diag([scale_x[i], scale_y[i]])
        inverse = np.linalg.inv(matrix)[::-1, ::-1]  # scipy puts y first
        centre = np.array([13.5, 13.5])
        offset = centre - inverse @ (centre + np.array([shift_y[i], shift_x[i]]))
        expected = affine_transform(images[i, 0], inverse, offset, order=1, mode="grid-constant")
        assert np.abs(got[i, 0].numpy() - expected).max() < 2e-5


def test_maps_without_movement_change_nothing(monkeypatch: pytest.MonkeyPatch):
    for name, value in (
        ("ROTATION_DEGREES", 0.0),
        ("SHEAR", 0.0),
        ("SCALE", (1.0, 1.0)),
        ("SHIFT_PIXELS", 0.0),
    ):
        monkeypatch.setattr(module, name, value)
    images = torch.rand(3, 2, 28, 28)
    assert torch.allclose(module.random_affine(images, Random(0, "train", 0)), images, atol=1e-5)


def test_every_image_of_a_task_moves_by_itself():
    images = Glyphs(augment=False).sample(0).support.tensors[0][:1].repeat(50, 1, 1, 1)
    moved = module.random_affine(images, Random(0, "train", 0))
    assert len({image.numpy().tobytes() for image in moved}) == 50


def test_augmentation_changes_the_pixels_and_not_the_choice():
    plain, moved = Glyphs(augment=False).sample(3), Glyphs().sample(3)
    assert torch.equal(plain.support.tensors[1], moved.support.tensors[1])
    assert not torch.equal(plain.support.tensors[0], moved.support.tensors[0])
    ink = plain.support.tensors[0].sum((1, 2, 3)) / moved.support.tensors[0].sum((1, 2, 3))
    assert (ink > 0.6).all() and (ink < 1.5).all()


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    sampler = Glyphs(k_shot=5)
    tasks = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tasks.append([sampler.sample(i) for i in range(5)])
    finally:
        torch.set_num_threads(before)
    assert all(equal(a, b) for other in tasks[1:] for a, b in zip(tasks[0], other, strict=True))


def test_a_pickled_sampler_holds_its_arguments_only():
    sampler = Glyphs(n_way=3, k_shot=2, k_query=4, split="val", seed=9, augment=False)
    pickled = pickle.dumps(sampler)
    copy = pickle.loads(pickled)
    assert len(pickled) < 200 and repr(copy) == repr(sampler)
    assert equal(copy.sample(6), sampler.sample(6))
    assert copy.classes is sampler.classes  # read once in a process


def test_repr_says_how_many_classes_are_drawn():
    sampler = Glyphs(split="test", seed=3)
    assert repr(sampler) == (
        "Glyphs(n_way=5, k_shot=1, k_query=15, split='test', seed=3, augment=True, "
        f"disjoint_families=True; {sampler.num_classes} of {sampler.num_classes_of_split} classes "
        "have renderings enough)"
    )
    assert 0 < sampler.num_classes < sampler.num_classes_of_split


def test_errors():
    found = refusal(lambda: Glyphs(k_query=250))
    assert found.startswith(
        "n_way must be <= the classes of split 'train' with renderings enough for k_shot + k_query "
        "= 1 + 250 (disjoint_families=True), got 5 and "
    )
    assert found.endswith(" classes: lower k_query, k_shot or n_way")
    with pytest.raises(ValueError, match=r"^split must be one of train, val, test, got 'all'$"):
        Glyphs(split="all")
    with pytest.raises(ValueError, match=r"^k_shot must be an integer >= 1, got 0$"):
        Glyphs(k_shot=0)


def test_it_is_built_from_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(Glyphs, "sampler")
    given = parser.parse_args(["--sampler.n_way=2", "--sampler.augment=false"])
    assert parser.instantiate(given).sampler.n_way == 2
