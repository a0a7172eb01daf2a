"""Evaluation on the workers: the metrics of one process to the last bit, whatever happens."""

from __future__ import annotations

import itertools
import signal
import threading

import pytest

from metadist import evaluate
from metadist.algorithms import ITD
from metadist.cluster import ASP, LeaseError, RayExecutor, Workers
from metadist.compute import Compute
from metadist.models import MLP
from metadist.run.storage import Folder
from metadist.tasks import FewShotProblem, Sinusoid
from tests.algorithms.directions import NEW_TASKS, DirectionSampler, trainer
from tests.cluster.toy import (
    Broken,
    Deadly,
    Flaky,
    Lines,
    OneStep,
    Regression,
    Waiting,
    cpus_taken,
    first_state,
    local_run,
    state_bytes,
)
from tests.helpers import becomes, read_events
from tests.problems import generator

THREE = Compute(device="cpu", chunk_size=3)
OUTER = first_state().outer


def toy(sampler, executor=None, outer=OUTER):
    return evaluate(Regression(), sampler, OneStep(), outer, 11, compute=THREE, executor=executor)


def test_workers_find_the_metrics_of_one_process_and_leave_the_training_alone(executor, tmp_path):
    expected = toy(Lines())
    problem = FewShotProblem(MLP(hidden=(20,)), adapt="all", loss="mse")
    outer = problem.init_outer(generator(0))

    def sinusoid(executor=None):
        task = (problem, Sinusoid(), ITD(inner_steps=3, inner_lr=0.01), outer, 30)
        return evaluate(*task, compute=Compute(device="cpu"), executor=executor)

    lost = []
    running = executor()
    running.notify = lambda event, **fields: lost.append((event, fields["num_lost"]))
    reports = running.run(4)
    for _ in itertools.islice(reports, 2):
        pass
    # With leases of the training in flight.
    assert toy(Lines(), running) == toy(Lines(), running) == expected
    assert sinusoid(running) == sinusoid()
    assert lost == []
    assert toy(Deadly(indices=(4,), folder=str(tmp_path)), running).metrics == expected.metrics
    assert lost == [("worker_lost", 1)]
    list(reports)
    assert state_bytes(running.state()) == state_bytes(local_run(4)[0])
    assert toy(Lines(), running) == expected


def test_errors_of_a_sampler_are_tried_again_and_end_as_in_training(executor, tmp_path):
    running = executor()
    events = []
    running.notify = lambda event, **fields: events.append((event, fields))
    found = toy(Flaky(folder=str(tmp_path), index=5), running)
    assert found.metrics == toy(Lines()).metrics
    ((event, fields),) = events
    assert event == "user_error" and len(fields["errors"]) == 2
    assert "tasks 3 to 5 of an evaluation on worker-" in fields["errors"][0]
    with pytest.raises(LeaseError, match=r"tasks 6 to 8 of an evaluation failed on worker-\d"):
        toy(Broken(index=7), running)
    assert toy(Lines(), running) == toy(Lines())


def test_an_interrupt_ends_an_evaluation_and_the_training_can_go_on(executor, tmp_path):
    gate = tmp_path / "gate"
    running = executor()
    reports = running.run(3)
    next(reports)
    signal.signal(signal.SIGALRM, signal.default_int_handler)

    def interrupt():
        assert becomes((tmp_path / "gate.waiting").exists)
        signal.raise_signal(signal.SIGALRM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        toy(Waiting(index=10, gate=str(gate)), running)
    gate.touch()
    list(reports)
    assert state_bytes(running.state()) == state_bytes(local_run(3)[0])


def test_a_validation_scores_the_x_of_its_step_while_workers_are_ahead(free_cluster, tmp_path):
    training = trainer(
        NEW_TASKS["itd"],
        executor=RayExecutor(Workers(start_timeout_s=600.0), policy=ASP()),
        val_sampler=DirectionSampler(),
        val_every=3,
        val_tasks=7,
        keep_checkpoints=9,
        run_dir=tmp_path / "run",
    )
    training.fit(6)
    assert becomes(lambda: cpus_taken() == 0)

    def local():
        task = (training.problem, DirectionSampler(), training.algorithm, training.outer, 7)
        return evaluate(*task, compute=training.workload.compute)

    # With workers of its own, which end with it.
    assert training.test(DirectionSampler(), 7) == local()
    assert becomes(lambda: cpus_taken() == 0)
    events = read_events(Folder(tmp_path / "run"))
    scored = [event for event in events if event.get("score") is not None]
    assert [event["step"] for event in scored] == [3, 6]
    for event in scored:
        training.restore(event["checkpoint"])
        assert event["score"] == local().score
