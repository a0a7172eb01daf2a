"""`Compute`: how hypergradients and adaptations are computed, wherever that happens."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch

from metadist.checks.values import check_fields, require_word, rule
from metadist.trees import Params

Vectorize = Literal["auto"] | bool


REPORT_EXAMPLES = 256
"""Of each set, in a report of a training with smaller mini-batches."""


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
            training by their sizes (see `metadist.chunks`), which is written to checkpoints for a
            CPU; in an evaluation 25.
        graph_budget: Bytes of graphs that a worker keeps from the forward steps of ITD for the way
            back; what does not fit is computed again. 0: memory does not grow with the number of
            steps, at about 1.3 times the time.
        batch_size: Examples per draw from support and query set; None: whole sets.
        outer_batch_size: Examples per draw from the query set, where f has a batch size of its own;
            None: `batch_size`.
        report_examples: With mini-batches, or if it is given, a report of a training is about so
            many examples of each set, always the same, and evaluations and metrics of solutions go
            through whole sets in parts of so many. None: 256, or a mini-batch if that is more.
        seed: The seed of these draws, and of the initial outer variable.
        data_budget: Bytes of data that may stay on a GPU, see `metadist.feed.Feed`; what is larger
            is sent with each lease. 0: everything is. A lease with more data is not sampled ahead
            either, so 0 turns that off.
        num_threads: Intra-op threads of torch. The sums of a convolution depend on it, so every
            worker uses the same. None, which a training refuses: as torch is set.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ... (CUDA or ROCm)
        precision: "highest": products of float32 are those of float32, whatever torch is set to.
            "tf32": a GPU may round what it multiplies to 10 bits, which is faster. torch's own
            default does so in convolutions, where it makes a hypergradient through several inner
            steps wrong by a quarter and more.
        encode_precision: "highest": as everything else. "bf16": `Problem.encode`, such as the
            backbone of ANIL, multiplies in bfloat16 (torch.autocast), and all that comes after it
            is in the dtype of x. Refused where encode multiplies nothing, as that of MAML, and
            where the hypergradient would be another one.
        cuda_graphs: Record what a lease of a training asks of a GPU as a CUDA graph, and replay it
            for the leases that follow: the same bytes without the time that Python takes to ask.
            "auto": on a GPU, where it can be done; where not, a warning says why, once. True: it is
            an error where it cannot be done. See docs/gpu.md.
    """

    vectorize: Vectorize = rule("auto", one_of=("auto", True, False))
    chunk_size: int | None = rule(None, ge=1, none="")
    graph_budget: int = rule(1_000_000_000, ge=0)
    batch_size: int | None = rule(None, ge=1, none="")
    outer_batch_size: int | None = rule(None, ge=1, none="")
    report_examples: int | None = rule(None, ge=1, none="")
    seed: int = 0
    data_budget: int = rule(1_000_000_000, ge=0)
    num_threads: int | None = rule(1, ge=1, none="")
    device: str = "auto"
    precision: Literal["highest", "tf32"] = rule("highest", one_of=("highest", "tf32"))
    encode_precision: Literal["highest", "bf16"] = rule("highest", one_of=("highest", "bf16"))
    cuda_graphs: Literal["auto"] | bool = rule("auto", one_of=("auto", True, False))

    def __post_init__(self) -> None:
        check_fields(self)
        require_word("seed", self.seed)
        device = parse_device(self.device)
        if self.cuda_graphs is True and device is not None and device.type == "cpu":
            raise ValueError(
                "cuda_graphs must be 'auto' or False with device='cpu', got True: graphs are of "
                "CUDA devices"
            )

    @property
    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Examples per draw from the support and from the query set; None: the whole set."""
        return self.batch_size, self.outer_batch_size or self.batch_size

    @property
    def part_size(self) -> int | None:
        """The most examples of which losses and metrics are computed together; None: whole sets."""
        sizes = [size for size in self.batch_sizes if size is not None]
        if self.report_examples is not None or not sizes:
            return self.report_examples
        return max(REPORT_EXAMPLES, *sizes)

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

    @property
    def arithmetic(self) -> dict[str, str]:
        """How numbers are rounded, for readers of a result; defaults of later versions left out."""
        found: dict[str, str] = {"precision": self.precision}
        if self.encode_precision != "highest":
            found["encode_precision"] = self.encode_precision
        return found

    def encode(self, encode: Callable[..., Params], outer: Params, task: Any) -> Params:
        """What `encode` of a problem, or its `encode_tasks`, returns in `encode_precision`."""
        if self.encode_precision == "highest":
            return encode(outer, task)
        leaf = next(iter(outer.values()))
        # Without torch's cache of rounded weights, whose gradients would be added up in bfloat16.
        with torch.autocast(leaf.device.type, torch.bfloat16, cache_enabled=False):
            context = encode(outer, task)
        return {
            name: part.to(leaf.dtype) if part.dtype == torch.bfloat16 else part
            for name, part in context.items()
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block torch computes as this says: threads, precision, the same bytes again.

        Nothing of it is left afterwards, whatever is raised.
        """
        is_tf32 = self.precision == "tf32"
        wanted: list[Any] = ["high" if is_tf32 else "highest", is_tf32, False, True]
        # A kind of operator for which none is written has that of all.
        wanted += [
            "tf32" if is_tf32 and name != "mkldnn.conv" and name != "mkldnn.rnn" else "ieee"
            for name in NEWER_SWITCHES
        ]
        switches = (*SWITCHES, *NEWER_SWITCHES.values())
        with intra_op_threads(self.num_threads):
            before = [_value_of(read) for read, _ in switches]
            if before == wanted:
                yield
                return
            try:
                for (_, write), value in zip(switches, wanted, strict=True):
                    write(value)
                yield
            finally:
                for (read, write), value in zip(switches, before, strict=True):
                    if value is None:
                        continue
                    if (read, write) in NEWER_SWITCHES.values():
                        write("none")  # that of all, which may be changed later
                    if _value_of(read) != value:
                        write(value)


