"""Fixed points of a problem's own map: closed forms, an equilibrium model, what is refused."""

from typing import Any

import pytest
import torch

from metadist import LocalExecutor, OuterOptimizer, Trainer
from metadist.algorithms import AID, ALGORITHMS, ITD, SOBA
from metadist.checks.hypergradient import check_hypergradient
from metadist.cluster.data_parallel.checks import check_workload
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.oracle import CountingOracle, in_gradients
from metadist.problem import Problem, has_inner_map
from metadist.step_rules import SGD
from metadist.task import Batch, Task
from metadist.trees import Params, dot
from metadist.workload import Workload
from tests.algorithms.toys import counts_of, estimate
from tests.problems import (
    DOUBLE,
    LinearMap,
    Quadratic,
    assert_close,
    assert_same_bytes,
    central_difference,
    generator,
    oracle_of,
    plain_gradient,
    quadratic_task,
    quadratic_terms,
    randn,
    random_like,
)


class Equilibrium(Problem):
    """h = tanh(W h + U input + b), one state per example: y are the states, x the weights.

    The support set has the inputs, the query set the targets of what is read from the states.
    """

    def init_outer(self, generator: torch.Generator) -> Params:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        weights = {"inner": 0.2 * normal(4, 4), "input": 0.5 * normal(4, 3)}
        return {**weights, "bias": 0.1 * normal(4), "readout": normal(4)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"state": torch.zeros(len(task.support.index), 4, dtype=DOUBLE)}

    def inner_map(self, context: Params, inner: Params, batch: Batch) -> Params:
        driven = batch.tensors[0] @ context["input"].T + context["bias"]
        return {"state": (inner["state"] @ context["inner"].T + driven).tanh()}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        return (self.inner_map(context, inner, batch)["state"] - inner["state"]).square().mean()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> torch.Tensor:
        return (inner["state"] @ context["readout"] - batch.tensors[0]).square().mean()


class EquilibriumSampler:
    def sample(self, index: int) -> Task:
        inputs = randn(index, 6, 3)
        return Task(Batch.of(inputs), Batch.of(inputs.sin().sum(1)), index)


AIDS = [
    AID(400, solver="normal_cg", adjoint_steps=24),
    AID(400, solver="fixed_point", adjoint_steps=400),
    AID(400, solver="neumann", adjoint_steps=400),
    AID(400, solver="fixed_point", adjoint_steps=600, adjoint_lr=0.7),
]


@pytest.mark.parametrize("eager", [False, True])
def test_products_of_the_oracle_agree_with_central_differences(eager):
    problem, task = Equilibrium(), EquilibriumSampler().sample(1)
    oracle, x, start = oracle_of(problem, problem.init_outer(generator(1)), task, eager=eager)
    y, draw = random_like(start, 2), oracle.draw_inner()
    v, u = random_like(y, 3), random_like(y, 4)
    phi = oracle.inner_map(x, y, draw)
    assert_close(phi, problem.inner_map(x, y, task.support), 1e-15)
    phi_x, phi_y = oracle.map_products(x, y, v, draw)
    assert_close(phi_x, central_difference(lambda x: dot(oracle.inner_map(x, y, draw), v), x), 1e-8)
    assert_close(phi_y, central_difference(lambda y: dot(oracle.inner_map(x, y, draw), v), y), 1e-8)
    assert float(dot(oracle.map_along(x, y, u, draw), v)) == pytest.approx(
        float(dot(phi_y, u)), rel=1e-12
    )
    counting = CountingOracle(oracle)
    counting.inner_map(x, y, draw)
    counting.map_products(x, y, v, draw)
    counting.map_along(x, y, u, draw)
    assert counting.counts == {"inner_map": 1, "map_vjp": 1, "map_jvp": 1}
    assert in_gradients(counting.counts) == 5
    for tree in (phi, phi_x, phi_y):
        assert not any(leaf.requires_grad for leaf in tree.values())


def exact(problem: LinearMap, outer: Params, task: Task) -> torch.Tensor:
    """rho x + B'(I - M')^-1 (y* - t),  y* = (I - M)^-1 (Bx + c)."""
    _, b, c, t = quadratic_terms(task)
    matrix = torch.eye(problem.num_inner, dtype=DOUBLE) - problem.matrix(task.support)
    y = torch.linalg.solve(matrix, b @ outer["x"] + c)
    return problem.rho * outer["x"] + b.T @ torch.linalg.solve(matrix.T, y - t)


