"""Runs show how they adapt and what they weigh, and train the same with it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from metadist.algorithms import SOBA
from metadist.pictures import MAX_TILES, Gallery, adaptation_picture
from metadist.run.reading import find_history
from metadist.run.storage import Folder
from metadist.tasks import HyperCleaning, LinearClassifier
from metadist.tasks.reweighting.corrupted_images import CorruptedImages
from tests.helpers import Images, curves, images_of_conv4, make_trainer


def test_a_validation_shows_how_a_task_is_adapted(tmp_path):
    trainer = make_trainer(
        **images_of_conv4(),
        val_sampler=Images(),
        val_every=2,
        val_tasks=2,
        run_dir=tmp_path,
    )
    trainer.fit(2)
    history = find_history(Folder(tmp_path / "tensorboard"))
    assert history.unreadable == []
    step, png = history.images["adaptation/query"]
    assert step == 2
    picture = np.asarray(Image.open(io.BytesIO(png)))
    # 6 query images in a row, each above two lines of text.
    assert picture.shape == (72 + 30 + 8, 6 * 80, 3)
    assert {"task/support", "task/query"} <= set(history.images)


def test_a_picture_tells_right_from_wrong_by_word_and_colour():
    images = torch.rand(2, 1, 8, 8)
    true = torch.tensor([1, 1])
    right = adaptation_picture(images, true, true, true)
    wrong = adaptation_picture(images, true, true, 1 - true)
    assert right.shape == wrong.shape == (3, 110, 160)
    border = [[round(float(v) * 255) for v in picture[:, 2, 2]] for picture in (right, wrong)]
    assert border == [[86, 180, 233], [230, 130, 30]]
    many = adaptation_picture(torch.rand(75, 3, 6, 12), *3 * [torch.zeros(75).long()])
    assert many.shape == (3, MAX_TILES // 10 * (36 + 38), 800)


def test_learned_weights_are_shown_by_right_and_wrong_label(tmp_path):
    sampler = CorruptedImages("digits", num_train=60, num_val=60, num_test=60, corruption=0.5)
    trainer = make_trainer(
        problem=HyperCleaning(60, LinearClassifier(64, 10)),
        sampler=sampler,
        algorithm=SOBA(inner_lr=0.1),
        meta_batch_size=1,
        tasks_per_lease=1,
        keep_state=True,
        run_dir=tmp_path,
    )
    trainer.fit(3)
    found = find_history(Folder(tmp_path / "tensorboard")).histograms
    wrong = int(sampler.wrong.sum())
    assert {name: step for name, (step, _) in found.items()} == {
        "weights/right label": 3,
        "weights/wrong label": 3,
    }
    counts = [
        sum(bar[2] for bar in found[f"weights/{name} label"][1]) for name in ("right", "wrong")
    ]
    assert counts == [60 - wrong, wrong] and wrong > 10
    weights = trainer.outer["logits"].sigmoid()[sampler.wrong]
    bars = found["weights/wrong label"][1]
    assert bars[0][0] == pytest.approx(float(weights.min()))
    assert bars[-1][1] == pytest.approx(float(weights.max()))


def test_problems_without_pictures_show_none(tmp_path):
    trainer = make_trainer(run_dir=tmp_path, val_sampler=curves("val"), val_every=1, val_tasks=2)
    trainer.fit(1)
    history = find_history(Folder(tmp_path / "tensorboard"))
    assert history.images == {} and history.histograms == {}


def test_pictures_take_little_time_and_a_failure_is_no_end(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("metadist.pictures.time.monotonic", lambda: now[0])
    shown = []

    def make() -> None:
        shown.append(now[0])
        now[0] += 2.0

    gallery = Gallery()
    for moment in (0.0, 50.0, 101.9, 102.1):
        now[0] = moment
        gallery.show(make)
    assert shown == [0.0, 102.1]

    def broken() -> None:
        shown.append(-1.0)
        raise RuntimeError("mine")

    gallery = Gallery()
    gallery.show(broken)
    now[0] += 1e6
    gallery.show(broken)
    assert shown.count(-1.0) == 1 and "pictures of this run are missing" in caplog.text
