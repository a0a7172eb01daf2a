"""A user's own tasks: noisy clusters in the plane. Nothing here derives from metadist."""

import torch
from my_noise import normal  # type: ignore[import-not-found]

from metadist import Batch, Task


class MySampler:
    """N clusters of points a task; `sample(index)` is all that metadist asks for."""

    def __init__(self, n_way: int = 2, k_shot: int = 3, k_query: int = 4, spread: float = 0.3):
        self.n_way = n_way
        self.k_shot = k_shot
        self.k_query = k_query
        self.spread = spread

    def sample(self, index: int) -> Task:
        """The task number `index`."""
        random = torch.Generator().manual_seed(index)
        centres = 2 * normal(random, self.n_way, 2)

        def batch(size: int) -> Batch:
            labels = torch.arange(self.n_way).repeat_interleave(size)
            noise = normal(random, len(labels), 2)
            return Batch.of(centres[labels] + self.spread * noise, labels)

        return Task(batch(self.k_shot), batch(self.k_query), index)
