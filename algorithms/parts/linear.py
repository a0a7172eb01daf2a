"""Linear solvers for H v = b by products alone.

`product` is v -> H v, symmetric unless a solver says otherwise; damping is in it
(`implicit.hessian`). All solvers are pure and run under vmap, where one program serves many
systems. So no branch depends on data: a system that is done is frozen by torch.where while others
continue, and v is the same as alone. A system without a sensible solution is reported in the
metrics and leaves v finite; only NaN in `product` or b gives NaN.
P: elements of v. K: vectors of a basis, or columns of H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from metadist.trees import FUSED, Params, flatten, norm, sub, unflatten

Product = Callable[[Params], Params]
FlatProduct = Callable[[Tensor], Tensor]


LOOKS_AT_EIGENVALUES = "torch looks whether the eigenvalues it solves with were found"
"""Why what solves by `solve_symmetric` in more than two dimensions is no CUDA graph."""


class Solution(NamedTuple):
    """v, and metrics of shape () that cost nothing extra.

    `negative_curvature`: 1 if H turned out not to be positive definite.
    `recursive_residual`: |b - H v| / |b| as the solver follows it, without rounding errors.
    """

    v: Params
    metrics: dict[str, Tensor]


def conjugate_gradient(
    product: Product,
    b: Params,
    num_steps: int,
    start: Params | None = None,
    tolerance: float = 0.0,
) -> Solution:
    """The minimiser of v'Hv/2 - b'v over start + K_j(H, b - H start), j <= num_steps.

    Stops at |b - H v| <= tolerance |b| (at the rounding error if that is larger), the last
    iterate included; and before a direction p with p'Hp <= 0, or so small against the largest
    product so far that it is rounding error, which it reports as `negative_curvature`: the
    iterate so far is kept. Hestenes and Stiefel, 1952.

    Args:
        product: v -> H v, the same matrix at every call.
        b: The right-hand side.
        num_steps: The largest number of products.
        start: Where to start, at the cost of one more product; None: 0, which costs none.
        tolerance: Relative, >= 0.
    """
    apply, b_P = _flat(product, b), _in_order(b, b)
    v_P = torch.zeros_like(b_P) if start is None else _in_order(start, b)
    r_P = b_P if start is None else b_P - apply(v_P)
    p_P, square = r_P, r_P @ r_P
    eps = torch.finfo(b_P.dtype).eps
    # Without a floor at rounding error a solved system would end in steps of 0/0.
    limit = max(tolerance, eps) ** 2 * (b_P @ b_P)
    done = square <= limit
    negative = torch.zeros_like(done)
    largest = torch.zeros_like(square)
    for _ in range(num_steps):
        if _known(done):
            break
        q_P = apply(p_P)
        curvature, length = p_P @ q_P, p_P @ p_P
        # Along p with p'Hp <= 0 the quadratic has no minimum, and a step would lead away. The
        # largest |H p| / |p| so far, a bound of |H| from below, says what counts as 0.
        largest = torch.maximum(largest, ((q_P @ q_P) / length).sqrt())
        flat = ~done & (curvature <= eps * largest * length)
        negative, done = negative | flat, done | flat
        # Systems that are done may divide 0 by 0 here; torch.where drops the result.
        step = square / curvature
        v_P = torch.where(done, v_P, v_P + step * p_P)
        r_P = torch.where(done, r_P, r_P - step * q_P)
        new = r_P @ r_P
        p_P = torch.where(done, p_P, r_P + new / square * p_P)
        square = torch.where(done, square, new)
        done = done | (square <= limit)
    metrics = {
        "negative_curvature": negative.to(b_P.dtype),
        "recursive_residual": _ratio(square.sqrt(), b_P.norm()),
    }
    return Solution(unflatten(v_P, b), metrics)


def normal_conjugate_gradient(
    product: Product,
    transposed: Product,
    b: Params,
    num_steps: int,
    start: Params | None = None,
    tolerance: float = 0.0,
) -> Solution:
    """The solution of M v = b by conjugate gradients on M'M v = M'b, for any regular M.

    M need be neither symmetric nor definite; the price is that the condition number is squared.
    Stops at |M'(b - M v)| <= tolerance |M'b|, which is also what `recursive_residual` follows.

    Args:
        product: v -> M v, the same matrix at every call.
        transposed: u -> M'u.
        b: The right-hand side.
        num_steps: The largest number of steps, of one product of each kind.
        start: Where to start, at the cost of two more products; None: 0.
        tolerance: Relative, >= 0.
    """
    return conjugate_gradient(
        lambda v: transposed(product(v)), transposed(b), num_steps, start, tolerance
    )


def fixed_point(
    product: Product,
    b: Params,
    num_steps: int,
    step_size: float,
    start: Params | None = None,
    tolerance: float = 0.0,
) -> Solution:
    """v after `num_steps` steps v <- v - step_size (H v - b).

    Converges iff 0 < step_size < 2/L; the error shrinks by 1 - step_size mu per step.
    The product may be on other examples at every call; then `tolerance` must be 0.

    Args:
        product: v -> H v.
        b: The right-hand side.
        num_steps: The number of steps, of one product each except the first from 0.
        step_size: eta.
        start: Where to start; None: 0.
        tolerance: Steps end at |b - H v| <= tolerance |b|; 0: never.
    """
    apply, b_P = _flat(product, b), _in_order(b, b)
    steps = num_steps if start is not None else num_steps - 1  # the first from 0 gives eta b
    v_P = step_size * b_P if start is None else _in_order(start, b)
    done = torch.zeros_like(b_P[0], dtype=torch.bool)
    for _ in range(steps):
        r_P = b_P - apply(v_P)
        if tolerance:
            done = done | (r_P.norm() <= tolerance * b_P.norm())
            if _known(done):
                break
        v_P = torch.where(done, v_P, v_P + step_size * r_P)
    return Solution(unflatten(v_P, b), {})


def neumann(
    product: Product, b: Params, num_products: int, step_size: float, tolerance: float = 0.0
) -> Solution:
    """step_size * sum over q = 0 .. Q of (I - step_size H)^q b, with Q = num_products.

    On one matrix this is `num_products` + 1 steps of `fixed_point` from 0. With a product on
    other examples at every call, each power is a product of independent factors and the
    mean of v is the sum with the mean of H.

    Args:
        product: v -> H v.
        b: The right-hand side.
        num_products: Q.
        step_size: eta, < 2/L.
        tolerance: The sum ends at a term (the residual) of norm <= tolerance |b|; 0: never.
    """
    apply, b_P = _flat(product, b), _in_order(b, b)
    term_P = total_P = b_P
    done = torch.zeros_like(b_P[0], dtype=torch.bool)
    for _ in range(num_products):
        term_P = term_P - step_size * apply(term_P)
        if tolerance:
            done = done | (term_P.norm() <= tolerance * b_P.norm())
            if _known(done):
                break
        total_P = torch.where(done, total_P, total_P + term_P)
    return Solution(unflatten(step_size * total_P, b), {})


class Krylov(NamedTuple):
    """A basis q_1, q_2, .. that is orthonormal, and the tridiagonal matrix T of H on it.

    Args:
        basis: Shape (K, P), the vectors in rows; rows from `size` on are 0.
        following: Shape (P,), beta q of the next vector; 0: there is none yet.
        diagonal: Shape (K,), the diagonal of T.
        coupling: Shape (K,), beta of each vector to the one before it.
        size: The number of vectors so far.
    """

    basis: Tensor
    following: Tensor
    diagonal: Tensor
    coupling: Tensor
    size: int


def empty_krylov(like: Params, num_vectors: int) -> Krylov:
    """No vectors, with room for `num_vectors`, or as many as `like` has elements if fewer.

    Room from the start, since a state must keep its shape from `init` on.
    """
    zeros_P = torch.zeros_like(_in_order(like, like))
    num_rows = min(num_vectors, zeros_P.shape[0])
    zeros_K = zeros_P.new_zeros(num_rows)
    return Krylov(
        basis=zeros_P.new_zeros(num_rows, zeros_P.shape[0]),
        following=zeros_P,
        diagonal=zeros_K,
        coupling=zeros_K,
        size=0,
    )


def extend(krylov: Krylov, product: Product, residual: Params) -> Krylov:
    """One step of Lanczos' process, re-orthogonalised. Cost: one product.

    Where the last step left no new direction (and at the very first), the next vector is the part
    of `residual` outside the basis; where that vanishes too, it is 0, and so is its row.
    Lanczos, 1950; on one matrix the projections are the iterates of `conjugate_gradient`.
    """
    r_P, basis = _in_order(residual, residual), krylov.basis
    eps = torch.finfo(r_P.dtype).eps
    beta = krylov.following.norm()
    # What is left of a residual in the span is rounding error.
    left_P = _unit(_orthogonal(r_P, basis), eps**0.5 * r_P.norm())
    q_P = torch.where(beta > 0, krylov.following / beta, left_P)
    basis = _put(basis, krylov.size, q_P)
    u_P = _flat(product, residual)(q_P)
    next_P = _orthogonal(u_P, basis)
    return Krylov(
        basis=basis,
        following=torch.where(next_P.norm() > 100 * eps * u_P.norm(), next_P, 0.0),
        diagonal=_put(krylov.diagonal, krylov.size, q_P @ u_P),
        coupling=_put(krylov.coupling, krylov.size, beta),
        size=krylov.size + 1,
    )


def project(krylov: Krylov, residual: Params) -> Solution:
    """Q' T^+ Q residual: the solution of H v = residual in the span of the basis."""
    r_P = _in_order(residual, residual)
    # Rows without a vector give zero rows of T, which the pseudo-inverse leaves out.
    beside = torch.diag_embed(krylov.coupling[1:], 1)
    matrix = torch.diag_embed(krylov.diagonal) + beside + beside.mT
    weights_K, negative = solve_symmetric(matrix, krylov.basis @ r_P)
    v_P = krylov.basis.mT @ weights_K.to(r_P.dtype)
    return Solution(unflatten(v_P, residual), {"negative_curvature": negative.to(r_P.dtype)})


