"""The inner optimisers step by step against torch.optim, decays, and what the loops refuse."""

import inspect
from typing import Any

import pytest
import torch
from torch.func import vmap

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms import AID, ALGORITHMS, ITD
from metadist.algorithms.meha import MEHA
from metadist.algorithms.parts.inner import Descent, InnerLoop, SingleLoop, decayed
from metadist.algorithms.ufom import UFOM
from metadist.evaluation import with_inner_steps
from metadist.step_rules import SGD, Adam, AdamW
from metadist.trees import select, stack, zeros_like
from tests.problems import (
    Smooth,
    assert_close,
    generator,
    golden_quadratic,
    oracle_of,
    randn,
    random_like,
    smooth_task,
)

SHAPES = [{"y": (3,)}, {"w": (2, 3), "b": ()}, {"w": (4, 2, 3, 3), "v": (1,), "empty": (0,)}]


class Loop(InnerLoop):
    """An algorithm with an inner loop and no hypergradient."""

    def estimate(self, oracle, context, state):
        state = InnerState(*self.descend(oracle, context, state.inner, state.memory))
        return Estimate(zeros_like(context), None, state, {})


class Single(SingleLoop):
    """An algorithm whose only move is one step of y."""

    def move(self, oracle, context, state):
        gradient = oracle.inner_grad(context, state.inner, oracle.draw_inner())
        state = InnerState(*self.step_inner(oracle, state.inner, state.memory, gradient))
        return Estimate(zeros_like(context), None, state, {})


def inner_of(shapes, seed=0):
    return {
        name: randn(seed + i, *shape) if shape else randn(seed + i, 1)[0]
        for i, (name, shape) in enumerate(shapes.items())
    }


def torch_run(make, inner, gradients):
    """The iterates of a torch.optim optimiser along given gradients."""
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in inner.items()}
    optimizer = make(leaves.values())
    for gradient in gradients:
        for name, leaf in leaves.items():
            leaf.grad = gradient[name].clone()
        optimizer.step()
        yield {name: leaf.detach().clone() for name, leaf in leaves.items()}


OPTIMIZERS = [
    (SGD(0.05), lambda leaves: torch.optim.SGD(leaves, lr=0.05)),
    (
        SGD(0.05, momentum=0.9, weight_decay=0.1),
        lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9, weight_decay=0.1),
    ),
    (
        Adam(0.05, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1),
        lambda leaves: torch.optim.Adam(
            leaves, lr=0.05, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1
        ),
    ),
    (Adam(0.05), lambda leaves: torch.optim.Adam(leaves, lr=0.05)),
    (AdamW(0.05), lambda leaves: torch.optim.AdamW(leaves, lr=0.05)),
]
NAMES = ["SGD", "SGD with momentum", "Adam with decay", "Adam", "AdamW"]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(("steps", "make"), OPTIMIZERS, ids=NAMES)
def test_steps_are_those_of_torch_optim(steps, make, shapes):
    inner = inner_of(shapes)
    # Gradients of many sizes, among them none at all.
    gradients = [
        {name: leaf * 10.0 ** (t % 9 - 6) for name, leaf in random_like(inner, t).items()}
        for t in range(120)
    ]
    gradients[0] = gradients[50] = zeros_like(inner)
    y, memory = inner, steps.start(inner)
    for gradient, expected in zip(gradients, torch_run(make, inner, gradients), strict=True):
        y, memory = steps.step(y, memory, gradient, steps.lr_at(0))
        assert_close(y, expected, 1e-12)
    assert memory.num_steps == 120


@pytest.mark.parametrize(("steps", "make"), OPTIMIZERS, ids=NAMES)
def test_under_vmap_every_task_has_its_own_optimizer(steps, make):
    inners = [inner_of(SHAPES[1], seed) for seed in (0, 10, 20)]
    gradients = [
        [random_like(inner, 7 * t + b) for b, inner in enumerate(inners)] for t in range(30)
    ]

    def run(inner, gradients):
        memory = steps.start(inner)
        for gradient in gradients:
            inner, memory = steps.step(inner, memory, gradient, 0.05)
        return inner

    together = vmap(run)(stack(inners), [stack(step) for step in gradients])
    for b, inner in enumerate(inners):
        *_, expected = torch_run(make, inner, [step[b] for step in gradients])
        assert_close(select(together, b), expected, 1e-12)


def test_steps_change_no_input():
    y, gradient = inner_of(SHAPES[1]), inner_of(SHAPES[1], 9)
    before = {name: leaf.clone() for name, leaf in (*y.items(), *gradient.items())}
    for steps in (SGD(0.1, momentum=0.9), AdamW(0.1, clip_norm=0.1)):
        _, memory = steps.step(y, steps.start(y), gradient, 0.1)
        kept = memory.means[0]["w"].clone()
        steps.step(y, memory, gradient, 0.1)
        assert torch.equal(memory.means[0]["w"], kept) and memory.num_steps == 1
    after = dict((*y.items(), *gradient.items()))
    assert all(torch.equal(after[name], leaf) for name, leaf in before.items())


