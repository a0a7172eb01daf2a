"""Sums in bfloat16: half of the bytes, and what is rounded off is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metadist.cluster import RayExecutor, Workers
from metadist.cluster.actors.buffers import OuterSpec, pack_state, read_only
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.compression import LARGEST, Bfloat16
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.transport import Pulled, receive
from metadist.cluster.parameter_server.worker import Worker
from metadist.optimizer import OuterOptimizer
from metadist.outer import LeaseResult
from tests.algorithms.directions import run_in_one_process, with_what_a_step_leaves
from tests.cluster.toy import ADAM, Lines, Regression, first_state, local_run, make_workload
from tests.problems import generator


def sums(number: int, length: int = 1000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sums that share a part which plain rounding always misses by the same."""
    common = torch.randn(length, generator=generator(0), dtype=torch.float64)
    own = torch.randn(length, generator=generator(number, 1), dtype=torch.float64)
    return (common + 1e-4 * own).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_what_is_sent_converges_to_the_truth_as_plain_rounding_does_not(dtype):
    rounding = Bfloat16()
    truth, sent, plain = (torch.zeros(1000, dtype=torch.float64) for _ in range(3))
    errors = {}
    for number in range(1, 257):
        total = sums(number, dtype=dtype)
        truth += total
        sent += rounding.round(total)
        plain += total.to(torch.bfloat16)
        errors[number] = [float((s - truth).abs().max()) / number for s in (sent, plain)]
    # One rounding in all, of numbers below 8, over the number of sums.
    for number, (with_feedback, _) in errors.items():
        assert with_feedback <= 8 * 2**-8 / number
    assert errors[256][1] > 0.5 * errors[1][1] > 20 * errors[256][0]


def test_what_is_beyond_the_range_comes_later():
    rounding = Bfloat16()
    total = torch.tensor([2.5 * LARGEST, -1.0], dtype=torch.float64)
    sent = [rounding.round(total if n == 0 else 0 * total).double() for n in range(4)]
    assert [float(part[0]) / LARGEST for part in sent] == pytest.approx([1, 1, 0.5, 0], abs=1e-2)
    assert sum(sent)[0] == pytest.approx(2.5 * LARGEST, rel=1e-5)  # type: ignore[index]


def test_a_sum_of_two_points_has_an_error_for_each_of_its_numbers():
    rounding, twice = Bfloat16(), 2000
    sent = [rounding.round(sums(0)).double(), *(rounding.round(sums(n, twice)) for n in (1, 2))]
    second = sum(part[1000:].double() for part in sent[1:])
    truth = sums(1, twice)[1000:].double() + sums(2, twice)[1000:].double()
    assert float((second - truth).abs().max()) <= 8 * 2**-8
    first = sum(part[:1000].double() for part in sent)
    halves = [sums(n, 1000 * (1 + (n > 0)))[:1000] for n in range(3)]
    in_first = torch.stack(halves).double().sum(0)
    assert float((first - in_first).abs().max()) <= 8 * 2**-8


def pushed_by(transfer: str, dtype: torch.dtype, bounds: Any = None) -> Any:
    problem = Regression(num_features=200_000, dtype=dtype)
    state = first_state(problem)
    spec = OuterSpec.of(state.outer)
    worker: Any = Worker("worker")
    workload = make_workload(Lines(num_features=200_000), problem)
    worker.setup(pickle_by_value(workload), spec, bounds, transfer)
    flat = pack_state(state).flat
    pulled = [Pulled(flat[a:b]) for a, b in bounds or [(0, len(flat))]]
    return worker.compute(workload.lease(0, 0), None, None, *pulled)


@pytest.mark.parametrize("bounds", [None, [(0, 1 << 16), (1 << 16, 200_001)]])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 2), (torch.float64, 1 / 4)])
def test_what_is_sent_has_2_bytes_a_number(dtype, share, bounds):
    result, *full = pushed_by("full", dtype, bounds)
    same, *rounded = pushed_by("bfloat16", dtype, bounds)
    assert result.num_tasks == same.num_tasks == 1
    for exact, part in zip(full, rounded, strict=True):
        assert part.total.nbytes == share * exact.total.nbytes == 2 * len(exact.total)
        expected = read_only(exact.total).to(torch.bfloat16)
        assert torch.equal(read_only(part.total), expected)


