"""`Conv2d`: values and first derivatives of torch to the last bit, exact ones of every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from metadist.layers.convolution import Conv2d, _Forward
from tests.helpers import fresh
from tests.problems import randn

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "bias": False},
    {"dilation": 2, "padding": 2, "groups": 2},
]


def pair(**options: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Ours and torch's with the same weights."""
    ours, torchs = (kind(4, 6, 3, **options).double() for kind in (Conv2d, nn.Conv2d))
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def derivatives(layer: nn.Conv2d, wanted: list[str], asked: list[str]) -> list[list[Tensor]]:
    """Of orders 0 to 3: first ones to `wanted`, second ones along directions for `asked`."""
    leaves = {"x": randn(1, 2, 4, 7, 6), "weight": layer.weight.detach()}
    if layer.bias is not None:
        leaves["bias"] = layer.bias.detach()
    leaves = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    params = {name: leaf for name, leaf in leaves.items() if name != "x"}
    y = functional_call(layer, params, (leaves["x"],))
    g = randn(2, *y.shape).requires_grad_()
    to = [leaves[name] for name in wanted if name in leaves]
    first = torch.autograd.grad(y, to, g, create_graph=True)
    named = dict(zip([name for name in wanted if name in leaves], first, strict=True))
    slopes = [named[name] for name in asked if name in named]
    along = [randn(3, *slope.shape).requires_grad_() for slope in slopes]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    second = torch.autograd.grad(slopes, [*to, g], along, create_graph=True, **options)
    total = sum((leaf.sin().sum() for leaf in second), torch.zeros(()))
    third = torch.autograd.grad(total, [*to, g, *along], **options)
    return [[leaf.detach() for leaf in order] for order in ([y], first, second, third)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (["x", "weight", "bias"], ["x", "weight", "bias"]),
        (["x", "weight", "bias"], ["x"]),
        (["x", "weight", "bias"], ["bias", "weight"]),
        (["weight", "bias"], ["weight", "bias"]),
        (["x"], ["x"]),
        (["weight"], ["weight"]),
    ],
)
def test_derivatives_are_those_of_torch(geometry, wanted, asked):
    found, expected = (derivatives(layer, wanted, asked) for layer in pair(**geometry))
    for order, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            if order < 2:
                assert torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_derivatives_are_those_of_differences():
    layer = pair(padding=1, stride=2)[0]
    leaves = (randn(1, 2, 4, 5, 4), layer.weight.detach(), randn(2, 6))
    geometry = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    variables = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(lambda *leaves: _Forward.apply(*leaves, geometry), variables)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: _Forward.apply(*leaves, geometry), variables
    )


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_second_derivatives_of_many_tasks_are_those_of_torch(dims):
    ours, torchs = pair(padding=1)
    x, weight = randn(1, 3, 2, 4, 5, 5), randn(2, 3, 6, 4, 3, 3)
    x_dim, weight_dim = dims
    x = x if x_dim == 0 else x[0]
    weight = weight if weight_dim == 0 else weight[0]

    def products(layer: nn.Conv2d) -> Any:
        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return functional_call(layer, {"weight": weight}, (x,)).sin().sum()

        def one(x: Tensor, weight: Tensor) -> Any:
            slopes = grad(loss, (0, 1))(x, weight)
            return slopes, vjp(grad(loss, (0, 1)), x, weight)[1](slopes)

        return vmap(one, (x_dim, weight_dim))(x, weight)

    for found, expected in zip(products(ours), products(torchs), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_what_it_does_not_know_is_left_to_torch(options):
    ours, torchs = pair(**options)
    x = randn(1, 2, 4, 6, 6)
    assert torch.equal(ours(x), torchs(x))
    assert type(ours(x).grad_fn) is type(torchs(x).grad_fn)


def test_one_image_forward_mode_and_autocast_are_left_to_torch():
    ours, torchs = pair(padding=1)
    x, along = randn(1, 2, 4, 6, 6), randn(2, 2, 4, 6, 6)
    assert torch.equal(ours(x[0]), torchs(x[0]))
    for a, b in zip(jvp(ours, (x,), (along,)), jvp(torchs, (x,), (along,)), strict=True):
        assert torch.equal(a, b)
    ours, torchs = ours.float(), torchs.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [layer(fresh((2, 4, 6, 6))).sum() for layer in (ours, torchs)]
    grads = [
        torch.autograd.grad(loss, layer.weight)[0]
        for loss, layer in zip(losses, (ours, torchs), strict=True)
    ]
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exports_see_the_convolution_of_torch():
    layer = pair(padding=1)[0]
    traced = torch.jit.trace(layer, randn(1, 2, 4, 6, 6))
    assert "aten::_convolution" in str(traced.graph)
    program = torch.export.export(layer, (randn(1, 2, 4, 6, 6),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default"]
    assert torch.equal(program.module()(randn(1, 2, 4, 6, 6)), layer(randn(1, 2, 4, 6, 6)))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_and_blank_images_and_stand_ins_are_left_to_torch():
    ours, torchs = pair(padding=1)
    x = randn(1, 2, 4, 6, 6)
    assert torch.equal(fx.symbolic_trace(ours)(x), torchs(x))
    assert ours.to("meta")(x.to("meta")).shape == (2, 6, 6, 6)
    ours, torchs = (layer.to(torch.complex128) for layer in pair(padding=1))
    assert torch.equal(ours(x + 1j), torchs(x + 1j))
