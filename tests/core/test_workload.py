"""Leases: which tasks they hold, how one is computed, and what a workload refuses."""

import dataclasses
import pickle

import pytest
import torch

from metadist.algorithms import ITD
from metadist.compute import Compute, intra_op_threads, pick_device
from metadist.hypergradient import task_hypergradients
from metadist.trees import flatten
from metadist.workload import Workload
from tests.helpers import with_compute
from tests.problems import Quadratic, QuadraticSampler, generator, quadratic_task


def workload(**options):
    options = {"meta_batch_size": 6, "tasks_per_lease": 2, "report_every": 3, **options}
    return Workload(
        Quadratic(2, 4), QuadraticSampler(broken=(5,)), ITD(inner_steps=2), **with_compute(options)
    )


def test_leases_cut_the_stream_of_tasks_without_gap_or_overlap():
    work = workload()
    assert work.leases_per_step == 3
    indices = [index for number in range(20) for index in work.lease(number, 0).indices]
    assert indices == list(range(40))
    assert work.lease(4, 2) == (4, 2, (8, 9), False)


def test_all_leases_of_the_first_and_of_every_third_step_report():
    work = workload(report_every=3)
    reporting = [number for number in range(18) if work.lease(number, 0).report]
    assert reporting == [0, 1, 2, 6, 7, 8, 15, 16, 17]
    assert all(workload(report_every=1).lease(number, 0).report for number in range(9))


@pytest.mark.parametrize("number", [0, 2])
def test_a_lease_is_the_sum_over_its_tasks(number):
    work = workload(report_every=1, seed=3, batch_size=2)
    outer = work.problem.init_outer(generator(0))
    result, flat, *_ = work.compute_lease(work.lease(number, 4), outer)
    tasks = [QuadraticSampler((5,)).sample(index) for index in (2 * number, 2 * number + 1)]
    expected = task_hypergradients(
        work.problem,
        work.algorithm,
        outer,
        tasks,
        compute=Compute(batch_size=2, seed=3),
        report=True,
        step=4,
    )
    assert torch.equal(flat, flatten(expected.total))
    assert (result.lease_id, result.version) == (number, 4)
    assert result.num_tasks == expected.num_tasks
    assert result.dropped == ((5,) if number == 2 else ())
    assert result.metrics == expected.metrics != {}
    assert result.sampling_s >= 0 and result.compute_s >= 0


def test_a_lease_that_is_computed_again_has_the_same_bytes():
    work = workload()
    outer = work.problem.init_outer(generator(0))
    lease = work.lease(3, 1)
    first, second = work.compute_lease(lease, outer)[1], work.compute_lease(lease, outer)[1]
    copied = pickle.loads(pickle.dumps(work)).compute_lease(lease, outer)[1]
    assert torch.equal(first, second) and torch.equal(first, copied)


def test_tasks_are_cast_to_the_dtype_of_the_outer_variable():
    seen = []

    class Watching(Quadratic):
        def inner_loss(self, context, inner, batch):
            seen.append(batch.tensors[0].dtype)
            return super().inner_loss(context, inner, batch)

    problem = Watching(2, 4)
    problem.start = problem.start.float()
    work = dataclasses.replace(workload(), problem=problem)
    outer = {"x": torch.ones(2, dtype=torch.float32)}
    assert work.compute_lease(work.lease(0, 0), outer)[1].dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_a_lease_computes_with_its_own_number_of_threads_and_gives_them_back():
    seen = []

    class Watching(QuadraticSampler):
        def sample(self, index):
            seen.append(torch.get_num_threads())
            return quadratic_task(index)

    work = dataclasses.replace(workload(num_threads=2), sampler=Watching())
    before = torch.get_num_threads()
    work.compute_lease(work.lease(0, 0), work.problem.init_outer(generator(0)))
    assert seen == [2, 2]
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), intra_op_threads(2):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": None}, r"num_threads must be >= 1 in a training, got None"),
        (
            {"meta_batch_size": 6, "tasks_per_lease": 4},
            r"meta_batch_size must be a multiple of tasks_per_lease \(4\), got 6",
        ),
        ({"sampler": 3}, r"sampler must have a method sample\(index\) -> Task, got int"),
        ({"sampler": None}, r"sampler must have a method .*, got NoneType without one"),
    ],
    ids=str,
)
def test_messages_of_the_workload(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(workload(), **with_compute(options))


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=rf"device must be 'cpu' or 'auto' .*, got '{device}'"):
        pick_device(device)
