"""The inner optimisers step by step against torch.optim, decays, and what the loops refuse."""

import inspect
from typing import Any

import pytest
import torch
from torch.func import vmap

from metadist.algorithm import Estimate, InnerState
from metadist.algorithms import AID, ALGORITHMS, ITD
from metadist.algorithms.meha import MEHA
from metadist.algorithms.parts.inner import (
    InnerLoop,
    InnerOptimizer,
    SingleLoop,
    adam_step,
    decayed,
    sgd_step,
)
from metadist.algorithms.ufom import UFOM
from metadist.evaluation import with_inner_steps
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
        inner = self.descend(oracle, context, state.inner)
        return Estimate(zeros_like(context), None, InnerState(inner), {})


class Single(SingleLoop):
    """An algorithm whose only move is one step of y."""

    def init(self, oracle, context, inner):
        return InnerState(inner)

    def move(self, oracle, context, state):
        gradient = oracle.inner_grad(context, state.inner, oracle.draw_inner())
        inner = self.descend_once(oracle, state.inner, gradient)
        return Estimate(zeros_like(context), None, InnerState(inner), {})


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
    ({}, lambda leaves: torch.optim.SGD(leaves, lr=0.05)),
    ({"momentum": 0.9}, lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9)),
    ({"inner_optimizer": "adam"}, lambda leaves: torch.optim.Adam(leaves, lr=0.05)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(("options", "make"), OPTIMIZERS, ids=["sgd", "momentum", "adam"])
def test_steps_are_those_of_torch_optim(options, make, shapes):
    inner = inner_of(shapes)
    # Gradients of many sizes, among them none at all.
    gradients = [
        {name: leaf * 10.0 ** (t % 9 - 6) for name, leaf in random_like(inner, t).items()}
        for t in range(120)
    ]
    gradients[0] = gradients[50] = zeros_like(inner)
    optimizer = InnerOptimizer(Loop(inner_lr=0.3, **options), 0.05)
    y = inner
    for gradient, expected in zip(gradients, torch_run(make, inner, gradients), strict=True):
        y = optimizer.step(y, gradient)
        assert_close(y, expected, 1e-12)


@pytest.mark.parametrize(("options", "make"), OPTIMIZERS, ids=["sgd", "momentum", "adam"])
def test_under_vmap_every_task_has_its_own_optimizer(options, make):
    inners = [inner_of(SHAPES[1], seed) for seed in (0, 10, 20)]
    gradients = [
        [random_like(inner, 7 * t + b) for b, inner in enumerate(inners)] for t in range(30)
    ]

    def run(inner, steps):
        optimizer = InnerOptimizer(Loop(**options), 0.05)
        for gradient in steps:
            inner = optimizer.step(inner, gradient)
        return inner

    together = vmap(run)(stack(inners), [stack(step) for step in gradients])
    for b, inner in enumerate(inners):
        *_, expected = torch_run(make, inner, [step[b] for step in gradients])
        assert_close(select(together, b), expected, 1e-12)


def test_steps_change_no_input():
    y, gradient = inner_of(SHAPES[1]), inner_of(SHAPES[1], 9)
    before = {name: leaf.clone() for name, leaf in (*y.items(), *gradient.items())}
    _, moments = adam_step(y, None, gradient, 0.1)
    kept = moments.first["w"].clone()
    adam_step(y, moments, gradient, 0.1)
    _, velocity = sgd_step(y, None, gradient, {name: torch.tensor(0.1) for name in y}, 0.9)
    sgd_step(y, velocity, gradient, {name: torch.tensor(0.1) for name in y}, 0.9)
    after = dict((*y.items(), *gradient.items()))
    assert all(torch.equal(after[name], leaf) for name, leaf in before.items())
    assert torch.equal(moments.first["w"], kept) and moments.num_steps == 1


@pytest.mark.parametrize(("options", "make"), OPTIMIZERS, ids=["sgd", "momentum", "adam"])
def test_the_loop_is_torch_optim_on_a_problem(options, make):
    problem, task = Smooth(), smooth_task(0)
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), task)
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    optimizer = make(leaves.values())
    for _ in range(40):
        optimizer.zero_grad()
        problem.inner_loss(context, leaves, task.support).backward()  # type: ignore[arg-type]
        optimizer.step()
    expected = {name: leaf.detach() for name, leaf in leaves.items()}
    algorithm = Loop(inner_steps=40, inner_lr=0.05, **options)
    assert_close(algorithm.adapt(oracle, context, start), expected, 1e-12)
    state = algorithm.init(oracle, context, start)
    assert_close(algorithm.estimate(oracle, context, state).state.inner, expected, 1e-12)
    if not options:
        assert_close(UFOM(40, 0.05).adapt(oracle, context, start), expected, 1e-12)
        single = Single(inner_steps=40, inner_lr=0.05)
        assert_close(single.adapt(oracle, context, start), expected, 1e-12)
        result = single.estimate(oracle, context, single.init(oracle, context, start))
        assert_close(result.state.inner, expected, 1e-12)


