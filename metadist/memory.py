"""Memory: how much of it a computation takes, and what is said where a GPU has too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Watches the memory of tensors that operators return within the block, on any device.

    It sees what runs in the end, below autograd and the transforms of torch.func: whatever holds
    a tensor, and for however many tasks under vmap.
    """

    def __init__(self) -> None:
        super().__init__()
        # By address, which weak references keep from being used again.
        self._given: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                # A view of it takes no memory.
                self._given[storage._cdata] = StorageWeakRef(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def num_bytes(self) -> int:
        """The bytes that are in use now."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def _storages(node: Any) -> Iterator[UntypedStorage]:
    for leaf in tree_leaves(node):
        # Sparse tensors have no storage, and are data rather than results.
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


class DeviceMemoryError(RuntimeError):
    """The memory of a GPU does not hold what is computed together."""


OUT_OF_MEMORY = ("CUDA error: out of memory", "HIP error: out of memory", "_ALLOC_FAILED")
"""What CUDA and its libraries say where torch's allocator was not asked."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def device_memory(work: str, **sizes: int | None) -> Iterator[None]:
    """Within the block memory of a GPU that ran out is an error that says what to change.

    Args:
        work: What is computed, in words.
        **sizes: The fields that decide how much is computed at once.

    Raises:
        DeviceMemoryError: It ran out. Nothing is tried again with less, which would change bytes.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        got = ", ".join(f"{name}={size}" for name, size in sizes.items())
        reason = str(error).strip().partition("\n")[0]
        # Without the traceback, which ends anywhere in the problem and says nothing more.
        raise DeviceMemoryError(
            f"{' or '.join(sizes)} must be lower, since the GPU has too little memory for {work}, "
            f"got {got}. It said: {reason}"
        ) from None
