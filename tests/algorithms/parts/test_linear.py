"""The linear solvers: against numpy and scipy, against one another, and where they must give up."""

import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch.func import vmap

from metadist.algorithms.parts.linear import (
    Solution,
    conjugate_gradient,
    empty_krylov,
    extend,
    fixed_point,
    in_span,
    neumann,
    nystrom,
    project,
    solve_symmetric,
)
from metadist.trees import add, flatten, scale, sub, unflatten
from tests.helpers import fused
from tests.problems import DOUBLE, assert_close, randn, random_like

N = 12
LIKE = {"w": torch.zeros(2, 3, dtype=DOUBLE), "m": torch.zeros(N - 6, dtype=DOUBLE)}
EIGENVALUES = torch.linspace(0.5, 3, N, dtype=DOUBLE)


def matrix_of(values, seed=0):
    basis = torch.linalg.qr(randn(seed, len(values), len(values)))[0]
    return basis @ torch.diag(torch.as_tensor(values, dtype=DOUBLE)) @ basis.T


def product_of(matrix, count=None, like=LIKE):
    def product(v):
        if count is not None:
            count.append(1)
        result = unflatten(matrix @ flatten({name: v[name] for name in like}), like)
        return dict(reversed(result.items()))  # the order of names is no matter

    return product


def tree(vector):
    return unflatten(torch.as_tensor(vector, dtype=DOUBLE), LIKE)


def lanczos(product, b, num_steps, start=None):
    """What `extend` and `project` find in the Krylov space of the residual at `start`."""
    residual = b if start is None else sub(b, product(start))
    krylov = empty_krylov(b, num_steps)
    for _ in range(krylov.basis.shape[0]):
        krylov = extend(krylov, product, residual)
    v, metrics = project(krylov, residual)
    return Solution(v if start is None else add(start, v), metrics)


def residual_of(matrix, v, b):
    return float((b - matrix @ flatten(v)).norm() / b.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 8, N])
