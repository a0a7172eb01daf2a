"""A set of examples from what a user has: arrays, a data set, a loader of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from metadist.task import Batch

Data = Any
"""What `batch_of` takes."""


def map_style(data: Any, field: str = "dataset") -> Any:
    """The data set behind a DataLoader; anything else as it is.

    The loader's batches and their order are not used: a method draws its own.

    Raises:
        ValueError: There are no examples by position, or the loader does more than collect them.
    """
    if isinstance(data, DataLoader):
        loader, data = data, data.dataset
        if not isinstance(data, IterableDataset):
            _require_plain(loader, field)
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"{field} must have its examples by position (__len__ and __getitem__), got the "
            f"iterable {type(data).__name__}: tasks are drawn in any order, and again. Collect "
            "what you need and pass that: list(itertools.islice(dataset, 10_000))"
        )
    return data


def _require_plain(loader: DataLoader[Any], field: str) -> None:
    """Raise ValueError unless the loader gives each example of its data set as it is."""
    batches = loader.batch_sampler
    own_batches = batches is not None and type(batches) is not BatchSampler
    order = batches.sampler if isinstance(batches, BatchSampler) else loader.sampler
    in_turn = isinstance(order, SequentialSampler)
    shuffled = (
        isinstance(order, RandomSampler)
        and not order.replacement
        and order.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if own_batches or not (in_turn or shuffled):
        raise ValueError(
            f"{field} must be a DataLoader over the whole of its data set, got one with "
            f"{type(batches if own_batches else order).__name__}: pass the data set, or "
            "torch.utils.data.Subset(dataset, positions)"
        )
    if loader.collate_fn not in (default_collate, default_convert):
        name = getattr(loader.collate_fn, "__name__", type(loader.collate_fn).__name__)
        raise ValueError(
            f"{field} must be a DataLoader with torch's own collate_fn, got {name}: do what it "
            "does in the __getitem__ of the data set"
        )


def batch_of(data: Data, field: str) -> Batch:
    """All examples of `data` as one batch.

    Args:
        data: A `Batch`; arrays or tensors (inputs, targets), or by name in a mapping, each with
            an axis of examples first; a map-style data set of (input, target), or a DataLoader of
            one. A data set is read once: what it draws at random stays as it was drawn then.
        field: What to call it in messages.

    Raises:
        ValueError: It is something else, or examples are of several shapes.
    """
    if isinstance(data, Batch):
        return data
    if isinstance(data, Mapping):
        if not all(isinstance(name, str) for name in data):
            raise ValueError(
                f"{field} must have names that are texts, got {list(data)}: rename them"
            )
        parts = {name: _tensor(part, field) for name, part in data.items()}
        if "targets" in parts:
            parts["targets"] = _as_targets(parts["targets"])
        return Batch.named(**parts)
    is_pair = isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0])
    if is_pair and (_is_array(data[1]) or isinstance(data[1], list)):
        inputs, targets = (_tensor(part, field) for part in data)
        return Batch.of(inputs, _as_targets(targets))
    data = map_style(data, field)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or _is_array(data):
        raise ValueError(
            f"{field} must be (inputs, targets), a data set or a DataLoader, got "
            f"{type(data).__name__}: give the targets beside the inputs"
        )
    if not len(data):
        raise ValueError(f"{field} must hold an example, got an empty {type(data).__name__}")
    examples = [data[position] for position in range(len(data))]
    first = examples[0]
    if not isinstance(first, tuple | list) or len(first) < 2:
        raise ValueError(
            f"{field} must give (input, target) at each position, got {type(first).__name__}: wrap "
            "the data set in a class whose __getitem__ does"
        )
    try:
        columns = [
            torch.stack([torch.as_tensor(part) for part in column])
            for column in zip(*examples, strict=True)
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{field} must give tensors, arrays or numbers of one shape at each position, got "
            f"{error}: convert them in the data set (of torchvision's, transform=ToTensor())"
        ) from error
    inputs, targets, *others = map(_narrow, columns)
    return Batch.of(inputs, _as_targets(targets), *others)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _tensor(value: Any, field: str) -> Tensor:
    try:
        # A copy has no negative strides, which torch has no tensors for.
        return _narrow(
            torch.as_tensor(value.copy(order="C") if isinstance(value, np.ndarray) else value)
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{field} must be arrays of numbers, got {error}: number classes that are texts "
            "(numpy.unique(labels, return_inverse=True)[1])"
        ) from error


def _narrow(tensor: Tensor) -> Tensor:
    """float64 as torch's default, since numpy's arrays are float64 and torch's weights are not."""
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _as_targets(tensor: Tensor) -> Tensor:
    """Integers and booleans as int64, which losses of classes take."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return tensor if is_number else tensor.to(torch.int64)