@pytest.mark.parametrize(("steps", "make"), OPTIMIZERS, ids=NAMES)
def test_the_loop_is_torch_optim_on_a_problem(steps, make):
    problem, task = Smooth(), smooth_task(0)
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), task)
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    optimizer = make(leaves.values())
    for _ in range(40):
        optimizer.zero_grad()
        problem.inner_loss(context, leaves, task.support).backward()  # type: ignore[arg-type]
        optimizer.step()
    expected = {name: leaf.detach() for name, leaf in leaves.items()}

    class Decaying(Loop):
        refuses_decay = ""

    algorithm = Decaying(inner_steps=40, inner_optimizer=steps)
    assert_close(algorithm.adapt(oracle, context, start), expected, 1e-12)
    state = algorithm.init(oracle, context, start)
    assert_close(algorithm.estimate(oracle, context, state).state.inner, expected, 1e-12)
    assert_close(UFOM(40, inner_optimizer=steps).adapt(oracle, context, start), expected, 1e-12)
    if not steps.weight_decay:
        single = Single(inner_steps=40, inner_optimizer=steps)
        assert_close(single.adapt(oracle, context, start), expected, 1e-12)
        result = single.estimate(oracle, context, single.init(oracle, context, start))
        assert_close(result.state.inner, expected, 1e-12)


def test_decayed_is_a_power_of_the_step():
    assert decayed(0.5, 0.0, 1000) == 0.5
    assert decayed(0.5, 0.5, 0) == 0.5
    assert decayed(0.5, 0.5, 3) == 0.25
    assert decayed(2.0, -0.5, 8) == pytest.approx(6.0)


@pytest.mark.parametrize("kind", [Loop, Single, MEHA])
def test_rates_fall_with_the_outer_step_but_not_in_evaluation(kind):
    problem, outer, task = golden_quadratic()
    algorithm = kind(inner_steps=1, inner_optimizer=SGD(0.2, schedule="power", exponent=0.5))
    for step, rate in ((3, 0.1), (0, 0.2)):
        oracle, context, start = oracle_of(problem, outer, task, step=step)
        assert_close(algorithm.adapt(oracle, context, start), {"y": 0.2 * outer["x"]}, 1e-14)
        state = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start)).state
        moved = state.proximal_point if kind is MEHA else state.inner
        assert_close(moved, {"y": rate * outer["x"]}, 1e-14)


COMMON = [
    ({"inner_steps": 0}, r"inner_steps must be >= 1, got 0"),
    ({"inner_lr": 0.0}, r"inner_lr must be > 0 and finite, got 0.0"),
    ({"inner_lr": float("nan")}, r"inner_lr must be > 0 and finite, got nan"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *((kind, *case) for kind in (Loop, Single) for case in COMMON),
        (
            Loop,
            {"inner_optimizer": "lbfgs"},
            r"inner_optimizer must be SGD\(...\), Adam\(...\) or AdamW\(...\), got 'lbfgs'",
        ),
    ],
    ids=str,
)
def test_messages(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


WITH_MEMORY = {
    name: cls
    for name, cls in ALGORITHMS.items()
    if issubclass(cls, Descent) and not cls.refuses_memory
}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_rule_that_ends_at_its_first_step_is_refused(name):
    make: Any = WITH_MEMORY[name]
    names = inspect.signature(make).parameters
    more: dict[str, Any] = {"rounds": 2} if "rounds" in names else {}
    momentum = {"inner_optimizer": SGD(0.2, momentum=0.3)}
    with pytest.raises(
        ValueError, match=r"inner_steps must be >= 2 with momentum=0\.3, got 1: the .* velocity"
    ):
        make(inner_steps=1, **momentum)
    assert make(inner_steps=2, **momentum).step_rule.momentum == 0.3
    carried = make(inner_steps=1, inner_optimizer=SGD(0.2, momentum=0.3, carry=True))
    assert "carry=True continues" in carried.needs_kept_state
    if name == "metasgd":  # the rates that it learns are those of SGD
        return
    if "adjoint_lr" in names:
        more["adjoint_lr"] = 0.1
    if name == "aid":
        more["solver"] = "fixed_point"
    with pytest.raises(ValueError, match=r"with inner_optimizer=Adam, got 1: .* sign of"):
        make(inner_steps=1, inner_optimizer=Adam(), **more)
    make(inner_steps=2, inner_optimizer=Adam(), **more)
    assert make(inner_steps=1, inner_optimizer=Adam(carry=True), **more).needs_kept_state


def test_evaluation_after_one_step_says_that_momentum_has_no_part_in_it():
    algorithm = ITD(3, inner_optimizer=SGD(0.2, momentum=0.9))
    assert with_inner_steps(algorithm, 1) == ITD(1, inner_optimizer=SGD(0.2))
    assert with_inner_steps(algorithm, 2) == ITD(2, inner_optimizer=SGD(0.2, momentum=0.9))
    with pytest.raises(
        ValueError, match="inner_steps must be >= 2 with inner_optimizer=Adam, got 1"
    ):
        with_inner_steps(AID(3, inner_optimizer=Adam()), 1)
