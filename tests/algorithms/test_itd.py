"""ITD: closed forms, the three engines, central differences."""

from typing import Any

import pytest
import torch

from metadist.algorithm import OWN, Algorithm
from metadist.algorithms import ALGORITHMS, ITD
from metadist.autograd import AutogradOracle
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.models import Conv4
from metadist.oracle import Constants, CountingOracle
from metadist.step_rules import SGD
from metadist.task import Batch, Task
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import add, scale
from tests.problems import (
    DOUBLE,
    Quadratic,
    Smooth,
    assert_close,
    assert_slopes,
    central_difference,
    generator,
    golden_quadratic,
    image_task,
    oracle_of,
    plain_gradient,
    plain_objective,
    quadratic_task,
    quadratic_terms,
    randn,
    random_like,
    smooth_task,
)

ENGINES: list[Any] = ["adjoint", "unrolled", "higher"]


def estimate(algorithm, problem, outer, task):
    oracle, context, start = oracle_of(problem, outer, task)
    context = {**context, **{n: leaf for n, leaf in outer.items() if n.startswith(OWN)}}
    return algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("truncate", "hypergradient"),
    [(None, (0.0992, -0.8704)), (2, (0.0992, -0.8704)), (1, (0.144, -0.792))],
)
def test_the_golden_table(engine, truncate, hypergradient):
    problem, outer, task = golden_quadratic()
    algorithm = ITD(inner_steps=2, inner_lr=0.2, truncate=truncate, engine=engine)
    result = estimate(algorithm, problem, outer, task)
    assert_close(result.state.inner, {"y": torch.tensor([0.72, -0.96], dtype=DOUBLE)}, 1e-12)
    assert_close(result.hypergradient, {"x": torch.tensor(hypergradient, dtype=DOUBLE)}, 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("num_steps", [1, 4])
def test_closed_forms_on_random_quadratics(engine, index, num_steps):
    problem, alpha = Quadratic(2, 4, rho=0.3), 0.15
    problem.start = randn(index, 4)
    task, outer = quadratic_task(index), problem.init_outer(generator(index))
    a, b, c, t = quadratic_terms(task)
    identity, x = torch.eye(4, dtype=DOUBLE), outer["x"]
    inverse = torch.linalg.inv(a)
    solution = inverse @ (b @ x + c)

    def power(exponent):
        return torch.linalg.matrix_power(identity - alpha * a, exponent)

    p = power(num_steps)
    y = p @ problem.start + (identity - p) @ solution
    result = estimate(ITD(num_steps, alpha, engine=engine), problem, outer, task)
    assert_close(result.state.inner, {"y": y}, 1e-12)
    h = 0.3 * x + b.T @ inverse @ (identity - p) @ (y - t)
    assert_close(result.hypergradient, {"x": h}, 1e-12)
    assert_close(result.start_gradient, {"y": p @ (y - t)}, 1e-12)

    truncated = ITD(num_steps, alpha, truncate=1, engine=engine)
    result = estimate(truncated, problem, outer, task)
    assert_close(result.hypergradient, {"x": 0.3 * x + alpha * b.T @ (y - t)}, 1e-12)
    assert_close(result.start_gradient, {"y": power(1) @ (y - t)}, 1e-12)

    first_order = ITD(num_steps, alpha, first_order=True, engine=engine)
    result = estimate(first_order, problem, outer, task)
    assert_close(result.hypergradient, {"x": 0.3 * x}, 1e-12)
    assert_close(result.start_gradient, {"y": y - t}, 1e-12)


MOMENTUM = SGD(0.1, momentum=0.7)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"inner_optimizer": MOMENTUM},
    {"truncate": 2},
    {"truncate": 1, "inner_optimizer": MOMENTUM},
    {"first_order": True},
    {"first_order": True, "inner_optimizer": MOMENTUM, "learn_lr": "per_tensor"},
    {"learn_lr": "per_tensor", "inner_optimizer": MOMENTUM},
    {"learn_lr": "per_element"},
    {"learn_lr": "per_element", "inner_optimizer": MOMENTUM, "truncate": 2},
]


