"""Every algorithm through the `Trainer`: the loss falls, and a run goes on where it stopped."""

import pytest

from metadist.algorithms import ALGORITHMS
from metadist.trees import flatten
from tests.algorithms.directions import MODES, NEW_TASKS, DirectionSampler, trainer
from tests.problems import assert_same_bytes

of_each = pytest.mark.parametrize("name", ALGORITHMS)
KEPT = [name for name, cls in ALGORITHMS.items() if cls.trains != "start"]


def loss(training):
    return training.test(DirectionSampler(), 20).metrics["query_loss"].mean


@of_each
def test_it_trains_on_new_tasks(name):
    training = trainer(NEW_TASKS[name], batch_size=None)
    before = loss(training)
    training.fit(30)
    assert loss(training) < 0.6 * before


@pytest.mark.parametrize("name", KEPT)
def test_it_trains_on_tasks_whose_state_is_kept(name):
    training = trainer(NEW_TASKS[name], keep_state=True, batch_size=None)
    before = loss(training)
    training.fit(30)
    assert loss(training) < 0.6 * before


@pytest.mark.parametrize(("name", "keep_state"), MODES)
def test_it_resumes_bit_for_bit(name, keep_state, tmp_path):
    algorithm = NEW_TASKS[name]
    whole = trainer(algorithm, keep_state)
    whole.fit(5)
    half = trainer(algorithm, keep_state, run_dir=tmp_path / "run")
    half.fit(3)
    again = trainer(algorithm, keep_state, run_dir=tmp_path / "run")
    again.restore()
    again.fit(5)
    assert_same_bytes(again.outer, whole.outer)
    assert bool(flatten(whole.outer).isfinite().all())
    if keep_state:
        for index in range(2):
            assert_same_bytes(again.inner(index), whole.inner(index))
