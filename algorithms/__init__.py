"""Bilevel and meta-learning algorithms, one file each, and linear solvers."""

if __name__ != "metadist.algorithms":
    raise ImportError("import metadist.algorithms, not algorithms: a bare name may be any module")

from metadist.algorithms.itd import ITD
from metadist.algorithms.reptile import Reptile

ALGORITHMS = {"itd": ITD, "reptile": Reptile}
"""Short names, for the command line."""

__all__ = ["ALGORITHMS", "ITD", "Reptile"]
