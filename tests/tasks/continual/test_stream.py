"""Memories and streams: what a learner holds and gets at a step, as a function of the step."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from metadist.task import Batch
from metadist.tasks import (
    ImageStream,
    PermutedImages,
    Random,
    Reservoir,
    Ring,
    SplitGlyphs,
    SplitImages,
    Stage,
)

SMALL: dict[str, Any] = {
    "per_task": 40,
    "num_test": 30,
    "batch": 5,
    "memory": 12,
    "semantic": 4,
    "replay": 10,
}


def permuted(**options):
    return PermutedImages("digits", num_tasks=3, **{**SMALL, **options})


def fields(batch: Batch) -> dict[str, torch.Tensor]:
    names = ("inputs", "stages", "is_new", "slots", "targets")
    return dict(zip(names, batch.fields(*names), strict=True))


def in_turn(slots_of, size: int, count: int):
    """What a memory holds after each arrival, when arrivals are put into slots one by one."""
    held: dict[int, int] = {}
    for number in range(count):
        slot = slots_of(number)
        if slot < size:
            held[slot] = number
        yield np.array([held[slot] for slot in sorted(held)])


def test_a_ring_holds_the_last_arrivals_in_their_slots():
    ring = Ring(7)
    for number, held in enumerate(in_turn(lambda i: i % 7, 7, 40)):
        np.testing.assert_array_equal(ring.at(number + 1), held)
    assert len(ring.at(0)) == 0
    assert len(Ring(0).at(5)) == 0


def test_a_reservoir_holds_what_one_that_is_filled_in_turn_does():
    words = Random(3, "memory", 1).words(200).tolist()
    slots = [i if i < 9 else words[i] % (i + 1) for i in range(200)]
    reservoir = Reservoir(9, 200, Random(3, "memory", 1))
    for number, held in enumerate(in_turn(slots.__getitem__, 9, 200)):
        np.testing.assert_array_equal(reservoir.at(number + 1), held)


def test_a_reservoir_is_a_uniform_choice():
    counts = np.zeros(100)
    for index in range(500):
        counts[Reservoir(10, 100, Random(0, "memory", index)).at(100)] += 1
    thirds = counts.reshape(4, 25).mean(1) / 500
    np.testing.assert_allclose(thirds, 0.1, atol=0.012)


@pytest.mark.parametrize("kind", ["ring", "reservoir"])
def test_a_step_has_what_the_definition_says(kind):
    stream = permuted(kind=kind, updates=2)
    assert (stream.num_steps, stream.steps_per_stage, stream.num_slots) == (48, 16, 24)
    first, whole = fields(stream.sample(0).support), fields(stream.whole())
    torch.testing.assert_close(first["inputs"], whole["inputs"][1:5])
    assert first["is_new"].all()
    task = stream.sample_at(0, 2 * 16 + 7)  # the third stage, its batch number 3
    support, query = fields(task.support), fields(task.query)
    new = support["is_new"]
    torch.testing.assert_close(support["inputs"][new], whole["inputs"][80 + 16 : 80 + 20])
    assert support["stages"][new].tolist() == [2] * 4
    assert int((~new).sum()) == 10  # of 8 + 8 + 8 that are held
    assert query["stages"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    apart = whole["inputs"].reshape(3, 8, 5, -1)[:, :, 0]
    for stage, image in zip(query["stages"], query["inputs"], strict=True):
        assert (apart[stage] == image.flatten()).all(-1).any()
    old = ~new & (support["stages"] < 2)
    assert (support["slots"][old] // 8 == support["stages"][old]).all()
    assert (support["slots"][~new & ~old] == -1).all()
    assert support["slots"][old].unique().numel() == int(old.sum())


def test_an_example_is_replayed_from_the_slot_that_it_was_stored_in():
    for kind in ("ring", "reservoir"):
        stream = permuted(kind=kind)
        stored: dict[int, torch.Tensor] = {}
        seen = 0
        for step in range(stream.num_steps):
            support = fields(stream.sample_at(0, step).support)
            for is_new, slot, image in zip(
                support["is_new"], support["slots"].tolist(), support["inputs"], strict=True
            ):
                if slot >= 0 and is_new:
                    stored[slot] = image
                elif slot >= 0:
                    assert torch.equal(stored[slot], image)
                    seen += 1
        assert seen > 100
        assert len(stored) == stream.num_slots


def test_a_step_is_a_function_of_the_step():
    stream, other = permuted(), pickle.loads(pickle.dumps(permuted()))
    steps = [5, 47, 0, 33]
    ahead = [stream.sample_at(0, step) for step in steps]
    back = [other.sample_at(0, step) for step in reversed(steps)]
    for one, two in zip(ahead, reversed(back), strict=True):
        for mine, theirs in zip(one[:2], two[:2], strict=True):
            assert all(map(torch.equal, mine.tensors, theirs.tensors))
    assert repr(stream) == repr(other)
    assert not torch.equal(
        ahead[0].query.tensors[0], permuted(seed=1).sample_at(0, 5).query.tensors[0]
    )


def test_stages_are_permuted_and_tested_alike():
    stream = permuted()
    inputs = [fields(stream.test(stage))["inputs"].flatten(1) for stage in range(3)]
    assert not torch.equal(inputs[0], inputs[1])
    torch.testing.assert_close(inputs[0].sort(1).values, inputs[1].sort(1).values)
    train = fields(stream.whole())["inputs"].flatten(1).sort(1).values
    tested = inputs[0].sort(1).values
    assert not (train[:, None] == tested).all(-1).any()


def test_classes_come_in_turn():
    stream = SplitImages("digits", classes_per_task=3, **{**SMALL, "per_task": 45})
    assert stream.num_stages == 3 and stream.num_classes == 3
    whole = fields(stream.whole())
    for stage in range(3):
        counts = whole["targets"][whole["stages"] == stage].bincount()
        assert counts.tolist() == [15] * 3
    assert fields(stream.test(1))["targets"].bincount().tolist() == [10] * 3


def test_alphabets_come_in_turn():
    stream = SplitGlyphs(("Thai", "Greek"), 5, per_task=50, num_test=25)
    assert (stream.num_stages, stream.num_classes) == (2, 5)
    assert fields(stream.whole())["inputs"].shape == (100, 1, 28, 28)
    test = fields(stream.test(1))
    assert test["targets"].bincount().tolist() == [5] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: permuted(batch=7), r"batch must be a divisor of 40 examples, got 7"),
        (lambda: permuted(memory=3), r"memory must be >= 4, got 3|memory must be an integer >= 4"),
        (lambda: permuted(kind="queue"), r"kind must be 'ring' or 'reservoir', got 'queue'"),
        (lambda: permuted(per_task=1000), r"num_tasks \* per_task must be <= 1797, .* got 3000"),
        (lambda: permuted().sample_at(0, 48), r"step must be from 0 to 47, got 48"),
        (
            lambda: SplitImages("digits", classes_per_task=11, per_task=11, num_test=11),
            r"<= the 10",
        ),
        (lambda: SplitImages("digits", per_task=41), r"per_task must be a multiple of classes_per"),
        (
            lambda: SplitImages("digits", per_task=900),
            r"per_task of a class must be <= 17., the im",
        ),
        (lambda: SplitGlyphs(("Runes",)), r"scripts must be some of Latin, .* got \('Runes',\)"),
        (lambda: SplitGlyphs(("Bengali",)), r"letters of Bengali with 35 renderings, got 20 and 0"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_of_ones_own():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 1, 2, 2), dtype=np.uint8)
    labels = np.arange(6) % 2
    stream = ImageStream([Stage(pixels, labels, pixels, labels)], batch=2, memory=2, semantic=1)
    assert stream.num_steps == 6
    assert stream.num_slots == 1
