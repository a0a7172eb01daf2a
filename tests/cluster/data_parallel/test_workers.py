"""`DataParallelExecutor` on real workers: the same numbers, deaths, slow workers, errors."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from metadist import LocalExecutor
from metadist.algorithms import AID, SOBA
from metadist.cluster import (
    DataParallelExecutor,
    Failures,
    LeaseError,
    ResourcesError,
    WorkerLostError,
    Workers,
)
from metadist.optimizer import OuterOptimizer
from metadist.tasks import FixedTasks
from tests.cluster.data_parallel.shards import (
    Cleaning,
    InProcess,
    PreciseText,
    Unequal,
    Whole,
    assert_same_state,
    bytes_of,
    cleaning,
    solve,
)
from tests.cluster.data_parallel.test_executor import ALL
from tests.cluster.data_parallel.test_local_statistics import Normed
from tests.cluster.toy import cpus_taken, happens_first
from tests.helpers import becomes
from tests.problems import Quadratic, quadratic_task, true_hypergradient
from tests.tasks.text.test_text import sparse_task

PART_1 = 5
"""A position of the support set that shard 1 of three holds."""


class Lasting(DataParallelExecutor):
    """Keeps its processes from one run to the next."""

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[Callable[..., Lasting]]:
    """Executors of three workers by their options; the processes of the last are kept."""
    last: list[tuple[dict[str, Any], Lasting]] = []

    def start(**options: Any) -> Lasting:
        if last and last[0][0] != options:
            last.pop()[1].end()
        if not last:
            # Half a CPU each: other modules' workers may still be there.
            three = Workers(num_workers=3, cpus_per_worker=0.5, start_timeout_s=600.0)
            last.append((options, Lasting(three, **options)))
        return last[0][1]

    yield start
    for _, executor in last:
        executor.end()


class Armed(Cleaning):
    """Behaves as usual until the file `armed` appears; then `strike` on shard 1, in a gradient."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def inner_loss(self, context, inner, batch):
        if (Path(self.folder) / "armed").exists() and bool((batch.index == PART_1).any()):
            self.strike()
        return super().inner_loss(context, inner, batch)

    @abstractmethod
    def strike(self) -> None: ...


def arm(folder: Path) -> None:
    (folder / "armed").touch()


class Dying(Armed):
    def strike(self) -> None:
        if happens_first(self.folder, "struck"):
            os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Armed):
    def strike(self) -> None:
        if happens_first(self.folder, "struck"):
            time.sleep(600)


class Raising(Armed):
    def strike(self) -> None:
        raise ZeroDivisionError("nothing left to divide by")


class Waiting(Armed):
    def strike(self) -> None:
        (Path(self.folder) / "waiting").touch()
        while (Path(self.folder) / "armed").exists():
            time.sleep(0.01)


@pytest.mark.parametrize("name", ["soba", "aid", "lancbio", "bome", "saba"])
def test_workers_are_one_process(workers, name):
    executor = workers()
    found, reports = solve(executor, ALL[name], batch_size=4)
    assert_same_state(found, solve(LocalExecutor(), ALL[name], batch_size=4)[0])
    same, expected = solve(InProcess(3), ALL[name], batch_size=4)
    assert bytes_of(found) == bytes_of(same)
    for mine, theirs in zip(reports, expected, strict=True):
        for metric in ("rounds", "bytes_sent", "bytes_received"):
            assert mine.results[0].metrics[metric] == theirs.results[0].metrics[metric]
        assert mine.num_workers == 3 and mine.lost_workers == 0


def test_each_worker_normalises_its_own_part_of_a_batch(workers):
    given: dict[str, Any] = {"problem": Normed(40), "sampler": Whole(40, 30), "batch_size": 9}
    found, _ = solve(workers(batch_statistics="local"), ALL["soba"], **given)
    same, _ = solve(InProcess(3, batch_statistics="local"), ALL["soba"], **given)
    assert bytes_of(found) == bytes_of(same)


