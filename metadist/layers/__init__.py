"""Layers of torch whose second derivatives are computed here, with the same values in less time.

Each is a function with a double backward pass of its own, written out in its module. Whatever
exports or traces a model sees torch's own layers, whose subclasses these are.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metadist.trees import FUSED


def is_plain(x: Tensor, small: int) -> bool:
    """Whether x is to pass torch's own layer: it is small, or something compiles or casts it.

    Args:
        x: The inputs of a layer.
        small: Numbers in x, below which calls cost a CPU more than they save.
    """
    return (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)  # but what stands for one while torch.fx traces
        or torch._C._is_tracing()
        or x.device.type not in ("cpu", *FUSED)
        or (x.device.type not in FUSED and x.numel() < small)
        or x.is_complex()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )


def quick(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` itself, whose calls take half of the time.

    torch reads the signature of `forward` at each call, for default arguments.
    """
    forward = function.forward
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return function
