"""`max_pool`: torch's maxima and derivatives to the last bit, where numbers are equal too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from metadist.layers.pooling import MaxPool2d, max_pool
from tests.helpers import fresh


def torchs(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Few different numbers, so that many of four are equal."""
    return fresh(shape, seed).mul(2).round()


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    g = fresh(y.shape, 1).requires_grad_()
    (first,) = torch.autograd.grad(y, x, g, create_graph=True)
    u = fresh(x.shape, 2).requires_grad_()
    (second,) = torch.autograd.grad(first, g, u, create_graph=True)
    (third,) = torch.autograd.grad(second, u, g)
    return [leaf.detach() for leaf in (y, first, second, third)]


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (2, 3), (28, 28), (3, 300)])
def test_derivatives_are_those_of_torch(size):
    x = images(2, 3, *size)
    for found, expected in zip(derivatives(max_pool, x), derivatives(torchs, x), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(max_pool(x), torchs(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(value):
    x = images(1, 2, 4, 4)
    x[0, 0, 1, 1] = x[0, 1, 2, 2] = value
    torch.testing.assert_close(max_pool(x), torchs(x), equal_nan=True, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(max_pool(x), torchs(x), equal_nan=True, rtol=0, atol=0)


def test_second_derivatives_of_many_tasks_are_those_of_torch():
    x = images(3, 2, 3, 6, 6)

    def products(function: Callable[[Tensor], Tensor]) -> Tensor:
        def one(x: Tensor) -> Tensor:
            slope = grad(lambda x: function(x).sin().sum())
            return vjp(slope, x)[1](slope(x))[0]

        return vmap(one)(x)

    assert torch.equal(products(max_pool), products(torchs))


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 3}, {"stride": 1}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": True}],
)
def test_the_layer_is_that_of_torch(options):
    ours, theirs = (kind(**{"kernel_size": 2, **options}) for kind in (MaxPool2d, nn.MaxPool2d))
    x = images(2, 3, 7, 7).requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    by_rows = "_Forward" in type(ours(x).grad_fn).__name__
    assert by_rows == (not options)


def test_the_layer_gives_the_places_where_they_are_asked_for():
    x = images(2, 3, 4, 4)
    _, found = MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(found, nn.MaxPool2d(2, return_indices=True)(x)[1])


def test_channels_last_and_forward_mode_are_left_to_torch():
    x = images(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert type(max_pool(last).grad_fn) is type(torchs(last).grad_fn)
    for found, expected in zip(
        jvp(max_pool, (x,), (fresh(x.shape),)), jvp(torchs, (x,), (fresh(x.shape),)), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_torch_refuses_is_refused():
    with pytest.raises(RuntimeError, match="too small"):
        max_pool(images(1, 2, 1, 4))
