"""The outer variable: torch.optim on the mean hypergradient, each lease once, in lease order."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.outer import OPTIMIZERS, Contribution, OuterOptimizer, OuterVariable
from metadist.trees import flatten
from tests.problems import assert_same_bytes, generator

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}],
    "adam": [{}, {"betas": [0.5, 0.9], "eps": 1e-3}, {"amsgrad": True, "weight_decay": 0.1}],
    "adamw": [{}, {"weight_decay": 0.3}],
    "rmsprop": [{}, {"momentum": 0.5, "centered": True}],
    "adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}],
}
EVERY_OPTIMIZER = [
    pytest.param(name, options, id=f"{name} {options}")
    for name in OPTIMIZERS
    for options in OPTIONS[name]
]


def params(dtype=torch.float32):
    random = generator(0)
    shapes = {"b": (2, 3), "a": (), "c": (4,)}
    return {
        name: torch.randn(shape, generator=random, dtype=dtype) for name, shape in shapes.items()
    }


def contribution(lease_id, version=0, num_tasks=1, weight=1.0, dtype=torch.float32):
    random = generator(lease_id, 5)
    # Of very different sizes, so that another order of addition gives other bytes.
    total = torch.randn(11, generator=random, dtype=dtype) * 10.0 ** (lease_id % 5)
    return Contribution(lease_id, version, total, num_tasks, weight)


def test_every_optimizer_is_tested():
    assert OPTIONS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), EVERY_OPTIMIZER)
def test_a_step_is_that_of_torch_optim_on_the_mean_gradient(name, options, dtype):
    variable = OuterVariable(params(dtype), OuterOptimizer(name, lr=0.05, options=options))
    leaf = torch.nn.Parameter(flatten(params(dtype)))
    reference = OPTIMIZERS[name]([leaf], lr=0.05, **options)
    for step in range(4):
        pair = [contribution(2 * step + i, step, num_tasks=3 - i, dtype=dtype) for i in range(2)]
        variable.apply(pair)
        leaf.grad = (pair[0].total + pair[1].total) / 5
        reference.step()
        assert torch.equal(variable.flat, leaf.detach())
    assert list(variable.params) == ["b", "a", "c"]
    assert torch.equal(flatten(variable.params), leaf.detach())


@pytest.mark.parametrize(("name", "options"), EVERY_OPTIMIZER)
@pytest.mark.parametrize("num_steps_before", [0, 1, 3])
def test_training_continues_from_a_state_bit_for_bit(name, options, num_steps_before):
    config = OuterOptimizer(
        name, 0.05, options, clip_norm=5.0, schedule="cosine", schedule_steps=9, warmup_steps=2
    )

    def train(variable, first, last):
        for step in range(first, last):
            variable.apply([contribution(step, step)])
        return variable

    whole = train(OuterVariable(params(), config), 0, 6)
    half = train(OuterVariable(params(), config), 0, num_steps_before)
    state = half.state()
    train(half, num_steps_before, 6)  # does not change the state that was taken
    resumed = OuterVariable.from_state(state, config)
    assert resumed.version == num_steps_before
    train(resumed, num_steps_before, 6)
    for variable in (half, resumed):
        assert_same_bytes(variable.params, whole.params)
        assert_same_bytes(variable.state().optimizer, whole.state().optimizer)
        assert variable.version == whole.version == 6


def test_a_state_names_every_lease_that_is_in():
    variable = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    variable.apply([contribution(n) for n in (0, 1, 3, 7)])
    state = variable.state()
    assert (state.version, state.applied_below, state.applied) == (1, 2, (3, 7))
    resumed = OuterVariable.from_state(state, OuterOptimizer("sgd", 0.1))
    assert [n for n in range(10) if resumed.is_applied(n)] == [0, 1, 3, 7]
    assert resumed.next_leases(4) == [2, 4, 5, 6]
    resumed.apply([contribution(2)])
    assert resumed.state().applied_below == 4
    assert resumed.apply([contribution(3)]).repeated == (3,)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations(range(6)))
def test_the_order_of_contributions_changes_no_byte(order):
    def step(ids):
        variable = OuterVariable(params(), OuterOptimizer("adam", 0.1))
        result = variable.apply([contribution(n, num_tasks=n + 1, weight=1 / (n + 1)) for n in ids])
        return variable, result

    variable, result = step(order)
    expected, expected_result = step(range(6))
    assert_same_bytes(variable.params, expected.params)
    assert result == expected_result


def test_contributions_are_such_that_another_order_of_addition_would_show():
    totals = [contribution(n).total for n in range(6)]
    assert not torch.equal(sum(totals), sum(reversed(totals)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=6), st.permutations(range(6)))
def test_a_repeated_lease_is_counted_and_ignored(repeated, order):
    once = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    once.apply([contribution(n) for n in range(6)])
    twice = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    result = twice.apply([contribution(n) for n in (*order, *repeated)])
    assert result.repeated == tuple(sorted(repeated))
    assert_same_bytes(twice.params, once.params)
    again = twice.apply([contribution(n) for n in repeated])
    assert (again.version, again.applied, again.repeated) == (1, (), tuple(sorted(repeated)))
    assert_same_bytes(twice.params, once.params)


def test_weights_scale_contributions_but_not_the_number_of_tasks():
    variable = OuterVariable(params(torch.float64), OuterOptimizer("sgd", 1.0))
    before = variable.flat.clone()
    one = contribution(0, num_tasks=2, weight=0.5, dtype=torch.float64)
    two = contribution(1, num_tasks=1, weight=0.25, dtype=torch.float64)
    result = variable.apply([one, two])
    mean = (0.5 * one.total + 0.25 * two.total) / 3
    assert torch.allclose(before - variable.flat, mean, rtol=1e-12)
    assert result.hypergradient_norm == pytest.approx(float(mean.norm()), rel=1e-12)


def test_staleness_is_counted_in_versions():
    variable = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    for step in range(3):
        variable.apply([contribution(step, step)])
    result = variable.apply([contribution(5, 1), contribution(3, 3), contribution(4, 0)])
    assert result.applied == (3, 4, 5)
    assert result.staleness == (0, 3, 2)
    assert result.version == variable.version == 4


@pytest.mark.parametrize("clip_norm", [0.5, 1e9, None])
def test_clipping_scales_the_mean_down_to_the_norm(clip_norm):
    variable = OuterVariable(params(torch.float64), OuterOptimizer("sgd", 1.0, clip_norm=clip_norm))
    before = variable.flat.clone()
    item = contribution(0, num_tasks=2, dtype=torch.float64)
    result = variable.apply([item])
    moved, mean = before - variable.flat, item.total / 2
    assert result.hypergradient_norm == pytest.approx(float(mean.norm()), rel=1e-12)
    assert torch.allclose(moved * mean.norm(), mean * moved.norm(), rtol=1e-9)
    expected = min(clip_norm or math.inf, float(mean.norm()))
    assert float(moved.norm()) == pytest.approx(expected, rel=1e-9)


def test_a_step_without_a_finite_task_moves_nothing_but_the_version():
    variable = OuterVariable(params(), OuterOptimizer("adam", 0.1))
    result = variable.apply([contribution(0, num_tasks=0)._replace(total=torch.zeros(11))])
    assert (result.version, result.applied, result.hypergradient_norm) == (1, (0,), 0.0)
    assert_same_bytes(variable.params, params())
    assert variable.state().optimizer == {}
    assert variable.is_applied(0)


def test_no_contribution_is_no_step():
    variable = OuterVariable(params(), OuterOptimizer("adam", 0.1))
    assert variable.apply([]).version == 0
    assert_same_bytes(variable.params, params())


def test_what_is_given_out_is_no_way_in():
    start = params()
    variable = OuterVariable(start, OuterOptimizer("sgd", 0.1))
    item = contribution(0)
    total = item.total.clone()
    start["b"].zero_()
    variable.params["b"].zero_()
    variable.state().outer["b"].zero_()
    assert_same_bytes(variable.params, params())
    variable.apply([item])
    assert torch.equal(item.total, total)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "schedule_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (
            {"schedule": "cosine", "schedule_steps": 4},
            [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0, 0.0],
        ),
        (
            {"schedule": "linear", "schedule_steps": 4, "warmup_steps": 2},
            [0.5, 0.75, 0.5, 0.25, 0.0, 0.0],
        ),
    ],
)
def test_the_schedule_of_the_learning_rate(options, expected):
    config = OuterOptimizer("sgd", lr=2.0, **options)
    rates = [config.lr_at(version) for version in range(6)]
    assert rates == pytest.approx([2 * rate for rate in expected], abs=1e-12)
    variable = OuterVariable(params(torch.float64), config)
    for version, rate in enumerate(rates):
        before = variable.flat.clone()
        item = contribution(version, version, dtype=torch.float64)
        assert variable.apply([item]).lr == rate
        assert torch.allclose(before - variable.flat, rate * item.total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, r"name must be one of \['adagrad', 'adam', .*\], got 'lion'"),
        ({"lr": 0.0}, r"lr of the outer optimizer must be > 0, got 0.0"),
        ({"lr": -1.0}, r"lr of the outer optimizer must be > 0, got -1.0"),
        ({"lr": math.nan}, r"lr of the outer optimizer must be > 0, got nan"),
        ({"lr": math.inf}, r"lr of the outer optimizer must be > 0.*, got inf"),
        ({"clip_norm": 0.0}, r"clip_norm must be > 0, or None for no clipping, got 0.0"),
        (
            {"schedule": "step"},
            r"schedule must be 'constant', 'linear', 'cosine' or 'power', got 'step'",
        ),
        ({"schedule": "cosine"}, r"schedule_steps must be >= 1 with schedule='cosine', got None"),
        (
            {"schedule": "linear", "schedule_steps": 0},
            r"schedule_steps must be >= 1 with schedule='linear', got 0",
        ),
        ({"warmup_steps": -1}, r"warmup_steps must be >= 0, got -1"),
        (
            {"name": "adam", "options": {"momentum": 0.9}},
            r"options of adam must be among \[.*'betas'.*\], got 'momentum'",
        ),
        ({"options": {"lr": 1.0}}, r"options of adam must be among .*, got 'lr'"),
        ({"options": {"params": []}}, r"options of adam must be among .*, got 'params'"),
        ({"options": {"self": 1}}, r"options of adam must be among .*, got 'self'"),
    ],
    ids=str,
)
def test_messages_of_the_outer_optimizer(options, message):
    with pytest.raises(ValueError, match=message):
        OuterOptimizer(**options)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            contribution(4)._replace(total=torch.zeros(10)),
            r"contribution of lease 4 must have shape \(11,\), got \(10,\)",
        ),
        (contribution(4, 1), r"contribution of lease 4 must have a version between 0 and 0, got 1"),
        (contribution(4, -1), r"contribution of lease 4 must have a version between 0 .*, got -1"),
    ],
)
def test_a_contribution_that_does_not_fit_is_refused_and_nothing_is_applied(item, message):
    variable = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    with pytest.raises(ValueError, match=message):
        variable.apply([contribution(0), item])
    assert_same_bytes(variable.params, params())
    assert not variable.is_applied(0)


@pytest.mark.parametrize("outer", [{}, {"a": torch.ones(1, dtype=torch.int64)}])
def test_an_outer_variable_of_no_floating_dtype_is_refused(outer):
    with pytest.raises(ValueError, match="outer must hold tensors of one floating dtype, got"):
        OuterVariable(outer, OuterOptimizer())
