"""The unrolled inner loop by the library `higher`: all use of it is in this file.

`higher` is no longer maintained. It is offered for comparison with published results, and only
with the inner optimisers whose updates are those of torch.optim (a test compares them).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from metadist.oracle import Oracle
from metadist.trees import Params, detach, gradients, leaves

with warnings.catch_warnings():  # it imports torch modules that warn of their own deprecation
    warnings.simplefilter("ignore")
    import higher

HIGHER_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adamax": torch.optim.Adamax,
}

REFUSED: dict[str, str] = {
    "adam": "its Adam adds epsilon before the bias correction, unlike torch.optim.Adam",
    "adamw": "it has no AdamW",
    "rprop": "its Rprop steps by the sign of the gradient, which has no useful derivative",
    "asgd": "ASGD returns an average that adaptation does not use",
    "adadelta": "its Adadelta has the derivative of a square root at 0, which is infinite",
}


def check_higher(optimizer: str, momentum: float, learn_lr: str) -> None:
    """Raise ValueError for an inner optimiser that `higher` does not run as torch.optim does."""
    if optimizer not in HIGHER_OPTIMIZERS:
        reason = REFUSED.get(optimizer, "it is not known here")
        raise ValueError(
            f"inner_optimizer with engine='higher' must be one of {sorted(HIGHER_OPTIMIZERS)}, "
            f"got {optimizer!r}: {reason}"
        )
    if optimizer != "sgd" and momentum:
        raise ValueError(
            f"momentum must be 0 with inner_optimizer={optimizer!r}, got {momentum}: it is the "
            "momentum of 'sgd'"
        )


def unroll(
    oracle: Oracle,
    context: Params,
    start: Params,
    rates: Params,
    *,
    optimizer: str,
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
    options = {"momentum": momentum} if optimizer == "sgd" else {}
    with torch.enable_grad():
        # One group per tensor, so that each has its own (differentiable) learning rate.
        parameters = [leaf.detach().clone().requires_grad_() for leaf in start.values()]
        groups = [{"params": [parameter]} for parameter in parameters]
        with warnings.catch_warnings():
            # It warns of squared gradients that are 0, as of dead units; a test compares the
            # derivative there with differences.
            warnings.filterwarnings("ignore", "Differentiable RMSprop suffers from gradient")
            differentiable = higher.get_diff_optim(
                HIGHER_OPTIMIZERS[optimizer](groups, lr=0.1, **options),
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
