"""`Transport`: how x and the sums of hypergradients travel from one process to another."""

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
"""A tensor in a message, by value or by reference; `receive` reads it."""


class Pulled(NamedTuple):
    """x, and for a two-point method x one version earlier; or a shard's slice of them."""

    flat: Sent
    previous: Sent | None = None


class Pushed(NamedTuple):
    """The tensors of a `Contribution`: the sum of hypergradients and the new states.

    With several shards each receives its slice of the sum (for a two-point method, of both
    halves), and the first one the states.
    """

    total: Sent
    states: dict[int, Array] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class Transport:
    """How a tensor in a message travels.

    Args:
        name: "object_store": Ray copies it to shared memory as numpy, and from there over TCP to
            other nodes. "nixl": it stays where it is, and the reader fetches it directly, also
            from the memory of a GPU, with Ray's direct tensor transport (alpha in Ray 2.60).
        on_gpu: Whether the parameter server has x on a GPU.

    Raises:
        ValueError: This transport is not available here.
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
        """The device of the server."""
        return "cuda" if self.on_gpu else "cpu"

    def send(self, tensor: Tensor) -> Sent:
        """A read-only handle; do not modify the tensor while readers may exist."""
        if self.name == "object_store":
            return to_array(tensor)
        tensor = tensor.detach()
        if not self.on_gpu:
            # A tensor arrives on a device of the kind it was sent from, and the server has no GPU.
            tensor = tensor.cpu()
        reference: ObjectRef[Any] = ray.put(tensor.contiguous(), _tensor_transport=self.name)
        return reference

    def send_copy(self, tensor: Tensor) -> Sent:
        """As `send`, for a tensor that will be modified."""
        # Ray pickles a numpy result into shared memory before it begins the next call, which is a
        # copy already. A direct transport reads the tensor's own memory later, when x has moved on.
        return self.send(tensor if self.name == "object_store" else tensor.clone())


OBJECT_STORE = Transport()


def receive(sent: Sent) -> Tensor:
    """The tensor that was sent; it is shared with other readers and must not be modified."""
    if isinstance(sent, ObjectRef):
        tensor: Tensor = ray.get(sent)
        return tensor
    return read_only(sent)