@pytest.mark.parametrize("name", [pytest.param("soba", marks=pytest.mark.slow), "aid"])
def test_sparse_rows_in_shards_are_the_whole_set_in_one_process(workers, name):
    given: dict[str, Any] = {"problem": PreciseText(), "sampler": FixedTasks([sparse_task()[0]])}
    found, _ = solve(workers(), ALL[name], **given)
    expected, _ = solve(LocalExecutor(), ALL[name], **given)
    assert found.outer["log_strengths"].dtype == torch.float64
    assert float(found.states[0].abs().max()) > 0.01
    assert_same_state(found, expected)


@pytest.mark.parametrize("problem", [Dying, pytest.param(Hanging, marks=pytest.mark.slow)])
def test_a_worker_that_dies_or_hangs_in_a_round_changes_no_byte(workers, tmp_path, problem):
    options = {"failures": Failures(timeout_s=5.0, max_losses=50)} if problem is Hanging else {}
    expected, _ = solve(InProcess(3), ALL["fsla"], 4, batch_size=8)
    executor = workers(**options)
    solve(executor, ALL["fsla"], 1, problem=problem(tmp_path), batch_size=8)
    reports = executor.run(4)
    arm(tmp_path)
    rest = list(reports)
    assert (tmp_path / "struck").exists()
    assert bytes_of(executor.state()) == bytes_of(expected)
    assert sum(report.lost_workers for report in rest) >= 1


@pytest.mark.slow
def test_a_worker_that_is_killed_between_rounds_changes_no_byte(workers):
    expected, _ = solve(InProcess(3), ALL["aid"], 3)
    executor = workers()
    solve(executor, ALL["aid"], 1)
    reports = executor.run(3)
    next(reports)
    for info in executor._pool.infos[:2]:
        os.kill(info.pid, signal.SIGKILL)
    (last,) = reports
    assert bytes_of(executor.state()) == bytes_of(expected)
    assert last.lost_workers == 2 and last.num_workers == 3


def test_an_error_of_the_problem_ends_the_run_with_its_traceback(workers, tmp_path):
    executor = workers()
    solve(executor, SOBA(), 1, problem=Raising(tmp_path))
    arm(tmp_path)
    with pytest.raises(LeaseError, match=r"shard 1 failed on worker-1, with this") as caught:
        list(executor.run(3))
    assert "nothing left to divide by" in str(caught.value) and "in strike" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert executor.state().version == 1


def test_one_slow_worker_holds_up_the_others_after_so_many_steps(workers, tmp_path):
    executor = workers(staleness=2)
    options: dict[str, Any] = {"problem": Waiting(tmp_path), "report_every": 100}
    solve(executor, SOBA(), 1, **options)
    reports = executor.run(7)
    next(reports)
    armed = tmp_path / "armed"
    arm(tmp_path)
    ages = []
    for _ in range(2):
        next(reports)
        ages.append(executor._pool.oldest)
    assert armed.exists() and becomes((tmp_path / "waiting").exists)
    assert ages == [1, 2]
    timer = threading.Timer(1.0, armed.unlink)
    timer.start()
    for report in reports:
        # Without its answer no step could be taken.
        assert not armed.exists()
        ages.append(executor._pool.oldest)
        assert report.num_workers == 3
    timer.join()
    assert len(ages) == 5 and max(ages) == 2
    fresh, _ = solve(InProcess(3), SOBA(), 2)
    assert not torch.equal(executor.state().outer["weights"], fresh.outer["weights"])


class Uneven(Quadratic):
    """One worker takes longer than the others."""

    def inner_loss(self, context, inner, batch):
        if batch.index[0] == 0:
            time.sleep(0.02)
        return super().inner_loss(context, inner, batch)


