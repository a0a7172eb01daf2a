"""What is expected of the methods without second derivatives, the heuristics and Meta-SGD.

The oracle gives grad_x g and grad_y g of one point together, so wherever the first is needed the
second is counted too.
"""

from __future__ import annotations

from metadist.algorithms.bome import BOME
from metadist.algorithms.bvfsm import BVFSM
from metadist.algorithms.darts import DARTS
from metadist.algorithms.f2sa import F2SA
from metadist.algorithms.free_pbgd import FreePBGD
from metadist.algorithms.meha import MEHA
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.penalty import Penalty
from metadist.algorithms.sama import SAMA
from metadist.algorithms.t1t2 import T1T2
from metadist.algorithms.vpbgd import VPBGD
from tests.algorithms.cases import Case

CASES: dict[str, Case] = {
    "bome": Case(
        BOME(inner_steps=5, inner_lr=0.4, y_lr=0.05),
        {"inner_grad": 5 + 2, "inner_grad_x": 2, "outer_grads": 1},
        outer_lr=0.05,
        tolerance=0.15,  # a fixed step leaves a gap
    ),
    "meha": Case(
        MEHA(inner_lr=0.3, y_lr=0.3, c=30.0, c_power=0.0),
        # theta, y, and grad_x g at both; f at the old and at the new x, one half of each used
        {"inner_grad": 4, "inner_grad_x": 2, "outer_grads": 2},
        outer_lr=5.0,
        tolerance=0.08,  # O(1 / c)
    ),
    "f2sa": Case(
        F2SA(inner_steps=10, inner_lr=0.4, lam=1000.0),
        {"inner_grad": 2 * 10 + 2, "inner_grad_x": 2, "outer_grads": 10 + 1},
        tolerance=1.5e-3,  # O(1 / lam)
    ),
    "vpbgd": Case(
        VPBGD(inner_steps=5, inner_lr=0.4, y_lr=0.4, gamma_max=10.0),
        {"inner_grad": 5 + 2, "inner_grad_x": 2, "outer_grads": 1},
        outer_lr=0.5,
        tolerance=0.12,  # O(1 / gamma)
    ),
    "bvfsm": Case(
        BVFSM(inner_steps=5, inner_lr=0.4, y_steps=20, y_lr=0.15, sigma=1e-3, mu=0.0, theta=0.0),
        # two values for each weight of g
        {"inner_grad": 5 + 20 + 2, "inner_grad_x": 2, "inner_value": 42, "outer_grads": 21},
        tolerance=0.08,  # O(sigma^(1/3))
    ),
    "freepbgd": Case(
        FreePBGD(inner_steps=2, inner_lr=0.4),
        {"inner_grad": 2, "outer_grads": 2 + 1},
    ),
    "penalty": Case(
        Penalty(inner_steps=5, inner_lr=0.2, eps=10.0),
        # the last hvp is a by-product of the jvp
        {"inner_grad": 5 + 1, "hvp": 5 + 1, "jvp": 1, "outer_grads": 5 + 1},
    ),
    "t1t2": Case(
        T1T2(inner_steps=10, inner_lr=0.4, adjoint_lr=0.7),
        # the hvp is a by-product of the jvp
        {"inner_grad": 10, "outer_grads": 1, "jvp": 1, "hvp": 1},
        tolerance=0.5,  # takes a number for the inverse Hessian
    ),
    "darts": Case(
        DARTS(inner_steps=10, inner_lr=0.4),
        {"inner_grad": 10 + 2, "inner_grad_x": 2, "outer_grads": 1},
        tolerance=0.7,  # takes the identity for it
    ),
    "sama": Case(
        SAMA(inner_steps=10, inner_lr=0.4),
        {"inner_grad": 10 + 2, "inner_grad_x": 2, "outer_grads": 1},
        tolerance=0.7,  # as DARTS
    ),
    "metasgd": Case(
        MetaSGD(inner_steps=10, inner_lr=0.4),
        {"inner_grad": 10, "outer_grads": 1, "hvp": 10, "jvp": 10},
        tolerance=0.02,  # what 10 steps do not see of the solution
    ),
}
