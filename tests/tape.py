"""A tape: CUDA graphs, emulated on a CPU.

It records the operations of a run below autograd and vmap, with the tensors they were called with,
and does exactly these again: on the same memory, with the numbers of Python that they had. As while
a CUDA graph is captured, nothing may be read from a tensor or copied to the device from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from metadist import graphs
from metadist.algorithms.parts import linear
from tests.pretend_device import READS

Operation = tuple[Any, Any, dict[str, Any], list[Tensor]]


class Tape(TorchDispatchMode):
    """Records what runs within the block; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS or torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{name} waits for the device, which is being recorded")
        if name in ("lift_fresh", "lift_fresh_copy"):
            raise RuntimeError("a tensor of numbers is copied to the device, which is recorded")
        # Other tensors of the same memory, since the shape of one may be changed in place.
        mine, named = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        result = func(*args, **kwargs)
        made = [leaf.detach() for leaf in _fresh(result, (args, kwargs))]
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if made or writes:  # else it is a view, of memory that stays where it is
            self.operations.append((func, mine, named, made))
        return result

    def replay(self) -> None:
        """Do all of it again."""
        with torch.no_grad():
            for func, args, kwargs, made in self.operations:
                fresh = _fresh(func(*args, **kwargs), (args, kwargs))
                for leaf, value in zip(made, fresh, strict=True):
                    leaf.copy_(value)


def _fresh(result: Any, arguments: Any) -> list[Tensor]:
    """The tensors of a result that have memory of their own."""
    given = {leaf.untyped_storage()._cdata for leaf in _tensors(arguments)}
    return [leaf for leaf in _tensors(result) if leaf.untyped_storage()._cdata not in given]


def _tensors(tree: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    assert all(leaf.layout == torch.strided for leaf in found), "a sparse tensor is recorded"
    return found


def record(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """A `metadist.graphs.Recorder`."""
    run()
    with Tape() as tape:
        found = run()
    return found, tape.replay


@contextmanager
def recording() -> Iterator[None]:
    """Within the block the CPU has graphs, and solvers do not look whether they are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphs.RECORDERS, "cpu", record)
        patch.setattr(linear, "_known", lambda done: False)
        yield