def in_span(product: Product, b: Params, vectors: list[Params]) -> Solution:
    """W (W'HW)^+ W'b: the v in the span of `vectors` that leaves b - H v orthogonal to them.

    For H > 0 it is the v of the span that is nearest to H^-1 b in the norm of H. The vectors are
    made orthonormal first; those that others span count as absent. Cost: a product per vector.
    """
    apply, b_P = _flat(product, b), _in_order(b, b)
    eps = torch.finfo(b_P.dtype).eps
    basis_KP = b_P.new_zeros(0, b_P.shape[0])
    for vector in vectors:
        w_P = _in_order(vector, b)
        q_P = _unit(_orthogonal(w_P, basis_KP), 100 * eps * w_P.norm())
        basis_KP = torch.cat([basis_KP, q_P[None]])
    images_KP = torch.stack([apply(q_P) for q_P in basis_KP])
    weights_K, negative = solve_symmetric(basis_KP @ images_KP.mT, basis_KP @ b_P)
    v_P = basis_KP.mT @ weights_K.to(b_P.dtype)
    return Solution(unflatten(v_P, b), {"negative_curvature": negative.to(b_P.dtype)})


def nystrom(product: Product, b: Params, indices: list[int], damping: float) -> Solution:
    """(H_k + damping I)^-1 b with H_k = C' M^+ C from k columns C of H, M = C[:, indices].

    With L = M^(-1/2) C:  v = (b - L' (damping I + L L')^-1 L b) / damping,  for H >= 0 the
    same as b / damping - C' (M + C C' / damping)^-1 C b / damping^2. Eigenvalues of M that are
    not positive (beyond rounding) are left out, which is reported: so H_k >= 0 and |v| <= |b| /
    damping, whatever H. Algebra in float64. Cost: k products.

    Args:
        product: v -> H v, undamped, the same matrix at every call.
        b: The right-hand side.
        indices: The columns, in the order of `flatten`, none twice.
        damping: > 0; outside the span of the columns v = b / damping.
    """
    apply, b_P = _flat(product, b), _in_order(b, b)
    places = torch.arange(b_P.shape[0], device=b_P.device)
    units = [(places == index).to(b_P.dtype) for index in indices]
    c_KP = torch.stack([apply(unit_P) for unit_P in units])
    values_K, vectors_KK, cut, _ = _eigh(c_KP[:, indices])
    # 1 / sqrt(inf) = 0 leaves an eigenvalue out without a branch.
    root_K = torch.where(values_K > cut, values_K.clamp(min=cut), torch.inf).rsqrt()
    l_KP = (vectors_KK * root_K).mT @ c_KP.double()
    inner_KK = damping * torch.eye(len(indices), dtype=l_KP.dtype, device=l_KP.device)
    inner_KK = inner_KK + l_KP @ l_KP.mT

    def solve(r_P: Tensor) -> Tensor:
        return (r_P - l_KP.mT @ solve_symmetric(inner_KK, l_KP @ r_P)[0]) / damping

    v_P = solve(b_P.double())
    # Once more on the residual: the difference in `solve` loses digits if damping is small.
    v_P = v_P + solve(b_P - damping * v_P - l_KP.mT @ (l_KP @ v_P))
    negative = (values_K < -cut).any().to(b_P.dtype)
    return Solution(unflatten(v_P.to(b_P.dtype), b), {"negative_curvature": negative})


