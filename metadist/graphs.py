"""A group of tasks as one CUDA graph: recorded once, replayed for every later lease of its form.

On a GPU a lease is thousands of small operations, each of which Python takes longer to ask for
than the GPU to do. A graph asks for all of them at once. It computes on fixed memory: inputs are
copied there before, and results copied from there after it. What else differs from lease to lease
are a few whole numbers, see `metadist.followed`: those that Python decides by select the graph.

Nothing is taken on trust. A graph is compared with the plain computation at its first replay, for
another lease than it was recorded from, and again at the first of other tasks, and serves only if
all bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from metadist.algorithm import Algorithm
from metadist.compute import Compute, warn_once
from metadist.followed import Buffers, Recording
from metadist.problem import Problem
from metadist.trees import same_bytes

Function = Callable[[Any, Sequence[Any]], Any]
"""(a tree of tensors, whole numbers) -> a tree of tensors and what else it returns.

Pure; what is no tensor in the result depends on what Python decides alone.
"""

MOST = 16
"""Graphs of an algorithm on a problem: by sizes, with and without a report, by phases."""

WARM_UP = 2
"""Runs on the stream of the recording before it, in which libraries take their workspaces."""


class Recorder(Protocol):
    """How operations on a type of device are recorded."""

    def __call__(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """(what `run` gives, what computes it again into the same memory).

        It runs more than once, the last time to be recorded; no memory of the first runs is used.

        Raises:
            Exception: Not everything that `run` does can be recorded.
        """
        ...


def record_cuda(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """By a CUDA graph, as torch.cuda.graph documents it."""
    with torch.cuda.device(device):
        current, (side, pool) = torch.cuda.current_stream(), _place(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # All graphs share memory, which is safe since results are copied before another one runs.
        # And other threads may copy the data of the next lease meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            found = run()
    return found, graph.replay


@lru_cache
def _place(device: int) -> tuple[Any, Any]:
    """The stream and the memory of all graphs of a device."""
    # One stream for warm-up and recording: cuBLAS takes a workspace by stream, and one taken while
    # it is recorded would lie in the memory of the graph.
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda}
"""By type of device."""


class Graph:
    """A recorded computation, with the memory of its inputs and results; `tasks`: see `Graphs`."""

    def __init__(
        self, function: Function, inputs: Any, numbers: Sequence[int], tasks: Any = ()
    ) -> None:
        self.tasks = tasks
        still = tree_map_only(Tensor, lambda leaf: torch.empty_like(leaf).copy_(leaf), inputs)
        self._inputs = _tensors(still)
        device = self._inputs[0].device
        buffers = Buffers(device)
        self._recording = Recording(numbers, buffers)

        def run() -> Any:
            # The last run is the one that is recorded.
            self._recording = Recording(numbers, buffers)
            return function(still, self._recording.numbers)

        found, self._replay = RECORDERS[device.type](run, device)
        self._results, self._form_found = tree_flatten(found)
        self.verified: set[Any] = set()
        """The tasks for which it gave the bytes of the plain computation."""

    def serves(self, numbers: Sequence[int]) -> bool:
        """Whether these numbers lead to the same computation."""
        return self._recording.holds(numbers)

    def __call__(self, inputs: Any, numbers: Sequence[int]) -> Any:
        """What the function gives."""
        self._recording.fill(numbers)
        torch._foreach_copy_(self._inputs, _tensors(inputs))
        self._replay()
        found = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._results]
        return tree_unflatten(found, self._form_found)


def _form_of(leaf: Any) -> Any:
    """What an input must share to be copied into memory of a graph; what is no tensor is fixed."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