def test_conjugate_gradient_makes_scipys_iterates(seed, warm, num_steps):
    matrix, b, start = matrix_of(EIGENVALUES, seed), randn(seed + 10, N), randn(seed + 20, N)
    expected, _ = scipy.sparse.linalg.cg(
        matrix.numpy(), b.numpy(), start.numpy() if warm else None, rtol=0, maxiter=num_steps
    )
    given = tree(start) if warm else None
    v, metrics = conjugate_gradient(product_of(matrix), tree(b), num_steps, given)
    assert_close(v, tree(expected), 1e-11)
    assert float(metrics["recursive_residual"]) == pytest.approx(
        residual_of(matrix, v, b), abs=1e-12
    )
    assert metrics["negative_curvature"] == 0
    if num_steps == N:
        assert_close(v, tree(np.linalg.solve(matrix.numpy(), b.numpy())), 1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("num_steps", range(1, 9))
def test_lanczos_is_conjugate_gradients(seed, warm, num_steps):
    product, b = product_of(matrix_of(EIGENVALUES, seed)), random_like(LIKE, seed)
    start = random_like(LIKE, seed + 5) if warm else None
    one = lanczos(product, b, num_steps, start)
    two = conjugate_gradient(product, b, num_steps, start)
    assert_close(one.v, two.v, 1e-10)
    assert one.metrics["negative_curvature"] == 0


@pytest.mark.parametrize("eta", [0.1, 0.3])
@pytest.mark.parametrize("num_products", [0, 1, 4, 20])
def test_neumann_and_fixed_point_have_the_closed_form(eta, num_products):
    matrix, b, start = matrix_of(EIGENVALUES), randn(1, N), randn(2, N)
    product, eye = product_of(matrix), torch.eye(N, dtype=DOUBLE)
    power = torch.linalg.matrix_power(eye - eta * matrix, num_products + 1)
    solution = torch.linalg.solve(matrix, b)
    expected = tree(solution - power @ solution)
    assert_close(neumann(product, tree(b), num_products, eta).v, expected, 1e-12)
    assert_close(fixed_point(product, tree(b), num_products + 1, eta).v, expected, 1e-12)
    expected = tree(solution + power @ (start - solution))
    found = fixed_point(product, tree(b), num_products + 1, eta, tree(start))
    assert_close(found.v, expected, 1e-12)


def test_neumann_of_independent_products_is_unbiased():
    # The mean over all sequences of two equally likely H, of the whole sum.
    low, high, eta, b = 0.5, 1.5, 0.5, {"y": torch.tensor([2.0], dtype=DOUBLE)}
    for solve in (neumann, lambda p, b, q, eta: fixed_point(p, b, q + 1, eta)):
        total = 0.0
        for sequence in itertools.product((low, high), repeat=3):
            factors = iter(sequence)
            total += float(solve(lambda v: scale(v, next(factors)), b, 3, eta).v["y"])  # noqa: B023
        assert total / 8 == pytest.approx(2.0 * eta * sum((1 - eta) ** q for q in range(4)))
    # One H for all factors is not.
    same = [float(neumann(lambda v: scale(v, h), b, 3, eta).v["y"]) for h in (low, high)]  # noqa: B023
    assert sum(same) / 2 != pytest.approx(1.875, abs=0.05)


def test_numbers_of_products():
    matrix, b, start = matrix_of(EIGENVALUES), random_like(LIKE, 1), random_like(LIKE, 2)

    def count(solve):
        calls: list[int] = []
        solve(product_of(matrix, calls))
        return len(calls)

    assert count(lambda p: conjugate_gradient(p, b, 3)) == 3
    assert count(lambda p: conjugate_gradient(p, b, 3, start)) == 4
    assert count(lambda p: conjugate_gradient(p, b, 100, tolerance=1e-9)) <= N
    assert count(lambda p: conjugate_gradient(p, b, 100, tolerance=1.0)) == 0
    assert count(lambda p: fixed_point(p, b, 3, 0.1)) == 2
    assert count(lambda p: fixed_point(p, b, 3, 0.1, start)) == 3
    assert 30 < count(lambda p: fixed_point(p, b, 1000, 0.3, start, 1e-6)) < 120
    assert count(lambda p: neumann(p, b, 3, 0.1)) == 3
    assert 30 < count(lambda p: neumann(p, b, 1000, 0.3, 1e-6)) < 120
    assert count(lambda p: lanczos(p, b, 3)) == 3
    assert count(lambda p: lanczos(p, b, 3, start)) == 4
    assert count(lambda p: lanczos(p, b, 100)) == N
    assert count(lambda p: nystrom(p, b, [3, 0], 0.1)) == 2
    assert count(lambda p: in_span(p, b, [b, start])) == 2


@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-8])
def test_tolerance_is_a_relative_residual_of_the_iterate_that_is_returned(tolerance):
    matrix, b = matrix_of(EIGENVALUES), 1e5 * randn(1, N)
    exact = [conjugate_gradient(product_of(matrix), tree(b), n).v for n in range(N + 1)]
    v = conjugate_gradient(product_of(matrix), tree(b), 50, None, tolerance).v
    first = next(n for n, it in enumerate(exact) if residual_of(matrix, it, b) <= tolerance)
    assert_close(v, exact[first], 1e-12)
    for found in (
        fixed_point(product_of(matrix), tree(b), 1000, 0.3, None, tolerance),
        neumann(product_of(matrix), tree(b), 1000, 0.3, tolerance),
    ):
        assert residual_of(matrix, found.v, b) <= 1.01 * tolerance / (1 - 0.3 * 0.5)


