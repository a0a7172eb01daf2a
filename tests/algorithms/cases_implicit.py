"""Cases of the methods of implicit differentiation, see cases.py."""

from __future__ import annotations

from metadist.algorithms.aid import AID
from metadist.algorithms.amigo import AmIGO
from metadist.algorithms.bamm import BAMM
from metadist.algorithms.imaml import IMAML
from metadist.algorithms.lancbio import LancBiO
from metadist.algorithms.noloop_aid import NoLoopAID
from metadist.algorithms.nystrom import Nystrom
from metadist.algorithms.subbio import SubBiO
from tests.algorithms.cases import Case, implicit

CASES: dict[str, Case] = {
    "aid": Case(AID(inner_steps=5, inner_lr=0.3, adjoint_steps=4), implicit(5, 4)),
    "noloopaid": Case(NoLoopAID(inner_lr=0.3), implicit(1, 1), outer_lr=0.03, num_steps=2000),
    "amigo": Case(AmIGO(inner_steps=5, inner_lr=0.3, adjoint_steps=6), implicit(5, 6)),
    # The share of f moves the solution.
    "bamm": Case(
        BAMM(inner_lr=0.5, adjoint_lr=0.5, mu=0.05),
        {"inner_grad": 1, "outer_grads": 1, "hvp": 1, "jvp": 1, "outer_hvp": 1, "outer_jvp": 1},
        tolerance=0.15,
    ),
    # As many columns as y has numbers: the bias is that of the damping.
    "nystrom": Case(
        Nystrom(inner_steps=5, inner_lr=0.3, rank=4, damping=1e-5), implicit(5, 4), tolerance=1e-3
    ),
    "subbio": Case(SubBiO(inner_steps=5, inner_lr=0.3), implicit(5, 3)),
    # The second estimate begins a window, which costs the product H anchor.
    "lancbio": Case(
        LancBiO(inner_steps=5, inner_lr=0.3, adjoint_steps=1, subspace_cap=4), implicit(5, 2)
    ),
    # The proximal term moves the solution: a bias of the order of lam.
    "imaml": Case(
        IMAML(inner_steps=5, inner_lr=0.3, lam=1e-4, adjoint_steps=4),
        implicit(5, 4),
        tolerance=1e-3,
    ),
}
