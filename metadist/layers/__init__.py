"""Layers of torch whose second derivatives are computed here, with the same values in less time.

Each is a function with a double backward pass of its own, written out in its module. Whatever
exports or traces a model sees torch's own layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metadist.trees import FUSED

SMALL = 1 << 16
"""Numbers in the inputs of a layer, below which a function of its own costs a CPU more than it
saves."""


def is_plain(x: Tensor) -> bool:
    """Whether x is to pass torch's own layer: it is small, or something compiles or casts it.

    Args:
        x: The inputs of a layer.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or (x.numel() < SMALL and x.device.type not in FUSED)
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )
