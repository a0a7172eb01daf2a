"""Exact derivatives through every step rule, rules in all methods, and memory that is carried."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from metadist import Compute, Trainer
from metadist.algorithm import InnerState
from metadist.algorithms import ALGORITHMS, FG2U, ITD, MEHA, SAMA, UFOM
from metadist.algorithms.parts.inner import Descent
from metadist.checks.hypergradient import check_hypergradient
from metadist.flat_states import flatten_state
from metadist.hypergradient import task_hypergradients
from metadist.step_rules import SGD, Adam, AdamW, Memory
from metadist.trees import norm, sub
from tests.algorithms.toys import estimate
from tests.helpers import exact, raw
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    central_difference,
    generator,
    oracle_of,
    quadratic_task,
    smooth_task,
)

RULES: dict[str, Any] = {
    "SGD": SGD(0.1, momentum=0.7, weight_decay=0.1, no_decay=("m",)),
    "SGD, clipped": SGD(0.1, momentum=0.7, weight_decay=0.1, clip_norm=0.5),
    "Adam": Adam(0.05, betas=(0.6, 0.9), eps=1e-3),
    "Adam, clipped": Adam(0.05, eps=1e-2, weight_decay=0.1, clip_norm=0.5),
    "AdamW": AdamW(0.05, eps=1e-3, weight_decay=0.3, no_decay=("w",)),
    "schedule": AdamW(0.2, eps=1e-3, schedule="cosine", num_steps=8, floor=0.1, warmup_steps=4),
}
STEP = 2


def make_torch(rule, leaves):
    """The optimiser of torch with the options of a rule at an outer step."""
    groups = []
    for name, leaf in leaves.items():
        decays = rule.weight_decay if name not in rule.no_decay else 0.0
        groups.append({"params": [leaf], "weight_decay": decays})
    options = {"lr": rule.lr_at(STEP)}
    if isinstance(rule, SGD):
        return torch.optim.SGD(groups, momentum=rule.momentum, **options)
    kind = torch.optim.AdamW if isinstance(rule, AdamW) else torch.optim.Adam
    return kind(groups, betas=rule.betas, eps=rule.eps, **options)


def by_torch(problem, rule, outer, task, num_steps):
    """f after steps of torch.optim, gradients clipped by torch."""
    _, context, start = oracle_of(problem, outer, task)
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    optimizer = make_torch(rule, leaves)
    for _ in range(num_steps):
        optimizer.zero_grad()
        problem.inner_loss(context, leaves, task.support).backward()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), rule.clip_norm)
        optimizer.step()
    y = {name: leaf.detach() for name, leaf in leaves.items()}
    return problem.outer_loss(context, y, task.query)


@pytest.mark.parametrize("name", RULES)
def test_both_engines_are_the_derivative_through_torch_optim(name):
    problem, task, rule = Smooth(), smooth_task(2), RULES[name]
    outer = problem.init_outer(generator(2))
    expected = central_difference(lambda x: by_torch(problem, rule, x, task, 4), outer, 1e-6)
    found = []
    for engine in ("adjoint", "unrolled"):
        for compute in (Compute(), Compute(vectorize=True), Compute(graph_budget=0)):
            algorithm = ITD(4, inner_optimizer=rule, engine=engine)
            total = task_hypergradients(
                problem, algorithm, outer, [task], step=STEP, compute=compute
            ).total
            assert_close(total, expected, 1e-8)
            found.append(total)
    for total in found[1:]:
        assert_close(total, found[0], 1e-10)


@pytest.mark.parametrize("options", [{"truncate": 2}, {"first_order": True}], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_engines_agree_on_less_than_full_second_order(name, options):
    problem, task = Smooth(), smooth_task(1)
    outer = problem.init_outer(generator(1))
    one, two = (
        task_hypergradients(
            problem, ITD(4, inner_optimizer=RULES[name], engine=engine, **options), outer, [task]
        ).total
        for engine in ("adjoint", "unrolled")
    )
    assert_close(one, two, 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_ufom_that_is_always_exact_is_itd(name, recompute):
    problem, task = Smooth(), smooth_task(1)
    outer = problem.init_outer(generator(1))
    algorithm = UFOM(4, inner_optimizer=RULES[name], exact_probability=1.0, recompute=recompute)
    expected = estimate(ITD(4, inner_optimizer=RULES[name]), problem, outer, task)
    found = estimate(algorithm, problem, outer, task)
    assert_close(found.hypergradient, expected.hypergradient, 1e-10)
    assert_close(found.start_gradient, expected.start_gradient, 1e-10)


@pytest.mark.parametrize("name", RULES)
def test_forward_mode_has_the_slope_of_itd(name):
    """h = s v for one direction v, so <h, v> = s |v|^2, s being the slope that ITD's h has."""
    problem, task = Quadratic(2, 4), quadratic_task(1)
    outer = problem.init_outer(generator(1))
    rule = replace(RULES[name], no_decay=())
    exact = estimate(ITD(4, inner_optimizer=rule), problem, outer, task)
    found = estimate(FG2U(4, inner_optimizer=rule, num_directions=1), problem, outer, task)
    v, z = found.hypergradient["x"], found.start_gradient["y"]
    size = v.numel() + z.numel()  # entries of the direction are +-1
    slope = math.sqrt(float((v.square().sum() + z.square().sum()) / size))
    along = float((exact.hypergradient["x"] * v).sum() + (exact.start_gradient["y"] * z).sum())
    assert along == pytest.approx(slope**2, rel=1e-9)


