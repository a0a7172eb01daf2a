"""Graphs of leases, by the tape of tests/tape.py: the bytes of the plain computation, or a reason.

Python's numbers are frozen on the tape, so a lease replayed at another step, from another state, on
another task and at another x has its bytes only if everything that differs goes in.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from metadist import graphs, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, ALGORITHMS, BOME, ITD, MEHA, SOBA, StocBiO, SubBiO
from metadist.compute import Compute
from metadist.followed import Buffers, Recording, filled
from metadist.hypergradient import HypergradientSum
from metadist.problem import Problem
from metadist.step_rules import SGD, Adam
from metadist.task import Task, to_device
from metadist.tasks import FewShotProblem
from metadist.trees import Params, add
from tests.helpers import exact_state, fused, make_trainer, small_conv4
from tests.problems import Quadratic, generator, image_task, quadratic_task
from tests.tape import recording


class Run(NamedTuple):
    """Some leases, and how many graphs were recorded and replayed for them."""

    leases: list[HypergradientSum]
    recorded: int
    replayed: int


def run(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    tasks: Sequence[Task],
    cuda_graphs: Any,
    keeps: bool = False,
    together: int = 1,
    first: int = 0,
    report_every: int = 0,
    **options: Any,
) -> Run:
    """A lease for each `together` tasks in turn, x moving in between; with `keeps` the same."""
    compute = Compute(cuda_graphs=cuda_graphs, **options)
    states: dict[int, Tensor] | None = {} if keeps or algorithm.needs_kept_state else None
    found: list[HypergradientSum] = []
    before = None
    for number, start in enumerate(range(0, len(tasks), together)):
        step = first + number
        is_two_point = algorithm.recursive_weight(step) is not None and not keeps
        group = list(tasks[:together] if keeps else tasks[start : start + together])
        lease = task_hypergradients(
            *(problem, algorithm, outer, group),
            compute=compute,
            step=step,
            report=bool(report_every) and number % report_every == 0,
            previous=before if is_two_point and step else None,
            states=states,
            is_checked=True,
        )
        states = lease.states if keeps else states
        before, outer = outer, add(outer, lease.total, -0.01)
        found.append(lease)
    owned = graphs._known.get((id(problem), id(algorithm), cuda_graphs))
    counts = (owned[2]._recorded, owned[2]._replayed) if owned else (0, 0)
    return Run(found, *counts)


def assert_same(found: Run, expected: Run) -> None:
    for ours, theirs in zip(found.leases, expected.leases, strict=True):
        for name, leaf in theirs.total.items():
            assert torch.equal(ours.total[name], leaf), name
        if theirs.previous is not None:
            assert ours.previous is not None
            for name, leaf in theirs.previous.items():
                assert torch.equal(ours.previous[name], leaf), name
        assert ours.states.keys() == theirs.states.keys()
        for number, state in theirs.states.items():
            assert torch.equal(ours.states[number], state)
        assert (ours.metrics, ours.calls, ours.dropped) == (
            *(theirs.metrics, theirs.calls, theirs.dropped),
        )


def assert_graphs_change_nothing(
    problem: Problem, algorithm: Algorithm, outer: Params, tasks: Sequence[Task], **options: Any
) -> None:
    # SubBiO is a graph only as a GPU computes it.
    with recording(), fused() if isinstance(algorithm, SubBiO) else nullcontext():
        expected = run(problem, algorithm, outer, tasks, False, **options)
        found = run(problem, algorithm, outer, tasks, True, **options)
    assert_same(found, expected)
    assert found.replayed >= 2
    assert found.recorded + found.replayed >= len(found.leases)


def of_name(name: str) -> Algorithm:
    method = cast(Any, ALGORITHMS[name])
    # Chains of a random length have a graph for each length.
    short = {"adjoint_steps": 2} if hasattr(method, "adjoint_steps") else {}
    algorithm: Algorithm = method(inner_steps=2, inner_lr=0.05, **short)
    return algorithm


def tasks_and_x(algorithm: Algorithm, count: int) -> tuple[Problem, list[Task], Params]:
    problem = Quadratic(2, 4)
    tasks = [quadratic_task(index) for index in range(count)]
    outer = problem.init_outer(generator(1))
    return problem, tasks, {**outer, **algorithm.init_own(problem.init_inner(outer, tasks[0]))}


GRAPHS = [name for name, method in ALGORITHMS.items() if not method.no_graph]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_algorithm_has_its_bytes_on_new_tasks(name):
    algorithm = of_name(name)
    problem, tasks, outer = tasks_and_x(algorithm, 5)
    assert_graphs_change_nothing(problem, algorithm, outer, tasks, batch_size=2)


@pytest.mark.parametrize("name", [name for name in GRAPHS if ALGORITHMS[name].trains != "start"])
def test_every_algorithm_has_its_bytes_on_kept_states(name):
    algorithm = of_name(name)
    problem, tasks, outer = tasks_and_x(algorithm, 12 if name == "saba" else 6)
    assert_graphs_change_nothing(problem, algorithm, outer, tasks, keeps=True, batch_size=2)


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - set(GRAPHS)))
def test_an_algorithm_that_can_be_no_graph_says_why(name, monkeypatch):
    algorithm = of_name(name)
    problem, tasks, outer = tasks_and_x(algorithm, 1)
    with recording():
        with pytest.raises(ValueError, match="must be 'auto' or False") as refused:
            run(problem, algorithm, outer, tasks, True)
        assert algorithm.no_graph in str(refused.value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(problem, algorithm, outer, tasks, "auto")
        # And that is how it is.
        forced = graphs.Graphs(name, must=True)
        monkeypatch.setattr("metadist.hypergradient.graphs_of", lambda *_: forced)
        with pytest.raises(ValueError, match="device"):
            run(problem, algorithm, outer, tasks, True)


CARRYING = SGD(lr=0.05, momentum=0.9, carry=True)

OPTIONS: dict[str, tuple[Algorithm, bool]] = {
    "cosine": (ITD(2, inner_optimizer=SGD(schedule="cosine", num_steps=9, warmup_steps=2)), False),
    "power, unrolled": (
        *(ITD(2, inner_optimizer=SGD(schedule="power", momentum=0.5), engine="unrolled"), False),
    ),
    "adam": (ITD(2, inner_optimizer=Adam(0.01, schedule="linear", num_steps=9)), False),
    "higher": (ITD(2, inner_optimizer=SGD(schedule="power"), engine="higher"), False),
    "carried momentum": (AID(2, inner_optimizer=CARRYING), True),
    "carried adam": (BOME(2, inner_optimizer=Adam(0.01, carry=True)), True),
    "decay": (SOBA(adjoint_decay=0.5), True),
    "normal equations": (AID(2, solver="normal_cg", adjoint_steps=2), False),
}


@pytest.mark.parametrize(("algorithm", "keeps"), OPTIONS.values(), ids=list(OPTIONS))
def test_rates_that_change_go_into_the_graph(algorithm, keeps):
    problem, tasks = Quadratic(2, 4), [quadratic_task(index) for index in range(8)]
    outer = problem.init_outer(generator(1))
    assert_graphs_change_nothing(problem, algorithm, outer, tasks, keeps=keeps)


TOGETHER: list[Algorithm] = [
    ITD(2, inner_optimizer=SGD(schedule="power")),
    StocBiO(2, adjoint_steps=2),
    MEHA(2, y_lr=0.05),
]


@pytest.mark.parametrize("algorithm", TOGETHER, ids=str)
def test_tasks_that_go_through_together_are_one_graph(algorithm):
    problem, tasks = Quadratic(2, 4), [quadratic_task(index) for index in range(10)]
    outer = problem.init_outer(generator(1))
    assert_graphs_change_nothing(
        problem, algorithm, outer, tasks, together=2, batch_size=2, report_every=2
    )


NETWORKS: list[tuple[Any, Algorithm]] = [
    ("all", ITD(2, 0.01)),
    ("head", AID(2, 0.1, adjoint_steps=2)),
    ("head", BOME(2, 0.1)),
]


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(("adapt", "algorithm"), NETWORKS, ids=str)
def test_a_network_has_its_bytes_as_a_gpu_computes_it(adapt, algorithm, vectorize):
    problem = FewShotProblem(small_conv4(), adapt=adapt)
    tasks = [to_device(image_task(index), "cpu", torch.float32) for index in range(8)]
    with fused():
        assert_graphs_change_nothing(
            *(problem, algorithm, problem.init_outer(generator(0)), tasks),
            vectorize=vectorize,
            together=2,
            report_every=2 if algorithm is NETWORKS[1][1] else 0,
        )


class Reading(Quadratic):
    """Looks at a number of its own losses."""

    def inner_loss(self, context: Params, inner: Params, batch: Any) -> Tensor:
        loss = super().inner_loss(context, inner, batch)
        return loss if float(inner["y"].detach().sum()) < 1e9 else 2 * loss


class Remembering(ITD):
    """Keeps a number of its own beside the state."""

    def estimate(self, oracle: Any, context: Params, state: Any) -> Any:
        calls.append(1)
        found = super().estimate(oracle, context, state)
        return found._replace(hypergradient={n: len(calls) * h for n, h in found[0].items()})


calls: list[int] = []


class Caching(Quadratic):
    """Keeps what it has computed of a task, by the address of its data."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.known: dict[int, Tensor] = {}

    def inner_loss(self, context: Params, inner: Params, batch: Any) -> Tensor:
        rows = batch.tensors[0]
        scale = self.known.setdefault(rows.data_ptr(), rows.exp().mean())
        return scale * super().inner_loss(context, inner, batch)


