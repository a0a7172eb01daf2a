"""The simulated scheduler in cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from metadist.cluster import ASP, BSP, SSP, Buffered, Policy
from metadist.cluster.parameter_server.simulation import Costs, Outcome, SimulatedWorkers, simulate

FREE = Costs()
POLICIES: list[Policy] = [BSP(), ASP(), SSP(0), SSP(3), SSP(20), Buffered(3)]


def applied(outcome: Outcome) -> list[int]:
    return [lease for step in outcome.steps for lease in step.leases]


@pytest.mark.parametrize("policy", [BSP(), ASP(), SSP(2)], ids=str)
def test_one_worker_takes_the_sum_of_all_costs(policy):
    costs = Costs(1e6, 0.01, 0.02, 3e-8, 0.04, 5e-8, 6e-8, link_bytes_per_s=1e7)
    outcome = simulate(policy, 1, SimulatedWorkers(1, 0.5), costs, 10)
    # x over the link, at the worker and at the server; the sum over the link.
    lease_s = 0.5 + 0.01 + 0.02 + 0.03 + 0.04 + 0.05 + 0.06 + 0.1 + 0.1
    assert outcome.seconds == pytest.approx(10 * lease_s)
    assert outcome.leases_per_s == pytest.approx(1 / lease_s)
    assert outcome.computing_s == pytest.approx(5)
    assert outcome.server_share == pytest.approx((0.04 + 0.05 + 0.06 + 0.1) / lease_s)
    assert set(outcome.staleness) == {0}


@pytest.mark.parametrize("num", [1, 4, 7, 100])
def test_bsp_with_equal_times_and_no_costs_is_ideal(num):
    outcome = simulate(BSP(), num, SimulatedWorkers(num, 0.25), FREE, 20 * num)
    assert outcome.seconds == pytest.approx(20 * 0.25)
    assert outcome.leases_per_s == pytest.approx(4 * num)
    assert set(outcome.staleness) == {0}


def test_bsp_waits_for_the_slowest():
    workers = SimulatedWorkers(10, 0.1, slow_share=0.1, slow_factor=5)
    outcome = simulate(BSP(), 10, workers, FREE, 100)
    assert outcome.seconds == pytest.approx(10 * 0.5)
    # Twice as many leases as workers: the fast ones take more of them.
    outcome = simulate(BSP(), 20, workers, FREE, 200)
    assert outcome.seconds == pytest.approx(10 * 0.5)


@pytest.mark.parametrize("num", [2, 5, 50])
def test_asp_has_the_staleness_of_the_other_workers(num):
    outcome = simulate(ASP(), 1, SimulatedWorkers(num, 1.0, spread=0.1), FREE, 40 * num)
    assert outcome.staleness.mean() == pytest.approx(num - 1, rel=0.05)
    assert outcome.leases_per_s == pytest.approx(num, rel=0.05)


def test_one_server_saturates_where_it_has_to():
    """A step of 20 ms: no more than 50 of them a second, however many workers there are."""
    costs = Costs(2e6, add_byte_s=4e-9, step_byte_s=6e-9)
    assert costs.apply_s(1) == pytest.approx(0.02)
    assert costs.apply_s(10) == pytest.approx(0.092)
    workers = SimulatedWorkers(200, 1.0, spread=0.1)
    outcome = simulate(ASP(), 1, workers, costs, 4000)
    assert outcome.leases_per_s == pytest.approx(50, rel=0.01)
    # What waits for the server grows old: a result for its lease and for the queue.
    assert outcome.staleness.mean() > 199
    few = simulate(ASP(), 1, SimulatedWorkers(20, 1.0, spread=0.1), costs, 800)
    assert few.leases_per_s == pytest.approx(20, rel=0.1)
    together = simulate(Buffered(10), 1, workers, costs, 4000)
    assert together.leases_per_s == pytest.approx(10 / 0.092, rel=0.02)


def test_shards_divide_what_goes_by_bytes():
    one = Costs(1e8, step_s=0.001, add_byte_s=1e-9, step_byte_s=1e-9, link_bytes_per_s=1e9)
    four = Costs(1e8, step_s=0.001, add_byte_s=1e-9, step_byte_s=1e-9, link_bytes_per_s=1e9,
                 num_shards=4, shard_s=0.002)  # fmt: skip
    assert one.apply_s(1) == pytest.approx(0.001 + 0.1 + 0.2)
    assert four.apply_s(1) == pytest.approx(0.001 + 3 * 0.002 + 0.3 / 4)


def test_workers_of_a_node_read_x_once():
    workers = SimulatedWorkers(8, 1.0)
    for per_node, transfers in ((1, 8), (4, 2), (8, 1)):
        costs = Costs(1e6, link_bytes_per_s=1e7, workers_per_node=per_node)
        outcome = simulate(BSP(), 8, workers, costs, 8)
        assert outcome.seconds == pytest.approx(transfers * 0.1 + 1.0 + 8 * 0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_lease_is_applied_once_whoever_is_lost(policy, seed):
    workers = SimulatedWorkers(6, 1.0, 0.3, 0.2, 4.0, failure_s=5.0, replace_s=3.0)
    outcome = simulate(policy, 6, workers, Costs(step_s=0.01), 300, seed)
    leases = applied(outcome)
    assert outcome.num_losses > 20
    assert sorted(leases) == list(range(len(leases)))
    assert len(leases) >= 300
    assert [step.end_s for step in outcome.steps] == sorted(step.end_s for step in outcome.steps)
    if isinstance(policy, SSP):
        assert outcome.staleness.max() <= policy.staleness


def test_failures_cost_what_they_must():
    """With failures once in 10 leases and replacements as long as a lease."""
    workers = SimulatedWorkers(50, 1.0, 0.2, failure_s=10.0, replace_s=1.0)
    outcome = simulate(ASP(), 1, workers, FREE, 5000)
    # Exponential losses: a lease is done with e^-0.1, takes 0.95 s in the mean, and 1 s if lost.
    done = np.exp(-0.1)
    expected = 50 * done / (10 * (1 - done) + (1 - done) * 1.0)
    assert outcome.leases_per_s == pytest.approx(expected, rel=0.03)


def test_a_run_is_a_function_of_its_seed():
    workers = SimulatedWorkers(5, 1.0, 0.5, failure_s=20.0, replace_s=1.0)
    first, second, other = (simulate(ASP(), 1, workers, FREE, 100, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert workers.durations(100_000, 0).mean() == pytest.approx(1.0, rel=0.01)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="must be >= 1, got 0, 1, 10 and 1"):
        simulate(BSP(), 0, SimulatedWorkers(1, 1.0), FREE, 10)


def test_a_lease_that_is_there_in_time_hides_what_the_driver_and_the_server_take():
    costs = Costs(1e6, 0.01, 0.02, 0.0, 0.04, 5e-8, 6e-8, link_bytes_per_s=1e7)
    workers = SimulatedWorkers(1, 0.5)
    without, ahead = (simulate(ASP(), 1, workers, costs, 40, prefetch=n) for n in (0, 1))
    assert without.waiting_share == pytest.approx(1 - 0.5 / (0.5 + 0.01 + 0.02 + 0.15 + 0.2))
    assert ahead.leases_per_s == pytest.approx(1 / (0.5 + 0.02))
    # x over the link and the first lease are not hidden.
    assert ahead.waiting_share < 0.08 < 0.4 < without.waiting_share
    # Handed out when the lease before it was half done.
    assert set(ahead.staleness) == {1}


def test_what_is_handed_out_late_is_half_a_lease_older():
    workers = SimulatedWorkers(20, 1.0, spread=0.1)
    for prefetch, staleness in ((0, 19), (1, 1.5 * 20 - 1)):
        outcome = simulate(ASP(), 1, workers, FREE, 2000, prefetch=prefetch)
        assert outcome.staleness.mean() == pytest.approx(staleness, rel=0.05)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_lease_is_applied_once_with_what_waited_at_a_lost_worker(policy):
    workers = SimulatedWorkers(6, 1.0, 0.3, 0.2, 4.0, failure_s=5.0, replace_s=3.0)
    outcome = simulate(policy, 12, workers, Costs(step_s=0.01), 300, prefetch=1)
    leases = applied(outcome)
    assert outcome.num_losses > 20
    assert sorted(leases) == list(range(len(leases)))
    if isinstance(policy, SSP):
        assert outcome.staleness.max() <= policy.staleness
