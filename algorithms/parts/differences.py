"""What replaces second derivatives: differences of first ones, and random directions."""

from __future__ import annotations

from typing import Literal

import torch

from metadist.draws import Draw
from metadist.oracle import Oracle
from metadist.trees import Params, add, norm, scale, sub, zeros_like


def difference_product(
    oracle: Oracle, context: Params, y: Params, v: Params, draw: Draw, radius: float
) -> Params:
    """J v by central differences along v / |v|; 0 where v = 0.

    y moves by `radius` however short v is, so that the difference never drowns in rounding.
    Cost: 2 joint gradients, on one draw. Error: of order |v| * radius^2.
    """
    length = norm(v)
    unit = scale(v, torch.where(length > 0, 1 / length, torch.zeros_like(length)))
    above = oracle.inner_grad_x(context, add(y, unit, radius), draw)
    below = oracle.inner_grad_x(context, add(y, unit, -radius), draw)
    return scale(sub(above, below), length / (2 * radius))


CONTEXT, START = "context.", "start."


def random_pair(
    oracle: Oracle, context: Params, start: Params, kind: Literal["normal", "rademacher"]
) -> tuple[Params, Params]:
    """Random directions, shaped like the context and like the start of adaptation.

    They are 0 in `Oracle.constants`: directions there would add noise to all other derivatives and
    buy nothing.
    """
    # A context and a start may use the same names, hence the prefixes.
    both = {CONTEXT + name: leaf for name, leaf in context.items()}
    both |= {START + name: leaf for name, leaf in start.items()}
    constant = {CONTEXT + name for name in oracle.constants.context}
    constant |= {START + name for name in oracle.constants.start}
    moving = {name: leaf for name, leaf in both.items() if name not in constant}
    drawn = zeros_like(both) | (oracle.random_like(moving, kind) if moving else {})
    context_direction = {name: drawn[CONTEXT + name] for name in context}
    return context_direction, {name: drawn[START + name] for name in start}
