"""The outer variable: torch.optim on the mean hypergradient, each lease once, in lease order."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.compute import intra_op_threads
from metadist.optimizer import OPTIMIZERS, OuterOptimizer
from metadist.outer import BLOCK, OuterVariable, StepRules, norm_of_blocks, shard_bounds
from metadist.trees import flatten
from tests.problems import assert_close, assert_same_bytes, computed_lease, generator

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
    return computed_lease(lease_id, version, total, num_tasks, weight)


def test_every_optimizer_is_tested():
    assert OPTIONS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), EVERY_OPTIMIZER)
def test_a_step_is_that_of_torch_optim_on_the_mean_gradient(name, options, dtype):
    config = OuterOptimizer(name, lr=0.05, options=options)
    variable = OuterVariable(params(dtype), config)
    leaf = torch.nn.Parameter(flatten(params(dtype)))
    reference = config.make([leaf])
    for step in range(4):
        pair = [contribution(2 * step + i, step, num_tasks=3 - i, dtype=dtype) for i in range(2)]
        variable.apply(pair)
        leaf.grad = (pair[0].total + pair[1].total) / 5
        reference.step()
        assert torch.equal(variable.flat, leaf.detach())
    assert list(variable.params) == ["b", "a", "c"]
    assert torch.equal(flatten(variable.params), leaf.detach())


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("given", [{}, {"fused": False}, {"foreach": True}, {"fused": True}])
def test_adam_is_fused_unless_another_loop_is_asked_for(name, given):
    leaf = torch.nn.Parameter(torch.randn(1000, generator=generator(1)))
    made = OuterOptimizer(name, lr=0.05, options=given).make([leaf])
    assert bool(made.defaults["fused"]) is (given in ({}, {"fused": True}))
    plain = torch.nn.Parameter(leaf.detach().clone())
    reference = OPTIMIZERS[name]([plain], lr=0.05, foreach=False)
    for step in range(5):
        leaf.grad = plain.grad = torch.randn(1000, generator=generator(step, 2))
        made.step()
        reference.step()
    torch.testing.assert_close(leaf.detach(), plain.detach(), rtol=1e-5, atol=1e-6)


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


KERNELS = [
    ("adam", {}),
    ("adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("adamw", {}),
    ("sgd", {"fused": True, "momentum": 0.9}),
    ("adagrad", {"fused": True}),
]


@pytest.mark.parametrize(("name", "options"), KERNELS, ids=str)
def test_kernels_that_divide_by_themselves_step_as_if_the_mean_were_clipped_first(name, options):
    clip, length = 0.7, 2 * BLOCK + 3
    start = {"x": torch.randn(length, generator=generator(1))}
    variable = OuterVariable(start, OuterOptimizer(name, 0.05, options, clip_norm=clip))
    first, scaled = (OuterVariable(start, OuterOptimizer(name, 0.05, options)) for _ in range(2))
    for version in range(3):
        item = long_contribution(version, version, length, torch.float32)._replace(weight=1.0)
        mean = item.total / item.result.num_tasks
        norm = norm_of_blocks(variable.prepare([item]))
        assert norm > clip
        variable.commit(norm)
        # Whole blocks are divided and the rest is multiplied, which differ by a rounding.
        times = mean * (clip / norm)
        whole = mean[: 2 * BLOCK] / torch.tensor(norm / clip)
        clipped = torch.cat([whole, times[2 * BLOCK :]])
        first.apply([computed_lease(version, version, clipped, 1)])
        scaled.apply([computed_lease(version, version, times, 1)])
    assert_same_bytes(variable.params, first.params)
    assert_same_bytes(variable.state().optimizer, first.state().optimizer)
    assert_close(variable.params, scaled.params, 1e-6)


@pytest.mark.parametrize(("name", "options"), KERNELS, ids=str)
def test_what_is_no_longer_than_clip_norm_is_left_alone(name, options):
    start = {"x": torch.randn(BLOCK + 3, generator=generator(1))}
    short, free = (
        OuterVariable(start, OuterOptimizer(name, 0.05, options, clip_norm=clip_norm))
        for clip_norm in (1e9, None)
    )
    for version in range(2):
        item = long_contribution(version, version, BLOCK + 3, torch.float32)
        assert short.apply([item]) == free.apply([item])
    assert_same_bytes(short.params, free.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_clipped_where_float32_does_not_hold_the_divisor(dtype):
    config = OuterOptimizer("adam", 0.05, {"eps": 1.0}, clip_norm=0.5)
    variable = OuterVariable({"x": torch.zeros(BLOCK, dtype=dtype)}, config)
    total = torch.full((BLOCK,), 3e38, dtype=dtype)
    variable.apply([computed_lease(0, 0, total, 1)])
    # The first step of Adam is lr g / (|g| + eps).
    g = 0.5 / BLOCK**0.5
    expected = torch.full((BLOCK,), -0.05 * g / (g + 1), dtype=dtype)
    torch.testing.assert_close(variable.flat, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_clipping_by_value_clamps_what_clipping_by_norm_has_left(clip_norm):
    config = OuterOptimizer("sgd", 1.0, clip_norm=clip_norm, clip_value=0.3)
    variable = OuterVariable(params(torch.float64), config)
    before = variable.flat.clone()
    item = contribution(0, num_tasks=2, dtype=torch.float64)
    result = variable.apply([item])
    mean = item.total / 2
    assert result.hypergradient_norm == pytest.approx(float(mean.norm()), rel=1e-12)
    scaled = mean * min(1.0, (clip_norm or math.inf) / float(mean.norm()))
    assert 0 < int((scaled.abs() > 0.3).sum()) < len(scaled)
    assert torch.allclose(before - variable.flat, scaled.clamp(-0.3, 0.3), atol=1e-12)


def test_shards_clip_by_value_to_the_bytes_of_one_owner():
    config = OuterOptimizer("sgd", 1.0, clip_norm=50.0, clip_value=0.1)
    outer = torch.zeros(LENGTH)
    item = long_contribution(0, 0, LENGTH, torch.float32)
    shards, whole = Shards(outer, config, None, 2), Shards(outer, config, None, 1)
    shards.apply([item])
    whole.apply([item])
    assert torch.equal(shards.state()["x"], whole.state()["x"])
    assert float(whole.state()["x"].abs().max()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "piecewise"}, "schedule_factors must be given with schedule='piecewise'"),
        ({"schedule_factors": {3: 0.1}}, "schedule_factors must be given with schedule='piece"),
        (
            {"schedule": "piecewise", "schedule_factors": {0: 0.1}},
            "a step of schedule_factors must be .*>= 1, got 0",
        ),
        (
            {"schedule": "piecewise", "schedule_factors": {5: -0.1}},
            r"schedule_factors\[5\] must be > 0 and finite, got -0.1",
        ),
        ({"clip_value": 0.0}, "clip_value must be > 0"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OuterOptimizer("sgd", 0.1, **options)


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
        (
            {"schedule": "piecewise", "schedule_factors": {4: 0.1, 2: 0.5}},
            [1.0, 1.0, 0.5, 0.5, 0.1, 0.1],
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
        ({"schedule": "cosine"}, r"schedule_steps must be >= 1 with schedule='cosine', got None"),
        ({"schedule_steps": 9}, r"schedule_steps must be None with schedule='constant', got 9"),
        ({"schedule_power": 0.3}, r"schedule_power must be left out with schedule='constant'"),
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


LENGTH = 4 * BLOCK + 77


def long_contribution(lease_id, version, length, dtype):
    random = generator(lease_id, 6)
    total = torch.randn(length, generator=random, dtype=torch.float64) * 10.0 ** (lease_id % 3)
    return computed_lease(lease_id, version, total.to(dtype), 2, weight=1 / (1 + lease_id))


class Shards:
    """The slices of x with their owners, which step it as a server of several shards does."""

    def __init__(self, outer, config, rules, num_shards):
        self.bounds = shard_bounds(len(outer), num_shards)
        self.variables = [OuterVariable({"x": outer[a:b]}, config, rules) for a, b in self.bounds]

    def apply(self, items):
        length = self.bounds[-1][1]
        squares = []
        for (start, stop), variable in zip(self.bounds, self.variables, strict=True):
            squares += variable.prepare(
                [
                    item._replace(
                        total=torch.cat([h[start:stop] for h in item.total.split(length)])
                    )
                    for item in items
                ]
            )
        norm = norm_of_blocks(squares)
        steps = [variable.commit(norm) for variable in self.variables]
        assert all(step == steps[0] for step in steps)
        return steps[0]

    def state(self):
        """Every tensor of the state, put together."""
        states = [variable.state() for variable in self.variables]
        found = {"x": torch.cat([state.outer["x"] for state in states])}
        for field in ("optimizer", "recursion"):
            for name, leaf in getattr(states[0], field).items():
                parts = [getattr(state, field)[name] for state in states]
                found[name] = torch.cat(parts) if leaf.ndim else leaf
        return found


def as_one(variable):
    state = variable.state()
    return {**state.outer, **state.optimizer, **state.recursion}


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1}
LONG = [
    *((*case.values, torch.float32, 1) for case in EVERY_OPTIMIZER),
    ("adam", {"fused": True}, torch.float32, 1),
    ("adam", {"foreach": True}, torch.float32, 1),
    ("adam", {}, torch.float32, 3),
    ("adam", {"fused": True}, torch.float32, 3),
    ("adamw", {}, torch.float64, 2),
    # Half precision is rounded differently at the ends of vectors.
    ("sgd", MOMENTUM, torch.float16, 1),
    ("sgd", MOMENTUM, torch.float16, 3),
]


@pytest.mark.parametrize(("name", "options", "dtype", "num_threads"), LONG, ids=str)
def test_shards_step_x_to_the_bytes_of_one_owner(name, options, dtype, num_threads):
    config = OuterOptimizer(
        name, 0.05, options, clip_norm=0.5, schedule="cosine", schedule_steps=5, warmup_steps=2
    )
    outer = torch.randn(LENGTH, generator=generator(1), dtype=torch.float64).to(dtype)
    whole = OuterVariable({"x": outer}, config)
    three = Shards(outer, config, None, 3)
    with intra_op_threads(num_threads):
        for version in range(3):
            items = [long_contribution(2 * version + i, version, LENGTH, dtype) for i in range(2)]
            assert three.apply(items) == whole.apply(items)
    assert_same_bytes(three.state(), as_one(whole))
    assert not torch.equal(whole.flat, outer)


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_step_a_two_point_method_to_the_bytes_of_one_owner(num_shards):
    config = OuterOptimizer("adam", 0.05, clip_norm=0.5)
    rules = StepRules(recursive_weight=lambda version: 0.3 + 0.1 * version)
    outer = torch.randn(LENGTH, generator=generator(1))
    whole = OuterVariable({"x": outer}, config, rules)
    shards = Shards(outer, config, rules, num_shards)
    for version in range(4):
        length = LENGTH * (2 if version else 1)
        items = [long_contribution(2 * version + i, version, length, torch.float32) for i in (0, 1)]
        assert shards.apply(items) == whole.apply(items)
    assert_same_bytes(shards.state(), as_one(whole))


def test_the_norm_is_that_of_numpy_and_clips_over_all_shards():
    config = OuterOptimizer("sgd", 1.0, clip_norm=2.0)
    outer = torch.zeros(LENGTH)
    shards = Shards(outer, config, None, 2)
    item = long_contribution(0, 0, LENGTH, torch.float32)
    step = shards.apply([item])
    expected = float((item.total.double() / 2).norm())
    assert step.hypergradient_norm == pytest.approx(expected, rel=1e-7)
    assert float(shards.state()["x"].double().norm()) == pytest.approx(2.0, rel=1e-5)


def test_what_was_prepared_changes_nothing_until_it_is_committed():
    variable = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    expected = OuterVariable(params(), OuterOptimizer("sgd", 0.1))
    variable.prepare([contribution(5)])
    assert_same_bytes(variable.params, params())
    assert variable.version == 0 and not variable.is_applied(5)
    # Another step takes its place.
    norm = norm_of_blocks(variable.prepare([contribution(0)]))
    assert variable.commit(norm) == expected.apply([contribution(0)])
    assert_same_bytes(variable.params, expected.params)
    with pytest.raises(AssertionError, match="prepare comes first"):
        variable.commit(norm)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-18, 1e-30, 1e12, 1e19, 1e30, 0.0])
def test_the_norm_is_exact_where_squares_leave_the_range_of_float32(scale):
    total = torch.randn(2 * BLOCK + 3, generator=generator(0)) * scale
    total[:BLOCK] *= 1e-3
    variable = OuterVariable({"x": torch.zeros_like(total)}, OuterOptimizer("sgd", 1.0))
    expected = float(total.double().norm())
    step = variable.apply([computed_lease(0, 0, total, 1)])
    assert step.hypergradient_norm == pytest.approx(expected, rel=1e-6)
    assert torch.equal(variable.flat, -total)


@pytest.mark.parametrize("at", [3, LENGTH - 1])
def test_what_is_not_finite_in_one_shard_is_refused_there_and_committed_nowhere(at):
    outer = torch.zeros(LENGTH)
    shards = Shards(outer, OuterOptimizer("adam", 0.1), None, 2)
    item = long_contribution(0, 0, LENGTH, torch.float32)
    item.total[at] = math.inf
    with pytest.raises(ValueError, match=r"must have a finite mean, got NaN or Inf from leases"):
        shards.apply([item])
    assert torch.equal(shards.state()["x"], outer)
    assert [variable.version for variable in shards.variables] == [0, 0]


def test_huge_numbers_without_a_finite_norm_are_no_error():
    variable = OuterVariable({"x": torch.zeros(2, dtype=torch.float64)}, OuterOptimizer("sgd", 1.0))
    total = torch.tensor([1e200, 1.0], dtype=torch.float64)
    assert variable.apply([computed_lease(0, 0, total, 1)]).hypergradient_norm == math.inf
    assert variable.flat.tolist() == [-1e200, -1.0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 40 * BLOCK), st.integers(1, 40))
def test_the_slices_of_shards_are_whole_blocks_and_cover_x(length, num_shards):
    num_blocks = max(1, -(-length // BLOCK))
    if num_shards > num_blocks:
        message = f"num_shards must be between 1 and {num_blocks} for .* {length} n.* {num_shards}:"
        with pytest.raises(ValueError, match=message):
            shard_bounds(length, num_shards)
        return
    bounds = shard_bounds(length, num_shards)
    assert bounds[0][0] == 0 and bounds[-1][1] == length and len(bounds) == num_shards
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert all(start % BLOCK == 0 for start, _ in bounds)
    sizes = [-(-(stop - start) // BLOCK) for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_a_state_that_is_no_copy_is_the_memory_of_the_variable():
    config = OuterOptimizer("adam", 0.1)
    variable = OuterVariable({"x": torch.zeros(2 * BLOCK)}, config)
    variable.apply([long_contribution(0, 0, 2 * BLOCK, torch.float32)])
    copy, live = variable.state(), variable.state(copy=False)
    before = {**copy.outer, **copy.optimizer}
    assert_same_bytes({**live.outer, **live.optimizer}, before)
    variable.apply([long_contribution(1, 1, 2 * BLOCK, torch.float32)])
    after = variable.state()
    assert_same_bytes({**live.outer, **live.optimizer}, {**after.outer, **after.optimizer})
    assert not torch.equal(before["x"], after.outer["x"])
    assert live.outer["x"].data_ptr() == variable.flat.data_ptr()


@pytest.mark.parametrize(
    ("name", "options"), [("adam", {"amsgrad": True}), ("sgd", MOMENTUM), ("adagrad", {})]
)
def test_the_first_step_of_many_blocks_is_that_of_torch_optim_too(name, options):
    length = 130 * BLOCK + 3
    outer = torch.randn(length, generator=generator(2))
    config = OuterOptimizer(name, lr=0.05, options=options)
    variable = OuterVariable({"x": outer}, config)
    leaf = torch.nn.Parameter(outer.clone())
    reference = config.make([leaf])
    for version in range(2):
        leaf.grad = torch.randn(length, generator=generator(version, 3))
        variable.apply([computed_lease(version, version, leaf.grad, 1)])
        reference.step()
    assert torch.equal(variable.flat, leaf.detach())
    found = variable.state().optimizer
    for key, moment in reference.state[leaf].items():
        assert torch.equal(found[key], moment)