def solve_symmetric(matrix_KK: Tensor, b_K: Tensor) -> tuple[Tensor, Tensor]:
    """(the least-squares solution of least norm, whether an eigenvalue is negative).

    For small matrices, definite or not: in float64, by eigenvalues; those within rounding error
    of 0 count as 0.
    """
    values_K, vectors_KK, cut, finite = _eigh(matrix_KK)
    inverse_K = torch.where(values_K.abs() > cut, 1 / values_K, 0.0)
    solution_K = vectors_KK @ (inverse_K * (vectors_KK.mT @ b_K.double()))
    return torch.where(finite, solution_K, torch.nan), (values_K < -cut).any()


def _eigh(matrix_KK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(eigenvalues, eigenvectors, rounding error of the eigenvalues, whether all is finite)."""
    # The library raises an error where it finds NaN, but one task must not end all others.
    finite = matrix_KK.isfinite().all()
    safe_KK = torch.where(finite, (matrix_KK + matrix_KK.mT) / 2, 0.0).double()
    by_rotation = len(safe_KK) == 2 and safe_KK.device.type in FUSED
    eigh = _eigh_of_two if by_rotation else torch.linalg.eigh
    values_K, vectors_KK = eigh(safe_KK)
    error = safe_KK.shape[0] * torch.finfo(matrix_KK.dtype).eps
    return values_K, vectors_KK, error * values_K.abs().max(), finite


def _eigh_of_two(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As torch.linalg.eigh of a 2 x 2 matrix, in any order; nothing waits for a GPU."""
    angle = torch.atan2(2 * matrix[0, 1], matrix[0, 0] - matrix[1, 1]) / 2
    cos, sin = angle.cos(), angle.sin()
    vectors = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    return (vectors.mT @ matrix @ vectors).diagonal(), vectors


def relative_residual(h_v: Params, b: Params) -> Tensor:
    """|H v - b| / |b|, shape (); 0 where b = 0."""
    return _ratio(norm(sub(h_v, b)), norm(b))


def _in_order(tree: Params, like: Params) -> Tensor:
    """`tree` as one vector, in the order of `like`."""
    return flatten({name: tree[name] for name in like})


def _flat(product: Product, like: Params) -> FlatProduct:
    return lambda v_P: _in_order(product(unflatten(v_P, like)), like)


def _known(done: Tensor) -> bool:
    """Whether this is one system and it is done, so that the loop can stop early.

    Under vmap `done` has a value per system that Python cannot read, and on a GPU a look at it
    would wait for all that was asked before: then all steps are made, to the same v.
    """
    return done.device.type == "cpu" and not is_functorch_wrapped_tensor(done) and bool(done)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _orthogonal(v_P: Tensor, basis_KP: Tensor) -> Tensor:
    # Twice is enough: once leaves rounding errors of v, which may be larger than the result.
    for _ in range(2):
        v_P = v_P - basis_KP.mT @ (basis_KP @ v_P)
    return v_P


def _unit(v_P: Tensor, least: Tensor) -> Tensor:
    """v / |v|; 0 if |v| <= least."""
    size = v_P.norm()
    return torch.where(size > least, v_P / size, 0.0)


def _put(tensor: Tensor, index: int, value: Tensor) -> Tensor:
    """`tensor` with `value` at `index`; a copy, for under vmap `value` may be of more tasks."""
    return torch.cat([tensor[:index], value[None], tensor[index + 1 :]])
