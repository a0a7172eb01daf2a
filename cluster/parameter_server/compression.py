"""`Bfloat16`: half of the bytes of a sum, and what rounding takes from one given to the next."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.bfloat16).max


class Bfloat16:
    """Rounds the sums of hypergradients that one worker sends, with error feedback.

    What was rounded off a sum is added to the next one, so the sum of all that was sent differs
    from the truth by one rounding, however many there were; without it roundings of the same sign
    would add up. It is lost with the worker, and with a sum that is sent and never used.

    Cost: one vector as large as the sum, on its device, and three passes over it.
    Source: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019, algorithm 2. Differs
    from it in: what is remembered is of hypergradients and not of steps.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None

    def round(self, total: Tensor) -> Tensor:
        """The bfloat16 sum to send for `total`, of the same shape."""
        if self._left is None or len(self._left) < len(total):
            # The sums of a two-point method are twice as long after the first.
            longer = torch.zeros_like(total)
            if self._left is not None:
                longer[: len(self._left)] = self._left
            self._left = longer
        left = self._left[: len(total)]
        left += total
        # What is beyond the range of bfloat16 comes later.
        rounded = left.to(torch.bfloat16).clamp_(-LARGEST, LARGEST)
        left -= rounded
        return rounded
