"""Every algorithm through the `Trainer`: the loss falls, and a run goes on where it stopped."""

import pytest

from metadist.algorithms import ALGORITHMS
from tests.algorithms.directions import MODES, NEW_TASKS, DirectionSampler, assert_resumes, trainer

of_each = pytest.mark.parametrize("name", ALGORITHMS)
KEPT = [name for name, cls in ALGORITHMS.items() if cls.trains != "start"]


def loss(training):
    return training.test(DirectionSampler(), 20).metrics["query_loss"].mean


@of_each
def test_it_trains_on_new_tasks(name):
    training = trainer(NEW_TASKS[name], batch_size=None)
    before = loss(training)
    training.fit(18)
    assert loss(training) < 0.6 * before


@pytest.mark.parametrize("name", KEPT)
def test_it_trains_on_tasks_whose_state_is_kept(name):
    training = trainer(NEW_TASKS[name], keep_state=True, batch_size=None)
    before = loss(training)
    training.fit(18)
    assert loss(training) < 0.6 * before


@pytest.mark.parametrize(("name", "keep_state"), MODES)
def test_it_resumes_bit_for_bit(name, keep_state, tmp_path):
    assert_resumes(NEW_TASKS[name], keep_state, tmp_path / "run")