@pytest.mark.parametrize("algorithm", [*AIDS, ITD(400)], ids=str)
def test_a_linear_map_that_is_not_symmetric_has_its_closed_form(algorithm):
    for index in range(2):
        problem, task = LinearMap(3, 5), quadratic_task(index, num_outer=3, num_inner=5)
        matrix = problem.matrix(task.support)
        assert float((matrix - matrix.T).norm()) > 0.5
        outer = problem.init_outer(generator(index))
        found = estimate(algorithm, problem, outer, task)
        assert_close(found.hypergradient, {"x": exact(problem, outer, task)}, 1e-8)
        assert float(found.metrics.get("adjoint_residual", 0.0)) < 1e-8


def plain_equilibrium(problem: Problem, outer: Params, task: Task, num_steps: int) -> torch.Tensor:
    y = problem.init_inner(outer, task)
    for _ in range(num_steps):
        y = problem.inner_map(outer, y, task.support)
    return problem.outer_loss(outer, y, task.query)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_itd_is_the_derivative_of_the_iterated_map(num_steps):
    problem, task = Equilibrium(), EquilibriumSampler().sample(0)
    outer = problem.init_outer(generator(0))
    found = estimate(ITD(num_steps), problem, outer, task)
    expected = plain_gradient(lambda x: plain_equilibrium(problem, x, task, num_steps), outer)
    assert_close(found.hypergradient, expected, 1e-12)


