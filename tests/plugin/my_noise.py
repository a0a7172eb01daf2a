"""A second file of the user, which the first imports."""

import torch


def normal(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=random)
