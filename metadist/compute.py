"""`Compute`: how hypergradients and adaptations are computed, wherever that happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from metadist.checks.values import check_fields, rule

Vectorize = Literal["auto"] | bool


@dataclass(frozen=True)
class Compute:
    """How tasks are computed; but for `batch_size` and `seed`, results depend on it by rounding.

    Args:
        vectorize: Run tasks together under `torch.func.vmap` (they must have equal shapes), or
            one after another. "auto": together where the algorithm allows it and, on a CPU, no
            inner tensor is a convolution kernel and the inner variable takes no more than 512 KB,
            since vmap is slower than a loop otherwise; what vmap cannot run is run one after
            another, with a warning.
        chunk_size: The largest number of tasks under one vmap; bounds memory. None: in a
            training all on a GPU, and on a CPU by their sizes (see `metadist.chunks`), which is
            written to checkpoints; in an evaluation 25.
        graph_budget: Bytes of graphs that a worker keeps from the forward steps of ITD for the way
            back; what does not fit is computed again. 0: memory does not grow with the number of
            steps, at about 1.3 times the time.
        batch_size: Examples per draw from support and query set; None: whole sets.
        seed: The seed of these draws, and of the initial outer variable.
        num_threads: Intra-op threads of torch. The sums of a convolution depend on it, so every
            worker uses the same. None, which a training refuses: as torch is set.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...
    """

    vectorize: Vectorize = rule("auto", one_of=("auto", True, False))
    chunk_size: int | None = rule(None, ge=1, none="")
    graph_budget: int = rule(1_000_000_000, ge=0)
    batch_size: int | None = rule(None, ge=1, none="")
    seed: int = 0
    num_threads: int | None = rule(1, ge=1, none="")
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        parse_device(self.device)

    def given(self, **fields: Any) -> Compute:
        """The same with those of `fields` that are not None.

        Raises:
            ValueError: One of them already has another value, which is not its default.
        """
        fields = {name: value for name, value in fields.items() if value is not None}
        for name, value in fields.items():
            ours = getattr(self, name)
            if ours not in (value, getattr(Compute, name)):
                raise ValueError(
                    f"{name} must not contradict compute.{name}, got {value!r} and {ours!r}: "
                    "give one of them"
                )
        return replace(self, **fields)


def parse_device(device: str) -> torch.device | None:
    """The device of that name, whether it is there or not; None for "auto"."""
    try:
        return None if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}"
        ) from error


def pick_device(device: str) -> torch.device:
    """The device of that name on this machine; "auto" is the GPU if there is one."""
    chosen = parse_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' or 'auto' where torch sees no GPU, got {device!r}")
    return chosen


@contextmanager
def intra_op_threads(num_threads: int | None) -> Iterator[None]:
    """Within the block torch computes with `num_threads` threads; None: as it is set."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


DEFAULT = Compute()
AS_TORCH_IS_SET = Compute(num_threads=None)