def test_a_graph_is_compared_again_at_the_first_other_tasks():
    problem, algorithm = Caching(), ITD(inner_steps=2, inner_lr=0.05)
    _, (first, other), outer = tasks_and_x(algorithm, 2)
    tasks = [first, first, first, other, other]
    expected = run(problem, algorithm, outer, tasks, False)
    with recording(), pytest.warns(RuntimeWarning, match="a graph computes other bytes"):
        found = run(problem, algorithm, outer, tasks, "auto")
    assert_same(found, expected)
    assert found.replayed == 3  # the last of these was thrown away


def test_a_graph_is_of_the_settings_that_its_problem_had():
    problem, algorithm = Quadratic(2, 4), ITD(inner_steps=2, inner_lr=0.05)
    _, tasks, outer = tasks_and_x(algorithm, 4)
    with recording():
        for rho in (0.1, 0.7, 0.1):
            problem.rho = rho
            expected = run(problem, algorithm, outer, tasks, False)
            found = run(problem, algorithm, outer, tasks, True)
            assert_same(found, expected)
    assert (found.recorded, found.replayed) == (2, 10)


class Counting(ITD):
    """Another program at every step."""

    def estimate(self, oracle: Any, context: Params, state: Any) -> Any:
        assert int(oracle.step) >= 0
        return super().estimate(oracle, context, state)


