"""Whether a problem is pure: equal arguments give equal bytes, and nothing that exists changes.

Found by behaviour: every method runs twice with other global seeds, and results, arguments and
all tensors that the problem holds are compared byte by byte.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.autograd import AutogradOracle
from metadist.compute import Compute, intra_op_threads
from metadist.problem import Problem, is_constrained, is_nonsmooth
from metadist.task import Task
from metadist.trees import Params, as_bytes, detach, same_bytes, tree_map

RARE = 16
"""Seeds tried for a method that draws random numbers and yet gives the same bytes."""


class Impure(ValueError):
    """A method of the problem is not a function of its arguments, or changes something."""


def check_pure(problem: Problem, outer: Params, task: Task, compute: Compute) -> None:
    """Raise `Impure` if the methods of `problem` are not pure on `task`.

    Args:
        problem: The problem.
        outer: x without the algorithm's own variables, on the CPU, where equal sums have equal
            bytes; computed with one thread, for the same reason.
        task: A task there.
        compute: The seed and the sizes of the draws that losses are computed on.

    Cost: two passes through every method, and two double backward passes of each loss.
    """
    with intra_op_threads(1), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        held, given = _held(problem), _digests(task)
        passes = []
        for seed in (1, 2):
            calls = _calls(problem, outer, task, compute, seed)
            now = _held(problem)
            _require_unchanged(problem, held, now)
            _require_unchanged_task(given, _digests(task), calls)
            held = now
            passes.append(calls)
        first, second = passes
        for name, call in first.items():
            if not _same(call.result, second[name].result):
                raise _not_a_function(problem, name, call)
        drawing = [name for name, call in first.items() if call.draws]
        for seed in range(3, RARE) if drawing else ():
            others = _calls(problem, outer, task, compute, seed)
            for name in drawing:
                if not _same(first[name].result, others[name].result):
                    raise _not_a_function(problem, name, first[name])
    if drawing:
        warnings.warn(
            f"{drawing[0]} draws random numbers from a global generator; its results did not "
            f"depend on them in {RARE - 1} calls. Where they can, no inner loop can be replayed: "
            "a problem must draw nothing",
            RuntimeWarning,
            stacklevel=2,
        )


class _Call(NamedTuple):
    """A method that has been called.

    Args:
        function: The method, with its derivatives.
        arguments: As they were before.
        result: What it returned.
        draws: Whether a global generator moved.
        writes: Whether a tensor of the task was written in place.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any
    draws: bool
    writes: bool


def _calls(
    problem: Problem, outer: Params, task: Task, compute: Compute, seed: int
) -> dict[str, _Call]:
    """Every method by name, called once from `seed`."""
    calls: dict[str, _Call] = {}
    tensors = [tensor for _, tensor in _walk(task) if isinstance(tensor, Tensor)]

    def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        given = _copied(function, arguments)
        versions = [tensor._version for tensor in tensors]
        result = failure = None
        with _seeded(seed):
            before = _random_states()
            try:
                result = function(*given)
            except RuntimeError as error:  # of a backward pass, after a change in place
                failure = error
            draws = not _same(before, _random_states())
        writes = versions != [tensor._version for tensor in tensors]
        calls[name] = _Call(function, arguments, result, draws, writes)
        changed = _changed(arguments, given)
        if changed is not None:
            layer = _layer_that_writes(problem, function, arguments, changed, seed)
            raise Impure(
                f"{name} must leave its arguments as they are, got {changed} changed in place"
                f"{layer}: x would change where a gradient is computed and nowhere else. Compute "
                "a new tensor instead, and leave out options that write to weights, such as "
                "max_norm of an embedding"
            )
        if failure is not None:
            raise (
                _of_the_task(name) if writes else _not_differentiable(name, failure)
            ) from failure
        return result

    context = detach(call("encode", _Differentiated(problem.encode), outer, task).value)
    start = detach(call("init_inner", _Differentiated(problem.init_inner), outer, task).value)
    oracle = AutogradOracle(problem, task, compute.batch_size, compute.seed)
    support, query = oracle.batch(oracle.draw_inner()), oracle.batch(oracle.draw_outer())
    inner_loss, outer_loss = problem.inner_loss, problem.outer_loss
    call("inner_loss", _Differentiated(inner_loss, twice=True), context, start, support)
    call("outer_loss", _Differentiated(outer_loss, twice=True), context, start, query)
    call("metrics", problem.metrics, context, start, query)
    if is_nonsmooth(problem):
        call("nonsmooth_loss", problem.nonsmooth_loss, context, start)
        call("prox_inner", problem.prox_inner, context, start, 0.1)
    if is_constrained(problem):
        call("project_outer", problem.project_outer, outer)
    return calls


def _not_differentiable(name: str, error: RuntimeError) -> ValueError:
    way_out = ""
    if type(error).__name__ == "CheckpointError":
        way_out = (
            ": torch.utils.checkpoint computes again when the parameters of the call are gone; "
            "leave it out, an algorithm decides itself what it keeps"
        )
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"{name} must be differentiable, got {type(error).__name__}: {reason}{way_out}"
    )


