"""A pretend device: tensors that say they are elsewhere, on a machine without a GPU.

Their numbers are those of the CPU. What would fail on a GPU fails here, operators on tensors of
two devices; and what would wait for it is noted: a number that Python reads, and a copy between
host and device (of pageable memory, as torch's are).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from metadist import Problem, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.compute import Compute
from metadist.hypergradient import HypergradientSum
from metadist.task import Batch, Task
from metadist.trees import Params

DEVICE = torch.device("lazy")
"""A type that this torch has no backend for, whose backward pass runs where the CPU's does."""

ROOT = Path(__file__).resolve().parent.parent

READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_linalg_eigh"}
"""Operators whose result is, or has the size of, what is on the device."""


class Elsewhere(Tensor):
    """A tensor on the pretend device; `numbers` has them."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        options: dict[str, Any] = {}
        if numbers.layout == torch.strided:
            options = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        found: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=numbers.dtype, device=DEVICE, **options
        )
        found.numbers = numbers
        return found

    def tolist(self) -> Any:
        _note("tolist")
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _real(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, Elsewhere) else leaf


_waits: Counter[str] = Counter()


def _note(what: str) -> None:
    """Count it where the code of this project asked for it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if is_ours and path.name != Path(__file__).name:
            what += f" at {path.relative_to(ROOT)}:{frame.f_lineno}"
            break
        frame = frame.f_back
    _waits[what] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in given if isinstance(leaf, Elsewhere)]
    here = [leaf for leaf in given if not isinstance(leaf, Elsewhere) and leaf.ndim]
    target = kwargs.get("device")
    target_type = None if target is None else torch.device(target).type
    if not there and target_type != DEVICE.type:
        return func(*args, **kwargs)
    copies = name in ("copy_", "_to_copy")
    if there and here:
        if name != "copy_":
            shapes = [tuple(leaf.shape) for leaf in given]
            raise RuntimeError(f"{name} got tensors of {shapes} on two devices")
        _note("copy")
    if there and (name in READS or (name == "_to_copy" and target_type == "cpu")):
        _note(name)
    if copies and not there:
        _note("copy")
    real = {key: tree_map(_real, value) for key, value in kwargs.items()}
    if target_type == DEVICE.type:
        real["device"] = torch.device("cpu")
    result = func(*tree_map(_real, args), **real)
    if target_type == "cpu" and there:
        return result
    if torch.Tag.inplace_view in func.tags:
        args[0].data = Elsewhere(args[0].numbers)  # its own shape
    in_place = name.endswith("_") and not name.endswith("__")  # as __xor__ does
    if in_place and isinstance(args[0], Elsewhere):
        return args[0]
    return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, result)


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device without one to start from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})


@contextmanager
def pretending() -> Iterator[Counter[str]]:
    """Within the block the device is there; gives what has waited for it, by place."""
    _waits.clear()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor on a device starts on the CPU
    try:
        # Tensor.new_tensor is written in C, for devices that there are.
        with pytest.MonkeyPatch.context() as patch, _Factories():
            patch.setattr(torch.Tensor, "new_tensor", _new_tensor)
            yield _waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def there(tree: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The same variables on the device."""
    return {name: Elsewhere(leaf.detach()) for name, leaf in tree.items()}


def here(tree: Params) -> Params:
    """The same variables on the CPU; nothing waits."""
    return {name: _real(leaf) for name, leaf in tree.items()}


def task_there(task: Task) -> Task:
    """The same task on the device."""

    def moved(batch: Batch) -> Batch:
        return batch.map(Elsewhere)._replace(index=Elsewhere(batch.index))

    return Task(moved(task.support), moved(task.query), task.id)


def last_of_two(
    problem: Problem, algorithm: Algorithm, outer: Params, tasks: list[Task], compute: Compute
) -> HypergradientSum:
    """Two steps with kept states where there are any; the second is computed from the first."""
    keeps = algorithm.trains != "start"
    states: dict[int, Tensor] | None = {} if keeps else None
    for step in range(2):
        found = task_hypergradients(
            *(problem, algorithm, outer, tasks),
            compute=compute,
            states=states,
            step=step,
            report=True,
            is_checked=True,
        )
        states = found.states if keeps else None
    return found
