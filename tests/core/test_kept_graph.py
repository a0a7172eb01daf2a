"""The graph of grad_y g that is kept for products at its point: exact, saved work, and freed."""

import gc

import pytest
import torch

from metadist import hypergradient
from metadist.algorithms.aid import AID
from metadist.algorithms.amigo import AmIGO
from metadist.algorithms.fg2u import FG2U
from metadist.algorithms.itd import ITD
from metadist.algorithms.lancbio import LancBiO
from metadist.algorithms.penalty import Penalty
from metadist.algorithms.saba import SABA
from metadist.algorithms.soba import SOBA
from metadist.algorithms.stocbio import StocBiO
from metadist.algorithms.ufom import UFOM
from metadist.autograd import AutogradOracle
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.memory import LiveMemory
from metadist.trees import add, dot, leaves
from tests.algorithms.test_table import of_each, outer_of
from tests.problems import (
    Smooth,
    assert_close,
    assert_same_bytes,
    generator,
    oracle_of,
    plain_gradient,
    random_like,
    smooth_task,
)

both_modes = pytest.mark.parametrize("eager", [False, True], ids=["torch.func", "torch.autograd"])


class Forgetful(AutogradOracle):
    """An oracle that builds every graph anew."""

    def derive(self, name, draw, *trees):
        self._point = None
        self._kept.clear()
        return super().derive(name, draw, *trees)


class Counted(Smooth):
    """Counts how often the inner loss is computed."""

    calls = 0

    def inner_loss(self, context, inner, batch):
        self.calls += 1
        return super().inner_loss(context, inner, batch)


def at_a_point(problem, **options):
    outer = problem.init_outer(generator(0))
    return oracle_of(problem, outer, smooth_task(0, num_support=12), **options)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
@of_each
def test_every_method_gives_the_same_bytes_with_and_without(
    name, case, vectorize, batch_size, monkeypatch
):
    problem, tasks = Smooth(), [smooth_task(index) for index in range(2)]
    outer = outer_of(case, problem, tasks[0])
    compute = Compute(vectorize=vectorize, batch_size=batch_size)
    keep_state = case.algorithm.trains != "start"
    found = []
    for oracle in (AutogradOracle, Forgetful):
        monkeypatch.setattr(hypergradient, "AutogradOracle", oracle)
        states: dict[int, torch.Tensor] | None = {} if keep_state else None
        for step in range(2):
            result = task_hypergradients(
                problem, case.algorithm, outer, tasks, compute=compute, step=step, states=states
            )
            states = result.states if keep_state else None
        found.append(result)
    assert_same_bytes(found[0].total, found[1].total)
    assert found[0].calls == found[1].calls
    for index, state in found[1].states.items():
        assert torch.equal(found[0].states[index], state)


@both_modes
def test_products_at_one_point_are_those_of_plain_autograd(eager):
    problem = Smooth()
    oracle, x, y = at_a_point(problem, batch_size=4, eager=eager)
    draw = oracle.draw_inner()
    batch = oracle.batch(draw)

    def along(v):
        def slope(at):
            g_y = torch.autograd.grad(
                problem.inner_loss(at["x"], at["y"], batch),
                list(at["y"].values()),
                create_graph=True,
            )
            return dot(dict(zip(y, g_y, strict=True)), v)

        of_x = plain_gradient(lambda x: slope({"x": x, "y": leaves(y)}), x)
        return of_x, plain_gradient(lambda y: slope({"x": x, "y": y}), y)

    directions = [random_like(y, seed) for seed in range(3)]
    for v in directions:
        assert_close(oracle.hvp(x, y, v, draw), along(v)[1], 1e-12)
    for found, expected in zip(
        oracle.second_order(x, y, directions[0], draw), along(directions[0]), strict=True
    ):
        assert_close(found, expected, 1e-12)
    g_y = plain_gradient(lambda y: problem.inner_loss(x, y, batch), y)
    assert_close(oracle.inner_grad(x, y, draw), g_y, 1e-12)


