"""Stochastic methods, here without noise in draws."""

from metadist.algorithms.fg2u import FG2U
from metadist.algorithms.fsla import FSLA
from metadist.algorithms.mrbo import MRBO
from metadist.algorithms.pzobo import PZOBO
from metadist.algorithms.saba import SABA
from metadist.algorithms.soba import SOBA
from metadist.algorithms.srba import SRBA
from metadist.algorithms.stocbio import StocBiO
from metadist.algorithms.sustain import SUSTAIN
from metadist.algorithms.ufom import UFOM
from metadist.algorithms.vrbo import VRBO
from tests.algorithms.cases import Case

# J v's pass gives H v too, so each J counts as one more H.
CASES: dict[str, Case] = {
    "stocbio": Case(
        StocBiO(inner_steps=3, inner_lr=0.5, adjoint_steps=20, adjoint_lr=0.5),
        {"inner_grad": 3, "outer_grads": 1, "hvp": 21, "jvp": 1},
        outer_lr=0.7,
    ),
    "mrbo": Case(
        MRBO(inner_lr=0.5, adjoint_steps=15, adjoint_lr=0.5),
        {"inner_grad": 2, "outer_grads": 2, "hvp": 32, "jvp": 2},
        outer_lr=0.5,
        tolerance=3e-5,  # (1 - .5)^16
    ),
    "vrbo": Case(
        VRBO(inner_steps=2, inner_lr=0.5, adjoint_steps=9, adjoint_lr=0.5),
        {"inner_grad": 4, "outer_grads": 4, "hvp": 40, "jvp": 4},
        outer_lr=0.7,
        num_steps=60,
        tolerance=2e-3,  # (1 - .5)^10
    ),
    # p = 3 at step 1. Chains of random length leave noise without noise in draws.
    "sustain": Case(
        SUSTAIN(inner_lr=0.5, adjoint_steps=6, adjoint_lr=0.5),
        {"inner_grad": 2, "outer_grads": 2, "hvp": 8, "jvp": 2},
        outer_lr=0.1,
        num_steps=300,
        tolerance=0.15,
    ),
    "soba": Case(
        SOBA(inner_lr=0.5, adjoint_lr=0.5),
        {"inner_grad": 1, "outer_grads": 1, "hvp": 1, "jvp": 1},
    ),
    "saba": Case(
        SABA(inner_lr=0.5, adjoint_lr=0.5),
        {"inner_grad": 1, "outer_grads": 1, "hvp": 1, "jvp": 1},
    ),
    "srba": Case(
        SRBA(inner_lr=0.5, adjoint_lr=0.5),
        {"inner_grad": 2, "outer_grads": 2, "hvp": 2, "jvp": 2},
    ),
    # The step of v takes grad_y f of a joint gradient, w one at each of its two points.
    "fsla": Case(
        FSLA(inner_lr=0.5, adjoint_lr=0.5),
        {"inner_grad": 1, "outer_grads": 3, "hvp": 3, "jvp": 2},
    ),
    "ufom": Case(
        UFOM(inner_steps=10, inner_lr=0.5, exact_probability=1.0),
        {"inner_grad": 10, "outer_grads": 1, "hvp": 10, "jvp": 10},
        outer_lr=0.7,
        num_steps=100,
        tolerance=0.3,
    ),
    "fg2u": Case(
        FG2U(inner_steps=10, inner_lr=0.5, num_directions=4),
        {"inner_grad": 10, "outer_grads": 1, "directional": 40},
        outer_lr=0.2,
        num_steps=100,
        tolerance=0.5,
    ),
    "pzobo": Case(
        PZOBO(inner_steps=10, inner_lr=0.5, num_directions=6),
        {"inner_grad": 70, "outer_grads": 1},
        outer_lr=0.2,
        num_steps=100,
        tolerance=0.8,
    ),
}