def test_decayed_is_a_power_of_the_step():
    assert decayed(0.5, 0.0, 1000) == 0.5
    assert decayed(0.5, 0.5, 0) == 0.5
    assert decayed(0.5, 0.5, 3) == 0.25
    assert decayed(2.0, -0.5, 8) == pytest.approx(6.0)


@pytest.mark.parametrize("kind", [Loop, Single, MEHA])
def test_rates_decay_with_the_outer_step_which_is_0_in_evaluation(kind):
    problem, outer, task = golden_quadratic()
    algorithm = kind(inner_steps=1, inner_lr=0.2, inner_decay=0.5)
    for step, rate in ((3, 0.1), (0, 0.2)):
        oracle, context, start = oracle_of(problem, outer, task, step=step)
        assert_close(algorithm.adapt(oracle, context, start), {"y": rate * outer["x"]}, 1e-14)
        state = algorithm.estimate(oracle, context, algorithm.init(oracle, context, start)).state
        moved = state.proximal_point if kind is MEHA else state.inner
        assert_close(moved, {"y": rate * outer["x"]}, 1e-14)


COMMON = [
    ({"inner_steps": 0}, r"inner_steps must be >= 1, got 0"),
    ({"inner_lr": 0.0}, r"inner_lr must be > 0 and finite, got 0.0"),
    ({"inner_lr": float("nan")}, r"inner_lr must be > 0 and finite, got nan"),
    ({"inner_decay": -0.1}, r"inner_decay must be in \[0, 1\], got -0.1"),
    ({"inner_decay": 1.5}, r"inner_decay must be in \[0, 1\], got 1.5"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *((kind, *case) for kind in (Loop, Single) for case in COMMON),
        (Loop, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (
            Loop,
            {"inner_optimizer": "lbfgs"},
            r"inner_optimizer must be one of \('sgd', 'adam'\), got 'lbfgs'",
        ),
        (
            Loop,
            {"inner_optimizer": "adam", "momentum": 0.5},
            r"momentum must be 0 with inner_optimizer='adam', got 0.5: it is the momentum of 'sgd'",
        ),
    ],
    ids=str,
)
def test_messages(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


WITH_MEMORY = {
    name: cls for name, cls in ALGORITHMS.items() if "momentum" in inspect.signature(cls).parameters
}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_an_optimizer_that_ends_at_its_first_step_is_refused(name):
    make: Any = WITH_MEMORY[name]
    options: dict[str, Any] = {"adjoint_lr": 0.1} if name in ("amigo", "subbio") else {}
    with pytest.raises(
        ValueError, match=r"inner_steps must be >= 2 with momentum=0\.3, got 1: the"
    ):
        make(inner_steps=1, momentum=0.3)
    assert make(inner_steps=1).momentum == 0 and make(inner_steps=2, momentum=0.3).momentum == 0.3
    if isinstance(make(), InnerLoop):
        if name == "sama":  # whose state has the moments
            make(inner_steps=1, inner_optimizer="adam")
        else:
            with pytest.raises(ValueError, match=r"with inner_optimizer='adam', got 1: .* sign of"):
                make(inner_steps=1, inner_optimizer="adam", **options)
        make(inner_steps=2, inner_optimizer="adam", **options)
    elif name in ("itd", "metasgd"):
        for optimizer in ("adagrad", "rmsprop", "adamax"):
            with pytest.raises(
                ValueError, match=rf"inner_optimizer='{optimizer}', got 1: .* sign of"
            ):
                make(inner_steps=1, engine="higher", inner_optimizer=optimizer)
        make(inner_steps=1, engine="higher")
    else:
        assert name == "reptile"


def test_evaluation_after_one_step_says_that_momentum_has_no_part_in_it():
    assert with_inner_steps(ITD(3, 0.1, momentum=0.9), 1) == ITD(1, 0.1)
    assert with_inner_steps(ITD(3, 0.1, momentum=0.9), 2) == ITD(2, 0.1, momentum=0.9)
    with pytest.raises(
        ValueError, match="inner_steps must be >= 2 with inner_optimizer='adam', got 1"
    ):
        with_inner_steps(AID(3, 0.1, inner_optimizer="adam"), 1)