Switch = tuple[Callable[[], Any], Callable[[Any], None]]
"""How a setting of torch is read and written."""


def _attribute(owner: Any, name: str) -> Switch:
    return partial(getattr, owner, name), partial(setattr, owner, name)


SWITCHES: tuple[Switch, ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.backends.cudnn, "allow_tf32"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
)
"""What the bytes of a result depend on: how products are rounded, which kernels cuDNN takes."""


def _newer() -> dict[str, Switch]:
    """The same precisions by operator, as torch has them from 2.9 on.

    They follow what is written above, but not the other way round; and what is written above leaves
    convolutions as torch.backends.fp32_precision says.
    """
    found = {}
    for name in (
        "cuda.matmul",
        "cudnn.conv",
        "cudnn.rnn",
        "mkldnn.matmul",
        "mkldnn.conv",
        "mkldnn.rnn",
    ):
        library, _, operator = name.partition(".")
        owner = getattr(getattr(torch.backends, library), operator, None)
        if getattr(torch.backends.cudnn, "conv", None) is not None and owner is not None:
            found[name] = _attribute(owner, "fp32_precision")
    return found


NEWER_SWITCHES = _newer()


def _value_of(read: Callable[[], Any]) -> Any:
    """A setting; None where the older way to read it is refused, since it was set the newer way."""
    try:
        return read()
    except RuntimeError:
        return None


CUBLAS_CONFIG, CUBLAS_FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What cuBLAS reads when it starts, and the value with which its sums are always the same."""


def parse_device(device: str) -> torch.device | None:
    """The device of that name, whether it is there or not; None for "auto".

    Raises:
        ValueError: It is neither the CPU nor a GPU of CUDA or ROCm: on MPS and XPU numbers of
            float64 and operators that we need are missing, or were never tried.
    """
    message = f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N' (CUDA or ROCm), got {device!r}"
    try:
        parsed = None if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise ValueError(message) from error
    if parsed is not None and parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"{message}: metadist was never run on {parsed.type}")
    return parsed


def wants_gpu(device: str) -> bool:
    """Whether what has that device computes on a GPU here, or would if there were one."""
    parsed = parse_device(device)
    return torch.cuda.is_available() if parsed is None else parsed.type == "cuda"


def pick_device(device: str) -> torch.device:
    """The device of that name on this machine; "auto" is the GPU if there is one."""
    chosen = parse_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        # Read when the first product is computed; without it cuBLAS may take any of its sums.
        os.environ.setdefault(CUBLAS_CONFIG, CUBLAS_FIXED)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be 'cpu' or 'auto' where torch sees no GPU, got {device!r}: `metadist "
            "doctor` says what torch was built for"
        )
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


@lru_cache
def warn_once(message: str) -> None:
    """Give this warning once in this process, whatever its filters say."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


DEFAULT = Compute()
AS_TORCH_IS_SET = Compute(num_threads=None)
