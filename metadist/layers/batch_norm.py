"""Batch norm by the statistics of what it is given, with few operations in every derivative.

The double backward pass of torch's own is 96 operations, each of which a GPU waits for, and it is
the last one. Here it is 18, of which two are a backward pass.

With r = (variance + eps)^-1/2, z = r (x - mean), m(.) the mean over the N numbers of a channel and
the projection  P u = u - m(u) - z m(u z), which is symmetric: a gradient g of  y = w z + b  gives

    to x:  w r P g;    to w:  sum g z;    to b:  sum g

and gradients u, k, l of these three, with  p = r P u,  give

    to g:  w p + k z + l;    to w:  sum g p
    to x:  r P e - r z w m(g p),    e = (k - w r m(u z)) g - w r m(g z) u

where r P u with the sums of u z, and r P e, are a backward pass each for w = 1, one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.layers import is_plain, quick

SMALL = 1 << 16  # see `is_plain`


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)`, to rounding.

    Exact derivatives of every order, also under torch.func.

    Args:
        x: Shape (N, C, ...).
        weight: Shape (C,).
        bias: Shape (C,).
        eps: What is added to a variance.
    """
    has_spread = x.numel() > x.shape[1]  # else torch refuses it
    if has_spread and torch.is_grad_enabled() and not is_plain(x, SMALL):
        normed: Tensor = _Forward.apply(x, weight, bias, eps)[0]
        return normed
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


@quick
class _Forward(torch.autograd.Function):
    """(x, weight, bias) -> (y, mean, r)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """Each channel of each task is a channel of its own."""
        return _together(_Forward, info.batch_size, in_dims, inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_mean: Tensor | None, g_r: Tensor | None) -> Any:
        x, weight, mean, r = ctx.saved_tensors
        g_x = g_weight = g_bias = None
        if g is not None:
            g_x, g_weight, g_bias = _Backward.apply(g, x, weight, mean, r, ctx.eps)
        # Third derivatives and higher ask for those of the statistics, too.
        scale = weight.numel() / x.numel()
        if g_mean is not None:
            shift = _wide(scale * g_mean, x)
            g_x = shift.expand_as(x) if g_x is None else g_x + shift
        if g_r is not None:
            slope = _wide(-scale * g_r * r**3, x) * (x - _wide(mean, x))
            g_x = slope if g_x is None else g_x + slope
        return g_x, g_weight, g_bias, None


@quick
class _Backward(torch.autograd.Function):
    """(g, x, weight) -> the gradients in x, weight and bias; mean and r are those of x."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, r, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        """As that of the forward pass."""
        return _together(_Backward, info.batch_size, in_dims, inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, k: Tensor | None, c: Tensor | None) -> Any:
        g, x, weight, mean, r, g_z = ctx.saved_tensors
        ones = torch.ones_like(weight)
        rest = x, ones, mean, r, ctx.eps
        p, u_z, _ = _Backward.apply(torch.zeros_like(x) if u is None else u, *rest)
        g_p = (g * p).sum([0, *range(2, x.ndim)])
        rate = weight * r * (-weight.numel() / x.numel())
        of_g = rate * u_z if k is None else torch.addcmul(k, rate, u_z)
        e = _wide(of_g, x) * g
        if u is not None:
            e = torch.addcmul(e, _wide(rate * g_z, x), u)
        away = x - _wide(mean, x)
        to_x = torch.addcmul(_Backward.apply(e, *rest)[0], _wide(rate * r * g_p, x), away)
        to_g = (
            _wide(weight, x) * p if c is None else torch.addcmul(_wide(c, x), _wide(weight, x), p)
        )
        if k is not None:
            to_g = torch.addcmul(to_g, _wide(k * r, x), away)
        return to_g, to_x, g_p, None, None, None


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """A number for each channel, to broadcast over x."""
    return channels.view(-1, *(1,) * (x.ndim - 2))


def _together(function: Any, num_tasks: int, in_dims: Any, inputs: Any) -> Any:
    """A function of all tasks at once, whose results have the axis of tasks before the channels."""
    folded: list[Any] = []
    for leaf, axis in zip(inputs, in_dims, strict=True):
        if isinstance(leaf, Tensor):
            if axis is None:
                leaf, axis = leaf.expand(num_tasks, *leaf.shape), 0
            place = 0 if leaf.ndim == 2 else 1
            leaf = leaf.movedim(axis, place).flatten(place, place + 1)
        folded.append(leaf)
    found = function.apply(*folded)
    places = [0 if leaf.ndim == 1 else 1 for leaf in found]
    split = [
        leaf.unflatten(place, (num_tasks, -1)) for leaf, place in zip(found, places, strict=True)
    ]
    return tuple(split), tuple(places)
