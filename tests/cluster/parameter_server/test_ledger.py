"""Every policy on a simulated pool: random arrivals, random deaths, no Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.cluster.parameter_server.ledger import Ledger
from metadist.cluster.parameter_server.policies import (
    ASP,
    BSP,
    SSP,
    Buffered,
    Policy,
    StalenessWeight,
)

LEASES_PER_STEP = 4

policies = st.one_of(
    st.just(BSP()),
    st.just(ASP()),
    st.integers(0, 5).map(SSP),
    st.integers(1, 6).map(Buffered),
)


def simulate(policy, until, num_workers, data, ledger=None):
    """Run to version `until`; [(version, {lease id: version it was computed at}), ...]."""
    ledger = ledger or Ledger(policy, LEASES_PER_STEP, 0, 0, (), until)
    steps: list[tuple[int, dict[int, int]]] = []
    computed_at: dict[int, int] = {}
    while ledger.version < until:
        while len(ledger.in_flight) < num_workers:
            # A worker may have made ready for any of them, or for one that does not come next.
            wanted = data.draw(st.none() | st.integers(0, 30))
            if (issued := ledger.issue(wanted)) is None:
                break
            computed_at[issued] = ledger.version
        assert ledger.in_flight, "nothing is in flight and nothing can be applied: stuck"
        for lease_id in data.draw(st.lists(st.sampled_from(sorted(ledger.in_flight)), unique=True)):
            ledger.lose(lease_id)
        if ledger.in_flight:
            ledger.arrive(data.draw(st.sampled_from(sorted(ledger.in_flight))))
        while weights := ledger.next_step():
            steps.append((ledger.version, {n: computed_at[n] for n in weights}))
            ledger.apply(weights, ledger.version + 1)
    return ledger, steps


@given(policies, st.integers(0, 12), st.integers(1, 6), st.data())
def test_every_lease_is_applied_once_and_none_is_left(policy: Policy, until, num_workers, data):
    ledger, steps = simulate(policy, until, num_workers, data)
    applied = [lease_id for _, leases in steps for lease_id in leases]
    assert len(steps) == until
    assert len(set(applied)) == len(applied)
    assert not ledger.in_flight and not ledger.arrived
    # No lease was skipped: a run that goes on from here begins with the next number.
    assert sorted(applied) == list(range(len(applied)))


@given(policies, st.integers(1, 12), st.sets(st.integers(0, 12)))
def test_what_is_upcoming_is_issued_next(policy: Policy, until, wanted):
    ledger = Ledger(policy, LEASES_PER_STEP, 0, 2, (3, 5), until)
    for lease_id in wanted:
        ledger.issue(lease_id)
    upcoming = ledger.upcoming(5)
    issued: list[int] = []
    while len(issued) < 5 and (lease_id := ledger.issue()) is not None:
        issued.append(lease_id)
    assert list(upcoming)[: len(issued)] == issued
    if policy.is_synchronous:
        versions = [0] * len(issued) + [1] * LEASES_PER_STEP + [2] * LEASES_PER_STEP
        assert list(upcoming.values()) == versions[: len(upcoming)]


@given(st.integers(0, 5), st.integers(1, 12), st.integers(1, 6), st.data())
def test_ssp_never_applies_anything_older_than_its_bound(staleness, until, num_workers, data):
    _, steps = simulate(SSP(staleness), until, num_workers, data)
    assert max(at - version for at, leases in steps for version in leases.values()) <= staleness


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_bsp_steps_with_whole_meta_batches_of_one_version(until, num_workers, data):
    _, steps = simulate(BSP(), until, num_workers, data)
    for version, leases in steps:
        first = version * LEASES_PER_STEP
        assert leases == dict.fromkeys(range(first, first + LEASES_PER_STEP), version)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 6), st.data())
def test_buffered_steps_with_its_size(size, until, num_workers, data):
    _, steps = simulate(Buffered(size), until, num_workers, data)
    assert {len(leases) for _, leases in steps} == {size}


@given(policies, st.sets(st.integers(3, 20)), st.integers(1, 8), st.integers(1, 4), st.data())
def test_leases_that_are_in_x_are_not_handed_out_again(policy, applied, num_steps, workers, data):
    ledger = Ledger(policy, LEASES_PER_STEP, 10, 3, applied, 10 + num_steps)
    _, steps = simulate(policy, 10 + num_steps, workers, data, ledger)
    done = [lease_id for _, leases in steps for lease_id in leases]
    free = (n for n in range(3, 200) if n not in applied)
    assert sorted(done) == [next(free) for _ in done]


def test_the_oldest_lost_lease_goes_out_first():
    ledger = Ledger(ASP(), 1, 0, 0, (), 10)
    assert [ledger.issue() for _ in range(4)] == [0, 1, 2, 3]
    for lease_id in (2, 0, 3):
        ledger.lose(lease_id)
    assert [ledger.issue() for _ in range(4)] == [0, 2, 3, 4]


def test_a_lost_lease_goes_out_at_the_current_version():
    ledger = Ledger(ASP(), 1, 0, 0, (), 10)
    ledger.issue()
    ledger.issue()
    ledger.arrive(1)
    ledger.apply(ledger.next_step(), 1)
    ledger.lose(0)
    assert ledger.issue() == 0
    assert ledger.in_flight == {0: 1}


def test_weights_follow_the_staleness():
    policy = ASP(StalenessWeight("inverse"))
    ledger = Ledger(policy, 1, 0, 0, (), 10)
    ledger.issue()
    ledger.issue()
    ledger.arrive(0)
    assert ledger.next_step() == {0: 1.0}
    ledger.apply([0], 1)
    ledger.arrive(1)
    assert ledger.next_step() == {1: 0.5}


@pytest.mark.parametrize(
    ("leases_per_step", "message"),
    [(2, r"must apply 2 leases of version 0 together, .*, got 1 of the versions \[0\]"), (1, None)],
)
def test_a_policy_that_is_not_as_synchronous_as_it_says_is_refused(leases_per_step, message):
    class Hasty(ASP):
        is_synchronous = True

    ledger = Ledger(Hasty(), leases_per_step, 0, 0, (), until_version=3)
    ledger.issue()
    ledger.issue()
    ledger.arrive(0)
    if message is None:
        ledger.apply(ledger.next_step(), 1)
        ledger.arrive(1)
        message = r"must apply 1 leases of version 1 together, .*, got 1 of the versions \[0\]"
    with pytest.raises(ValueError, match=message):
        ledger.next_step()
