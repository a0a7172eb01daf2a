"""An nn.Module as a function of its parameters: which layers are refused, and its constants."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metadist.trees import Params


def trainable(module: nn.Module) -> Params:
    """A copy of the trainable parameters of `module` by name."""
    named = module.named_parameters()
    return {name: leaf.detach().clone() for name, leaf in named if leaf.requires_grad}


def constants(module: nn.Module) -> Iterator[Tensor]:
    """The buffers and the frozen parameters of `module`."""
    yield from module.buffers()
    yield from (leaf for leaf in module.parameters() if not leaf.requires_grad)


def move_constants(module: nn.Module, device: torch.device) -> None:
    """Move the buffers and the frozen parameters of `module` to `device`."""
    for child in module.modules():
        for name, leaf in child.named_buffers(recurse=False):
            if leaf.device != device:
                child._buffers[name] = leaf.to(device)
        for name, leaf in child.named_parameters(recurse=False):
            if not leaf.requires_grad and leaf.device != device:
                child._parameters[name] = nn.Parameter(leaf.to(device), requires_grad=False)


def without_parameters(model: nn.Module) -> nn.Module:
    """A copy of `model` whose trainable parameters have a shape but no memory."""
    # A memo of `deepcopy` holds the copies to use: so the weights are never copied.
    memo = {
        id(leaf): nn.Parameter(torch.empty_like(leaf, device="meta"))
        for leaf in model.parameters()
        if leaf.requires_grad
    }
    return copy.deepcopy(model, memo)


def _dropout(module: nn.Module) -> float:
    """The share of its inputs that `module` itself would drop at random."""
    if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if module.training and isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0


def check_model(model: nn.Module) -> None:
    """Raise ValueError for layers whose inner loop could not be replayed or differentiated."""
    for name, module in model.named_modules():
        if _dropout(module) > 0:
            raise ValueError(
                f"dropout must be off in the inner loop, layer {name!r} has p={_dropout(module)}: "
                "its random mask could not be replayed for second derivatives; set it to 0, or "
                f"model.get_submodule({name!r}).eval()"
            )
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.training
        ):
            raise ValueError(
                f"batch norm must not update running statistics, layer {name!r} does: convert "
                "the model with metadist.models.with_task_batch_norm(model), or freeze the "
                f"statistics with model.get_submodule({name!r}).eval()"
            )
