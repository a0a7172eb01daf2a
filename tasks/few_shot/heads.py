"""Linear heads in closed form, from the features of a support set.

Shape letters: N ways, S support examples, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor


def num_classes(targets: Tensor) -> int:
    """N of targets 0 .. N-1, each of which is there; under vmap those of all tasks."""
    # How many classes there are is a shape, which vmap lets no value decide. It is the same in all
    # tasks that go together, whose stack is behind the slice.
    while is_functorch_wrapped_tensor(targets):
        targets = get_unwrapped(targets)
    return int(targets.max()) + 1


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """1 where an example is of a class, else 0; (S, N), of the type of `like`."""
    classes = torch.arange(num_classes(targets), device=targets.device)
    return (targets[:, None] == classes).to(like.dtype)


def prototypes(features_SF: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(2 c, -|c|^2) of the class means c: weight (N, F) and bias (N,).

    The logits differ from -|f - c|^2 by |f|^2, which softmax does not see.
    """
    members_SN = one_hot(targets, features_SF)
    means_NF = members_SN.T @ features_SF / members_SN.sum(0)[:, None]
    return 2 * means_NF, -means_NF.square().sum(1)


def ridge(features_SF: Tensor, targets: Tensor, strength: Tensor) -> Tensor:
    """argmin_W |f W^T - one-hot targets|^2 + strength |W|^2: weight (N, F)."""
    gram_SS = features_SF @ features_SF.T
    gram_SS = gram_SS + strength * torch.eye(len(gram_SS)).to(gram_SS)
    return torch.linalg.solve(gram_SS, one_hot(targets, features_SF)).T @ features_SF
