"""Problems whose model a `ModelFactory` gives: it is built once in a process, and sent as text."""

from __future__ import annotations

import hashlib
import inspect
import socket
from typing import Any, NamedTuple

from torch import Tensor, nn

from metadist.factory import ModelFactory
from metadist.tasks.network import check_model, emptied, trainable, without_parameters
from metadist.trees import Params, as_bytes


class Opened(NamedTuple):
    """A model taken apart.

    Args:
        start: Its trainable parameters by name.
        module: The model, whose trainable parameters have a shape but no memory. Those of one
            factory share it.
        digest: sha256 of all its parameters and buffers; empty where no factory made it.
    """

    start: Params
    module: nn.Module
    digest: str


# A cache for the whole process: a model of a factory may fill most of the memory.
_built: dict[str, Opened] = {}


def opened(model: nn.Module | ModelFactory) -> Opened:
    """The model taken apart; one that a factory gives is built if this process has not yet.

    Raises:
        ValueError: It is neither, cannot be built, or is one that no inner loop can replay.
    """
    if isinstance(model, ModelFactory):
        if (key := model.key()) not in _built:
            made = model()
            check_model(made)
            digest = digest_of(made)
            _built[key] = Opened(*emptied(made), digest)
        return _built[key]
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be an nn.Module or a ModelFactory, got {type(model).__name__}"
        )
    check_model(model)
    return Opened(trainable(model), without_parameters(model), "")


def digest_of(model: nn.Module) -> str:
    """sha256 of the names, dtypes, shapes and bytes of all parameters and buffers."""
    hasher = hashlib.sha256()
    for name, leaf in (*model.named_parameters(), *model.named_buffers()):
        hasher.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        hasher.update(_bytes(leaf))
    return hasher.hexdigest()


def _bytes(leaf: Tensor) -> Any:
    return as_bytes(leaf.detach().cpu().contiguous()).numpy()


class SentAsText:
    """A base of problems with an argument `model`, which are sent by their arguments if it is text.

    Each argument is kept as the attribute of its name. Whoever receives one builds the model, and
    compares it with that of the sender.
    """

    model: nn.Module | ModelFactory

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not isinstance(getattr(self, "model", None), ModelFactory):
            return super().__reduce_ex__(protocol)
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return _received, (type(self), arguments, opened(arguments["model"]).digest)


def _received(cls: type, arguments: dict[str, Any], digest: str) -> Any:
    model: ModelFactory = arguments["model"]
    found = opened(model).digest
    if found != digest:
        raise ValueError(
            f"{model} must give the same weights on every machine, got sha256 {found[:12]} on host "
            f"{socket.gethostname()} and {digest[:12]} where it was first built: another revision "
            "or copy of the files, another version of torch, or a function that draws from "
            "elsewhere than torch. Give a revision, or copy one folder to all"
        )
    return cls(**arguments)