OTHER = random_like(LIKE, 3)
SOLVERS = {
    "cg": lambda product, b: conjugate_gradient(product, b, 30),
    "warm cg": lambda product, b: conjugate_gradient(product, b, 30, tree(torch.zeros(N))),
    "fixed_point": lambda product, b: fixed_point(product, b, 30, 0.1, None, 1e-3),
    "neumann": lambda product, b: neumann(product, b, 30, 0.1, 1e-3),
    "lanczos": lambda product, b: lanczos(product, b, 30),
    "short lanczos": lambda product, b: lanczos(product, b, 4),
    "nystrom": lambda product, b: nystrom(product, b, [1, 7, 4], 0.1),
    "in_span": lambda product, b: in_span(product, b, [b, OTHER, scale(b, 2.0)]),
}
SYSTEMS = {
    "definite": (matrix_of(EIGENVALUES), randn(1, N)),
    "b = 0": (matrix_of(EIGENVALUES), torch.zeros(N, dtype=DOUBLE)),
    "H = 0": (torch.zeros(N, N, dtype=DOUBLE), randn(1, N)),
    "an eigenvector": (torch.diag(EIGENVALUES), torch.eye(N, dtype=DOUBLE)[3]),
    "indefinite": (matrix_of(torch.linspace(-1, 2, N)), randn(2, N)),
    "negative": (-matrix_of(EIGENVALUES), randn(2, N)),
    "singular": (matrix_of([0.0] * 4 + [1.0, 2, 3, 4, 5, 6, 7, 8]), randn(3, N)),
    "tiny": (1e-9 * matrix_of(EIGENVALUES), 1e-12 * randn(4, N)),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_together_under_vmap_as_one_by_one_and_always_finite(solver):
    solve = SOLVERS[solver]
    matrices, vectors = (torch.stack(list(column)) for column in zip(*SYSTEMS.values()))  # noqa: B905

    def one(matrix, b):
        solution = solve(product_of(matrix), unflatten(b, LIKE))
        return flatten(solution.v), solution.metrics

    together, all_metrics = vmap(one)(matrices, vectors)
    for i, name in enumerate(SYSTEMS):
        v, alone = one(matrices[i], vectors[i])
        assert v.isfinite().all() and v.dtype == DOUBLE, name
        assert_close({"v": together[i]}, {"v": v}, 1e-10)
        for key, metric in alone.items():
            assert metric.shape == () and metric.isfinite()
            assert all_metrics[key][i] == pytest.approx(float(metric), rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_solve(solver):
    v = SOLVERS[solver](product_of(matrix_of(EIGENVALUES)), tree(torch.zeros(N))).v
    assert_close(v, tree(torch.zeros(N)), 0.0)


@pytest.mark.parametrize("num_steps", [1, 40])
def test_at_the_solution_nothing_moves(num_steps):
    matrix, solution = matrix_of(EIGENVALUES), random_like(LIKE, 1)
    product = product_of(matrix)
    b = product(solution)
    v, metrics = conjugate_gradient(product, b, num_steps, solution)
    assert_close(v, solution, 1e-14)
    assert metrics["negative_curvature"] == 0 and metrics["recursive_residual"] < 1e-14
    assert_close(lanczos(product, b, num_steps, solution).v, solution, 1e-13)
    assert_close(fixed_point(product, b, num_steps, 0.3, solution, 1e-12).v, solution, 1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_indefinite_systems(seed):
    matrix, b = matrix_of(torch.linspace(-1, 2, N), seed), randn(seed + 30, N)
    expected = np.linalg.solve(matrix.numpy(), b.numpy())
    reference, _ = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-13)
    assert np.allclose(reference, expected, rtol=1e-7, atol=1e-7)
    v, metrics = conjugate_gradient(product_of(matrix), tree(b), 50)
    assert metrics["negative_curvature"] == 1
    assert float(metrics["recursive_residual"]) == pytest.approx(residual_of(matrix, v, b))
    assert metrics["recursive_residual"] > 1e-3
    # The iterate before the direction of negative curvature is kept.
    iterates = [conjugate_gradient(product_of(matrix), tree(b), n).v for n in range(N)]
    assert any(all(torch.equal(v[k], it[k]) for k in v) for it in iterates)
    v, metrics = lanczos(product_of(matrix), tree(b), N)
    assert_close(v, tree(expected), 1e-10)
    assert metrics["negative_curvature"] == 1


def test_the_first_direction_may_bend():
    start = random_like(LIKE, 1)
    v, metrics = conjugate_gradient(product_of(-matrix_of(EIGENVALUES)), start, 5, start)
    assert_close(v, start, 0.0)
    assert metrics["negative_curvature"] == 1 and metrics["recursive_residual"] > 1


SINGULAR = [0.0] * 4 + [1.0, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(5))
def test_singular_systems_that_have_a_solution(seed):
    matrix = matrix_of(SINGULAR, seed)
    b = matrix @ randn(seed + 40, N)
    expected = tree(np.linalg.pinv(matrix.numpy(), rcond=1e-10) @ b.numpy())
    reference, _ = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-13)
    assert_close(tree(reference), expected, 1e-7)
    v, metrics = conjugate_gradient(product_of(matrix), tree(b), 50, None, 1e-12)
    assert_close(v, expected, 1e-10)
    assert metrics["negative_curvature"] == 0
    for num_steps in (8, 50):
        v, metrics = lanczos(product_of(matrix), tree(b), num_steps)
        assert_close(v, expected, 1e-10)
        assert metrics["negative_curvature"] == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [3, 9, 50])
def test_singular_systems_that_have_none(seed, num_steps):
    matrix, b = matrix_of(SINGULAR, seed), randn(seed + 50, N)
    best = float((b - matrix @ torch.linalg.lstsq(matrix, b, driver="gelsd").solution).norm())
    for solve in (conjugate_gradient, lanczos):
        v = solve(product_of(matrix), tree(b), num_steps).v
        assert flatten(v).isfinite().all()
        assert residual_of(matrix, v, b) >= best / float(b.norm()) - 1e-9
    _, metrics = conjugate_gradient(product_of(matrix), tree(b), num_steps)
    assert metrics["recursive_residual"] >= best / float(b.norm()) - 1e-9
    if num_steps == 50:
        assert metrics["negative_curvature"] == 1


