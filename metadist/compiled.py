"""`CompiledOracle`: derivatives by torch.compile, of one task or of a stack of tasks at once.

What is compiled is one step, never a loop, so that a loop of any length is compiled once: grad_y g
as a function whose backward pass is the second-order product at that point, which computes the loss
of a step once. For a stack of tasks, whose models are small, the gradient and the product are two
functions: to compute the loss again costs less than autograd around them. There vmap is inside of
what is compiled; the loop around it runs on plain tensors with a leading axis of tasks, since each
small operation under vmap costs several times what it costs outside.

A problem that cannot be compiled, or that computes something else when compiled, is computed as
without compilation, to the same bytes, and a warning says why.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from metadist.autograd import AutogradOracle, functional
from metadist.draws import Draw
from metadist.memory import is_out_of_memory
from metadist.oracle import DERIVATIVES, Oracle, Program
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.trees import Params, detach, gradients, leaves, norm, sub

MOST = 24
"""Compiled functions of a problem: the gradients of g and f for about eight shapes of tasks."""


class NotCompiled(Exception):
    """Why a problem is computed without compilation."""


class Kernels:
    """What is compiled of a problem, for as long as it is used.

    Each function has fixed shapes and is compared with what it was compiled from before it is
    used: in a problem that draws random numbers, or keeps a state, the two are not the same.
    """

    def __init__(self, problem: Problem) -> None:
        self._works = True
        self._problem = problem
        self._compiled: dict[object, Callable[..., Any]] = {}
        self._warned: set[str] = set()

    def run(
        self,
        program: Program,
        oracle: AutogradOracle,
        task: Task,
        trees: tuple[Params, ...],
        graph_budget: int,
    ) -> Any:
        """`program(oracle, *trees)` with compiled derivatives, under vmap those of all tasks.

        Args:
            program: See `Oracle.together`.
            oracle: The oracle of `task`.
            task: One task, or under vmap one slice of a stack of tasks.
            trees: The arguments of the program.
            graph_budget: Bytes of the graphs that `kept_grad` may leave behind.
        """
        if self._works:
            compiled = CompiledOracle(oracle, self, graph_budget)
            try:
                if any(map(is_batchedtensor, task.support.tensors)):
                    found = _outside(compiled, program, task, trees)
                else:
                    found = program(compiled, *trees)
            except NotCompiled as reason:
                if str(reason) not in self._warned:
                    self._warned.add(str(reason))
                    message = f"compile=True has no effect, {reason}"
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
            else:
                oracle._mini_batches = compiled._mini_batches
                return found
        return program(oracle, *trees)

    def get(self, name: str, stacked: bool, batch: Batch, *trees: Params) -> Callable[..., Any]:
        """The function of (trees, batch) of this name, compiled for their shapes.

        Args:
            name: A key of `DERIVATIVES`.
            stacked: Whether all arguments have a leading axis of tasks.
            batch: The last argument.
            *trees: The other arguments.

        Raises:
            NotCompiled: It cannot be compiled, or it computes something else.
        """
        of_batch = [(leaf.shape, leaf.dtype) for leaf in (*batch.tensors, batch.index)]
        of_trees = [(key, leaf.shape, leaf.dtype) for tree in trees for key, leaf in tree.items()]
        where, threads = batch.index.device, torch.get_num_threads()
        key = (name, stacked, where, threads, tuple(batch.names), *of_batch, *of_trees)
        found = self._compiled.get(key)
        if found is None:
            if len(self._compiled) >= MOST:
                raise NotCompiled(
                    f"tasks have more shapes than the {MOST} compiled functions that are kept of a "
                    "problem serve: give its tasks the same sizes, or pass compile=False"
                )
            found = self._compiled[key] = self._compile(name, stacked, batch, trees)
        return found

    def _compile(
        self, name: str, stacked: bool, batch: Batch, trees: tuple[Params, ...]
    ) -> Callable[..., Any]:
        derivative = DERIVATIVES[name]
        function = functional(self._problem, derivative)
        if stacked:
            function = vmap(function)
        # On a CPU the compiler would turn images to channels_last, of which its sums over a channel
        # are less exact and slower, as those of TaskBatchNorm are.
        on_cpu = batch.index.device.type == "cpu"
        options: dict[str, Any] | None = {"layout_optimization": False} if on_cpu else None
        compiled = torch.compile(_fresh(function), fullgraph=True, dynamic=False, options=options)
        try:
            found = _try(compiled, name, batch, trees)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # What is wrong in the losses themselves is raised again where they run uncompiled.
            self._works = False
            reason = str(error).strip().partition("\n")[0]
            raise NotCompiled(
                f"torch.compile failed: {reason}; install a C++ compiler (or on GPU, triton), or "
                "pass compile=False"
            ) from error
        for tree, expected in zip(found, _try(function, name, batch, trees), strict=True):
            size, difference = (float(norm(t)) for t in (expected, sub(tree, expected)))
            tolerance = torch.finfo(next(iter(trees[1].values())).dtype).eps ** 0.375
            # A task that is not finite says nothing; it is told by its result.
            if difference > tolerance * size:
                self._works = False
                raise NotCompiled(
                    f"the compiled {derivative.counts[0]} is {difference / size:.0e} from "
                    "what it was compiled from: does the problem draw random numbers, or keep a "
                    "state? Pass compile=False"
                )
        return compiled


SLOPE = "kept_grad"
"""The name of grad_y g as a function that is differentiated; `inner_grad` is not."""


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own code, by which the compiler counts how often it compiled one."""

    def call(*args: Any) -> Any:
        return function(*args)

    return FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )


def _try(
    function: Callable[..., Any], name: str, batch: Batch, trees: tuple[Params, ...]
) -> tuple[Params, ...]:
    """What a function gives; of a slope also its product with itself."""
    if name != SLOPE:
        with torch.no_grad():
            found: tuple[Params, ...] = function(*trees, batch)
        return found
    x, y = trees
    graph = _Graph(function, x, y, batch)
    return (graph.slope, *graph.product(graph.slope))


class _Graph:
    """grad_y g at a point, and the product there."""

    def __init__(self, function: Callable[..., Any], x: Params, y: Params, batch: Batch) -> None:
        self._point = x, y, batch
        self._variables = leaves(x), leaves(y)
        with torch.enable_grad():
            (self._outputs,) = function(*self._variables, batch)
        self.slope = detach(self._outputs)

    def is_at(self, x: Params, y: Params, batch: Batch) -> bool:
        """Whether it belongs to these very tensors."""
        mine, others = (_tensors(*point) for point in (self._point, (x, y, batch)))
        return len(mine) == len(others) and all(map(operator.is_, mine, others))

    def product(self, v: Params) -> tuple[Params, ...]:
        """(J v, H v); the graph goes with it."""
        outputs = self._outputs
        return gradients(list(outputs.values()), [v[name] for name in outputs], *self._variables)

    def num_bytes(self) -> int:
        """What the graph holds."""
        nodes = {leaf.grad_fn for leaf in self._outputs.values()}
        saved = [leaf for node in nodes for leaf in getattr(node, "saved_tensors", ())]
        return sum({leaf.data_ptr(): leaf.nbytes for leaf in saved}.values())


def _tensors(x: Params, y: Params, batch: Batch) -> list[Tensor]:
    return [*x.values(), *y.values(), *batch.tensors]


class CompiledOracle(Oracle):
    """The compiled derivatives of `oracle`; those of all tasks of a stack once it is `stacked`.

    Its trees then have a leading axis of tasks, as the leaves of its results have.
    """

    def __init__(self, oracle: AutogradOracle, kernels: Kernels, graph_budget: int) -> None:
        super().__init__(oracle._problem, copy.copy(oracle._mini_batches), oracle.constants)
        self._single = oracle
        self._kernels = kernels
        self._stack: Task | None = None
        self._budget = graph_budget
        self._graphs: list[_Graph] = []

    def stacked(self, tasks: Task) -> CompiledOracle:
        """This oracle, of a stack of tasks."""
        self._stack = tasks
        return self

    def _batch(self, draw: Draw) -> Batch:
        if self._stack is None:
            return self._single.batch(draw)
        if self._mini_batches.is_whole(draw.source):
            return self._stack.support if draw.source == "support" else self._stack.query
        found: Batch = vmap(lambda task: self._single.of(task).batch(draw))(self._stack)
        return found

    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        if DERIVATIVES[name].gives == ("value",):
            return self._single.derive(name, draw, *trees)
        if name == "cross":  # not worth a compilation of its own
            return self.derive("second_order", draw, *trees)[:1]
        x, y, *directions = trees
        batch, stacked = self._batch(draw), self._stack is not None
        if stacked or name not in (SLOPE, "second_order"):
            name = "inner_grad" if name == SLOPE else name
            function = self._kernels.get(name, stacked, batch, *trees)
            with torch.no_grad():
                found: tuple[Params, ...] = function(*trees, batch)
            return found
        for number in reversed(range(len(self._graphs) if directions else 0)):
            if self._graphs[number].is_at(x, y, batch):
                return self._graphs.pop(number).product(*directions)
        graph = _Graph(self._kernels.get(SLOPE, stacked, batch, x, y), x, y, batch)
        if directions:
            return graph.product(*directions)
        if (len(self._graphs) + 1) * graph.num_bytes() <= self._budget:
            self._graphs.append(graph)
        return (graph.slope,)


def _outside(
    oracle: CompiledOracle, program: Program, task: Task, trees: tuple[Params, ...]
) -> Any:
    """Under vmap, a program on plain trees with a leading axis of tasks."""
    leaves, form = tree_flatten((task, trees))
    form_found = None

    def run(stacked: list[Tensor]) -> list[Tensor]:
        nonlocal form_found
        tasks, trees = tree_unflatten(stacked, form)
        found, form_found = tree_flatten(program(oracle.stacked(tasks), *trees))
        return found

    # Tensors alone, since torch takes arguments and results apart several times on this way.
    found = _Outside.apply(run, *leaves)
    assert form_found is not None
    return tree_unflatten(found, form_found)


class _Outside(torch.autograd.Function):
    """Calls a function of plain tensors from under vmap."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("no tensor is under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing of it is differentiated."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, run: Callable[[list[Tensor]], list[Tensor]], *tensors: Tensor
    ) -> tuple[Any, Any]:
        stacked = [
            leaf.expand(info.batch_size, *leaf.shape) if axis is None else leaf.movedim(axis, 0)
            for leaf, axis in zip(tensors, in_dims[1:], strict=True)
        ]
        found = run(stacked)
        return tuple(found), (0,) * len(found)
