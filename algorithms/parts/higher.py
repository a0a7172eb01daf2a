"""The unrolled inner loop by the library `higher`: all use of it is in this file.

`higher` is no longer maintained. It is offered for comparison with published results, and only
with SGD: its other optimisers are not those of torch.optim, or have no useful derivative.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from metadist.oracle import Oracle
from metadist.step_rules import SGD, Adam, StepRule
from metadist.trees import Params, detach, gradients, leaves

with warnings.catch_warnings():  # it imports torch modules that warn of their own deprecation
    warnings.simplefilter("ignore")
    import higher


def check_higher(steps: StepRule) -> None:
    """Raise ValueError for a rule that `higher` does not run as torch.optim does."""
    if not isinstance(steps, SGD) or steps.weight_decay or steps.clip_norm or steps.carry:
        reason = (
            "its Adam adds epsilon before the bias correction"
            if isinstance(steps, Adam)
            else "it has neither clipping nor carried velocity, and decay is left to the others"
        )
        raise ValueError(
            "inner_optimizer must be SGD without weight_decay, clip_norm and carry with "
            f"engine='higher', got {steps!r}: {reason}. Use engine='adjoint'"
        )


def unroll(
    oracle: Oracle,
    context: Params,
    start: Params,
    rates: Params,
    *,
    momentum: float,
    num_steps: int,
    second_order_steps: int,
) -> tuple[Params, ...]:
    """(y_T, d f / d context, d f / d start, d f / d rates) of `num_steps` inner steps.

    Not for vmap: `higher` differentiates with torch.autograd. Memory: the graph of all steps.
    """
    context = leaves(context)
    start = leaves(start)
    rates = leaves({name: rate.expand(start[name].shape) for name, rate in rates.items()})
    with torch.enable_grad():
        # One group per tensor, so that each has its own (differentiable) learning rate.
        parameters = [leaf.detach().clone().requires_grad_() for leaf in start.values()]
        groups = [{"params": [parameter]} for parameter in parameters]
        differentiable = higher.get_diff_optim(
            torch.optim.SGD(groups, lr=0.1, momentum=momentum),
            parameters,
            override={"lr": list(rates.values())},
        )
        y = start
        for t in range(num_steps):
            loss = oracle.inner_value(context, y, oracle.draw_inner())
            truncated = t < num_steps - second_order_steps
            moved = differentiable.step(
                loss, params=list(y.values()), grad_callback=_detached if truncated else None
            )
            y = dict(zip(y, moved, strict=True))
        loss = oracle.outer_value(context, y, oracle.draw_outer())
    return detach(y), *gradients([loss], [None], context, start, rates)


def _detached(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if gradient is None else gradient.detach() for gradient in gradients]