class _Results(NamedTuple):
    """A value and its derivatives; None where there is none."""

    value: Any
    first: list[Tensor | None] | None
    second: list[Tensor | None] | None


class _Differentiated:
    """A method together with its gradient, and with `twice` a Hessian-vector product."""

    def __init__(self, method: Callable[..., Any], *, twice: bool = False) -> None:
        self.method = method
        self.twice = twice

    def __call__(self, *arguments: Any) -> _Results:
        trees = [argument for argument in arguments if isinstance(argument, dict)]
        variables = [leaf for tree in trees for leaf in tree.values() if leaf.requires_grad]
        value = self.method(*arguments)
        first = self._gradient(_sum(value), variables, create_graph=self.twice)
        second = None
        if self.twice and first is not None:
            # Where there is none, the preflight asks whether the algorithm needs it.
            with suppress(RuntimeError):
                second = self._gradient(_sum(first), variables)
        return _Results(value, first, second)

    def _gradient(
        self, total: Tensor | None, variables: list[Tensor], *, create_graph: bool = False
    ) -> list[Tensor | None] | None:
        if total is None or not variables:
            return None
        return list(
            torch.autograd.grad(total, variables, create_graph=create_graph, allow_unused=True)
        )


def _sum(value: Any) -> Tensor | None:
    """The sum of all tensors in `value` that have a graph."""
    tensors = [leaf for _, leaf in _walk(value) if isinstance(leaf, Tensor)]
    sums = [leaf.sum() for leaf in tensors if leaf.requires_grad]
    return torch.stack(sums).sum() if sums else None


# Random states


