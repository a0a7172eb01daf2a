"""`RayExecutor` without accidents: the same bytes as in one process, and every policy."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table, remove_placement_group

from metadist.algorithms import ITD
from metadist.cluster import (
    ASP,
    SSP,
    Buffered,
    LeaseError,
    RayExecutor,
    ResourcesError,
    StalenessWeight,
    Workers,
)
from metadist.cluster.actors.connection import _sigterm_kept, reserve
from metadist.compute import Compute
from metadist.evaluation import evaluate
from metadist.optimizer import OuterOptimizer
from metadist.step_rules import Adam
from tests.cluster.toy import (
    ADAM,
    Broken,
    FewLines,
    Flaky,
    Leaving,
    Lines,
    Moving,
    Regression,
    Slow,
    Steady,
    cpus_taken,
    first_state,
    local_run,
    make_workload,
    state_bytes,
)
from tests.helpers import becomes


@pytest.mark.parametrize(
    "num_workers", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))]
)
def test_bsp_gives_the_bytes_of_one_process(executor, num_workers):
    expected, expected_reports = local_run(5)
    # Two are the default, which the tests after this one go on with.
    running = executor(
        **({} if num_workers == 2 else {"workers": Workers(num_workers=num_workers)})
    )
    reports = list(running.run(5))
    assert state_bytes(running.state()) == state_bytes(expected)
    for mine, local in zip(reports, expected_reports, strict=True):
        assert mine.step == local.step
        assert [r[:5] for r in mine.results] == [r[:5] for r in local.results]
        assert mine.num_workers == num_workers
        assert (mine.lost_workers, mine.reissued) == (0, ())
        assert 0 <= mine.waiting_s <= num_workers * mine.seconds


@pytest.mark.parametrize(
    ("problem", "optimizer"),
    [
        (Regression(dtype=torch.float64), ADAM),
        (Regression(num_idle=300_000), OuterOptimizer("sgd", lr=0.1, clip_norm=0.1)),
    ],
)
def test_bsp_gives_the_same_bytes_in_double_precision_and_when_large(executor, problem, optimizer):
    workload = make_workload(problem=problem, tasks_per_lease=2)
    expected, _ = local_run(3, workload, optimizer)
    running = executor(workload, first_state(problem, optimizer), optimizer)
    list(running.run(3))
    assert state_bytes(running.state()) == state_bytes(expected)


def test_a_run_that_goes_on_gives_the_bytes_of_an_uninterrupted_one(executor):
    expected, _ = local_run(6)
    running = executor()
    for _ in itertools.islice(running.run(6), 2):
        pass  # and drop the rest, with leases in flight
    state = running.state()
    assert (state.version, state.applied_below, state.applied) == (2, 8, ())
    list(running.run(4))
    list(running.run(6))
    assert state_bytes(running.state()) == state_bytes(expected)
    running = executor(first=state)
    list(running.run(6))
    assert state_bytes(running.state()) == state_bytes(expected)
    assert all(torch.equal(running.state().outer[name], x) for name, x in expected.outer.items())


@pytest.mark.parametrize("carry", [False, True])
def test_adam_inside_and_its_carried_moments_give_the_same_bytes(executor, carry):
    steps = Adam(0.01, eps=1e-3, clip_norm=1.0, carry=carry)
    workload = dataclasses.replace(
        make_workload(),
        sampler=FewLines() if carry else Lines(),
        algorithm=ITD(3, inner_optimizer=steps),
        keep_state=carry,
    )
    expected, _ = local_run(3, workload)
    running = executor(workload)
    list(running.run(3))
    found = running.state()
    assert state_bytes(found) == state_bytes(expected)
    assert found.states.keys() == expected.states.keys() and len(found.states) == 4 * carry
    assert all(torch.equal(found.states[i], flat) for i, flat in expected.states.items())


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"prefetch": 0}, marks=pytest.mark.slow)],
    ids=["ahead", "one at a time"],
)
def test_a_lease_that_is_handed_out_ahead_changes_no_byte(executor, monkeypatch, options):
    running = executor(make_workload(Steady(), meta_batch_size=8), **options)
    pool = running._pool
    submit, at_once = pool.submit, []

    def note(*arguments):
        submit(*arguments)
        at_once.append(max(len(slot.calls) for slot in pool._slots))

    monkeypatch.setattr(pool, "submit", note)
    list(running.run(2))
    assert max(at_once) == (1 if options else 2)
    assert state_bytes(running.state()) == state_bytes(
        local_run(2, make_workload(meta_batch_size=8))[0]
    )


@pytest.mark.slow
def test_old_versions_of_x_are_let_go(executor):
    def num_references():
        gc.collect()
        worker: Any = ray._private.worker.global_worker
        return len(worker.core_worker.get_all_reference_counts())

    workload = make_workload(problem=Regression(num_idle=50_000))
    running = executor(workload)

    def all_ended():
        # A lease that went to two workers may still be computed by one of them.
        return running._pool.wait(0.0) == [] and all(s.item is None for s in running._pool._slots)

    list(running.run(5))
    assert becomes(lambda: all_ended() and num_references() < 15)
    before = num_references()
    list(running.run(45))
    assert becomes(lambda: all_ended() and num_references() <= before)


def test_starting_again_keeps_the_processes(executor):
    running = executor()
    pids = [info.pid for info in running._pool.infos]
    list(running.run(1))
    running.start(make_workload(), ADAM, first_state())
    list(running.run(2))
    assert state_bytes(running.state()) == state_bytes(local_run(2)[0])
    assert [info.pid for info in running._pool.infos] == pids


def test_an_error_in_user_code_that_passes_changes_no_byte(executor, tmp_path):
    running = executor(make_workload(Flaky(folder=str(tmp_path), index=9)))
    reports = list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(local_run(4)[0])
    retried = [error for report in reports for error in report.retried]
    assert len(retried) == 2 and sum(report.lost_workers for report in reports) == 0
    for error in retried:
        assert error.startswith("lease 9 (tasks 9) on worker-")
        assert error.endswith(": ConnectionError: the share is away")


def test_an_exit_in_user_code_is_an_error_and_no_loss(executor):
    running = executor(make_workload(Leaving(index=5)))
    with pytest.raises(LeaseError, match=r"sys.exit\(0\)") as caught:
        list(running.run(4))
    assert "with this error there, attempt 2" in str(caught.value)
    assert running.state().version == 1


def test_an_error_in_user_code_ends_the_run_with_its_traceback(executor):
    running = executor(make_workload(Broken(index=9)))
    reports = running.run(5)
    assert next(reports).step.version == 1
    with pytest.raises(LeaseError) as caught:
        list(reports)
    text = str(caught.value)
    assert "lease 9 (tasks 9) failed on worker-" in text
    assert "raise BrokenTaskError" in text and "no file for task 9" in text
    assert "\x1b[" not in text
    assert type(caught.value.__cause__).__name__ == "BrokenTaskError"
    # The steps before it are not lost.
    assert running.state().version == 2
    running.close()
    running.close()
    assert ray.is_initialized(), "a connection that it did not make"
    assert becomes(lambda: cpus_taken() == 0)
    with pytest.raises(RuntimeError, match="must be started"):
        running.state()


@pytest.mark.parametrize(
    ("options", "num_leases"),
    [
        pytest.param({"policy": Buffered(3)}, 48, marks=pytest.mark.slow),
        ({"policy": SSP(staleness=2)}, None),
        pytest.param({"policy": ASP(StalenessWeight("inverse"))}, 16, marks=pytest.mark.slow),
    ],
)
def test_asynchronous_policies_apply_each_lease_once(executor, tmp_path, options, num_leases):
    workload = make_workload(Slow(folder=str(tmp_path), seconds=0.3))
    running = executor(workload, **options)
    # The first lease of each worker is slow on all of them.
    reports = [*running.run(4), *running.run(16)]
    applied = [lease_id for report in reports for lease_id in report.step.applied]
    assert sorted(applied) == list(range(len(applied)))
    assert num_leases is None or len(applied) == num_leases
    assert [report.step.version for report in reports] == list(range(1, 17))
    assert all(report.step.repeated == () for report in reports)
    state = running.state()
    assert (state.version, state.applied_below, state.applied) == (16, len(applied), ())
    staleness = [tau for report in reports for tau in report.step.staleness]
    # How old they get is a matter of who is slow when; the bound is not.
    if isinstance(options["policy"], SSP):
        assert max(staleness) <= 2
    if isinstance(options["policy"], ASP):  # all workers began at the same version
        assert max(staleness) > 0
    assert running.describe()["policy"].startswith(str(options["policy"]).partition("(")[0])
    assert running.describe()["device"].startswith("2 x cpu on ")


def test_asynchronous_runs_go_on_from_any_state(executor):
    running = executor(policy=ASP(StalenessWeight("inverse")))
    for _ in itertools.islice(running.run(20), 5):
        pass
    state = running.state()
    reports = list(executor(first=state).run(state.version + 2))
    # Holes first, in the order of their numbers.
    applied = {*range(state.applied_below), *state.applied}
    free = (n for n in range(100) if n not in applied)
    assert [list(report.step.applied) for report in reports] == [
        [next(free) for _ in range(4)] for _ in reports
    ]


@pytest.mark.parametrize(
    ("workers", "device", "message"),
    [
        (
            {"num_workers": 5},
            "cpu",
            r"num_workers=5 must be free within start_timeout_s=1, got CPU: 5 needed \(1 each\), "
            r"4 in the cluster, 4 free: lower num_workers",
        ),
        (
            {"num_workers": 6, "min_workers": 5},
            "cpu",
            r"min_workers=5 must be free within .*lower min_w",
        ),
        ({"gpus_per_worker": 0.5}, "cpu", r"GPU: 0.5 each, got nodes with CPU: 4 and GPU: 0 "),
        ({}, "cuda", r"GPU: 1 each, got nodes with CPU: 4 and GPU: 0 "),
    ],
)
def test_too_few_resources_are_reported_in_time(executor, workers, device, message):
    workload = replace(make_workload(meta_batch_size=8), compute=Compute(device=device))
    with pytest.raises(ResourcesError, match=message):
        executor(workload, workers=Workers(**{"start_timeout_s": 1.0, **workers}))
    assert becomes(lambda: cpus_taken() == 0)


@pytest.mark.slow
def test_workers_join_when_their_resources_appear(free_cluster, executor):
    taken = reserve([{"CPU": 1.0}] * 3, timeout_s=60)
    try:
        running = executor(workers=Workers(num_workers=3, min_workers=1))
        assert running.describe()["num_workers"] == "1 to 3"
        reports = [*running.run(2)]
        assert {report.num_workers for report in reports} == {1}
        # What lacks is demand, as Ray's autoscaler sees it.
        states = [table["state"] for table in placement_group_table().values()]
        assert states.count("PENDING") == 2
    finally:
        remove_placement_group(taken)
    version = 2
    while reports[-1].num_workers < 3:
        version += 2
        reports += running.run(version)
        running._pool.wait(timeout_s=0.2)
    assert [report.step.version for report in reports] == list(range(1, version + 1))
    assert state_bytes(running.state()) == state_bytes(local_run(version)[0])
    assert {found.worker for report in reports[-2:] for found in report.results} > {"worker-0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, r"workers must be a Workers, such as Workers\(num_workers=4\), got 2"),
        ({"server": 2}, r"server must be a Server, such as Server\(num_shards=2\), got 2"),
        ({"policy": "ssp"}, r"policy must be a Policy, such as SSP\(staleness=2\), got 'ssp'"),
        ({"failures": 2}, r"failures must be a Failures, such as Failures\(max_losses=3\), got 2"),
        ({"backup_factor": 0.5}, "backup_factor must be >= 1 and finite or None .* got 0.5"),
        ({"prefetch": -1}, "prefetch must be >= 0, got -1"),
    ],
)
def test_errors_name_field_rule_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**options)


def test_workers_that_would_never_work_are_refused():
    with pytest.raises(ValueError, match=r"num_workers must be <= 4 with policy='bsp'.* got 5"):
        RayExecutor(Workers(num_workers=5)).start(make_workload(), ADAM, first_state())


def test_before_the_start_there_is_nothing_to_run():
    with pytest.raises(RuntimeError, match="must be started"):
        RayExecutor().run(1)


def test_a_workload_that_cannot_be_pickled_is_reported():
    sampler = Lines()
    object.__setattr__(sampler, "lock", threading.Lock())
    with pytest.raises(RuntimeError, match="problem, sampler and algorithm must be picklable"):
        RayExecutor().start(make_workload(sampler), ADAM, first_state())


def test_ray_does_not_take_the_handler_of_sigterm_away():
    """Its own would end a run without a checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with _sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stream_on_workers_has_the_bytes_of_one_process(executor):
    work = make_workload(Moving())
    expected, _ = local_run(4, work)
    running = executor(work)
    list(running.run(4))
    assert state_bytes(running.state()) == state_bytes(expected)
    assert state_bytes(expected) != state_bytes(local_run(4)[0])
    # Validation has the data of the step it is told.
    found = evaluate(
        work.problem, Moving(), work.algorithm, expected.outer, 6, executor=running, step=3
    )
    there = evaluate(work.problem, Moving(), work.algorithm, expected.outer, 6, step=3)
    assert found.metrics["query_loss"].mean == pytest.approx(there.metrics["query_loss"].mean)
