"""Leases: which tasks they hold, how one is computed, and what a workload refuses."""

import dataclasses
import pickle
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import pytest
import torch

from metadist import LocalExecutor, OuterOptimizer, evaluate
from metadist.algorithms import ITD
from metadist.chunks import falls_back
from metadist.compute import NEWER_SWITCHES, SWITCHES, Compute, intra_op_threads, pick_device
from metadist.hypergradient import task_hypergradients
from metadist.memory import DeviceMemoryError
from metadist.outer import OuterVariable
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


def settings_of_torch():
    return [read() for read, _ in (*SWITCHES, *NEWER_SWITCHES.values())]


@pytest.fixture
def loose():
    """torch set to round what it multiplies and to try kernels; as it was, afterwards."""
    before = settings_of_torch()
    for (_, write), value in zip(SWITCHES, ("medium", True, True, False), strict=True):
        write(value)
    yield
    for (_, write), value in zip((*SWITCHES, *NEWER_SWITCHES.values()), before, strict=True):
        write(value)


class Noting(Quadratic):
    """Notes the settings that it is computed with, and may fail."""

    def __init__(self, error=None):
        super().__init__(2, 4)
        self.seen, self.error = set(), error

    def outer_loss(self, context, inner, batch):
        self.seen.add(tuple(read() for read, _ in SWITCHES))
        if self.error is not None:
            raise self.error
        return super().outer_loss(context, inner, batch)


@pytest.mark.parametrize(("precision", "expected"), [("highest", False), ("tf32", True)])
@pytest.mark.parametrize("error", [None, KeyError("ours")])
def test_precision_and_kernels_are_set_for_a_lease_and_given_back(
    loose, precision, expected, error
):
    problem = Noting(error)
    work = dataclasses.replace(workload(precision=precision), problem=problem)
    before = settings_of_torch()
    with nullcontext() if error is None else pytest.raises(KeyError, match="ours"):
        work.compute_lease(work.lease(0, 0), problem.init_outer(generator(0)))
    products = "high" if expected else "highest"
    assert problem.seen == {(products, expected, False, True)}
    assert settings_of_torch() == before


@pytest.mark.parametrize("alone", ["evaluate", "hypergradients"])
def test_evaluation_and_a_call_of_ours_compute_in_full_precision(loose, alone):
    problem, before = Noting(), settings_of_torch()
    outer = problem.init_outer(generator(0))
    if alone == "evaluate":
        evaluate(problem, QuadraticSampler(), ITD(inner_steps=1), outer, 2)
    else:
        tasks = [quadratic_task(0)]
        task_hypergradients(problem, ITD(inner_steps=1), outer, tasks, is_checked=True)
    assert problem.seen == {("highest", False, False, True)}
    assert settings_of_torch() == before


@pytest.mark.skipif(not NEWER_SWITCHES, reason="this torch has no precision by operator")
def test_a_precision_that_was_set_by_operator_is_given_back(loose):
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    conv.fp32_precision = "ieee"  # the older way to ask is refused now
    problem, before = Noting(), by_operator()
    work = dataclasses.replace(workload(), problem=problem)
    work.compute_lease(work.lease(0, 0), problem.init_outer(generator(0)))
    assert problem.seen == {("highest", False, False, True)}
    assert by_operator() == before


def by_operator():
    return {name: read() for name, (read, _) in NEWER_SWITCHES.items()}


@pytest.mark.skipif(not NEWER_SWITCHES, reason="this torch has no precision by operator")
@pytest.mark.parametrize("place", ["", "cudnn", "mkldnn.conv"])
def test_a_precision_of_everything_rounds_nothing_in_a_lease(place):
    owner: Any = attrgetter(place)(torch.backends) if place else torch.backends
    inside = []

    class Looking(Noting):
        def outer_loss(self, context, inner, batch):
            inside.append(by_operator())
            return super().outer_loss(context, inner, batch)

    problem, first = Looking(), owner.fp32_precision
    work = dataclasses.replace(workload(), problem=problem)
    try:
        owner.fp32_precision = "tf32"
        before = by_operator()
        assert "tf32" in before.values()
        work.compute_lease(work.lease(0, 0), problem.init_outer(generator(0)))
        assert all(set(found.values()) == {"ieee"} for found in inside)
        assert by_operator() == before
        owner.fp32_precision = "ieee"
        expected = by_operator()
        work.compute_lease(work.lease(0, 0), problem.init_outer(generator(0)))
        assert by_operator() == expected
    finally:
        owner.fp32_precision = first


def test_autocast_around_a_lease_is_refused():
    work, outer = workload(), workload().problem.init_outer(generator(0))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast\('cpu'\) must be off around hypergradients"),
    ):
        work.compute_lease(work.lease(0, 0), outer)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd ten screens.")


def test_a_lease_that_a_gpu_has_no_memory_for_says_what_to_lower():
    problem = Noting(out_of_memory())
    work = dataclasses.replace(workload(), problem=problem)
    with pytest.raises(DeviceMemoryError) as caught:
        work.compute_lease(work.lease(3, 0), problem.init_outer(generator(0)))
    assert str(caught.value) == (
        "chunk_size or tasks_per_lease or meta_batch_size or graph_budget must be lower, since the "
        "GPU has too little memory for lease 3 (tasks 6, 7), got chunk_size=None, "
        "tasks_per_lease=2, meta_batch_size=6, graph_budget=1000000000. It said: CUDA out of "
        "memory. Tried to allocate 2 GiB."
    )
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_a_library_lacks_is_no_reason_to_compute_otherwise(text):
    problem = Noting(RuntimeError(text))
    work = dataclasses.replace(workload(), problem=problem)
    with pytest.raises(DeviceMemoryError, match="tasks_per_lease"):
        work.compute_lease(work.lease(3, 0), problem.init_outer(generator(0)))
    # Under vmap too: how much memory there is may not decide on rounding.
    assert not falls_back("auto", RuntimeError(text))


def test_an_outer_step_that_a_gpu_has_no_memory_for_says_what_to_lower(monkeypatch):
    work, optimizer = workload(), OuterOptimizer("sgd", lr=0.1)
    executor = LocalExecutor()
    outer = work.problem.init_outer(generator(0))
    executor.start(work, optimizer, OuterVariable(outer, optimizer).state())

    def fail(self, contributions):
        raise out_of_memory()

    monkeypatch.setattr(OuterVariable, "apply", fail)
    with pytest.raises(DeviceMemoryError, match=r"meta_batch_size must be lower.* outer step 1"):
        next(executor.run(1))


def test_data_that_a_gpu_has_no_memory_for_says_what_to_lower(monkeypatch):
    def fail(*arguments, **named):
        raise out_of_memory()

    monkeypatch.setattr("metadist.workload.Feed", fail)
    with pytest.raises(DeviceMemoryError, match="data_budget must be lower"):
        workload().feed(workload().problem.init_outer(generator(0)))


def test_an_evaluation_that_a_gpu_has_no_memory_for_says_what_to_lower():
    problem = Noting()
    outer, compute = problem.init_outer(generator(0)), Compute(chunk_size=3)
    evaluate(problem, QuadraticSampler(), ITD(inner_steps=1), outer, 2)
    problem.error = out_of_memory()
    message = "chunk_size must be lower.* tasks 0 to 2 of an evaluation, got chunk_size=3"
    with pytest.raises(DeviceMemoryError, match=message):
        evaluate(problem, QuadraticSampler(), ITD(inner_steps=1), outer, 5, compute=compute)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "gpu"])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(ValueError, match=rf"\(CUDA or ROCm\), got '{device}'"):
        Compute(device=device)


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