def _random_states() -> list[Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # only looked at
    return [torch.get_rng_state(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block the global generators start from `seed`; afterwards they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    # Not torch.manual_seed, which would also seed every GPU.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # that generator is the one to look at
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


# Tensors, and what holds them


def _walk(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """(path, tensor or module) for all that `value` holds, modules before what is in them."""
    seen = set() if seen is None else seen
    if isinstance(value, PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
        return
    children: Any
    if isinstance(value, nn.Module):
        yield path, value
        fields = dict(vars(value))
        children = []
        for part in ("_parameters", "_buffers", "_modules"):
            children += fields.pop(part).items()
        children += fields.items()
    elif isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        names = getattr(value, "_fields", range(len(value)))
        children = zip(names, value, strict=True)
    elif isinstance(value, OPAQUE) or not hasattr(value, "__dict__"):
        return
    else:
        children = vars(value).items()
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else str(name), seen)


PLAIN = (str, bytes, bool, int, float, complex, type(None))
OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor consists of."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _unwrapped(tensor: Tensor) -> Tensor:
    """What functional transforms have wrapped, which has the bytes."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _digest(tensor: Tensor) -> bytes:
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.device.type != "meta":
        for part in _parts(tensor):
            hasher.update(as_bytes(_unwrapped(part)).numpy())  # type: ignore[arg-type]
    return hasher.digest()


def _digests(value: Any) -> dict[str, bytes]:
    """A digest of every tensor that `value` holds, by its path."""
    return {path: _digest(leaf) for path, leaf in _walk(value) if isinstance(leaf, Tensor)}


def _same(first: Any, second: Any) -> bool:
    """Whether two results have the same structure and the same bytes."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (first.dtype, first.shape, first.layout) != (second.dtype, second.shape, second.layout):
            return False
        pairs = zip(_parts(first), _parts(second), strict=True)
        return all(same_bytes(_unwrapped(a), _unwrapped(b)) for a, b in pairs)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return list(first) == list(second) and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    # NaN is no fault here; other checks ask for finite values.
    return bool(first == second) or (first != first and second != second)


def _copied(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with trees of their own; tasks and batches, which may be large, are shared."""

    def copied(leaf: Tensor) -> Tensor:
        leaf = leaf.detach().clone()
        if not isinstance(function, _Differentiated) or not leaf.is_floating_point():
            return leaf
        # Not a leaf of the graph: torch refuses in-place changes of these in words of its own.
        return leaf.requires_grad_().clone()

    return tuple(
        tree_map(copied, argument) if isinstance(argument, dict) else argument
        for argument in arguments
    )


def _changed(before: tuple[Any, ...], after: tuple[Any, ...]) -> str | None:
    """The name of a tensor that differs between two lists of arguments."""
    for one, two in zip(before, after, strict=True):
        if not isinstance(one, dict):
            continue
        if list(one) != list(two):
            return "the names of a dictionary"
        for name, leaf in one.items():
            if not _same(leaf, two[name]):
                return repr(name)
    return None


# Who did it


def _layer_names(problem: Problem) -> dict[int, str]:
    """The names of all modules in `problem`, as their model has them, by identity."""
    names: dict[int, str] = {}
    roots: list[tuple[str, nn.Module]] = []
    for path, value in _walk(problem):
        if not isinstance(value, nn.Module):
            continue
        if roots and path.startswith(roots[-1][0] + "."):
            names[id(value)] = path.removeprefix(roots[-1][0] + ".")
        else:
            roots.append((path, value))
    return names


def told(problem: Problem, module: nn.Module) -> str:
    """A module in words, by its name in the model that the problem holds."""
    name = _layer_names(problem).get(id(module))
    kind = type(module).__name__
    return f"the model itself ({kind})" if name is None else f"layer {name!r} ({kind})"


def _passes(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    seed: int,
    note: Callable[[Any], Any],
) -> list[tuple[nn.Module, Any, Any]]:
    """(module, note of its inputs, note of its outputs) in the order in which modules return."""
    records: list[tuple[nn.Module, Any, Any]] = []
    waiting: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        waiting.append(note(args))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        records.append((module, waiting.pop(), note(output)))

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        with _seeded(seed):
            function(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _layer_that_differs(problem: Problem, call: _Call, seeds: tuple[int, int]) -> str | None:
    """The first layer whose outputs differ where its inputs do not."""

    def note(value: Any) -> dict[str, bytes]:
        return _digests(value)

    one, two = (
        _passes(call.function, _copied(call.function, call.arguments), seed, note) for seed in seeds
    )
    for (module, given, output), (_, given_again, output_again) in zip(one, two, strict=False):
        if given == given_again and output != output_again:
            return told(problem, module)
    return None


def _layer_that_writes(
    problem: Problem, function: Callable[..., Any], arguments: tuple[Any, ...], name: str, seed: int
) -> str:
    given = _copied(function, arguments)

    def note(_: Any) -> bool:
        return _changed(arguments, given) is not None

    try:
        records = _passes(function, given, seed, note)
    except RuntimeError:
        return ""
    for module, before, after in records:
        if after and not before:
            return f" by {told(problem, module)}"
    return ""


def _not_a_function(problem: Problem, name: str, call: _Call) -> Impure:
    again = []
    for _ in range(2):
        with _seeded(1):
            again.append(call.function(*_copied(call.function, call.arguments)))
    if _same(*again):
        layer = _layer_that_differs(problem, call, (1, 2))
        return Impure(
            f"{name} must give the same bytes whenever its arguments are the same, got others "
            f"with another global seed{f': {layer} draws random numbers' if layer else ''}. No "
            "inner loop could be replayed and no second derivative be right. Switch it off (a "
            "rate of 0, or .eval() on that layer), or draw in the sampler and pass the numbers "
            "with the data"
        )
    layer = _layer_that_differs(problem, call, (1, 1))
    return Impure(
        f"{name} must give the same bytes whenever its arguments are the same, got others at the "
        f"second call{f': {layer} does' if layer else ''}. It keeps something from call to call, "
        "or draws from a generator of its own. Freeze it (.eval() on that layer), or make what is "
        "kept a part of x or y"
    )


def _held(problem: Problem) -> dict[str, tuple[Tensor, bytes]]:
    """(tensor, digest) of all tensors that the problem holds, by path."""
    tensors = [(path, leaf) for path, leaf in _walk(problem) if isinstance(leaf, Tensor)]
    return {path: (leaf, _digest(leaf)) for path, leaf in tensors}


def _require_unchanged(
    problem: Problem,
    before: dict[str, tuple[Tensor, bytes]],
    after: dict[str, tuple[Tensor, bytes]],
) -> None:
    for path, (tensor, digest) in before.items():
        now, digest_now = after.get(path, (tensor, digest))
        if digest_now == digest:
            continue
        # torch's functional_call leaves parameters of its call in a module that has two names.
        if isinstance(tensor, nn.Parameter) and now is not tensor:
            continue
        owner, whose = "", f"its tensor {path!r}"
        for where, value in _walk(problem):
            is_owner = isinstance(value, nn.Module) and path.startswith(where + ".")
            if is_owner and len(where) > len(owner):
                owner = where
                whose = f"{path.removeprefix(where + '.')!r} of {told(problem, value)}"
        raise Impure(
            f"a problem must leave what it holds as it is, got {whose} changed by a call: each "
            "worker would hold another value, and no inner loop could be replayed. Freeze it "
            "(.eval() on that layer; metadist.models.with_task_batch_norm for batch norm), or "
            "make it a part of x or y"
        )


def _require_unchanged_task(
    before: dict[str, bytes], after: dict[str, bytes], calls: dict[str, _Call]
) -> None:
    changed = [path for path, digest in before.items() if after[path] != digest]
    if changed:
        by = [name for name, call in calls.items() if call.writes]
        raise _of_the_task(by[0] if by else "a method of the problem")


def _of_the_task(name: str) -> Impure:
    return Impure(
        f"{name} must leave its arguments as they are, got a tensor of the task changed in place: "
        "compute a new one instead"
    )
