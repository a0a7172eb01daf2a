"""`LocalExecutor`: plain training, the same every time, and exact after an interruption."""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch

from metadist import retry
from metadist.algorithms import ITD
from metadist.compute import Compute
from metadist.evaluation import evaluate
from metadist.executor import LocalExecutor
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterVariable
from metadist.workload import Workload
from tests.helpers import with_compute
from tests.problems import Quadratic, QuadraticSampler, assert_close, assert_same_bytes, generator

ADAM = OuterOptimizer("adam", lr=0.1, clip_norm=1.0, schedule="cosine", schedule_steps=8)


def workload(**options):
    options = {"meta_batch_size": 4, "report_every": 2, "batch_size": 2, "seed": 1, **options}
    sampler = QuadraticSampler(broken=(2, 9))
    return Workload(Quadratic(2, 4), sampler, ITD(inner_steps=3), **with_compute(options))


def started(work, optimizer=ADAM, state=None, **options):
    executor = LocalExecutor(**options)
    if state is None:
        outer = work.problem.init_outer(generator(0))
        state = OuterVariable(outer, optimizer).state()
    executor.start(work, optimizer, state)
    return executor


def test_two_runs_are_the_same_bytes_and_leases_of_any_size_agree():
    def train(tasks_per_lease):
        executor = started(workload(tasks_per_lease=tasks_per_lease))
        list(executor.run(3))
        return executor.state().outer

    trained = train(2)
    assert_same_bytes(train(2), trained)
    for tasks_per_lease in (1, 4):
        assert_close(train(tasks_per_lease), trained, 1e-12)


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_training_continues_from_a_state_bit_for_bit(stop):
    work = workload(tasks_per_lease=2)
    whole = started(work)
    reports = list(whole.run(6))
    first = started(work)
    begun = list(first.run(stop))
    resumed = started(work, state=first.state())
    continued = list(resumed.run(6))
    assert_same_bytes(resumed.state().outer, whole.state().outer)
    assert_same_bytes(resumed.state().optimizer, whole.state().optimizer)
    assert resumed.state()[2:5] == whole.state()[2:5] == (6, 12, ())
    assert [report.step for report in begun + continued] == [report.step for report in reports]


def test_leases_that_are_in_already_are_not_computed_again():
    work = workload(tasks_per_lease=2)
    variable = OuterVariable(work.problem.init_outer(generator(0)), ADAM)
    state = variable.state()._replace(applied_below=1, applied=(2, 3), version=2)
    (report,) = started(work, state=state).run(3)
    assert report.step.applied == (1, 4)
    assert [result.lease_id for result in report.results] == [1, 4]


def test_a_report_tells_of_the_step():
    executor = started(workload())
    reports = list(executor.run(3))
    assert [report.step.version for report in reports] == [1, 2, 3]
    assert [report.step.lr for report in reports] == [ADAM.lr_at(n) for n in range(3)]
    assert [bool(report.results[0].metrics) for report in reports] == [True, True, False]
    assert [sum(result.num_tasks for result in report.results) for report in reports] == [3, 4, 3]
    dropped = [[i for result in report.results for i in result.dropped] for report in reports]
    assert dropped == [[2], [], [9]]
    for report in reports:
        assert [result.worker for result in report.results] == ["local"] * 4
        assert (report.num_workers, report.lost_workers, report.reissued) == (1, 0, ())
        assert report.step.staleness == (0,) * 4
        assert report.seconds >= report.waiting_s >= 0
    assert executor.describe() == {
        "executor": "local",
        "policy": "bsp",
        "device": "cpu",
        "precision": "highest",
    }


def test_run_stops_at_the_version_and_goes_on_where_it_stopped():
    executor = started(workload())
    assert len(list(executor.run(2))) == 2
    assert list(executor.run(2)) == []
    assert len(list(executor.run(5))) == 3


def test_what_an_executor_gives_out_is_a_copy():
    executor = started(workload())
    executor.state().outer["x"].zero_()
    assert bool(executor.state().outer["x"].all())