def test_truncated_itd_passes_the_last_steps_alone():
    problem, task = LinearMap(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    matrix, (_, b, c, t) = problem.matrix(task.support), quadratic_terms(task)
    y = torch.zeros(4, dtype=DOUBLE)
    for _ in range(6):
        y = matrix @ y + b @ outer["x"] + c
    w = y - t
    expected = problem.rho * outer["x"] + b.T @ (w + matrix.T @ w)
    found = estimate(ITD(6, truncate=2), problem, outer, task)
    assert_close(found.hypergradient, {"x": expected}, 1e-12)


@pytest.mark.parametrize("algorithm", [AIDS[0], AIDS[1], ITD(100)], ids=str)
def test_an_equilibrium_model_agrees_with_central_differences(algorithm):
    problem, task = Equilibrium(), EquilibriumSampler().sample(0)
    outer = problem.init_outer(generator(0))
    found = estimate(algorithm, problem, outer, task)
    expected = central_difference(lambda x: plain_equilibrium(problem, x, task, 100), outer)
    assert_close(found.hypergradient, expected, 1e-7)
    report = check_hypergradient(problem, task, algorithm, repeats=())
    assert report.error < 1e-6
    assert any("singular value" in name for name in report.metrics)


def test_normal_equations_of_a_symmetric_system_are_conjugate_gradients_of_another_one():
    problem, task = Quadratic(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    one = estimate(AID(20, adjoint_steps=4), problem, outer, task)
    other = estimate(AID(20, adjoint_steps=4, solver="normal_cg"), problem, outer, task)
    assert_close(other.hypergradient, one.hypergradient, 1e-8)
    counts = counts_of(AID(20, adjoint_steps=4, solver="normal_cg"), problem, outer, task)
    assert counts == {"inner_grad": 20, "outer_grads": 1, "hvp": 2 * 4 + 2, "jvp": 1}


def test_normal_equations_serve_an_indefinite_hessian():
    problem, task = Quadratic(2, 2, rho=0.0), quadratic_task(0, num_inner=2)
    a = torch.diag(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    task = Task(Batch.of(a[None], randn(1, 1, 2, 2), randn(2, 1, 2)), task.query, 0)
    outer = problem.init_outer(generator(0))
    _, b, c, t = quadratic_terms(task)
    problem.start = torch.linalg.solve(a, b @ outer["x"] + c)  # the saddle
    found = estimate(AID(1, 1e-3, adjoint_steps=3, solver="normal_cg"), problem, outer, task)
    expected = b.T @ torch.linalg.solve(a, problem.start - t)
    assert_close(found.hypergradient, {"x": expected}, 1e-10)


def test_costs():
    problem, task = LinearMap(2, 4), quadratic_task(0)
    outer = problem.init_outer(generator(0))
    of_aid = {"inner_map": 6, "outer_grads": 1}
    cases: list[tuple[Any, dict[str, int]]] = [
        (ITD(6), {**of_aid, "map_vjp": 6}),
        (AID(6, solver="normal_cg", adjoint_steps=3), {**of_aid, "map_vjp": 4, "map_jvp": 4}),
        (AID(6, solver="neumann", adjoint_steps=3), {**of_aid, "map_vjp": 4}),
    ]
    for algorithm, counts in cases:
        assert counts_of(algorithm, problem, outer, task) == counts


@pytest.mark.parametrize(
    "algorithm", [AID(5, solver="normal_cg", adjoint_steps=4), ITD(5)], ids=str
)
def test_tasks_together_are_tasks_in_a_loop(algorithm):
    problem, sampler = Equilibrium(), EquilibriumSampler()
    outer, tasks = problem.init_outer(generator(0)), [sampler.sample(index) for index in range(3)]
    alone, together = (
        task_hypergradients(
            problem, algorithm, outer, tasks, compute=Compute(vectorize=vectorize), report=True
        )
        for vectorize in (False, True)
    )
    assert_close(together.total, alone.total, 1e-10)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    "algorithm", [AID(20, solver="normal_cg", adjoint_steps=5, warm_start=True), ITD(20)], ids=str
)
def test_an_equilibrium_model_trains_and_resumes_to_the_same_bytes(algorithm, tmp_path):
    def trainer(**options: Any) -> Trainer:
        return Trainer(
            Equilibrium(),
            EquilibriumSampler(),
            algorithm,
            outer_optimizer=OuterOptimizer("adam", lr=0.03),
            meta_batch_size=2,
            keep_state=True,
            compute=Compute(device="cpu"),
            executor=LocalExecutor(),
            quiet=True,
            **options,
        )

    whole = trainer()
    before = whole.test(EquilibriumSampler(), 2).metrics["query_loss"].mean
    whole.fit(30)
    assert whole.test(EquilibriumSampler(), 2).metrics["query_loss"].mean < 0.5 * before
    half = trainer(run_dir=tmp_path / "run")
    half.fit(17)
    again = trainer(run_dir=tmp_path / "run")
    again.restore()
    again.fit(30)
    assert_same_bytes(again.outer, whole.outer)


def refused(algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(LinearMap(2, 4), Sampler(), algorithm, quiet=True)


class Sampler:
    def sample(self, index: int) -> Task:
        return quadratic_task(index)


@pytest.mark.parametrize(
    "name", [n for n, cls in ALGORITHMS.items() if not cls.takes_map and cls.trains != "start"]
)
def test_other_methods_are_refused_by_name(name):
    refused(
        ALGORITHMS[name](), rf"take the inner_map of LinearMap, got {ALGORITHMS[name].__name__}"
    )


def test_shards_of_one_problem_are_refused():
    algorithm = ITD(3)
    workload = Workload(LinearMap(2, 4), Sampler(), algorithm, meta_batch_size=1, keep_state=True)
    with pytest.raises(ValueError, match=r"problem must have no inner_map with DataParallel.* got"):
        check_workload(workload, staleness=0)


def test_other_methods_are_refused_where_no_preflight_sees_them():
    problem, task = LinearMap(2, 4), quadratic_task(0)
    with pytest.raises(ValueError, match=r"must take the inner_map of LinearMap, .* asks for"):
        task_hypergradients(problem, SOBA(), problem.init_outer(generator(0)), [task])


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (AID(5), r"solver must be 'normal_cg', .* got 'cg': the Jacobian"),
        (AID(5, 0.2, solver="normal_cg"), r"inner_lr must be left out .* got 0\.2: y moves"),
        (ITD(5, 0.2), r"inner_lr must be left out for a problem with inner_map, got 0\.2"),
        (ITD(5, inner_optimizer=SGD(0.1, momentum=0.5)), r"inner_optimizer must be left out"),
        (ITD(5, learn_lr="per_tensor"), r"learn_lr must be left out .* got 'per_tensor'"),
        (ITD(5, engine="unrolled"), r"engine must be left out .* got 'unrolled'"),
        (ITD(5, compile=True), r"compile must be left out"),
    ],
    ids=str,
)
def test_options_of_steps_on_g_are_refused(algorithm, message):
    refused(algorithm, message)


class Misshapen(LinearMap):
    def inner_map(self, context, inner, batch):
        return {"y": super().inner_map(context, inner, batch)["y"][:3]}

    def inner_loss(self, context, inner, batch):
        return inner["y"].square().sum()


def test_a_map_that_leaves_the_space_of_y_is_refused():
    with pytest.raises(
        ValueError, match=r"inner_map must return tensors .* \(\(4,\), .*, got .*\(\(3,\), "
    ):
        Trainer(Misshapen(2, 4), Sampler(), ITD(3), quiet=True)


def test_a_problem_has_a_map_only_where_it_writes_one():
    assert has_inner_map(LinearMap(2, 4)) and not has_inner_map(Quadratic(2, 4))