def test_a_flat_direction_beside_a_curved_one():
    # H = diag(1, 0): the second direction of conjugate gradients has no curvature.
    like = {"y": torch.zeros(2, dtype=DOUBLE)}
    matrix = torch.diag(torch.tensor([1.0, 0.0], dtype=DOUBLE))
    b = {"y": torch.tensor([0.3, 0.7], dtype=DOUBLE)}
    v, metrics = conjugate_gradient(product_of(matrix, like=like), b, 10)
    assert metrics["negative_curvature"] == 1
    assert_close(v, {"y": b["y"] * (0.3**2 + 0.7**2) / 0.3**2}, 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_an_ill_conditioned_system(seed):
    size, like = 20, {"y": torch.zeros(20, dtype=DOUBLE)}
    matrix = matrix_of(torch.logspace(0, -8, size), seed)
    solution = randn(seed, size)
    b = {"y": matrix @ solution}
    product = product_of(matrix, like=like)
    v, metrics = lanczos(product, b, size)
    assert_close(v, {"y": solution}, 1e-5)
    assert metrics["negative_curvature"] == 0
    # Conjugate gradients lose conjugacy, need more steps and report what they have.
    for num_steps in (5, 20, 400):
        v, metrics = conjugate_gradient(product, b, num_steps)
        true = residual_of(matrix, v, b["y"])
        assert float(metrics["recursive_residual"]) == pytest.approx(true, rel=1e-3, abs=1e-12)
        assert metrics["negative_curvature"] == 0
    assert_close(v, {"y": solution}, 1e-5)


def test_few_eigenvalues_end_the_process_early():
    matrix, b = matrix_of([1.0] * 6 + [4.0] * 6), randn(1, N)
    expected = tree(torch.linalg.solve(matrix, b))
    calls: list[int] = []
    assert_close(conjugate_gradient(product_of(matrix, calls), tree(b), 50).v, expected, 1e-12)
    assert len(calls) <= 3
    for num_steps in (2, 3, N):
        assert_close(lanczos(product_of(matrix), tree(b), num_steps).v, expected, 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_basis_is_orthonormal_and_makes_the_matrix_tridiagonal(seed):
    matrix, b = matrix_of(torch.logspace(0, -6, N), seed), random_like(LIKE, seed)
    krylov = empty_krylov(b, 9)
    for size in range(9):
        assert krylov.size == size
        krylov = extend(krylov, product_of(matrix), b)
    q = krylov.basis
    assert_close({"": q @ q.T}, {"": torch.eye(9, dtype=DOUBLE)}, 1e-13)
    beside = torch.diag(krylov.coupling[1:], 1)
    expected = torch.diag(krylov.diagonal) + beside + beside.T
    assert_close({"": q @ matrix @ q.T}, {"": expected}, 1e-13)


def test_after_a_breakdown_the_process_goes_on_with_a_new_residual():
    # Room for three; the first right-hand side spans a space of one.
    matrix = torch.diag(EIGENVALUES)
    first, second = torch.eye(N, dtype=DOUBLE)[3], torch.eye(N, dtype=DOUBLE)[5]
    krylov = empty_krylov(LIKE, 3)
    for b in (first, first, first + second):
        krylov = extend(krylov, product_of(matrix), tree(b))
    v = project(krylov, tree(first + second)).v
    # The second vector was lost, the third is the new part.
    assert_close(v, tree(first / EIGENVALUES[3] + second / EIGENVALUES[5]), 1e-12)
    assert krylov.basis[1].abs().max() == 0


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("indices", [list(range(N)), [5], [11, 0, 3, 4]])
def test_nystrom_is_its_formula(indices, damping):
    matrix, b = matrix_of(EIGENVALUES), randn(1, N)
    c, m = matrix[indices], matrix[indices][:, indices]
    low_rank = c.T @ torch.linalg.inv(m) @ c
    expected = torch.linalg.solve(low_rank + damping * torch.eye(N, dtype=DOUBLE), b)
    inner = torch.linalg.solve(m + c @ c.T / damping, c @ b)
    assert torch.allclose(b / damping - c.T @ inner / damping**2, expected, atol=1e-9)
    v, metrics = nystrom(product_of(matrix), tree(b), indices, damping)
    assert_close(v, tree(expected), 1e-9)
    assert metrics["negative_curvature"] == 0


def test_nystrom_with_columns_that_vanish_or_depend_on_one_another():
    # Two dead units and rank 3.
    basis = torch.cat([randn(1, N - 2, 3), torch.zeros(2, 3, dtype=DOUBLE)])
    matrix, b, damping = basis @ basis.T, randn(2, N), 0.1
    expected = torch.linalg.solve(matrix + damping * torch.eye(N, dtype=DOUBLE), b)
    for indices in ([0, 3, 6], [11, 0, 3, 6, 10, 7], list(range(N))):
        v, metrics = nystrom(product_of(matrix), tree(b), indices, damping)
        assert_close(v, tree(expected), 1e-8)
        assert metrics["negative_curvature"] == 0
    v, _ = nystrom(product_of(matrix), tree(b), [10, 11], damping)
    assert_close(v, tree(b / damping), 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_nystrom_of_an_indefinite_matrix_is_bounded_and_reported(seed):
    # -damping is among the eigenvalues: H + damping I itself is singular.
    matrix, b = matrix_of([-0.1] * 4 + [1.0] * 8, seed), randn(seed, N)
    v, metrics = nystrom(product_of(matrix), tree(b), list(range(N)), 0.1)
    assert metrics["negative_curvature"] == 1
    assert float(flatten(v).norm()) <= float(b.norm()) / 0.1 * (1 + 1e-9)


def test_in_span_is_the_best_of_the_span():
    matrix, b = matrix_of(EIGENVALUES), randn(1, N)
    w = torch.stack([b, randn(2, N), 1e4 * randn(3, N)])
    weights = torch.linalg.solve(w @ matrix @ w.T, w @ b)
    expected = tree(w.T @ weights)
    product, vectors = product_of(matrix), [tree(row) for row in w]
    assert_close(in_span(product, tree(b), vectors).v, expected, 1e-9)
    doubled = [vectors[0], tree(torch.zeros(N)), *vectors, scale(vectors[0], -1e-8)]
    v, metrics = in_span(product, tree(b), doubled)
    assert_close(v, expected, 1e-9)
    assert metrics["negative_curvature"] == 0


def test_solve_symmetric():
    matrix, b = matrix_of([3.0, 0.0, -2.0]), randn(1, 3)
    v, negative = solve_symmetric(matrix, b)
    assert torch.allclose(v, torch.linalg.pinv(matrix, rtol=1e-10) @ b) and bool(negative)
    v, negative = solve_symmetric(torch.zeros(2, 2, dtype=DOUBLE), b[:2])
    assert v.tolist() == [0.0, 0.0] and not bool(negative)


@pytest.mark.parametrize(
    "rows",
    [
        [[2.0, 1.0], [1.0, 3.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1e12, 1.0], [1.0, 1e-3]],
        [[-1.0, 0.5], [0.5, 2.0]],
        [[0.0, 1e-9], [1e-9, 0.0]],
        [[torch.nan, 1.0], [1.0, 2.0]],
    ],
)
def test_two_dimensions_are_solved_without_a_wait(rows, monkeypatch):
    matrix, b = torch.tensor(rows, dtype=DOUBLE), torch.tensor([1.0, -2.0], dtype=DOUBLE)
    for dtype in (DOUBLE, torch.float32):
        expected, is_negative = solve_symmetric(matrix.to(dtype), b)
        with fused(), monkeypatch.context() as patch:
            patch.delattr(torch.linalg, "eigh")
            v, negative = solve_symmetric(matrix.to(dtype), b)
            together, _ = vmap(solve_symmetric)(matrix.to(dtype)[None], b[None])
        torch.testing.assert_close(v, expected, rtol=1e-10, atol=0, equal_nan=True)
        torch.testing.assert_close(together[0], v, equal_nan=True)
        assert bool(negative) == bool(is_negative)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_in_one_system_stays_there(solver):
    matrices = torch.stack([matrix_of(EIGENVALUES), torch.full((N, N), torch.nan, dtype=DOUBLE)])
    b = torch.stack([randn(1, N), randn(1, N)])
    v = vmap(lambda a, b: flatten(SOLVERS[solver](product_of(a), unflatten(b, LIKE)).v))(
        matrices, b
    )
    assert v[0].isfinite().all() and not v[1].isfinite().any()


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("warm cg", "in_span")])
def test_single_precision(solver):
    matrix, b = matrix_of(EIGENVALUES), random_like(LIKE, 1)
    single = {name: leaf.float() for name, leaf in b.items()}
    expected = SOLVERS[solver](product_of(matrix), b)
    v, metrics = SOLVERS[solver](product_of(matrix.float()), single)
    assert {leaf.dtype for leaf in (*v.values(), *metrics.values())} == {torch.float32}
    assert_close({n: leaf.double() for n, leaf in v.items()}, expected.v, 1e-4)
