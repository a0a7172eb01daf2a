"""Bilevel and meta-learning methods: one file per paper, and `parts` with what they share.

To add a method, write one file here, in the symbols of all the others, and name its class below:

    x, y           outer and inner variable; the losses see x as `context`
    f_x, f_y       gradients of the outer loss f (query set)
    g_x, g_y       gradients of the inner loss g (support set)
    h_v, j_v       products of H = d2g/dy2 and J = d2g/dxdy with v
    v, b           the adjoint, and the right-hand side of H v = b (b = f_y)
    h              what stands for the hypergradient, d f(x, y*(x)) / dx
"""

if __name__ != "metadist.algorithms":
    raise ImportError("import metadist.algorithms, not algorithms: a bare name may be any module")

from metadist.algorithm import Algorithm
from metadist.algorithms.aid import AID
from metadist.algorithms.amigo import AmIGO
from metadist.algorithms.bome import BOME
from metadist.algorithms.darts import DARTS
from metadist.algorithms.f2sa import F2SA
from metadist.algorithms.fg2u import FG2U
from metadist.algorithms.fsla import FSLA
from metadist.algorithms.imaml import IMAML
from metadist.algorithms.itd import ITD
from metadist.algorithms.lancbio import LancBiO
from metadist.algorithms.meha import MEHA
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.mrbo import MRBO
from metadist.algorithms.noloop_aid import NoLoopAID
from metadist.algorithms.nystrom import Nystrom
from metadist.algorithms.penalty import Penalty
from metadist.algorithms.pzobo import PZOBO
from metadist.algorithms.reptile import Reptile
from metadist.algorithms.saba import SABA
from metadist.algorithms.sama import SAMA
from metadist.algorithms.soba import SOBA
from metadist.algorithms.stocbio import StocBiO
from metadist.algorithms.subbio import SubBiO
from metadist.algorithms.sustain import SUSTAIN
from metadist.algorithms.t1t2 import T1T2
from metadist.algorithms.ufom import UFOM
from metadist.algorithms.vpbgd import VPBGD
from metadist.algorithms.vrbo import VRBO

FAMILIES: dict[str, tuple[type[Algorithm], ...]] = {
    "Through the inner loop": (ITD, MetaSGD, UFOM, FG2U, PZOBO),
    "Implicit differentiation": (AID, NoLoopAID, AmIGO, Nystrom, SubBiO, LancBiO, IMAML),
    "Stochastic": (StocBiO, MRBO, VRBO, SUSTAIN, SOBA, SABA, FSLA),
    "First derivatives of g": (BOME, MEHA, F2SA, VPBGD, Penalty),
    "Heuristic": (Reptile, T1T2, DARTS, SAMA),
}

ALGORITHMS = {cls.__name__.lower(): cls for family in FAMILIES.values() for cls in family}
"""Short names, for the command line, in families."""

__all__ = [
    "AID",
    "ALGORITHMS",
    "BOME",
    "DARTS",
    "F2SA",
    "FG2U",
    "FSLA",
    "IMAML",
    "ITD",
    "MEHA",
    "MRBO",
    "PZOBO",
    "SABA",
    "SAMA",
    "SOBA",
    "SUSTAIN",
    "T1T2",
    "UFOM",
    "VPBGD",
    "VRBO",
    "AmIGO",
    "LancBiO",
    "MetaSGD",
    "NoLoopAID",
    "Nystrom",
    "Penalty",
    "Reptile",
    "StocBiO",
    "SubBiO",
]