def conv4(adapt):
    torch.manual_seed(0)
    return FewShotProblem(Conv4(n_way=3, width=3, image_size=16).double(), adapt=adapt)


PROBLEMS: dict[str, tuple[Any, Any]] = {
    "quadratic": (lambda: Quadratic(2, 4), quadratic_task),
    "smooth": (Smooth, smooth_task),
    "MAML on Conv4": (lambda: conv4("all"), image_task),
    "ANIL on Conv4": (lambda: conv4("head"), image_task),
}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_three_engines_agree(name, options):
    make, task_of = PROBLEMS[name]
    problem, task = make(), task_of(1)
    outer = problem.init_outer(generator(1))
    variable = ITD(inner_steps=3, inner_lr=0.1, **options)
    own = variable.init_own(problem.init_inner(outer, task))
    # Rates that differ from one another, one of them negative.
    own = {
        rate: (0.1 + 0.05 * random_like(own, 3)[rate]) * (-1 if i == 1 else 1)
        for i, rate in enumerate(own)
    }
    outer = {**outer, **own}
    one, two, three = (
        task_hypergradients(
            problem, ITD(inner_steps=3, engine=engine, **options), outer, [task], report=True
        )
        for engine in ENGINES
    )
    assert_close(one.total, two.total)
    assert_close(three.total, two.total)
    assert one.metrics == pytest.approx(two.metrics, rel=1e-10)
    assert three.metrics == pytest.approx(two.metrics, rel=1e-10)
    if "first_order" not in options or name != "quadratic":
        assert any(bool(leaf.abs().max() > 1e-3) for leaf in one.total.values())


def rates_of(outer):
    prefix = OWN + "inner_lr."
    rates = {n.removeprefix(prefix): leaf for n, leaf in outer.items() if n.startswith(prefix)}
    return {n: leaf for n, leaf in outer.items() if not n.startswith(prefix)}, rates


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("learn_lr", ["no", "per_tensor", "per_element"])
def test_every_derivative_agrees_with_central_differences(engine, momentum, learn_lr):
    problem, task = Smooth(), smooth_task(2)
    algorithm = ITD(
        4, inner_optimizer=SGD(0.15, momentum=momentum), learn_lr=learn_lr, engine=engine
    )
    outer = problem.init_outer(generator(2))
    outer = {**outer, **algorithm.init_own(problem.init_inner(outer, task))}

    def objective(x):
        x, rates = rates_of(x)
        return plain_objective(problem, x, task, 4, rates or 0.15, momentum)

    result = task_hypergradients(problem, algorithm, outer, [task])
    assert_close(result.total, central_difference(objective, outer), 1e-8)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_learned_rates_of_conv4_agree_with_central_differences(adapt):
    problem, task = conv4(adapt), image_task(2)
    algorithm = ITD(3, inner_optimizer=SGD(0.1, momentum=0.5), learn_lr="per_element")
    outer = problem.init_outer(generator(0))
    outer = {**outer, **algorithm.init_own(problem.init_inner(outer, task))}

    def objective(x):
        x, rates = rates_of(x)
        return plain_objective(problem, x, task, 3, rates, 0.5)

    result = task_hypergradients(problem, algorithm, outer, [task])
    assert_slopes(result.total, objective, outer)


@pytest.mark.parametrize(
    ("learn_lr", "shapes"),
    [("no", {}), ("per_tensor", {"w": (), "m": ()}), ("per_element", {"w": (3,), "m": (2,)})],
)
def test_learned_rates_are_outer_variables_that_begin_at_inner_lr(learn_lr, shapes):
    inner = {"w": torch.zeros(3, dtype=DOUBLE), "m": torch.zeros(2, dtype=DOUBLE)}
    own = ITD(inner_lr=0.3, learn_lr=learn_lr).init_own(inner)
    assert {n: tuple(leaf.shape) for n, leaf in own.items()} == {
        f"{OWN}inner_lr.{name}": shape for name, shape in shapes.items()
    }
    assert all(bool((leaf == 0.3).all()) and leaf.dtype == DOUBLE for leaf in own.values())


