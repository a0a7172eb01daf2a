"""`Transport`: how x and the sums of hypergradients get from one process to another."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import ray
from ray import ObjectRef
from torch import Tensor

from metadist.cluster.actors.buffers import Array, read_only, to_array

TransportName = Literal["object_store", "nixl"]
Sent = Array | ObjectRef[Any]
"""What stands for a tensor in a message; `receive` reads it."""


class Pulled(NamedTuple):
    """x, and for a two-point method x one version before; or a shard's slice of them."""

    flat: Sent
    previous: Sent | None = None


class Pushed(NamedTuple):
    """The sum of hypergradients of a lease, and what the algorithm keeps of its tasks.

    Of several shards each gets its slice of the sum (of a two-point method, of both halves), and
    the first the states.
    """

    total: Sent
    states: dict[int, Array] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class Transport:
    """What becomes of a tensor in a message.

    Args:
        name: "object_store": it is copied to shared memory as numpy, and from there over TCP to
            other nodes. "nixl": it stays where it is, and who reads it fetches it from there, from
            the memory of a GPU too, with Ray's direct tensor transport (alpha in Ray 2.60).
        on_gpu: the parameter server has x on a GPU.

    Raises:
        ValueError: there is no such transport here.
    """

    name: TransportName = "object_store"
    on_gpu: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(TransportName):
            raise ValueError(
                f"transport must be one of {get_args(TransportName)}, got {self.name!r}"
            )
        if self.name == "object_store":
            return
        if "_tensor_transport" not in inspect.signature(ray.put).parameters:
            raise ValueError(
                f"transport must be 'object_store' with Ray {ray.__version__}, which has no direct "
                f"tensor transport, got {self.name!r}: install Ray 2.60 or later"
            )
        if importlib.util.find_spec("nixl") is None:
            raise ValueError(
                "transport must be 'object_store' where the package nixl is missing, got 'nixl': "
                "on every node, pip install 'metadist[nixl]'"
            )

    @property
    def device(self) -> str:
        """Of the server."""
        return "cuda" if self.on_gpu else "cpu"

    def send(self, tensor: Tensor) -> Sent:
        """To be read; its memory must not be written to as long as somebody may read it.

        What is read arrives on a device of the same kind, so a GPU's goes to the CPU first where
        the server has none.
        """
        if self.name == "object_store":
            return to_array(tensor)
        tensor = tensor.detach()
        if not self.on_gpu:
            tensor = tensor.cpu()
        reference: ObjectRef[Any] = ray.put(tensor.contiguous(), _tensor_transport=self.name)
        return reference

    def send_copy(self, tensor: Tensor) -> Sent:
        """As `send`, of memory that is going to be written to; Ray copies what is numpy itself."""
        return self.send(tensor if self.name == "object_store" else tensor.clone())


OBJECT_STORE = Transport()


def receive(sent: Sent) -> Tensor:
    """What was sent, to be read from and never written to."""
    if isinstance(sent, ObjectRef):
        tensor: Tensor = ray.get(sent)
        return tensor
    return read_only(sent)