@pytest.mark.parametrize("use", ["run", "state"])
def test_an_executor_must_be_started(use):
    arguments = (1,) if use == "run" else ()
    executor = LocalExecutor()
    with pytest.raises(RuntimeError, match=r"must be started with start\(...\) before it is used"):
        list(getattr(executor, use)(*arguments))
    executor = started(workload())
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="must be started"):
        list(getattr(executor, use)(*arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_executor_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'auto' where torch sees no GPU"):
        started(workload(compute=Compute(device="cuda")))


class Flaky(QuadraticSampler):
    """Raises `errors` one after another when task 5 is drawn, and then no more."""

    def __init__(self, *errors):
        super().__init__(broken=(2, 9))
        self.errors = list(errors)

    def sample(self, index):
        if index == 5 and self.errors:
            raise self.errors.pop(0)
        return super().sample(index)


def away():
    return TimeoutError("the share is away")


@pytest.mark.parametrize("errors", [(away(), away(), away()), (away(), KeyError("k"), away())])
def test_an_error_of_user_code_that_passes_changes_no_byte(errors, caplog):
    executor = started(replace(workload(), sampler=Flaky(*errors)), backoff_s=0.0)
    reports = list(executor.run(3))
    whole = started(workload())
    list(whole.run(3))
    assert_same_bytes(executor.state().outer, whole.state().outer)
    assert [len(report.retried) for report in reports] == [0, 3, 0]
    assert reports[1].retried[0] == "lease 5 (tasks 5): TimeoutError: the share is away"
    assert "lease 5 (tasks 5) raised and is tried again" in caplog.text
    assert "in sample" in caplog.text  # with its traceback


@pytest.mark.parametrize(
    ("errors", "num_tries", "options"),
    [
        ([KeyError("k")] * 9, 2, {}),
        ([FileNotFoundError("f")] * 9, 2, {}),
        ([TimeoutError("t")] * 9, 4, {}),
        ([TimeoutError("t")] * 9, 1, {"max_user_errors": 0}),
        ([SystemExit(0)] * 9, 1, {}),
        ([KeyboardInterrupt()] * 9, 1, {}),
    ],
)
def test_an_error_of_user_code_that_stays_is_raised_as_it_is(errors, num_tries, options):
    sampler = Flaky(*errors)
    executor = started(replace(workload(), sampler=sampler), backoff_s=0.0, **options)
    with pytest.raises(type(errors[0])) as caught:
        list(executor.run(3))
    assert caught.value is errors[0] and len(sampler.errors) == 9 - num_tries
    assert executor.state().version == 1


def test_an_evaluation_is_tried_again_too():
    whole, flaky = QuadraticSampler(broken=(2, 9)), Flaky(away(), away())
    problem, algorithm = Quadratic(2, 4), ITD(inner_steps=1, inner_lr=0.1)
    outer = problem.init_outer(generator(0))
    events = []
    executor = LocalExecutor(backoff_s=0.0)
    executor.notify = lambda event, **fields: events.append((event, fields))  # type: ignore[method-assign]

    def judged(sampler, **options):
        return evaluate(problem, sampler, algorithm, outer, 8, **options).metrics

    assert judged(flaky, executor=executor) == judged(whole)
    error = "tasks 0 to 7 of an evaluation: TimeoutError: the share is away"
    assert events == [("user_error", {"errors": [error] * 2})]

    errors = [KeyError("k")] * 9
    sampler = Flaky(*errors)
    with pytest.raises(KeyError):
        judged(sampler, executor=executor)
    assert len(sampler.errors) == 7
    with pytest.raises(KeyError):
        judged(Flaky(KeyError("k")), executor=LocalExecutor(max_user_errors=0))


@pytest.mark.parametrize("field", ["max_user_errors", "backoff_s"])
def test_options_of_the_local_executor_are_checked(field):
    with pytest.raises(ValueError, match=f"{field} must be >= 0, got -1"):
        LocalExecutor(**{field: -1})


def test_a_lease_that_may_hang_is_reported_once_while_it_runs(monkeypatch, caplog):
    monkeypatch.setattr(retry, "LOOK_S", 0.001)
    monkeypatch.setattr(retry, "FIRST_SLOW_S", math.inf)
    monkeypatch.setattr(retry, "MIN_SLOW_S", 0.0)
    was_reported = threading.Event()

    class Hanging(QuadraticSampler):
        def sample(self, index):
            task = super().sample(index)
            if index == 5:
                assert was_reported.wait(60)
                time.sleep(0.05)
            return task

    events = []

    def notify(event, **fields):
        events.append((event, fields))
        if fields["leases"] == ["lease 5 (tasks 5)"]:
            was_reported.set()

    executor = started(replace(workload(), sampler=Hanging()))
    executor.notify = notify
    list(executor.run(2))
    (slow,) = [fields for _, fields in events if "lease 5 (tasks 5)" in fields["leases"]]
    assert slow["worker"] == "local" and slow["seconds"] >= 10 * slow["median_s"] > 0
    assert {event for event, _ in events} == {"lease_slow"}
    assert "lease 5 (tasks 5) takes" in caplog.text and "it may hang" in caplog.text


def test_the_watchdog_ends_with_the_run():
    reports = started(workload()).run(3)
    next(reports)
    (watchdog,) = [t for t in threading.enumerate() if t.name == "metadist-watchdog"]
    reports.close()
    watchdog.join(60)
    assert not watchdog.is_alive()