class Flat(Smooth):
    """An entry of y that g does not depend on, so that its gradient is exactly 0."""

    def init_inner(self, outer, task):
        return {**super().init_inner(outer, task), "idle": outer["a"][:2]}


@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
@pytest.mark.parametrize("rule", [Adam(0.05), AdamW(0.05, clip_norm=1.0)], ids=["Adam", "AdamW"])
def test_gradients_of_exactly_zero_spoil_nothing(rule, engine):
    task = smooth_task(0)
    outer = Smooth().init_outer(generator(0))
    plain, idle = (
        task_hypergradients(
            problem, ITD(3, inner_optimizer=rule, engine=engine), outer, [task]
        ).total
        for problem in (Smooth(), Flat())
    )
    assert_close(idle, plain, 1e-9)


def test_the_root_of_a_clipped_zero_has_no_derivative_and_no_nan():
    rule = SGD(0.1, clip_norm=1.0)
    y = {"y": torch.ones(2, dtype=DOUBLE)}
    zero = {"y": torch.zeros(2, dtype=DOUBLE)}
    pulled = rule.pull(y, rule.start(y), zero, 0.1, y, ())
    assert torch.isfinite(pulled.gradient["y"]).all()


def test_schedules():
    assert [SGD(0.4, schedule="power", exponent=0.5).lr_at(k) for k in (0, 3)] == [0.4, 0.2]
    assert SGD(0.4, schedule="power", floor=0.5).lr_at(10**6) == 0.2
    linear = SGD(1.0, schedule="linear", num_steps=4, floor=0.2)
    assert [linear.lr_at(k) for k in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = SGD(1.0, schedule="cosine", num_steps=4)
    assert [cosine.lr_at(k) for k in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert [SGD(1.0, warmup_steps=4).lr_at(k) for k in (0, 1, 3, 7)] == [0.25, 0.5, 1.0, 1.0]


def test_evaluation_adapts_with_the_rate_itself():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    for kind in (ITD, MEHA, SAMA):
        warm, plain = (
            kind(3, inner_optimizer=rule).adapt(*oracle_of(problem, outer, task))
            for rule in (SGD(0.1, warmup_steps=10), SGD(0.1))
        )
        assert_close(warm, plain, 0.0)


@pytest.mark.parametrize("algorithm", [UFOM(3, exact_probability=1.0), ITD(3)], ids=str)
def test_the_check_goes_by_the_schedule_as_training_does(algorithm):
    rule = Adam(0.05, eps=1e-2, warmup_steps=3)
    algorithm = replace(algorithm, inner_optimizer=rule)
    assert check_hypergradient(Smooth(), smooth_task(1), algorithm, repeats=()).error < 1e-6


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (SGD, {"lr": 0.0}, r"lr must be > 0 and finite, got 0.0"),
    (SGD, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    (SGD, {"carry": True}, r"carry must be False with momentum=0, got True: plain SGD remembers"),
    (SGD, {"schedule": "cosine"}, r"num_steps must be >= 1 with schedule='cosine', got None"),
    (SGD, {"num_steps": 5}, r"num_steps must be None with schedule='constant', got 5"),
    (SGD, {"floor": 0.1}, r"floor must be 0 with schedule='constant', which does not fall"),
    (SGD, {"no_decay": ("b",)}, r"no_decay must be empty with weight_decay=0, .* got \('b',\)"),
    (SGD, {"no_decay": "b"}, r"no_decay must be a list of patterns, got 'b': write \('b',\)"),
    (SGD, {"weight_decay": 0.1, "no_decay": None}, r"no_decay must be a list .* got None"),
    (SGD, {"weight_decay": 0.1, "no_decay": (1,)}, r"no_decay must be a list .* got \(1,\)"),
    (SGD, {"exponent": 0.9}, r"exponent must be left out with schedule='constant', got 0.9"),
    (Adam, {"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
    (Adam, {"betas": ("a", 0.9)}, r"betas must be two numbers in \[0, 1\), got \('a', 0.9\)"),
    (Adam, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    (Adam, {"eps": 0.0}, r"eps must be > 0 and finite, got 0.0"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=str)
def test_messages(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_pattern_that_matches_no_name_is_refused():
    problem, task = Smooth(), smooth_task(0)
    algorithm = ITD(2, inner_optimizer=AdamW(no_decay=("bias*",)))
    with pytest.raises(ValueError, match=r"no_decay must match names .*'bias\*', which .* of w, m"):
        estimate(algorithm, problem, problem.init_outer(generator(0)), task)


CARRIED = Adam(0.01, eps=1e-3, clip_norm=1.0, carry=True)
CARRIES = [
    name
    for name, cls in ALGORITHMS.items()
    if issubclass(cls, Descent) and not cls.refuses_memory and name not in ("metasgd", "reptile")
]


def options_of(name):
    """What a method needs beside Adam."""
    fields: dict[str, dict[str, Any]] = {
        "aid": {"solver": "fixed_point"},
        "darts": {"adjoint_lr": 0.1},
    }
    found = dict(fields.get(name, {}))
    if name in ("aid", "amigo", "subbio", "noloopaid"):
        found["adjoint_lr"] = 0.1
    return found


@pytest.mark.parametrize("name", CARRIES)
def test_carried_moments_are_a_part_of_the_state(name):
    """Two estimates with one step each differ from those that start anew, and tasks agree."""
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    make: Any = ALGORITHMS[name]
    algorithm = make(inner_steps=2, inner_optimizer=CARRIED, **options_of(name))
    oracle, context, start = oracle_of(problem, outer, task)
    state = algorithm.init(oracle, context, start)
    size = flatten_state(state).numel()
    for step in range(2):
        oracle, context, _ = oracle_of(problem, outer, task, step=step)
        state = algorithm.estimate(oracle, context, state).state
        assert flatten_state(state).numel() == size
    memories = (state.memory,) if isinstance(state.memory, Memory) else state.memory
    for memory in memories:
        assert memory.num_steps >= 2
        assert all(float(norm(mean)) > 0 for mean in memory.means)


@pytest.mark.parametrize("name", CARRIES)
def test_under_vmap_every_task_carries_its_own(name):
    problem, tasks = Smooth(), [smooth_task(index) for index in range(3)]
    outer = problem.init_outer(generator(0))
    make: Any = ALGORITHMS[name]
    algorithm = make(inner_steps=2, inner_optimizer=CARRIED, **options_of(name))
    found = []
    for vectorize in (False, True):
        states: dict[int, Any] = {}
        for step in range(2):
            result = task_hypergradients(
                problem,
                algorithm,
                outer,
                tasks,
                states=states,
                step=step,
                compute=Compute(vectorize=vectorize),
            )
            states = result.states
        found.append(result.total)
    assert_close(found[0], found[1], 1e-9)


def test_carrying_is_one_loop_in_two_halves():
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    algorithm = ITD(2, inner_optimizer=Adam(0.05, carry=True))
    first = estimate(algorithm, problem, outer, task)
    second = estimate(algorithm, problem, outer, task, first.state)
    whole = estimate(ITD(4, inner_optimizer=Adam(0.05)), problem, outer, task)
    anew = estimate(
        ITD(2, inner_optimizer=Adam(0.05)), problem, outer, task, InnerState(first.state.inner)
    )
    assert_close(second.state.inner, whole.state.inner, 1e-12)
    assert float(norm(sub(anew.state.inner, whole.state.inner))) > 1e-3


class Many:
    def sample(self, index):
        return smooth_task(index)


class OneTask:
    num_tasks = 1

    def sample(self, index):
        return smooth_task(index)


@pytest.mark.parametrize("name", ["itd", "meha", "bome", "f2sa", "sama"])
def test_a_resumed_run_carries_on_to_the_same_bytes(tmp_path, name):
    make: Any = ALGORITHMS[name]

    def trainer(folder):
        return Trainer(
            Smooth(),
            OneTask(),
            make(inner_steps=1, inner_optimizer=SGD(0.05, momentum=0.9, clip_norm=1.0, carry=True)),
            run_dir=str(tmp_path / folder),
            keep_state=True,
            quiet=True,
        )

    whole = trainer("whole")
    whole.fit(4)
    trainer("parts").fit(2)
    again = trainer("parts")
    again.restore()
    again.fit(4)
    assert exact(again.outer) == exact(whole.outer)
    assert raw(again._state.states[0]) == raw(whole._state.states[0])


def test_new_tasks_refuse_to_carry():
    algorithm = ITD(2, inner_optimizer=Adam(0.05, carry=True))
    with pytest.raises(ValueError, match=r"keep_state must be True .*carry=True continues"):
        Trainer(Smooth(), Many(), algorithm, quiet=True)
