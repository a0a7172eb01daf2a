"""`Bfloat16`: sums of hypergradients in half the bytes, with error feedback."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Compression = Literal["none", "bfloat16"]
LARGEST = torch.finfo(torch.bfloat16).max


class Bfloat16:
    """Rounds the sums of hypergradients that one worker sends, with error feedback.

    The part rounded off one sum is added to the next, so all sums sent so far differ in total from
    the exact ones by a single rounding, however many there were; without the feedback, roundings
    of the same sign would add up. The remainder is lost with the worker, and with a sum that is
    sent and never used.

    Cost: one vector as large as the sum, on its device, and three passes over it.
    Source: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019, algorithm 2. Differs
    from it in: the remainder is one of hypergradients, not of steps.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None

    def round(self, total: Tensor) -> Tensor:
        """The bfloat16 sum to send for `total`, of the same shape."""
        if self._left is None or len(self._left) < len(total):
            # A two-point method sends sums twice as long after its first step; the remainder of
            # the first half stays valid, as that half is at the same place.
            longer = torch.zeros_like(total)
            if self._left is not None:
                longer[: len(self._left)] = self._left
            self._left = longer
        left = self._left[: len(total)]
        left += total
        # Rounding may overflow to infinity, which no later sum could repair: clamp, and let the
        # excess stay in the remainder.
        rounded = left.to(torch.bfloat16).clamp_(-LARGEST, LARGEST)
        left -= rounded
        return rounded
