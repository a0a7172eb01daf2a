"""Convolution with as little work as possible in its second derivatives.

torch computes the gradient to the weight in a double backward pass as a convolution whose kernel is
as large as the image, and the gradient to the inputs also where nobody asked for it. Here each is
the backward pass that there is for it anyway. With  y = x * w + b  and

    X(g, w)  and  W(g, x)

the gradients of  <g, y>  to x and w, both bilinear: gradients u, k, l of  X(g, w), W(g, x) and the
sum of g over all but the channels  give

    to g:  u * w + x * k + l;    to x:  X(g, k);    to w:  W(g, u)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metadist.layers import is_plain, quick

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""stride, padding, dilation, is_transposed, output_padding, groups"""


SMALL = 1 << 16
"""See `is_plain`; of inputs or outputs, whichever are more."""


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with second derivatives that take less time.

    Values and first derivatives are those of `nn.Conv2d` to the last bit (under vmap, to rounding),
    second ones to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, padding = input, self.padding
        if (
            isinstance(padding, str)
            or self.padding_mode != "zeros"
            or not torch.is_grad_enabled()
            or is_plain(x, SMALL * self.in_channels // max(self.in_channels, self.out_channels))
            or x.ndim != 4
        ):
            return super().forward(x)
        stride, dilation = list(self.stride), list(self.dilation)
        geometry = (stride, list(padding), dilation, False, [0, 0], self.groups)
        found: Tensor = _Forward.apply(x, self.weight, self.bias, geometry)
        return found


@quick
class _Forward(torch.autograd.Function):
    """(x, weight, bias) -> y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Any:
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        asked = tuple(ctx.needs_input_grad[:3])
        return *_Backward.apply(g, x, weight, asked, ctx.geometry), None


@quick
class _Backward(torch.autograd.Function):
    """(g, x, weight) -> the gradients to x, weight and bias that are asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, asked: tuple[bool, ...], geometry: Geometry
    ) -> Any:
        return _backward(g, x, weight, asked, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, ctx.geometry = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, k: Tensor | None, c: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        wants_g, wants_x, wants_weight, *_ = ctx.needs_input_grad
        to_g = to_x = to_weight = None
        if wants_g:
            parts = []
            if k is not None:
                parts.append(torch.ops.aten.convolution(x, k, c, *ctx.geometry))
            elif c is not None:
                parts.append(c.view(-1, 1, 1).expand_as(g))
            if u is not None:
                parts.append(torch.ops.aten.convolution(u, weight, None, *ctx.geometry))
            to_g = sum(parts[1:], parts[0]) if parts else None
        if wants_x and k is not None:
            to_x = _backward(g, x, k, (True, False, False), ctx.geometry)[0]
        if wants_weight and u is not None:
            to_weight = _backward(g, u, weight, (False, True, False), ctx.geometry)[1]
        return to_g, to_x, to_weight, None, None


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, asked: tuple[bool, ...], geometry: Geometry
) -> tuple[Tensor | None, ...]:
    channels = [weight.shape[0]]
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g, x, weight, channels, *geometry, list(asked)
    )
    return found