def linear_task(support_inputs, query_inputs):
    def batch(inputs, seed):
        return Batch.of(inputs, randn(seed, len(inputs)))

    return Task(batch(support_inputs, 1), batch(query_inputs, 2), 0)


class LinearRegression(Smooth):
    """One start for all tasks, adapted by one step on a mean of squares."""

    def init_outer(self, generator):
        return {"w": torch.randn(3, generator=generator, dtype=DOUBLE)}

    def encode(self, outer, task):
        return {}

    def init_inner(self, outer, task):
        return outer

    def inner_loss(self, context, inner, batch):
        return (batch.tensors[0] @ inner["w"] - batch.tensors[1]).square().mean()

    def outer_loss(self, context, inner, batch):
        return self.inner_loss(context, inner, batch)


def test_first_order_maml_is_maml_exactly_where_the_hessian_annihilates_the_query_gradient():
    problem = LinearRegression()
    outer = problem.init_outer(generator(0))
    alpha = 0.1

    def gradients(task):
        return (
            estimate(ITD(1, alpha, first_order=first), problem, outer, task).start_gradient["w"]
            for first in (False, True)
        )

    # In general they differ by alpha H grad f.
    task = linear_task(randn(3, 4, 3), randn(4, 5, 3))
    x = task.support.tensors[0]
    maml, fomaml = gradients(task)
    hessian = 2 / len(x) * x.T @ x
    assert torch.allclose(maml, fomaml - alpha * hessian @ fomaml, rtol=1e-12)
    assert float((maml - fomaml).norm()) > 0.01
    # A support set without curvature in the only directions that the query set sees.
    support = torch.cat([randn(3, 4, 1), torch.zeros(4, 2, dtype=DOUBLE)], 1)
    query = torch.cat([torch.zeros(5, 1, dtype=DOUBLE), randn(4, 5, 2)], 1)
    maml, fomaml = gradients(linear_task(support, query))
    assert torch.allclose(maml, fomaml, rtol=0, atol=1e-14) and float(fomaml.norm()) > 0.01
    # No support curvature at all.
    maml, fomaml = gradients(linear_task(torch.zeros(4, 3, dtype=DOUBLE), randn(4, 5, 3)))
    assert torch.allclose(maml, fomaml, rtol=0, atol=1e-14) and float(fomaml.norm()) > 0.01


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_adaptation_is_torch_sgd_step_by_step(momentum):
    problem, task = Smooth(), smooth_task(0)
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), task)
    leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in start.items()}
    reference = torch.optim.SGD(leaves.values(), lr=0.1, momentum=momentum)
    for num_steps in range(1, 6):
        reference.zero_grad()
        problem.inner_loss(context, leaves, task.support).backward()  # type: ignore[arg-type]
        reference.step()
        expected = {name: leaf.detach() for name, leaf in leaves.items()}
        # One step with momentum is refused, since momentum would do nothing.
        for engine in ENGINES if num_steps > 1 or not momentum else ():
            algorithm = ITD(num_steps, inner_optimizer=SGD(0.1, momentum=momentum), engine=engine)
            assert_close(algorithm.adapt(oracle, context, start), expected, 1e-13)
            assert_close(
                estimate(algorithm, problem, problem.init_outer(generator(0)), task).state.inner,
                expected,
                1e-13,
            )