@pytest.mark.slow
def test_stale_answers_still_lead_to_the_solution(workers):
    task = quadratic_task(0, num_support=6, num_query=6)
    problem = Uneven(2, 4, rho=1.0)
    options: dict[str, Any] = {
        "problem": problem,
        "sampler": FixedTasks([task]),
        "optimizer": OuterOptimizer("sgd", lr=0.02),
        "report_every": 1000,
    }
    executor = workers(staleness=2)
    oldest = []
    algorithm = SOBA(inner_lr=0.15, adjoint_lr=0.15)
    first, _ = solve(executor, algorithm, 1, **options)
    for _ in executor.run(500):
        oldest.append(executor._pool.oldest)
    before, after = (
        float(true_hypergradient(problem, outer, task).norm())
        for outer in (first.outer, executor.state().outer)
    )
    assert after < 1e-2 * before
    assert 0 < max(oldest) <= 2


@pytest.mark.slow
def test_a_trainer_runs_it_and_closes_it(workers, tmp_path):
    workers().end()
    before = cpus_taken()
    executor = DataParallelExecutor(
        Workers(num_workers=2, cpus_per_worker=0.5, start_timeout_s=600.0)
    )
    training = cleaning(AID(3, 0.2), executor, run_dir=tmp_path / "run", log_every=1)
    training.fit(2)
    assert becomes(lambda: cpus_taken() <= before)
    local = cleaning(AID(3, 0.2), LocalExecutor())
    local.fit(2)
    for name, leaf in local.outer.items():
        torch.testing.assert_close(training.outer[name], leaf, rtol=1e-10, atol=1e-10)
    settings = training.settings()
    assert settings["executor"] == "data_parallel" and settings["num_workers"] == "2"


class Parts(Unequal):
    """Nobody can hold all of it."""

    def sample(self, index):
        raise MemoryError("more than there is")

    def shard(self, index, part, num_parts):
        return Unequal().shard(index, part, num_parts)


def test_no_machine_needs_to_hold_all_data(workers, tmp_path):
    training = cleaning(AID(3, 0.2), workers(), sampler=Parts(), run_dir=tmp_path / "run")
    training.fit(2)
    local = cleaning(AID(3, 0.2), LocalExecutor())
    local.fit(2)
    for name, leaf in local.outer.items():
        torch.testing.assert_close(training.outer[name], leaf, rtol=1e-10, atol=1e-10)


class Fatal(Unequal):
    def shard(self, index, part, num_parts):
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().shard(index, part, num_parts)


class Missing(Unequal):
    def shard(self, index, part, num_parts):
        raise FileNotFoundError("no such part")


class Changing(Unequal):
    """Gives another shard to the process that replaces a lost one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def shard(self, index, part, num_parts):
        first = happens_first(self.folder, f"part-{part}")
        return super().shard(index, part if first else (part + 1) % num_parts, num_parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (Fatal(), WorkerLostError, r"worker-1 was lost 2 times in a row without an answer, max_lo"),
        (Missing(), LeaseError, r"shard \d failed on worker-\d(.|\n)*no such part"),
    ],
    ids=["fatal", "missing"],
)
def test_data_that_cannot_be_read_ends_the_start(ray_session, sampler, error, message):
    executor = DataParallelExecutor(
        Workers(num_workers=2, cpus_per_worker=0.5, start_timeout_s=600.0),
        failures=Failures(max_losses=2),
    )
    with pytest.raises(error, match=message):
        solve(executor, SOBA(), sampler=sampler)
    assert executor._pool is None


@pytest.mark.slow
def test_a_shard_that_changes_is_noticed(workers, tmp_path):
    executor = workers()
    solve(executor, SOBA(), 1, sampler=Changing(tmp_path))
    os.kill(executor._pool.infos[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"shard 1 must hold the same examples whenever it is r"):
        list(executor.run(3))


def test_too_few_resources_are_told(ray_session):
    executor = DataParallelExecutor(Workers(num_workers=2, cpus_per_worker=64, start_timeout_s=0.5))
    with pytest.raises(ResourcesError, match=r"num_workers=2 must have nodes with CPU: 64"):
        solve(executor, SOBA())
    assert ray.is_initialized()
