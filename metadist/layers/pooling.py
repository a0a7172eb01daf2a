"""Max-pooling by 2 whose forward pass takes a CPU about as long as reading its inputs.

torch finds a maximum and its place one number after another. Here maxima are taken of whole rows,
and the place of each, of which derivatives are gathers and scatters, follows from two comparisons.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.layers import is_plain, quick
from metadist.trees import FUSED

SMALL = 100_000  # see `is_plain`


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` that takes a CPU less time, where it is one of 2 x 2 numbers."""

    def forward(self, input: Tensor) -> Tensor:
        given = (self.kernel_size, self.stride, self.padding, self.dilation)
        if given != (2, 2, 0, 1) or self.return_indices or self.ceil_mode:
            pooled: Tensor = super().forward(input)
            return pooled
        return max_pool(input)


def max_pool(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 2)` and its derivatives, to the last bit but for the sign of a zero.

    Of images with NaN the gradient goes elsewhere.

    Args:
        x: Shape (N, C, H, W).
    """
    if (
        is_plain(x, SMALL)
        or x.device.type in FUSED
        or x.ndim != 4
        or not x.is_contiguous()
        or min(x.shape[2:]) < 2
    ):
        return F.max_pool2d(x, 2)
    if not torch.is_grad_enabled():
        left, right = _columns(x)
        wide = torch.maximum(left, right)
        return torch.maximum(wide[:, :, ::2], wide[:, :, 1::2])
    pooled: Tensor = _Forward.apply(x)[0]
    return pooled


def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right numbers of all pairs in a row."""
    height, width = (size // 2 * 2 for size in x.shape[2:])
    return x[:, :, :height, 0:width:2], x[:, :, :height, 1:width:2]


@quick
class _Forward(torch.autograd.Function):
    """x -> (maxima, their places in an image)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        left, right = _columns(x)
        # Of equal numbers the first is the maximum, as torch's.
        is_right = right > left
        wide = torch.maximum(left, right)
        top, bottom = wide[:, :, ::2], wide[:, :, 1::2]
        is_bottom = bottom > top
        # Bits, since a CPU computes `torch.where` and sums of mixed types one number after another.
        above, below = is_right[:, :, ::2], is_right[:, :, 1::2]
        is_right = above ^ ((above ^ below) & is_bottom)
        height, width = top.shape[2:]
        rows = torch.arange(height, device=x.device)[:, None] * (2 * x.shape[3])
        first = rows + 2 * torch.arange(width, device=x.device)
        place = first + is_right.long().add(is_bottom.long(), alpha=x.shape[3])
        return torch.maximum(top, bottom), place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return _Backward.apply(g, *ctx.saved_tensors, ctx.shape)


@quick
class _Backward(torch.autograd.Function):
    """(g, places) -> g at its places in images of zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, place: Tensor, shape: torch.Size) -> Any:
        like = g.new_empty(()).expand(shape)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            g, like, [2, 2], [2, 2], [0, 0], [1, 1], False, place
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return u.flatten(-2).gather(-1, place.flatten(-2)).view(place.shape), None, None