@pytest.mark.parametrize("learn_lr", ["per_tensor", "per_element"])
def test_adaptation_uses_the_learned_rates(learn_lr):
    problem, task = Smooth(), smooth_task(0)
    outer = problem.init_outer(generator(0))
    oracle, context, start = oracle_of(problem, outer, task)
    algorithm = ITD(1, 0.1, learn_lr=learn_lr)
    own = scale(algorithm.init_own(start), 3.0)
    _, rates = rates_of(own)
    gradient = oracle.inner_grad(context, start, oracle.draw_inner())
    expected = {name: start[name] - rates[name] * gradient[name] for name in start}
    assert_close(algorithm.adapt(oracle, {**context, **own}, start), expected, 1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_step_takes_a_draw_of_its_own_and_second_order_takes_the_same(engine):
    """Central differences through mini-batches that change from step to step."""
    problem, task = Smooth(), smooth_task(3, num_support=9, num_query=7)
    outer = problem.init_outer(generator(0))
    algorithm = ITD(3, 0.1, engine=engine)

    def objective(x):
        oracle, context, y = oracle_of(problem, x, task, batch_size=3, seed=5)
        for _ in range(3):
            y = add(y, oracle.inner_grad(context, y, oracle.draw_inner()), -0.1)
        return oracle.outer_value(context, y, oracle.draw_outer())

    result = task_hypergradients(
        problem, algorithm, outer, [task], compute=Compute(batch_size=3, seed=5)
    )
    assert_close(result.total, central_difference(objective, outer), 1e-8)


@pytest.mark.parametrize(
    ("options", "second_order"), [({}, 5), ({"truncate": 2}, 2), ({"first_order": True}, 0)]
)
def test_costs(options, second_order):
    problem = Smooth()
    oracle, context, start = oracle_of(problem, problem.init_outer(generator(0)), smooth_task(0))
    algorithm = ITD(inner_steps=5, **options)
    assert algorithm.second_order_steps == second_order
    counting = CountingOracle(oracle)
    algorithm.estimate(counting, context, algorithm.init(counting, context, start))
    expected = {"inner_grad": 5, "outer_grads": 1, "hvp": second_order, "jvp": second_order}
    assert {key: n for key, n in counting.counts.items() if n} == {
        key: n for key, n in expected.items() if n
    }
    counting.counts.clear()
    algorithm.adapt(counting, context, start)
    assert dict(counting.counts) == {"inner_grad": 5}


def test_results_carry_no_graph():
    problem, task = Smooth(), smooth_task(0)
    outer = {n: leaf.requires_grad_() for n, leaf in problem.init_outer(generator(0)).items()}
    detached = {n: leaf.detach() for n, leaf in outer.items()}
    for engine in ENGINES:
        total = task_hypergradients(problem, ITD(engine=engine), detached, [task]).total
        assert not any(leaf.requires_grad for leaf in total.values())


def test_short_names_and_abilities():
    assert ALGORITHMS["itd"] is ITD
    assert issubclass(ITD, Algorithm)
    assert ITD().supports_vmap and not ITD(engine="higher").supports_vmap
    assert ITD(compile=True).compiles and not ITD().compiles


def test_the_plain_reference_of_these_tests_meets_the_golden_table():
    """The reference itself against a closed form, so that both cannot be wrong together."""
    problem, outer, task = golden_quadratic()
    gradient = plain_gradient(lambda x: plain_objective(problem, x, task, 2, 0.2), outer)
    assert_close(gradient, {"x": torch.tensor([0.0992, -0.8704], dtype=DOUBLE)}, 1e-12)


@pytest.mark.parametrize(
    "options", [{"inner_lr": 0.1}, {"inner_optimizer": SGD(0.1, momentum=0.5)}]
)
@pytest.mark.parametrize("truncate", [None, 2])
def test_no_derivative_in_a_constant_start_is_computed(options, truncate, monkeypatch):
    problem, task = Smooth(), smooth_task(0)
    outer, algorithm = problem.init_outer(generator(0)), ITD(4, truncate=truncate, **options)
    names, derive = [], AutogradOracle.derive

    def noted(oracle, name, *rest):
        names.append(name)
        return derive(oracle, name, *rest)

    monkeypatch.setattr(AutogradOracle, "derive", noted)
    found = []
    for constant in ((), ("w", "m")):
        names.clear()
        oracle, context, start = oracle_of(problem, outer, task)
        oracle.constants = Constants(start=frozenset(constant))
        counting = CountingOracle(oracle)
        state = algorithm.init(counting, context, start)
        result = algorithm.estimate(counting, context, state)
        found.append((result.hypergradient, counting.counts, list(names)))
    (whole, counts, asked), (part, counts_of_part, asked_of_part) = found
    assert_close(part, whole, 0)
    assert counts_of_part == counts
    assert asked_of_part == [*asked[:-1], "cross"]
    assert asked[-1] == "second_order"