class Graphs:
    """The graphs of an algorithm on a problem.

    Args:
        name: Of the algorithm, for messages.
        must: Raise an error where no graph can serve. Otherwise a warning says why, once, and
            everything is computed without graphs from then on.
    """

    def __init__(self, name: str, must: bool) -> None:
        self._name = name
        self._must = must
        self._graphs: list[tuple[Any, Graph]] = []  # the last used one at the end
        self._recorded = self._replayed = 0
        self._reason = ""

    def run(
        self, function: Function, inputs: Any, numbers: Sequence[int], key: Any, tasks: Any = ()
    ) -> Any:
        """`function(inputs, numbers)`, from a graph where there is one.

        Args:
            function: The function, the same one whenever the key is.
            inputs: A tree of tensors, on one device.
            numbers: Whole numbers.
            key: What else decides what the function does; can be hashed.
            tasks: Which tasks the inputs are of; can be hashed. What a graph has of them in it may
                be seen at others alone.

        Raises:
            ValueError: No graph can serve, and one must.
        """
        if self._reason:
            return function(inputs, numbers)
        leaves, form = tree_flatten(inputs)
        key = (key, form, *map(_form_of, leaves))
        graph = self._find(key, numbers)
        if graph is None:
            found = function(inputs, numbers)
            self._record(key, function, inputs, numbers, tasks)
            return found
        found = graph(inputs, numbers)
        self._replayed += 1
        if tasks in graph.verified or graph.verified - {graph.tasks}:
            return found
        expected = function(inputs, numbers)
        if not _same(found, expected):
            self._give_up("a graph computes other bytes than it was recorded from")
        graph.verified.add(tasks)
        return expected

    def _find(self, key: Any, numbers: Sequence[int]) -> Graph | None:
        for place, (its_key, graph) in enumerate(self._graphs):
            if its_key == key and graph.serves(numbers):
                self._graphs.append(self._graphs.pop(place))
                return graph
        return None

    def _record(
        self, key: Any, function: Function, inputs: Any, numbers: Sequence[int], tasks: Any
    ) -> None:
        if self._recorded >= MOST and self._replayed < self._recorded:
            self._give_up("Python decides otherwise at nearly every lease")
            return
        if len(self._graphs) == MOST:
            self._graphs.pop(0)
        self._recorded += 1
        try:
            self._graphs.append((key, Graph(function, inputs, numbers, tasks)))
        except Exception as error:  # noqa: BLE001  # the plain computation has just succeeded
            self._give_up(_reason_of(error))

    def _give_up(self, reason: str) -> None:
        self._graphs.clear()
        if self._must:
            raise ValueError(
                f"cuda_graphs must be False or 'auto' with {self._name}, got True: {reason}"
            )
        self._reason = reason
        warn_once(
            f"{self._name} is computed without CUDA graphs, as cuda_graphs=False says from the "
            f"start: {reason}"
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _reason_of(error: BaseException) -> str:
    # The end of a recording that failed fails too, in other words.
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _same(found: Any, expected: Any) -> bool:
    """Whether two results have the same bytes."""
    (mine, form), (other, other_form) = tree_flatten(found), tree_flatten(expected)
    return form == other_form and all(
        same_bytes(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(mine, other, strict=True)
    )


def plain_settings(owner: Any) -> tuple[Any, ...]:
    """The numbers, words and tensors that an object has: a graph is of these.

    Somebody may give it others between two leases.
    """
    found: list[Any] = []
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, Tensor):
            found.append((name, id(value), value._version))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, value))
    return tuple(found)


COMPILES = "what torch.compile makes is not recorded"

Owner = tuple[ReferenceType[Problem], ReferenceType[Algorithm], Graphs]

_known: dict[tuple[int, int, str | bool], Owner] = {}
"""The graphs of this process, for as long as their problem and algorithm are used."""


def graphs_of(
    problem: Problem, algorithm: Algorithm, compute: Compute, device: torch.device
) -> Graphs | None:
    """Where groups of tasks are to be recorded; None: they are not.

    Raises:
        ValueError: They must be, and cannot be.
    """
    wanted: Literal["auto"] | bool = compute.cuda_graphs
    if wanted is False or (wanted == "auto" and device.type not in RECORDERS):
        return None
    if device.type not in RECORDERS:
        raise ValueError(
            f"cuda_graphs must be 'auto' or False on a {device.type.upper()}, got True: graphs are "
            "of CUDA devices"
        )
    reason = algorithm.no_graph or (COMPILES if algorithm.compiles else "")
    if reason and wanted is True:
        raise ValueError(
            f"cuda_graphs must be 'auto' or False with {algorithm}, got True: {reason}"
        )
    if reason:
        return None
    key = id(problem), id(algorithm), wanted
    if key not in _known:

        def forget(_: Any, known: dict[Any, Owner] = _known) -> None:
            known.pop(key, None)  # Python may have taken the name apart, at its end

        owner = ref(problem, forget), ref(algorithm, forget)
        _known[key] = (*owner, Graphs(type(algorithm).__name__, must=wanted is True))
    return _known[key][2]
