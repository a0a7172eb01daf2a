"""Sparse linear regression whose regularisation is learned: a lower level that is not smooth.

Shape letters: n examples, P features, K groups of M features each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metadist.checks.values import check, require_integer, require_number, require_word
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.fixed import OneTask, metrics_on
from metadist.trees import Params

DOUBLE = torch.float64
TERMS = ("groups", "lasso", "ridge")
Term = Literal["groups", "lasso", "ridge"]


class SparseRegression(Problem):
    """Linear regression with learned strengths of an elastic net or of a (sparse) group lasso.

        g = mean_i (a_i'y - b_i)^2 / 2  +  exp(x_ridge) |y|^2 / 2
        r = sum_k exp(x_k) |y_k|  +  exp(x_lasso) |y|_1              (y_k: the features of group k)
        f = mean_i (a_i'y - b_i)^2 / 2 on the validation examples

    with those `terms` that are asked for: an elastic net is ("lasso", "ridge"), a group lasso
    ("groups",), a sparse group lasso ("groups", "lasso"). Only methods with a prox take it (MEHA).

        data = SparseRegressionData()
        problem = SparseRegression(terms=("groups",))
        Trainer(problem, data, MEHA(inner_lr=0.1, y_lr=0.1))

    Args:
        num_features: P, a multiple of num_groups.
        num_groups: K; groups are of neighbouring features.
        terms: One or more of "groups", "lasso" and "ridge".
        tied: One strength for all groups.
        strength: The strengths at the start, > 0. Under large ones y stays at 0, where x has no
            hypergradient.
        max_strength: Strengths stay below it, >= strength.

    x: `log_groups` (K,), or (1,) if tied; `log_lasso` and `log_ridge` (1,). y: `weight` (P,).
    In float64.

    Source: Liu et al., MEHA (ICML 2024), its group lasso and the examples of the same group
    (elastic net, sparse group lasso), after Feng and Simon (2018) and Gao et al., VF-iDCA (ICML
    2022).
    Differs from them in: means over examples, not sums; logarithms of the strengths.
    """

    def __init__(
        self,
        num_features: int = 600,
        num_groups: int = 30,
        terms: Sequence[Term] = ("groups",),
        tied: bool = False,
        strength: float = 0.1,
        max_strength: float = 100.0,
    ) -> None:
        require_groups(num_features, num_groups)
        unknown = [term for term in terms if term not in TERMS]
        if unknown or not terms or isinstance(terms, str):
            raise ValueError(f"terms must be a list of {', '.join(TERMS)}, got {terms!r}")
        check("strength", strength, gt=0)
        require_number(max_strength=max_strength)
        if not strength <= max_strength < math.inf:
            raise ValueError(
                f"max_strength must be >= strength ({strength}) and finite, got {max_strength}"
            )
        self.num_features = num_features
        self.num_groups = num_groups
        self.terms = tuple(terms)
        self.tied = tied
        self.strength = strength
        self.max_strength = max_strength

    def init_outer(self, generator: torch.Generator) -> Params:
        start = math.log(self.strength)
        sizes = {"groups": 1 if self.tied else self.num_groups, "lasso": 1, "ridge": 1}
        return {f"log_{t}": torch.full((sizes[t],), start, dtype=DOUBLE) for t in self.terms}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"weight": next(iter(outer.values())).new_zeros(self.num_features)}

    def project_outer(self, outer: Params) -> Params:
        limit = math.log(self.max_strength)
        return {name: leaf.clamp(max=limit) for name, leaf in outer.items()}

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs_nP, targets_n = batch.fields("inputs", "targets")
        return 0.5 * (inputs_nP @ inner["weight"] - targets_n).square().mean()

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        loss = self.outer_loss(context, inner, batch)
        if "ridge" not in self.terms:
            return loss
        return loss + 0.5 * context["log_ridge"].exp().sum() * inner["weight"].square().sum()

    def nonsmooth_loss(self, context: Params, inner: Params) -> Tensor:
        y = inner["weight"]
        total = y.new_zeros(())
        if "groups" in self.terms:
            norms_K = y.view(self.num_groups, -1).norm(dim=1)
            total = total + (context["log_groups"].exp() * norms_K).sum()
        if "lasso" in self.terms:
            total = total + context["log_lasso"].exp().sum() * y.abs().sum()
        return total

    def prox_inner(self, context: Params, inner: Params, step_size: float) -> Params:
        """Soft thresholds, then a shrinkage of the groups: exact for both together."""
        y = inner["weight"]
        if "lasso" in self.terms:
            y = y.sign() * (y.abs() - step_size * context["log_lasso"].exp()).relu()
        if "groups" in self.terms:
            y_KM = y.view(self.num_groups, -1)
            norms_K1 = y_KM.norm(dim=1, keepdim=True)
            kept_K1 = (norms_K1 - step_size * context["log_groups"].exp()[:, None]).relu()
            # A group of zeros stays 0, where the quotient would be 0 / 0.
            y = (y_KM * (kept_K1 / norms_K1.clamp(min=torch.finfo(y.dtype).tiny))).flatten()
        return {"weight": y}

    def solve(self, outer: Params, inner: Params, batch: Batch, max_iter: int = 5000) -> Params:
        """y*(x) on the examples of `batch`, from `inner`, by accelerated proximal gradients.

        Ends after `max_iter` steps, or where a step is below 1e-9 of |y|.
        """
        inputs_nP, targets_n = batch.fields("inputs", "targets")
        ridge = float(outer["log_ridge"].exp()) if "ridge" in self.terms else 0.0
        curvature = float(torch.linalg.matrix_norm(inputs_nP, 2)) ** 2 / len(inputs_nP)
        rate = 1 / (curvature + ridge)
        y, ahead, momentum = inner["weight"], inner["weight"], 1.0
        for _ in range(max_iter):
            residual_n = inputs_nP @ ahead - targets_n
            gradient = inputs_nP.T @ residual_n / len(inputs_nP) + ridge * ahead
            stepped = {"weight": ahead - rate * gradient}
            last, y = y, self.prox_inner(outer, stepped, rate)["weight"]
            if (y - last).norm() <= 1e-9 * y.norm():
                break
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = y + (momentum - 1) / following * (y - last)
            momentum = following
        return {"weight": y}


class SparseRegressionData(OneTask):
    """Linear regression data with few features that matter.

    b_i = a_i'y + noise, where a_i is normal, and y is 0 but for multiples of `coefficients` at the
    beginning of the first `num_active` groups (`truth`). a_i'y has a variance of 1, the noise a
    standard deviation of 1 / snr, so the least test loss is 1 / (2 snr^2).

    Args:
        num_features, num_groups: See `SparseRegression`.
        num_active: The number of groups that matter.
        coefficients: The first entries of y in each of them; not more than a group has features.
        correlation: Of features i and j to the power |i - j|, in [0, 1).
        snr: The ratio of signal to noise, > 0.
        num_train, num_val, num_test: Examples, >= 1.
        seed: The seed of all data, 0 <= seed < 2^64.

    Source: Feng and Simon, Gradient-based regularization parameter selection for problems with
    nonsmooth penalty functions (2018), as in `SparseRegression`.
    """

    def __init__(
        self,
        num_features: int = 600,
        num_groups: int = 30,
        num_active: int = 3,
        coefficients: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 5.0),
        correlation: float = 0.0,
        snr: float = 2.0,
        num_train: int = 100,
        num_val: int = 100,
        num_test: int = 300,
        seed: int = 0,
    ) -> None:
        require_groups(num_features, num_groups)
        size = num_features // num_groups
        require_integer("num_active", num_active, 1)
        if num_active > num_groups:
            raise ValueError(f"num_active must be <= num_groups ({num_groups}), got {num_active}")
        if not 1 <= len(coefficients) <= size:
            raise ValueError(
                f"coefficients must be 1 to {size} numbers, the features of a group, got "
                f"{len(coefficients)}"
            )
        for coefficient in coefficients:
            check("each of coefficients", coefficient)
        check("correlation", correlation, ge=0, lt=1)
        check("snr", snr, gt=0)
        sizes = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        for field, value in sizes.items():
            require_integer(field, value, 1)
        require_word("seed", seed)
        truth_KM = torch.zeros(num_groups, size, dtype=DOUBLE)
        truth_KM[:num_active, : len(coefficients)] = torch.tensor(coefficients, dtype=DOUBLE)
        self.truth = truth_KM.flatten()
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=DOUBLE)

        total = sum(sizes.values())
        inputs = normal(total, num_features)
        if correlation:
            place = torch.arange(num_features)
            covariance = correlation ** (place[:, None] - place).abs().to(DOUBLE)
            inputs = inputs @ torch.linalg.cholesky(covariance).T
        self.truth /= (inputs @ self.truth).std()
        targets = inputs @ self.truth + normal(total) / snr
        parts = zip(*(rows.split(list(sizes.values())) for rows in (inputs, targets)), strict=True)
        train, val, self.test = (Batch.named(inputs=a, targets=b) for a, b in parts)
        super().__init__(train, val)

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """The test loss of y, and what x is worth.

        `solved_val_loss` and `solved_test_loss` are losses at y*(x). `precision` is the share of
        features that matter among those with a weight in y*(x) (0 if there is none), `recall` the
        share that has a weight among those that matter.
        """
        metrics = metrics_on(problem, outer, inner, self.test)
        if not isinstance(problem, SparseRegression):
            return metrics
        outer, inner = ({n: t.cpu().double() for n, t in tree.items()} for tree in (outer, inner))
        solved = problem.solve(outer, inner, self.support)
        found, there = solved["weight"] != 0, self.truth != 0
        hits = int((found & there).sum())
        return {
            **metrics,
            **metrics_on(problem, outer, solved, self.query, "solved_val"),
            **metrics_on(problem, outer, solved, self.test, "solved_test"),
            "precision": hits / max(1, int(found.sum())),
            "recall": hits / int(there.sum()),
        }


def require_groups(num_features: int, num_groups: int) -> None:
    """Raise ValueError unless the features can be cut into groups of one size."""
    require_integer("num_groups", num_groups, 1)
    require_integer("num_features", num_features, 1)
    if num_features % num_groups:
        raise ValueError(
            f"num_features must be a multiple of num_groups ({num_groups}), got {num_features}"
        )
