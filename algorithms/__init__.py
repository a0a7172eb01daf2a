"""Bilevel and meta-learning methods: one file per paper, and `parts` with what they share.

To add a method, write one file here, in the symbols of all the others, and import its class below
(`as` its own name: what is imported is public, and listed):

    x, y           outer and inner variable; the losses see x as `context`
    f_x, f_y       gradients of the outer loss f (query set)
    g_x, g_y       gradients of the inner loss g (support set)
    h_v, j_v       products of H = d2g/dy2 and J = d2g/dxdy with v
    v, b           the adjoint, and the right-hand side of H v = b (b = f_y)
    h              what stands for the hypergradient, d f(x, y*(x)) / dx
"""

if __name__ != "metadist.algorithms":
    raise ImportError("import metadist.algorithms, not algorithms: a bare name may be any module")

from metadist.algorithm import Algorithm as _Algorithm
from metadist.algorithms.aid import AID as AID
from metadist.algorithms.amigo import AmIGO as AmIGO
from metadist.algorithms.bamm import BAMM as BAMM
from metadist.algorithms.bda import BDA as BDA
from metadist.algorithms.bome import BOME as BOME
from metadist.algorithms.bvfsm import BVFSM as BVFSM
from metadist.algorithms.darts import DARTS as DARTS
from metadist.algorithms.f2sa import F2SA as F2SA
from metadist.algorithms.fg2u import FG2U as FG2U
from metadist.algorithms.free_pbgd import FreePBGD as FreePBGD
from metadist.algorithms.fsla import FSLA as FSLA
from metadist.algorithms.iaptt import IAPTT as IAPTT
from metadist.algorithms.imaml import IMAML as IMAML
from metadist.algorithms.itd import ITD as ITD
from metadist.algorithms.lancbio import LancBiO as LancBiO
from metadist.algorithms.meha import MEHA as MEHA
from metadist.algorithms.meta_sgd import MetaSGD as MetaSGD
from metadist.algorithms.mrbo import MRBO as MRBO
from metadist.algorithms.noloop_aid import NoLoopAID as NoLoopAID
from metadist.algorithms.nystrom import Nystrom as Nystrom
from metadist.algorithms.penalty import Penalty as Penalty
from metadist.algorithms.pzobo import PZOBO as PZOBO
from metadist.algorithms.reptile import Reptile as Reptile
from metadist.algorithms.saba import SABA as SABA
from metadist.algorithms.sama import SAMA as SAMA
from metadist.algorithms.soba import SOBA as SOBA
from metadist.algorithms.srba import SRBA as SRBA
from metadist.algorithms.stocbio import StocBiO as StocBiO
from metadist.algorithms.subbio import SubBiO as SubBiO
from metadist.algorithms.sustain import SUSTAIN as SUSTAIN
from metadist.algorithms.t1t2 import T1T2 as T1T2
from metadist.algorithms.ufom import UFOM as UFOM
from metadist.algorithms.vpbgd import VPBGD as VPBGD
from metadist.algorithms.vrbo import VRBO as VRBO

_METHODS = [cls for cls in list(vars().values()) if isinstance(cls, type) and cls is not _Algorithm]

ALGORITHMS: dict[str, type[_Algorithm]] = {cls.__name__.lower(): cls for cls in _METHODS}
"""Short names, for the command line."""

__all__ = ["ALGORITHMS", *(cls.__name__ for cls in _METHODS)]
