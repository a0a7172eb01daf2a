"""Whether a problem is pure: equal arguments give equal bytes, and nothing that exists changes.

Found by behaviour: every method runs several times with other global seeds, and results,
arguments and all tensors and arrays that the problem holds are compared byte by byte.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

from metadist.autograd import AutogradOracle
from metadist.checks.contents import (
    agree,
    changed_argument,
    digest,
    digests,
    random_states,
    same,
    seeded,
    walk,
)
from metadist.compute import Compute
from metadist.copies import PLAIN, deep_copy, is_flat, originals_of, reachable
from metadist.problem import (
    HasModel,
    Problem,
    has_inner_map,
    is_constrained,
    is_nonsmooth,
    start_carried,
    with_carried,
)
from metadist.task import Task
from metadist.trees import Params, add, detach, gradients, leaves, norm, tree_map

REPEATED = 5
"""Further values of every method, for what happens at every other call, or every third, ..."""

RARE = 16
"""Seeds tried for a method that draws random numbers, or keeps some, yet gives the same bytes."""

SHARED = 1 << 20
"""Bytes of memory from which on a tensor is not copied with the problem that holds it."""

MANY = 300_000
"""Objects from which on the check takes more than some seconds."""

_pure: WeakValueDictionary[int, Problem] = WeakValueDictionary()
"""The problems that were found to be pure in this process, by identity."""

_untouched: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Copies of the others, made before they computed anything."""

_asked_alone: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The task on which a problem was found to be pure, where no other one was there."""


class Impure(ValueError):
    """A method of the problem is not a function of its arguments, or changes something."""


def is_known_pure(problem: Problem) -> bool:
    """Whether `check_pure` has passed this problem in this process."""
    return _pure.get(id(problem)) is problem


def check_each_pure(problem: Problem, outer: Params, tasks: list[Task], compute: Compute) -> None:
    """`check_pure` at the first call with a problem, and once more with the first other task."""
    if not is_known_pure(problem):
        other = next((task for task in tasks if _differ(task, tasks[0])), None)
        untouched = _untouched_of(problem)
        check_pure(problem, outer, tasks[0], compute, other)
        if other is None and untouched is not None:
            _untouched[problem], _asked_alone[problem] = untouched, tasks[0]
    elif problem in _asked_alone:
        first = _asked_alone[problem]
        other = next((task for task in tasks if _differ(task, first)), None)
        if other is not None:
            del _pure[id(problem)], _asked_alone[problem]
            check_pure(problem, outer, tasks[0], compute, other)


def _untouched_of(problem: Problem) -> Problem | None:
    """The copy of `problem`, made now where there is none."""
    remember(problem)
    return _untouched.get(problem)


def _differ(one: Task, two: Task) -> bool:
    """Whether two tasks are not the same."""
    return one is not two and not same(one, two)


def remember(problem: Problem) -> None:
    """Keep a copy of a problem that has not computed yet; call it before its first method."""
    if problem in _untouched or is_known_pure(problem):
        return
    with suppress(Exception):  # what cannot be copied is checked without
        _untouched[problem] = _copy(problem)


def _copy(problem: Problem) -> Problem:
    """A copy that shares what is large, and keeps nothing of what happens to `problem`.

    Raises:
        TypeError: Something within acts at its end: that of a copy may delete a folder of both.
    """
    memo: dict[int, Any] = {}
    functions = []
    for part in reachable(problem):
        if hasattr(type(part), "__del__"):
            raise TypeError(f"{type(part).__name__} must have no __del__ to be copied, got one")
        if isinstance(part, Tensor | np.ndarray) and _memory(part) > SHARED:
            memo[id(part)] = part
        elif isinstance(part, FunctionType) and part.__closure__:
            functions.append(part)
        elif is_flat(part):
            memo[id(part)] = copy.copy(part)
    return deep_copy(problem, memo, functions)


def _memory(leaf: Tensor | np.ndarray[Any, Any]) -> int:
    """Bytes that a copy takes: of a tensor those of its whole memory, also of a small view."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        with suppress(NotImplementedError, RuntimeError):  # some subclasses have none
            return leaf.untyped_storage().nbytes()
    return leaf.nbytes


