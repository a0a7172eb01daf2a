"""What each policy decides, and which options it refuses."""

from __future__ import annotations

import pytest

from metadist.cluster.parameter_server.policies import (
    ASP,
    BSP,
    SSP,
    Buffered,
    StalenessWeight,
    View,
)


def view(version=0, in_flight=None, arrived=None, leases_per_step=3):
    return View(version, in_flight or {}, arrived or {}, leases_per_step)


def test_bsp_steps_when_the_whole_meta_batch_is_there():
    assert BSP().leases_to_apply(view(arrived={2: 0, 0: 0}, in_flight={1: 0})) == ()
    assert BSP().leases_to_apply(view(arrived={2: 0, 0: 0, 1: 0})) == (2, 0, 1)


def test_bsp_hands_out_no_more_than_a_meta_batch():
    assert BSP().may_issue(view(arrived={0: 0}, in_flight={1: 0}))
    assert not BSP().may_issue(view(arrived={0: 0}, in_flight={1: 0, 2: 0}))


def test_asp_steps_with_every_arrival_in_order():
    assert ASP().leases_to_apply(view(arrived={5: 0, 3: 0}, in_flight={1: 0})) == (5,)
    assert ASP().leases_to_apply(view(in_flight={1: 0})) == ()
    assert ASP().may_issue(view(arrived={5: 0}))


def test_buffered_steps_with_the_first_arrivals():
    policy = Buffered(2)
    assert policy.leases_to_apply(view(arrived={5: 0})) == ()
    assert policy.leases_to_apply(view(arrived={5: 0, 3: 0, 4: 0})) == (5, 3)
    assert policy.may_issue(view(arrived={5: 0}))


def test_ssp_steps_while_the_slowest_lease_stays_young_enough():
    assert SSP(2).leases_to_apply(view(1, in_flight={0: 0}, arrived={1: 1})) == (1,)
    assert SSP(2).leases_to_apply(view(2, in_flight={0: 0}, arrived={1: 1})) == ()


def test_ssp_takes_the_oldest_first():
    assert SSP(5).leases_to_apply(view(3, arrived={7: 3, 6: 1, 5: 1})) == (6,)


def test_ssp_applies_together_what_would_be_too_old_afterwards():
    assert SSP(2).leases_to_apply(view(3, arrived={7: 3, 6: 1, 5: 1})) == (6, 5)


def test_ssp_of_zero_is_a_barrier_over_the_workers():
    assert SSP(0).leases_to_apply(view(4, in_flight={1: 4}, arrived={0: 4})) == ()
    assert SSP(0).leases_to_apply(view(4, arrived={0: 4, 1: 4})) == (0, 1)


def test_ssp_lets_workers_wait_while_results_are_held_back():
    assert SSP(2).may_issue(view(2, in_flight={0: 0}))
    assert not SSP(2).may_issue(view(2, in_flight={0: 0}, arrived={1: 1}))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (StalenessWeight(), [1, 1, 1]),
        (StalenessWeight("inverse"), [1, 1 / 2, 1 / 4]),
        (StalenessWeight("polynomial"), [1, 2**-0.5, 1 / 2]),
        (StalenessWeight("polynomial", 2), [1, 1 / 4, 1 / 16]),
    ],
)
def test_staleness_weights(weight, expected):
    for policy in (ASP(weight), SSP(3, weight), Buffered(2, weight)):
        assert [policy.weight(tau) for tau in (0, 1, 3)] == pytest.approx(expected)


def test_bsp_weighs_everything_alike():
    assert BSP().weight(0) == 1


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (BSP(), "bsp"),
        (ASP(), "asp(staleness_weight=constant)"),
        (
            SSP(3, StalenessWeight("inverse")),
            "ssp(staleness=3, staleness_weight=inverse)",
        ),
        (
            Buffered(4, StalenessWeight("polynomial")),
            "buffered(size=4, staleness_weight=polynomial(exponent=0.5))",
        ),
    ],
)
def test_a_policy_names_its_fields(policy, text):
    assert str(policy) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSP(-1), "staleness of SSP must be >= 0, got -1"),
        (lambda: Buffered(0), "size of Buffered must be >= 1, got 0"),
        (
            lambda: StalenessWeight("linear"),  # type: ignore[arg-type]
            "staleness_weight.name must be one of .*, got 'linear'",
        ),
        (
            lambda: StalenessWeight(exponent=1.0),
            "staleness_weight.exponent must be left out unless .* got 1.0 with 'constant'",
        ),
        (
            lambda: StalenessWeight("polynomial", 0.0),
            "staleness_weight.exponent must be > 0 and finite, got 0.0",
        ),
    ],
)
def test_errors_name_field_rule_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
