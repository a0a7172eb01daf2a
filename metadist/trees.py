"""Arithmetic and gradients on `Params`: dictionaries of tensors, the form of every variable.

All functions are pure and act name by name; two trees in one call must have the same names. Every
other module stands on this one: x, y, directions and gradients are such trees everywhere, and only
what is sent or stored is flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from metadist.followed import Followed

Params = dict[str, Tensor]
"""Tensors by name: the form of every variable, direction and gradient."""


def tree_map(function: Callable[..., Tensor], first: Params, *rest: Params) -> Params:
    """`{name: function(first[name], ...)}`; raises ValueError where the names differ."""
    for other in rest:
        if other.keys() != first.keys():
            raise ValueError(
                "trees must have the same names, got "
                f"{sorted(first.keys() - other.keys())} only in the first and "
                f"{sorted(other.keys() - first.keys())} only in another"
            )
    return {name: function(leaf, *(other[name] for other in rest)) for name, leaf in first.items()}


FUSED = {"cuda"}
"""The types of device on which a call on a tree is one operation, and not one by leaf.

On a GPU each operation costs the time to ask for it. On a CPU nothing would be gained, and sums
over a tree would have other bytes than they always had.
"""


def _is_fused(*trees: Params) -> bool:
    """Whether these can go together: on such a device, and not under torch.func."""
    # Its transforms have no rules for lists of tensors.
    leaves = [leaf for tree in trees for leaf in tree.values()]
    return (
        len(leaves) > len(trees)
        and leaves[0].device.type in FUSED
        and not any(map(is_functorch_wrapped_tensor, leaves))
    )


def _together(function: Callable[..., Sequence[Tensor]], first: Params, *rest: Any) -> Params:
    """What one of torch's functions of lists gives for the leaves of trees, and numbers."""
    lists = [
        [other[name] for name in first] if isinstance(other, dict) else other for other in rest
    ]
    return dict(zip(first, function(list(first.values()), *lists), strict=True))


def add(first: Params, second: Params, scale: float | Tensor = 1.0) -> Params:
    """`first + scale * second`."""
    if not isinstance(scale, float) or scale != 1:
        second = _scaled(second, scale)
    if _is_fused(first, second):
        return _together(torch._foreach_add, first, second)
    return tree_map(torch.add, first, second)


def sub(first: Params, second: Params) -> Params:
    """`first - second`."""
    if _is_fused(first, second):
        return _together(torch._foreach_sub, first, second)
    return tree_map(torch.sub, first, second)


def scale(tree: Params, factor: float | Tensor) -> Params:
    """`factor * tree`."""
    return _scaled(tree, factor)


def _scaled(tree: Params, factor: Any) -> Params:
    if not _is_fused(tree):
        return tree_map(lambda a: factor * a, tree)
    if isinstance(factor, Followed):
        factor = factor.beside(next(iter(tree.values())))
    return _together(torch._foreach_mul, tree, factor)


def multiply(first: Params, second: Params) -> Params:
    """The elementwise product of two trees (each leaf broadcasts)."""
    if _is_fused(first, second):
        return _together(torch._foreach_mul, first, second)
    return tree_map(torch.mul, first, second)


def zeros_like(tree: Params) -> Params:
    """A tree of zeros of the same shapes."""
    if _is_fused(tree) and len({leaf.dtype for leaf in tree.values()}) == 1:
        leaf = next(iter(tree.values()))
        return unflatten(leaf.new_zeros(num_elements(tree)), tree)
    return tree_map(torch.zeros_like, tree)


def detach(tree: Params) -> Params:
    """The same values, cut from any graph."""
    return tree_map(Tensor.detach, tree)


def dot(first: Params, second: Params) -> Tensor:
    """The inner product over all leaves, a tensor of shape ()."""
    if _is_fused(first, second):
        return (flatten(first) * flatten({name: second[name] for name in first})).sum()
    products = tree_map(lambda a, b: (a * b).sum(), first, second)
    if not products:
        return torch.zeros(())
    return torch.stack(list(products.values())).sum()


def norm(tree: Params) -> Tensor:
    """The Euclidean norm over all leaves, a tensor of shape ()."""
    return dot(tree, tree).sqrt()


def stack(trees: list[Params]) -> Params:
    """One tree whose leaves have a new leading axis over `trees`."""
    return tree_map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])


def select(tree: Params, index: int) -> Params:
    """Entry `index` of the leading axis of every leaf."""
    return {name: leaf[index] for name, leaf in tree.items()}


def num_elements(tree: Mapping[str, Tensor]) -> int:
    """The number of elements of all leaves."""
    return sum(leaf.numel() for leaf in tree.values())


def check_flattenable(tree: Params, field: str) -> torch.dtype:
    """The one floating dtype of all leaves; ValueError if there is none or more than one."""
    dtypes = {leaf.dtype for leaf in tree.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(
            f"{field} must hold tensors of one floating dtype, got {sorted(map(str, dtypes))}: "
            "cast the model with model.float() or model.double()"
        )
    return dtypes.pop()


def flatten(tree: Params) -> Tensor:
    """All leaves in the order of the tree, as one vector of shape (num_elements,)."""
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: views of `flat` with the names and shapes of `like`."""
    if flat.shape != (num_elements(like),):
        raise ValueError(
            f"flat must have shape ({num_elements(like)},) to fill the tree, "
            f"got {tuple(flat.shape)}"
        )
    pieces = flat.split([leaf.numel() for leaf in like.values()])
    tree = {}
    for (name, leaf), piece in zip(like.items(), pieces, strict=True):
        tree[name] = piece.view(leaf.shape)
    return tree


def as_bytes(leaf: Tensor) -> Tensor:
    """The bytes of a dense tensor of any dtype and strides, on the CPU, of shape (num_bytes,)."""
    flat = leaf.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    # Fewer than two elements may have any stride, and then cannot be seen as bytes.
    flat = flat.new_empty(len(flat)).copy_(flat) if len(flat) < 2 else flat.contiguous()
    return flat.view(torch.uint8)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two dense tensors have the same dtype, shape and bytes; NaN equals itself."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(as_bytes(first), as_bytes(second))


# Reverse mode by torch.autograd, which has less overhead per call than torch.func but does not run
# under its transforms: see metadist/autograd.py for where each is used.


def leaves(tree: Params) -> Params:
    """The same values as new leaves of a graph."""
    return {name: leaf.detach().requires_grad_() for name, leaf in tree.items()}


def gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *trees: Params,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Params, ...]:
    """The vector-Jacobian product of `outputs` in each of `trees`.

    Args:
        outputs: Tensors computed from the leaves of `trees`; those without a graph count as
            constants.
        cotangents: Tensors shaped like the outputs; None for a scalar stands for 1.
        trees: Trees of `leaves`; the gradient in a leaf that no output depends on is zero.
        create_graph: Make the result differentiable.
        retain_graph: Keep the graph for another product; None: if `create_graph`.
    """
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not pairs:
        return tuple(zeros_like(tree) for tree in trees)
    variables: list[Tensor] = []
    for tree in trees:
        variables += tree.values()
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            variables,
            [cotangent for _, cotangent in pairs],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return tuple({name: next(found) for name in tree} for tree in trees)
