"""Oracle calls are counted on every way, and a training may be watched, saved and ended."""

from __future__ import annotations

import pytest
import torch

from metadist import task_hypergradients
from metadist.algorithms import ITD, MRBO, SOBA
from metadist.run.storage import Folder
from metadist.trees import Params
from tests.helpers import (
    exact_state,
    last_state,
    latest_scalars,
    make_trainer,
    store_of,
    with_compute,
)
from tests.problems import Quadratic, generator, quadratic_task

TASKS = [quadratic_task(index) for index in range(5)]


def calls(algorithm, tasks=TASKS, **options):
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    return task_hypergradients(problem, algorithm, outer, tasks, **with_compute(options)).calls


@pytest.mark.parametrize("options", [{"vectorize": False}, {"vectorize": True, "chunk_size": 2}])
@pytest.mark.parametrize("report", [False, True])
def test_calls_are_those_of_each_task_summed(options, report):
    expected = {"inner_grad": 15, "outer_grads": 5, "hvp": 15, "jvp": 15}
    assert calls(ITD(inner_steps=3, inner_lr=0.1), report=report, **options) == expected


def test_engines_that_differentiate_themselves_ask_for_values():
    found = calls(ITD(inner_steps=3, inner_lr=0.1, engine="unrolled"))
    assert found == {"inner_value": 15, "outer_value": 5}


def test_both_points_of_a_two_point_method_count():
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    one = calls(MRBO(1, 0.1, adjoint_steps=2))
    assert calls(MRBO(1, 0.1, adjoint_steps=2), previous=outer) == {
        name: 2 * count for name, count in one.items()
    }


def test_what_was_computed_in_vain_counts():
    broken = quadratic_task(7)
    broken.query.tensors[0].fill_(torch.nan)
    # Once together, then one by one to find the culprit.
    found = calls(ITD(inner_steps=1), [TASKS[0], broken], vectorize=True)
    assert found["inner_grad"] == 4


def test_a_training_reports_its_calls(tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", log_every=2)
    result = trainer.fit(3)
    assert result.calls == {"inner_grad": 24, "outer_grads": 12, "hvp": 24, "jvp": 24}
    scalars = latest_scalars(Folder(tmp_path / "run") / "tensorboard")
    # Of one outer step of four tasks with two inner steps each.
    assert (scalars["oracle/hvp"].value, scalars["oracle/hvp"].step) == (8.0, 2)
    assert trainer.fit(4).calls["outer_grads"] == 4


def test_kept_states_count_too():
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    found = task_hypergradients(problem, SOBA(1, 0.1), outer, TASKS[:2], states={})
    assert found.calls == {"inner_grad": 2, "outer_grads": 2, "hvp": 2, "jvp": 2}


def test_on_step_ends_a_training_as_num_steps_does(tmp_path):
    seen = []

    def watch(report):
        seen.append(report.step.version)
        return len(seen) < 3

    stopped = make_trainer(run_dir=tmp_path / "stopped")
    result = stopped.fit(100, watch)
    assert seen == [1, 2, 3] and result.num_steps == stopped.version == 3
    whole = make_trainer(run_dir=tmp_path / "whole")
    whole.fit(3)
    assert exact_state(stopped) == exact_state(whole)
    assert store_of(tmp_path / "stopped").load()[0] == "step-00000003"
    # And it goes on as if nothing had happened.
    stopped.fit(5)
    whole.fit(5)
    assert last_state(tmp_path / "stopped") == last_state(tmp_path / "whole")


def test_save_within_on_step_is_of_that_step(tmp_path):
    outers: dict[int, Params] = {}

    def watch(report):
        if report.step.version % 2 == 0:
            assert trainer.save() == report.step.version
            outers[trainer.version] = trainer.outer
        return True

    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.fit(5, watch)
    store = store_of(tmp_path / "run")
    assert list(outers) == [2, 4]
    for step, outer in outers.items():
        saved = store.load(f"step-{step:08d}")[1].state.outer
        assert all(torch.equal(saved[name], leaf) for name, leaf in outer.items())
    plain = make_trainer(run_dir=tmp_path / "plain")
    plain.fit(5)
    assert exact_state(trainer) == exact_state(plain)