ONE_GRAPH = {
    "conjugate gradients": (AID(3, 0.01, adjoint_steps=5, tolerance=0.0), 3 + 1),
    "Neumann": (AID(3, 0.01, solver="neumann", adjoint_steps=5), 3 + 1),
    "a fresh draw each": (AmIGO(3, 0.01, adjoint_steps=5), 3 + 1),
    "Lanczos": (LancBiO(3, 0.01), 3 + 1),
    "a chain": (StocBiO(3, 0.01, adjoint_steps=5), 3 + 1),
    "products and the gradient": (SOBA(), 1),
    "parts": (SABA(), 1),
    "directions and the gradient": (FG2U(3, 0.01, num_directions=4), 3),
    "a gradient and a product": (Penalty(3, 0.01), 3 + 1),
    "steps and their adjoint": (ITD(3, 0.01), 3),
    "truncated": (ITD(3, 0.01, truncate=2), 3),
    "first order": (ITD(3, 0.01, first_order=True), 3),
    "UFOM": (UFOM(3, 0.01, exact_probability=1.0), 3),
}


@pytest.mark.parametrize(("algorithm", "expected"), ONE_GRAPH.values(), ids=list(ONE_GRAPH))
def test_all_products_at_a_point_on_whole_sets_share_one_graph(algorithm, expected):
    problem = Counted()
    oracle, x, y = at_a_point(problem, eager=True)
    algorithm.estimate(oracle, x, algorithm.init(oracle, x, y))
    assert problem.calls == expected


@both_modes
@pytest.mark.parametrize(("num_graphs", "expected"), [(0, 10), (1.5, 9), (3, 7), (9, 5)])
def test_steps_that_the_budget_has_no_room_for_are_computed_again(num_graphs, expected, eager):
    estimates = []
    oracle, x, y = at_a_point(Smooth(), eager=eager)
    with LiveMemory() as memory:
        oracle.kept_grad(x, y, oracle.draw_inner())
        size = memory.num_bytes()
    for budget, calls in ((int(num_graphs * size), expected), (10**9, 5)):
        problem = Counted()
        oracle, x, y = at_a_point(problem, eager=eager, graph_budget=budget)
        algorithm = ITD(5, 0.01)
        estimates.append(algorithm.estimate(oracle, x, algorithm.init(oracle, x, y)))
        assert problem.calls == calls
    assert_same_bytes(estimates[0].hypergradient, estimates[1].hypergradient)
    assert_same_bytes(*(estimate.start_gradient or {} for estimate in estimates))


@both_modes
def test_another_point_or_draw_is_another_graph(eager):
    oracle, x, y = at_a_point(Smooth(), batch_size=4, eager=eager)
    v = random_like(y, 5)
    draw, other = oracle.draw_inner(), oracle.draw_inner()
    moved = add(y, random_like(y, 6))

    def expected(x, y, draw):
        fresh, _, _ = at_a_point(Smooth(), batch_size=4, eager=eager)
        return fresh.hvp(x, y, v, draw)

    for point in ((x, y, draw), (x, y, other), (x, moved, other), (add(x, x), moved, other)):
        assert_same_bytes(oracle.hvp(*point[:2], v, point[2]), expected(*point))


@both_modes
@pytest.mark.parametrize("which", ["x", "y"])
def test_a_tensor_that_was_changed_in_place_is_another_point(which, eager):
    oracle, x, y = at_a_point(Smooth(), eager=eager)
    x, y = ({name: leaf.clone() for name, leaf in tree.items()} for tree in (x, y))
    draw, v = oracle.draw_inner(), random_like(y, 5)
    before = oracle.hvp(x, y, v, draw)
    next(iter({"x": x, "y": y}[which].values())).mul_(2)
    fresh, _, _ = at_a_point(Smooth(), eager=eager)
    after = oracle.hvp(x, y, v, draw)
    assert_same_bytes(after, fresh.hvp(x, y, v, draw))
    assert any(not torch.equal(after[name], before[name]) for name in y)


@both_modes
@pytest.mark.parametrize("ends", ["another question", "J v", "the oracle"])
def test_a_graph_is_freed_as_soon_as_it_cannot_be_asked_again(eager, ends):
    problem = Smooth()
    task = smooth_task(0, num_support=500)
    oracle, x, y = oracle_of(problem, problem.init_outer(generator(0)), task, eager=eager)
    v, draw = random_like(y, 5), oracle.draw_inner()
    oracle.inner_grad(x, y, draw)  # what torch imports late makes cycles
    gc.disable()  # what is freed must not wait for it
    try:
        with LiveMemory() as memory:
            oracle.hvp(x, y, v, draw)
            assert memory.num_bytes() > 8 * 500
            if ends == "another question":
                oracle.outer_grads(x, y, oracle.draw_outer())
            elif ends == "J v":
                oracle.second_order(x, y, v, draw)
            else:
                del oracle
        assert memory.num_bytes() < 8 * 500
    finally:
        gc.enable()