def test_a_sum_of_no_tasks_takes_nothing_along():
    worker: Any = Worker("worker")
    problem = Regression()
    workload = make_workload(problem=problem)
    state = first_state(problem)
    worker.setup(pickle_by_value(workload), OuterSpec.of(state.outer), None, "bfloat16")
    flat = pack_state(state).flat
    worker.compute(workload.lease(0, 0), None, None, Pulled(flat))
    left = worker._rounding._left.clone()
    assert left.any()
    nowhere = flat * flat.dtype.type("nan")
    result, pushed = worker.compute(workload.lease(1, 0), None, None, Pulled(nowhere))
    assert (result.num_tasks, len(result.dropped)) == (0, 1)
    assert not pushed.total.any()
    assert torch.equal(worker._rounding._left, left)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_server_adds_bfloat16_without_further_rounding(weight):
    optimizer = OuterOptimizer("sgd", lr=1.0)
    state = first_state(optimizer=optimizer)
    server = ParameterServer()
    server.setup(pack_state(state), OuterSpec.of(state.outer), optimizer, 1)
    before = receive(server.pull().flat).clone()
    _, pushed = pushed_small()
    total = read_only(pushed.total)
    assert total.dtype == torch.bfloat16
    _, after = server.apply([LeaseResult(n, 0, 1) for n in range(3)], [weight] * 3, *[pushed] * 3)
    mean = sum((total.float() * weight for _ in range(3)), torch.zeros(())) / 3
    torch.testing.assert_close(before - receive(after.flat), mean, rtol=1e-5, atol=1e-6)


def pushed_small() -> Any:
    problem = Regression()
    workload, state = make_workload(problem=problem), first_state(problem)
    worker = Worker("worker")
    worker.setup(pickle_by_value(workload), OuterSpec.of(state.outer), None, "bfloat16")
    return worker.compute(workload.lease(0, 0), None, None, Pulled(pack_state(state).flat))


@pytest.mark.slow
def test_training_ends_near_the_exact_one(executor):
    running = executor(workers=Workers(num_workers=2), compression="bfloat16")
    list(running.run(60))
    found, (expected, _) = running.state(), local_run(60)
    for name, leaf in expected.outer.items():
        assert not torch.equal(found.outer[name], leaf) or not leaf.numel()
        torch.testing.assert_close(found.outer[name], leaf, rtol=0.02, atol=0.02)
    start = first_state().outer["weight"]
    assert float((expected.outer["weight"] - start).abs().max()) > 0.5
    assert running.describe()["compression"] == "bfloat16"


@with_what_a_step_leaves
def test_what_an_algorithm_keeps_stays_exact(executor, name, keep_state):
    workload, first, local = run_in_one_process(name, keep_state, ADAM)
    running = executor(workload, first, workers=Workers(num_workers=2), compression="bfloat16")
    list(local.run(1)), list(running.run(1))
    # They follow from the first x, which is the same.
    for index, state in local.state().states.items():
        assert torch.equal(running.state().states[index], state)
    assert bool(local.state().states) == keep_state
    list(local.run(20)), list(running.run(20))
    found, expected = running.state(), local.state()
    assert not torch.equal(found.outer["w"], expected.outer["w"])
    torch.testing.assert_close(found.outer["w"], expected.outer["w"], rtol=0.02, atol=0.02)
    for leaf in (*found.recursion.values(), *found.states.values()):
        assert leaf.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        (
            {"compression": "int8"},
            torch.float32,
            r"compression must be one of \('none', 'bfloat16'\), got 'int8'",
        ),
        (
            {"compression": "bfloat16"},
            torch.float16,
            "compression must be 'none' with .* of float16",
        ),
    ],
)
def test_what_would_gain_nothing_is_refused(options, dtype, message):
    problem = Regression(dtype=dtype)
    with pytest.raises(ValueError, match=message):
        RayExecutor(**options).start(make_workload(problem=problem), ADAM, first_state(problem))