@pytest.mark.parametrize(
    ("problem", "algorithm", "reason"),
    [
        (Reading(2, 4), ITD(1, 0.11), "waits for the device"),
        (Quadratic(2, 4), Remembering(1, 0.12), "computes other bytes"),
        (Quadratic(2, 4), Counting(1, 0.13), "Python decides otherwise at nearly every lease"),
    ],
)
def test_what_cannot_be_a_graph_is_computed_without_and_warned_of_once(problem, algorithm, reason):
    tasks = [quadratic_task(index) for index in range(graphs.MOST + 3)]
    outer = problem.init_outer(generator(1))
    with recording():
        with pytest.warns(RuntimeWarning, match=f"without CUDA graphs.*{reason}") as warned:
            found = run(problem, algorithm, outer, tasks, "auto")
        assert len(warned) == 1
        if not isinstance(algorithm, Remembering):
            assert_same(found, run(problem, algorithm, outer, tasks, False))
        with pytest.raises(ValueError, match=f"cuda_graphs must be .*, got True: .*{reason}"):
            run(problem, algorithm, outer, tasks, True)


def test_memory_that_runs_out_while_it_is_recorded_is_a_reason_too(monkeypatch):
    def no_room(run: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(graphs.RECORDERS, "cpu", no_room)
    problem, algorithm = Quadratic(2, 4), ITD(1, 0.14)
    outer, tasks = problem.init_outer(generator(1)), [quadratic_task(0), quadratic_task(1)]
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*out of memory"):
        found = run(problem, algorithm, outer, tasks, "auto")
    assert_same(found, run(problem, algorithm, outer, tasks, False))


def test_a_cpu_has_no_graphs():
    problem, algorithm = Quadratic(2, 4), ITD(1)
    outer, tasks = problem.init_outer(generator(1)), [quadratic_task(0)]
    assert run(problem, algorithm, outer, tasks, "auto").recorded == 0
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto' or False on a CPU"):
        run(problem, algorithm, outer, tasks, True)
    with pytest.raises(ValueError, match="with device='cpu', got True"):
        Compute(cuda_graphs=True, device="cpu")


def test_graphs_go_with_their_algorithm():
    problem, algorithm = Quadratic(2, 4), ITD(1)
    tasks = [quadratic_task(0), quadratic_task(1)]
    before = set(graphs._known)
    with recording():
        run(problem, algorithm, problem.init_outer(generator(1)), tasks, True)
    assert set(graphs._known) - before == {(id(problem), id(algorithm), True)}
    del algorithm
    assert set(graphs._known) <= before


def test_followed_numbers_are_inputs_to_tensors_and_conditions_to_python():
    record = Recording([3, 10], Buffers(torch.device("cpu")))
    step, size = cast(Any, record.numbers)
    rate = min(1.0, 0.9 / (step + 1) ** 0.5)  # 0.45, and a condition: it is below 1
    assert size % 4 == 2
    leaf = torch.ones(2)
    assert torch.equal(leaf * rate, torch.zeros(2))  # what it has before it is filled
    record.fill([3, 10])
    assert torch.equal(leaf * rate, torch.full((2,), 0.45))
    assert torch.equal(filled(leaf, (1,), rate, torch.float32), torch.tensor([0.45]))
    assert (torch.tensor(1.0) * rate).dtype == torch.float32
    record.fill([8, 10])
    assert torch.equal(leaf - rate, leaf - 0.3)
    for numbers, holds in (([8, 14], True), ([8, 11], False), ([0, 10], True)):
        assert record.holds(numbers) is holds
    whole = torch.arange(2) + step * 2
    assert whole.dtype == torch.int64 and int(step) == 3
    assert record.holds([3, 14]) and not record.holds([8, 14])


def test_a_training_has_the_same_bytes_with_graphs():
    def trained(cuda_graphs: Any) -> Any:
        algorithm = ITD(2, inner_optimizer=SGD(schedule="power"))
        trainer = make_trainer(algorithm=algorithm, cuda_graphs=cuda_graphs, device="auto")
        trainer.fit(6)
        owned = graphs._known.get((id(trainer.problem), id(trainer.algorithm), cuda_graphs))
        return exact_state(trainer), owned[2]._replayed if owned else 0

    with recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        plain, found = trained(False), trained("auto")
        demanded = trained(True)
    assert found[0] == plain[0] and demanded[0] == plain[0]
    assert found[1] >= 2 and demanded[1] >= 2


def test_a_training_that_must_have_graphs_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto' or False on a CPU"):
        make_trainer(cuda_graphs=True, device="auto")


def test_a_cuda_graph_is_warmed_up_on_the_stream_of_its_recording(monkeypatch):
    cuda = MagicMock()
    order: list[str] = []
    cuda.stream.return_value.__enter__.side_effect = lambda: order.append("side stream")
    cuda.graph.return_value.__enter__.side_effect = lambda: order.append("recording")
    monkeypatch.setattr(torch, "cuda", cuda)
    graphs._place.cache_clear()
    try:
        found, replay = graphs.record_cuda(lambda: order.append("run"), torch.device("cuda:1"))
    finally:
        graphs._place.cache_clear()
    assert found is None and order == ["side stream", "run", "run", "recording", "run"]
    side = cuda.Stream.return_value
    cuda.device.assert_called_once_with(torch.device("cuda:1"))
    cuda.stream.assert_called_once_with(side)
    cuda.graph.assert_called_once_with(
        cuda.CUDAGraph.return_value,
        pool=cuda.graph_pool_handle.return_value,
        stream=side,
        capture_error_mode="thread_local",
    )
    assert replay is cuda.CUDAGraph.return_value.replay
