"""Distributed meta-learning and bilevel optimisation with PyTorch and Ray."""

from importlib.metadata import version

__version__ = version("metadist")
