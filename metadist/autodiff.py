"""Reverse mode on `Params` by torch.autograd, which has less overhead than torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metadist.trees import Params, zeros_like


def leaves(tree: Params) -> Params:
    """The same values as new leaves of a graph."""
    return {name: leaf.detach().requires_grad_() for name, leaf in tree.items()}


def gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *trees: Params,
    create_graph: bool = False,
) -> tuple[Params, ...]:
    """The vector-Jacobian product of `outputs` in each of `trees`.

    Args:
        outputs: tensors computed from the leaves of `trees`; those without a graph count as
            constants.
        cotangents: shaped like the outputs; None for a scalar stands for 1.
        trees: trees of `leaves`; where nothing depends on a leaf its gradient is zero.
        create_graph: make the result differentiable.
    """
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not pairs:
        return tuple(zeros_like(tree) for tree in trees)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [leaf for tree in trees for leaf in tree.values()],
            [cotangent for _, cotangent in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return tuple({name: next(found) for name in tree} for tree in trees)