def check_pure(
    problem: Problem, outer: Params, task: Task, compute: Compute, other: Task | None = None
) -> None:
    """Raise `Impure` if the methods of `problem` are not pure on `task`.

    Args:
        problem: The problem.
        outer: x without the algorithm's own variables. On the CPU, where equal sums have equal
            bytes, results are compared byte by byte, elsewhere up to rounding; computed with one
            thread, for the same reason.
        task: A task there.
        compute: The seed and the sizes of the draws that losses are computed on.
        other: Another task.

    Cost: up to fourteen values of every method, and two double backward passes of each loss.
    """
    remember(problem)
    alone = replace(compute, num_threads=1)
    with alone.applied(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        held, given = [_held(problem)], digests(task)
        if len(held[0].values) > MANY:
            warnings.warn(
                f"{type(problem).__name__} holds {len(held[0].values):,} objects, which take "
                "long to check and to send: keep them in tensors, arrays, or lists of plain values",
                RuntimeWarning,
                stacklevel=2,
            )
        passes = []
        for seed in (1, 2):
            calls = _calls(problem, outer, task, compute, seed)
            held.append(_held(problem))
            _require_unchanged(problem, *held[-2:])
            _require_unchanged_task(given, digests(task), calls)
            passes.append(calls)
        first, second = passes
        for name, call in first.items():
            if not agree(call.result, second[name].result):
                for before, after in pairwise(held):
                    _require_unchanged(problem, before, after, replaced=True)
                raise _not_a_function(problem, name, call)
        # The first pass may fill what is kept for later.
        kept = list(_other_values(held[1].values, held[2].values))
        replaced = any(any(_changed(before, after)) for before, after in pairwise(held))
        for name, call in first.items():
            if isinstance(call.function, _Differentiated) and _computes_again(call):
                _require_slope(name, call, call.function.method)
            for seed in range(3, 3 + REPEATED):
                if not agree(call.value, call.again(seed)):
                    raise _not_a_function(problem, name, call)
        for name in 2 * list(reversed(first)):  # after others, whose output it might read
            if not agree(first[name].value, first[name].again(1)):
                raise _not_a_function(problem, name, first[name])
        watched = [name for name, call in first.items() if call.draws or kept or replaced]
        for seed in range(3, RARE) if watched else ():
            others = _calls(problem, outer, task, compute, seed)
            for name in watched:
                if not agree(first[name].result, others[name].result):
                    raise _not_a_function(problem, name, first[name])
        _require_no_original(problem, held[-1].modules, first)
        if problem in _untouched:
            for asked in (task, task if other is None else other):  # twice, for what the first left
                _require_nothing_kept(problem, _untouched[problem], outer, asked, compute)
    if kept or any(call.draws for call in first.values()):
        drawing = (name for name, call in first.items() if call.draws)
        who, does = next(drawing, ""), "draws random numbers from a global generator"
        if kept:
            who, does = type(problem).__name__, f"keeps {kept[0]!r}, which every call changes"
        warnings.warn(
            f"{who} {does}; its results did not depend on that in {RARE - 1} calls. Where they "
            "can, no inner loop can be replayed: a problem must be a function of its arguments",
            RuntimeWarning,
            stacklevel=2,
        )
    _pure[id(problem)] = problem
    _untouched.pop(problem, None)


def _require_no_original(problem: Problem, held: list[nn.Module], calls: dict[str, _Call]) -> None:
    """Raise `Impure` if a model reads the weights of the one that it was copied from.

    Losses may, which distil from the model as it was: of a problem with a model its outputs count.
    """
    originals = {id(leaf): leaf for part in held for leaf in originals_of(part)}
    if not originals:
        return
    # x may be these weights, which are changed below.
    calls = {
        name: call._replace(arguments=_copied(call.function, call.arguments))
        for name, call in calls.items()
    }

    def values() -> list[Any]:
        found = [calls[name].again(1) for name in ("encode", "init_inner")]
        if not isinstance(problem, HasModel):
            return [*found, *(calls[name].again(1) for name in ("inner_loss", "outer_loss"))]
        context, inner, query = _copied(problem.predict, calls["outer_loss"].arguments)
        return [*found, problem.predict(context, inner, query)]

    with torch.no_grad():
        before = values()
        with _changed_weights(originals.values()):
            after = values()
    if not agree(before, after):
        raise Impure(
            "a model must compute with x and y, got outputs that follow the weights of the model "
            f"that {type(problem).__name__} was made of: a hook or a layer reads them by a global "
            "name or a weak reference. Let it read those of the module that it is given"
        )


@contextmanager
def _changed_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within the block they have other values, in other memory: theirs may be a read-only file."""
    # By .data: whoever has computed with them may go backward yet.
    kept = [(leaf, leaf.data) for leaf in weights]
    try:
        for leaf, own in kept:
            leaf.data = own * 2 + 1
        yield
    finally:
        for leaf, own in kept:
            leaf.data = own


def _require_nothing_kept(
    problem: Problem, untouched: Problem, outer: Params, task: Task, compute: Compute
) -> None:
    """Raise `Impure` if `problem` computes otherwise than a copy that has seen no other arguments.

    Args:
        problem: Has computed at `outer`.
        untouched: The copy.
        outer: x; both are asked beside it, and beside the start of y, where losses may not depend
            on what is kept.
        task: Of both.
        compute: As for `check_pure`.
    """
    generator = torch.Generator().manual_seed(0)
    x = tree_map(lambda leaf: _beside(leaf, 0.01, generator), outer)
    try:
        used = _calls(problem, x, task, compute, 1, at_start=False)
        new = _calls(_copy(untouched), x, task, compute, 1, at_start=False)
    except Impure:
        raise
    except Exception:  # noqa: BLE001  # beside x a problem may refuse to compute
        return
    for name, call in used.items():
        if agree(call.result, new[name].result):
            continue
        layer = None
        with suppress(Exception):  # the copy has not gone through the methods before this one
            alike = getattr(_copy(untouched), name)
            layer = _layer_that_differs(problem, call, ((call.function, 1), (alike, 1)))
        raise Impure(
            f"{name} must be a function of its arguments, got other bytes from a problem that has "
            f"computed on others before{_does(layer)}. It keeps something of its first call or its "
            "last, as a mean or a scale of the first data, so each worker would compute with "
            "another: compute that before, from data that you choose, or make it a part of x"
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

    @property
    def value(self) -> Any:
        """What the method itself returned, without derivatives."""
        return self.result.value if isinstance(self.result, _Results) else self.result

    def again(self, seed: int) -> Any:
        """What the method returns when it is called again from `seed`."""
        own = self.function.method if isinstance(self.function, _Differentiated) else self.function
        with seeded(seed):
            return own(*_copied(self.function, self.arguments))


def _calls(
    problem: Problem,
    outer: Params,
    task: Task,
    compute: Compute,
    seed: int,
    *,
    at_start: bool = True,
) -> dict[str, _Call]:
    """Every method by name, called once from `seed`.

    Not `at_start`: beside the start of y, for the values alone.
    """
    calls: dict[str, _Call] = {}
    tensors = [tensor for _, tensor in walk(task) if isinstance(tensor, Tensor)]

    def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        given = _copied(function, arguments)
        versions = [tensor._version for tensor in tensors]
        result = failure = None
        with seeded(seed):
            before = random_states()
            try:
                result = function(*given)
            except RuntimeError as error:  # of a backward pass, after a change in place
                failure = error
            draws = not same(before, random_states())
        writes = versions != [tensor._version for tensor in tensors]
        calls[name] = _Call(function, arguments, result, draws, writes)
        changed = changed_argument(arguments, given)
        if changed is not None:
            layer = _layer_that_writes(problem, function, arguments, changed, seed)
            raise Impure(
                f"{name} must leave its arguments as they are, got {changed} changed in place"
                f"{layer}: x would change where a gradient is computed and nowhere else. Compute "
                "a new tensor instead, and leave out options that write to weights, such as "
                "max_norm of an embedding"
            )
        if failure is not None:
            if not writes:
                calls[name].again(seed)  # where the method itself fails, it says why
                raise _not_differentiable(name, calls[name], failure) from failure
            raise _of_the_task(name) from failure
        return result

    once, twice = (partial(_Differentiated, order=order if at_start else 0) for order in (1, 2))
    context = detach(call("encode", once(problem.encode), outer, task).value)
    start = detach(call("init_inner", once(problem.init_inner), outer, task).value)
    carried = detach(call("init_carried", start_carried, problem, outer, task))
    context = with_carried(context, carried)
    if not at_start:
        generator = torch.Generator().manual_seed(1)
        start = tree_map(lambda leaf: _beside(leaf, 0.01, generator), start)
    oracle = AutogradOracle(problem, task, compute.batch_sizes, compute.seed)
    support, query = oracle.batch(oracle.draw_inner()), oracle.batch(oracle.draw_outer())
    call("inner_loss", twice(problem.inner_loss), context, start, support)
    call("outer_loss", twice(problem.outer_loss), context, start, query)
    call("metrics", problem.metrics, context, start, query)
    if has_inner_map(problem):
        call("inner_map", twice(problem.inner_map), context, start, support)
    if carried:
        call("carry", problem.carry, outer, start, task, carried)
    if is_nonsmooth(problem):
        call("nonsmooth_loss", problem.nonsmooth_loss, context, start)
        call("prox_inner", problem.prox_inner, context, start, 0.1)
    if is_constrained(problem):
        call("project_outer", problem.project_outer, outer)
    return calls


CHECKPOINTS = (
    "torch.utils.checkpoint computes again in the backward pass, when the parameters of the call "
    "are gone from the model: leave it out, an algorithm decides itself what it keeps"
)


def _not_differentiable(name: str, call: _Call, error: RuntimeError) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    if _computes_again(call):
        reason += f". {CHECKPOINTS}"
    return ValueError(f"{name} must be differentiable, got {type(error).__name__}: {reason}")


def _computes_again(call: _Call) -> bool:
    """Whether something of the forward pass is left to the backward pass."""
    try:
        with disable_saved_tensors_hooks(CHECKPOINTS):
            call.again(1)
    except RuntimeError as error:
        return CHECKPOINTS in str(error)
    return False


def _require_slope(name: str, call: _Call, method: Callable[..., Any]) -> None:
    """Raise `Impure` if the gradient is not the slope of the value beside the arguments.

    At the arguments themselves, which are often the model's own parameters, it may be.
    """
    generator = torch.Generator().manual_seed(0)

    def value(trees: list[Params]) -> Tensor:
        given = iter(trees)
        arguments = (next(given) if isinstance(it, dict) else it for it in call.arguments)
        found = _sum(method(*arguments))
        return torch.zeros(()) if found is None else found

    def beside(leaf: Tensor) -> Tensor:
        return _beside(leaf, 1, generator)

    at = [leaves(tree_map(beside, tree)) for tree in call.arguments if isinstance(tree, dict)]
    total = value(at)
    slopes = gradients([total], [None], *at)
    slope = norm({str(index): norm(tree) for index, tree in enumerate(slopes)})
    step = 1e-2 * (total.abs() / slope).clamp(max=1) / slope
    above, below = (
        value([add(tree, along, sign * step) for tree, along in zip(at, slopes, strict=True)])
        for sign in (1, -1)
    )
    rise, expected = above - below, 2 * step * slope.square()
    rounding = 100 * torch.finfo(total.dtype).eps * total.abs()
    if (rise - expected).abs() > 0.05 * expected + rounding:
        raise Impure(f"{name} must have the derivative of its value, got another: {CHECKPOINTS}")


def _beside(leaf: Tensor, far: float, generator: torch.Generator) -> Tensor:
    """`leaf` with noise, `far` times as large as its numbers."""
    if not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=generator).to(leaf)
    return leaf + far * noise * (leaf.square().mean().sqrt() + 0.1)


class _Results(NamedTuple):
    """A value and its derivatives; None where there is none."""

    value: Any
    first: list[Tensor | None] | None
    second: list[Tensor | None] | None


class _Differentiated:
    """A method together with its gradient, and of order 2 with a Hessian-vector product."""

    def __init__(self, method: Callable[..., Any], order: int) -> None:
        self.method = method
        self.order = order

    def __call__(self, *arguments: Any) -> _Results:
        trees = [argument for argument in arguments if isinstance(argument, dict)]
        variables = [leaf for tree in trees for leaf in tree.values() if leaf.requires_grad]
        value = self.method(*arguments)
        first = second = None
        if self.order:
            first = self._gradient(_sum(value), variables, create_graph=self.order > 1)
        if self.order > 1 and first is not None:
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
    tensors = [leaf for _, leaf in walk(value) if isinstance(leaf, Tensor)]
    sums = [leaf.sum() for leaf in tensors if leaf.requires_grad]
    return torch.stack(sums).sum() if sums else None


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


# Who did it


def _layer_names(problem: Problem) -> dict[int, str]:
    """The names of all modules in `problem`, as their model has them, by identity."""
    names: dict[int, str] = {}
    roots: list[tuple[str, nn.Module]] = []
    for path, value in walk(problem):
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
        with seeded(seed):
            function(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _layer_that_differs(
    problem: Problem, call: _Call, ways: Iterable[tuple[Callable[..., Any], int]]
) -> str | None:
    """The first layer whose outputs differ where its inputs do not.

    Args:
        problem: The problem.
        call: A call.
        ways: Two methods to call with its arguments, and the seed of each.
    """

    def note(value: Any) -> dict[str, bytes]:
        return digests(value)

    one, two = (
        _passes(function, _copied(call.function, call.arguments), seed, note)
        for function, seed in ways
    )
    for (module, given, output), (_, given_again, output_again) in zip(one, two, strict=False):
        if given == given_again and output != output_again:
            return told(problem, module)
    return None


def _does(layer: str | None) -> str:
    return f": {layer} does" if layer else ""


def _layer_that_writes(
    problem: Problem, function: Callable[..., Any], arguments: tuple[Any, ...], name: str, seed: int
) -> str:
    given = _copied(function, arguments)

    def note(_: Any) -> bool:
        return changed_argument(arguments, given) is not None

    try:
        records = _passes(function, given, seed, note)
    except RuntimeError:
        return ""
    for module, before, after in records:
        if after and not before:
            return f" by {told(problem, module)}"
    return ""


def _not_a_function(problem: Problem, name: str, call: _Call) -> Impure:
    rule = f"{name} must give the same bytes whenever its arguments are the same, got others "
    if call.draws and agree(call.again(1), call.again(1)):
        layer = _layer_that_differs(problem, call, ((call.function, seed) for seed in (1, 2)))
        return Impure(
            f"{rule}with another global seed{f': {layer} draws random numbers' if layer else ''}. "
            "No inner loop could be replayed and no second derivative be right. Switch it off (a "
            "rate of 0, or .eval() on that layer), or draw in the sampler and pass the numbers "
            "with the data"
        )
    twice = [(call.function, 1)] * 2
    layers = (_layer_that_differs(problem, call, twice) for _ in range(REPEATED))
    layer = next(filter(None, layers), None)
    return Impure(
        f"{rule}at a later call{_does(layer)}. It keeps something from call "
        "to call, or draws from a generator of its own. Freeze it (.eval() on that layer), or make "
        "what is kept a part of x or y"
    )


class _Held(NamedTuple):
    """What a problem holds, by path.

    Args:
        tensors: (tensor or array, digest).
        values: Numbers, texts and counters; those of one container together, by their place in it.
        modules: Modules, in no order.
    """

    tensors: dict[str, tuple[Any, bytes]]
    values: dict[str, dict[Any, Any]]
    modules: list[nn.Module]


def _held(problem: Problem) -> _Held:
    found = _Held({}, {}, [])
    for path, leaf in walk(problem):
        if isinstance(leaf, PLAIN):
            found.values[path] = {"": leaf}
        elif isinstance(leaf, count):
            found.values[path] = {"": repr(leaf)}
        elif isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.flags.writeable):
            found.tensors[path] = leaf, digest(leaf)
        elif issubclass(type(leaf), nn.Module):  # a weakref.proxy is one by isinstance
            found.modules.append(leaf)
        elif is_flat(leaf):
            found.values[path] = dict(leaf) if type(leaf) is dict else dict(enumerate(leaf))
    return found


def _other_values(
    before: dict[str, dict[Any, Any]], after: dict[str, dict[Any, Any]]
) -> Iterator[str]:
    """The paths of values that are others than they were; not of those that are new."""
    for path, values in after.items():
        known = before.get(path, values)
        if known != values:
            for name, value in values.items():
                if repr(known.get(name, value)) != repr(value):
                    yield f"{path}.{name}".removesuffix(".")


def _changed(before: _Held, after: _Held) -> Iterator[tuple[str, Any, bool]]:
    """(path, tensor, whether another one is there now) of what no longer has the same bytes."""
    for path, (tensor, digest_before) in before.tensors.items():
        now, digest_now = after.tensors.get(path, (tensor, digest_before))
        # torch's functional_call leaves parameters of its call in a module that has two names.
        left = isinstance(tensor, nn.Parameter) and now is not tensor
        if digest_now != digest_before and not left:
            yield path, tensor, now is not tensor


def _require_unchanged(
    problem: Problem, before: _Held, after: _Held, *, replaced: bool = False
) -> None:
    """Raise `Impure` if something held was written to.

    What another tensor has replaced, as a layer's output that a hook keeps, only where `replaced`:
    it does no harm unless a method reads it before it replaces it, which results show.
    """
    for path, tensor, is_new in _changed(before, after):
        if is_new and not replaced:
            continue
        kind = "tensor" if isinstance(tensor, Tensor) else "array"
        owner, whose = "", f"its {kind} {path!r}"
        for where, value in walk(problem):
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
