"""Batch norm with few operations: torch's values, and exact derivatives of every order."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap

from metadist import layers, task_hypergradients
from metadist.algorithms import ITD
from metadist.compute import Compute
from metadist.layers.batch_norm import batch_norm
from metadist.models import Conv4, TaskBatchNorm
from metadist.task import to_device
from metadist.tasks import FewShotProblem
from tests.helpers import fused
from tests.problems import assert_close, generator, image_task, randn

EPS = 1e-3


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(x, weight, bias, EPS)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's own has no third derivatives, and no second under vmap."""
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    wide = mean.shape[1:]
    return (x - mean) * (variance + EPS).rsqrt() * weight.view(wide) + bias.view(wide)


def point(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x far from mean 0, and a weight that is 0."""
    weight = torch.tensor([1.3, 0.0], dtype=torch.float64)
    return 3 + randn(1, *shape), weight, randn(3, 2)


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2), (3, 2, 2, 2)])
def test_values_and_two_derivatives_are_those_of_torch(shape):
    variables = tuple(leaf.requires_grad_() for leaf in point(*shape))
    expected = F.batch_norm(
        variables[0], None, None, variables[1], variables[2], training=True, eps=EPS
    )
    assert torch.equal(ours(*variables), expected)
    assert torch.autograd.gradcheck(ours, variables)
    assert torch.autograd.gradgradcheck(ours, variables)


def derivatives(function: Any, asked: tuple[bool, bool, bool]) -> list[Tensor]:
    """Of orders 1 to 4, the second along directions for some of x, weight and bias."""
    x, weight, bias = (leaf.requires_grad_() for leaf in point(3, 2, 2, 2))
    g = randn(4, 3, 2, 2, 2).requires_grad_()
    first = torch.autograd.grad(function(x, weight, bias), (x, weight, bias), g, create_graph=True)
    pairs = [
        (slope, randn(5, *slope.shape).requires_grad_())
        for slope, is_asked in zip(first, asked, strict=True)
        if is_asked
    ]
    slopes, along = zip(*pairs, strict=True)
    options: dict[str, Any] = {
        "create_graph": True,
        "allow_unused": True,
        "materialize_grads": True,
    }
    second = torch.autograd.grad(slopes, (x, weight, g), along, **options)
    waves = torch.stack([leaf.sin().sum() for leaf in second]).sum()
    third = torch.autograd.grad(waves, (x, weight, g, *along), **options)
    waves = torch.stack([leaf.cos().sum() for leaf in third]).sum()
    fourth = torch.autograd.grad(waves, (x, weight, g), **options)
    return [leaf.detach() for leaf in (*first, *second, *third, *fourth)]


@pytest.mark.parametrize(
    "asked", [(True, True, True), (True, False, False), (False, True, False), (False, True, True)]
)
def test_four_derivatives_are_those_by_hand(asked):
    found, expected = derivatives(ours, asked), derivatives(by_hand, asked)
    for ours_, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_second_derivatives_of_many_tasks_are_those_of_each(dims):
    x_dim, weight_dim = dims
    x, (weight, bias) = 3 + randn(1, 4, 3, 2, 2), (randn(2, 4, 2), randn(3, 4, 2))
    target, v, v_weight = randn(4, 4, 3, 2, 2), randn(5, 4, 3, 2, 2), randn(6, 4, 2)
    x = x if x_dim == 0 else x[0]
    weight, bias = (leaf if weight_dim == 0 else leaf[0] for leaf in (weight, bias))

    def products(function: Any) -> Any:
        def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
            return (function(x, weight, bias) * target).sin().sum()

        def one(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Any:
            target, *along = rest
            slopes = grad(loss, (0, 1))
            return vjp(lambda x, weight: slopes(x, weight, bias, target), x, weight)[1](
                tuple(along)
            )

        every = vmap(one, (x_dim, weight_dim, weight_dim, 0, 0, 0))
        return every(x, weight, bias, target, v, v_weight)

    for found, expected in zip(products(ours), products(by_hand), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("engine", ["adjoint", "unrolled"])
def test_models_use_it_where_operations_are_fused(engine, vectorize, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = FewShotProblem(Conv4(n_way=3, width=3, image_size=16).double(), adapt="all")
    tasks = [to_device(image_task(index), "cpu", torch.float64) for index in range(2)]
    outer = problem.init_outer(generator(0))

    def total() -> Any:
        return task_hypergradients(
            *(problem, ITD(2, 0.01, engine=engine), outer, tasks),
            compute=Compute(vectorize=vectorize),
            is_checked=True,
        ).total

    for module in (layers.batch_norm, layers.convolution, layers.pooling):
        monkeypatch.setattr(module, "SMALL", 1 << 60)
    used = Mock(side_effect=layers.batch_norm._Forward.apply)
    monkeypatch.setattr(layers.batch_norm._Forward, "apply", used)
    expected = total()
    assert not used.called
    with fused():
        assert_close(total(), expected, 1e-9)
    assert used.called


def test_one_number_a_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        TaskBatchNorm(3)(randn(0, 1, 3).float())
